"""Weights for an encoder: torchvision's pretrained ones, a file, or random ones. Nothing falls back silently."""

from __future__ import annotations

import hashlib
import pickle
import threading
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torchvision.models import ResNet18_Weights, WeightsEnum
from torchvision.models.video import R3D_18_Weights

#: Names of pretrained weights by model.
PRETRAINED: dict[str, dict[str, WeightsEnum]] = {
    "resnet18": {"imagenet": ResNet18_Weights.IMAGENET1K_V1},
    "r3d_18": {"kinetics": R3D_18_Weights.KINETICS400_V1},
}

_REACH_SECONDS = 8.0  # no network is found out within this time, whatever the name server does


class WeightsUnavailableError(RuntimeError):
    """Weights that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """Weights and where they come from.

    Attributes
    ----------
    name
        ``imagenet``, ``kinetics``, ``random (seed 0)`` or the file's name.
    sha256
        Of the file; of the parameters' bytes if random.
    state_dict
        None for random weights, which are the model's own initialisation.
    mean, std
        Of the red, green and blue inputs in [0, 1] that the weights expect.
    """

    name: str
    sha256: str
    state_dict: dict[str, Any] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_weights(model: str, weights: str) -> Weights:
    """Get the weights that a user asked for.

    Parameters
    ----------
    model
        ``resnet18`` or ``r3d_18``.
    weights
        ``imagenet`` (resnet18), ``kinetics`` (r3d_18), ``random``, or the path of a state dict saved by torch.

    Raises
    ------
    WeightsUnavailableError
        If they cannot be downloaded, the file is absent, or it holds no state dict.
    """
    known = PRETRAINED[model]
    mean, std = _normalisation(next(iter(known.values())))
    if weights == "random":
        return Weights("random", "", None, mean, std)
    if weights in known:
        return _pretrained(model, weights, known[weights])
    path = Path(weights)
    if not path.is_file():
        choices = ", ".join([*known, "random"])
        raise WeightsUnavailableError(f"no weights {weights!r} for {model}: expected {choices}, or the path of a file")
    return Weights(path.name, _sha256(path), _read_state_dict(path), mean, std)


def _normalisation(entry: WeightsEnum) -> tuple[tuple[float, ...], tuple[float, ...]]:
    transforms = entry.transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _pretrained(model: str, name: str, entry: WeightsEnum) -> Weights:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / Path(urlparse(entry.url).path).name
    if not file.is_file():
        problem = _why_unreachable(entry.url)
        if problem:
            raise WeightsUnavailableError(
                f"{name} weights of {model} cannot be downloaded ({problem}); put {file.name} into {cache}, "
                "or use --weights FILE or --weights random"
            )
    try:
        state_dict = entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsUnavailableError(
            f"{name} weights of {model} cannot be loaded ({_first_line(error)}); delete {file} and try again"
        ) from error
    return Weights(name, _sha256(file), dict(state_dict), *_normalisation(entry))


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


def _read_state_dict(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():  # about pickles of other versions: what cannot be loaded is an error anyhow
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsUnavailableError(
            f"{path} is no state dict that is safe to load: {_first_line(error)}; "
            "save one with torch.save(model.state_dict(), FILE)"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise WeightsUnavailableError(f"{path} holds {type(content).__name__}, expected a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
