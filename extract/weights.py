"""Weights for an encoder: torchvision's pretrained ones, a file, or random ones. Nothing falls back silently."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn
from torchvision.models import WeightsEnum

from extract.checkpoints import Checkpoint, parameters_for, read_checkpoint
from extract.errors import WeightsUnavailableError
from extract.models import FAMILIES, default_weights, family_of
from extract.trained import Trained, other_store, same_store
from ingest.store import VolumeStore

_REACH_SECONDS = 8.0  # no network is found out within this time, whatever the name server does


@dataclass(frozen=True)
class Weights:
    """Weights and where they come from.

    Attributes
    ----------
    name
        ``imagenet``, ``kinetics``, ``random (seed 0)``, the file's name, or those of a run and a file in it, with the
        epoch: ``sex/best.pt (epoch 12)``.
    sha256
        Of the file; of the parameters' bytes if random.
    state_dict
        The model's parameters without its classifier; None for random weights, which are its own initialisation, and
        once a network has them.
    mean, std
        Of the red, green and blue inputs in [0, 1] that the weights expect.
    entry
        Which weights of torchvision, for instance ``ResNet18_Weights.IMAGENET1K_V1``; None for others.
    trained
        What a run of finetune says of the weights, if they are of one.
    """

    name: str
    sha256: str
    state_dict: dict[str, torch.Tensor] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    entry: str | None = None
    trained: Trained | None = None


def find_checkpoint(weights: str | None) -> Checkpoint | None:
    """Read the file, or the folder of a run, that a user gave as weights; None for weights that have a name.

    Raises
    ------
    WeightsUnavailableError
        See `extract.checkpoints.read_checkpoint`.
    """
    names = {"random", *(family.pretrained for family in FAMILIES.values())}
    return None if weights is None or weights in names or not os.path.exists(weights) else read_checkpoint(weights)


def load_weights(
    model: str, weights: str | Checkpoint | None = None, weights_dir: str | os.PathLike[str] | None = None
) -> Weights:
    """Get the weights that a user asked for.

    Parameters
    ----------
    model
        See `extract.models`.
    weights
        ``imagenet`` (2D models), ``kinetics`` (3D models), ``random``, or the path of a file or of the folder of a
        run, see `extract.checkpoints.read_checkpoint`, or what that gave; by default the pretrained ones. Those are
        torchvision's default for the model, taken from its cache, or downloaded into that.
    weights_dir
        A folder that holds torchvision's files by their own names, instead of its cache; nothing is downloaded, and
        the files are checked by the digits in their names.

    Raises
    ------
    ValueError
        For an unknown model, or a folder for weights that are not torchvision's.
    WeightsUnavailableError
        If they cannot be downloaded, the file is absent, or it does not hold weights of the model.
    """
    pretrained = family_of(model).pretrained
    entry = default_weights(model)
    weights = pretrained if weights is None else weights
    if weights == pretrained:
        file = _in_cache(model, entry) if weights_dir is None else _in_folder(model, entry, Path(weights_dir))
        try:
            checkpoint = read_checkpoint(file)
            parameters = parameters_for(checkpoint, model)
        except WeightsUnavailableError as error:
            raise WeightsUnavailableError(
                f"{weights} weights of {model} cannot be loaded ({error}); delete {file} and try again"
            ) from None
        return Weights(weights, checkpoint.sha256, parameters, *_normalisation(entry), str(entry))
    if weights_dir is not None:
        given = weights.file if isinstance(weights, Checkpoint) else weights
        raise ValueError(f"weights_dir holds {pretrained} weights, but weights is {given!r}; leave one of them out")
    if weights == "random":
        return Weights("random", "", None, *_normalisation(entry))
    if not isinstance(weights, Checkpoint):
        if not os.path.exists(weights):
            raise WeightsUnavailableError(
                f"no weights {weights!r} for {model}: expected {pretrained}, random, or the path of a file or a run"
            )
        weights = read_checkpoint(weights)
    mean, std = _normalisation(entry)
    return Weights(
        weights.name, weights.sha256, parameters_for(weights, model), weights.mean or mean, weights.std or std,
        trained=weights.trained,
    )  # fmt: skip


def about_store(weights: Weights, volumes: VolumeStore) -> list[str]:
    """Return what is to be told, a line each, of features that weights of a run make of the scans of a store."""
    if weights.trained is None:
        return []
    lines = other_store(weights.trained.attrs, volumes)
    if same_store(weights.trained.attrs, volumes):
        lines.append(
            f"{weights.name} was trained on people of this store, whose features look better than others' would; "
            "split.csv of the run tells who they are: test on those whom it has not seen"
        )
    return lines


def sha256_of_parameters(network: nn.Module) -> str:
    """Return the digest of the bytes of a network's parameters and statistics, with their names."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _normalisation(entry: WeightsEnum) -> tuple[tuple[float, ...], tuple[float, ...]]:
    transforms = entry.transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _file_name(entry: WeightsEnum) -> str:
    return Path(urlparse(entry.url).path).name


def _in_cache(model: str, entry: WeightsEnum) -> Path:
    """Return torchvision's file in its cache, into which it is downloaded if need be."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / _file_name(entry)
    if file.is_file():
        return file
    problem = _why_unreachable(entry.url)
    if problem is None:
        digits = _digits(file.name)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry.url, str(file), hash_prefix=digits, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another file came
            problem = (str(error) or type(error).__name__).splitlines()[0]
    if problem is not None:
        name = family_of(model).pretrained
        raise WeightsUnavailableError(
            f"{name} weights of {model} cannot be downloaded ({problem}); put {file.name} into {cache}, "
            "or use --weights-dir, --weights FILE or --weights random"
        )
    return file


def _in_folder(model: str, entry: WeightsEnum, folder: Path) -> Path:
    """Return torchvision's file in a folder, after checking its digest."""
    if not folder.is_dir():
        raise WeightsUnavailableError(f"weights_dir is {folder}, which is no folder")
    file = folder / _file_name(entry)
    if not file.is_file():
        raise WeightsUnavailableError(
            f"{folder} has no {file.name}, the {family_of(model).pretrained} weights of {model}; "
            f"download it from {entry.url}"
        )
    digits = _digits(file.name)
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if digits and not found.startswith(digits):
        raise WeightsUnavailableError(
            f"{file} is not torchvision's file: its sha256 begins with {found[: len(digits)]}, expected {digits}; "
            "copy it again, or give a file of your own as --weights FILE"
        )
    return file


def _digits(name: str) -> str | None:
    """Return the start of a sha256 that torchvision puts into the names of its files."""
    found = re.search(r"-([0-9a-f]{8,})\.", name)
    return found.group(1) if found else None


def _why_unreachable(url: str) -> str | None:
    """Return why an address cannot be reached, or None if it can; a thread, for name look-ups have no time-out."""
    answer = [f"no answer within {_REACH_SECONDS:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_SECONDS):
                answer[0] = ""
        except urllib.error.URLError as error:
            answer[0] = str(error.reason)
        except OSError as error:
            answer[0] = str(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_REACH_SECONDS)
    return answer[0] or None
