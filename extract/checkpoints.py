"""Files of weights: a plain state dict, or a checkpoint of a network that was fine-tuned. No code in them is run."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from extract.errors import WeightsUnavailableError
from extract.models import MODELS, family_of, parameter_shapes
from extract.trained import Trained, read_trained

#: ``format`` of a checkpoint of ours.
FORMAT = "brain-volumes-checkpoint"
#: In the folder of a run of finetune: its checkpoints with the best weights, and with the last ones.
BEST, LAST = "best.pt", "last.pt"
#: Attribute of a plain state dict that `finetune.export` wrote: what else a checkpoint says.
NOTE = "brain_volumes"

#: End of the names of whole numbers that batch norms count; who halves all of a network makes fractions of them.
_COUNT = "num_batches_tracked"

#: What training puts before the names of a network's parameters.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
#: ... and that stands beside other parts, such as a head, which are left out.
_PARTS = ("encoder.", "backbone.")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes
    ----------
    file
        Its name, for messages.
    sha256
        Of the file.
    state_dict
        Tensors by name, of the network alone where the file has it as ``encoder`` or ``backbone``.
    model
        Which network it says it is, if it does.
    mean, std
        By which it says that its three inputs, in [0, 1], are normalised, if it does.
    trained
        What it says of the run of finetune that it is from, if it does.
    """

    file: str
    sha256: str
    state_dict: dict[str, torch.Tensor]
    model: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trained: Trained | None = None

    @property
    def name(self) -> str:
        """The file's, and which epoch of a run its weights are of."""
        known = self.trained is not None and self.trained.epoch is not None
        return f"{self.file} (epoch {self.trained.epoch})" if self.trained and known else self.file


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file of weights that ``torch.save`` wrote, or the best ones in the folder of a run of finetune.

    It holds one of

    * a state dict;
    * a dict with a state dict as ``state_dict``;
    * a checkpoint of ours, a dict with ``format`` "brain-volumes-checkpoint"; ``model``, a dict with the model's
      ``name``; ``state_dict``; and, where its input is normalised in a way of its own, ``mean`` and ``std``, three
      numbers each. Those of runs of finetune have in ``model``, too, what the network saw, see
      `extract.trained.read_trained`;
    * a state dict with an attribute ``brain_volumes``, which is such a checkpoint without ``state_dict``.

    Raises
    ------
    WeightsUnavailableError
        If the file is something else, is damaged, or asks for code to be run.
    """
    path = os.fspath(path)
    content, sha256 = load_content(path)
    return _interpret(content, path, sha256)


def load_content(path: str) -> tuple[object, str]:
    """Return what a file that ``torch.save`` wrote holds, and its sha256; of the folder of a run its best weights.

    Raises
    ------
    WeightsUnavailableError
        If the file is something else, is damaged, or asks for code to be run.
    """
    if os.path.isdir(path):
        best = os.path.join(path, BEST)
        if not os.path.isfile(best):
            raise WeightsUnavailableError(
                f"{path} is a folder without {BEST}, expected that of a finetune run, or a file of weights; "
                "--weights-dir takes folders of torchvision's files"
            )
        path = best
    if not os.path.isfile(path):
        raise WeightsUnavailableError(f"{path} is no file, expected weights saved by torch.save")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return _load(file, path), sha256
    except OSError as error:
        raise WeightsUnavailableError(f"{path} cannot be read: {error.strerror or error}") from None


def _load(file: IO[bytes], path: str) -> object:
    file.seek(0)
    start = file.read(256).lstrip()
    file.seek(0)
    if not start:
        raise WeightsUnavailableError(f"{path} is empty; copy or download it again")
    if start.startswith(b"<"):
        raise WeightsUnavailableError(f"{path} is a web page, not weights; download the file that it leads to")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsUnavailableError(f"{path} is a pointer of Git LFS, not weights; run: git lfs pull")
    _check_bytes(file, path)
    try:
        with warnings.catch_warnings():  # about pickles of other versions: what cannot be loaded is an error anyhow
            warnings.simplefilter("ignore")
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage makes the unpickler fail in any way
        raise WeightsUnavailableError(
            f"{path} is no state dict that is safe to load: {_reason(error)}; "
            "save one with torch.save(model.state_dict(), FILE)"
        ) from None
    return content


def _check_bytes(file: IO[bytes], path: str) -> None:
    """Compare what a file holds with its checksums, which torch does not look at: damaged numbers are numbers, too."""
    if not zipfile.is_zipfile(file):  # written by torch before 1.6, or no weights at all
        file.seek(0)
        return
    try:
        with zipfile.ZipFile(file) as archive:
            known = any(record.CRC for record in archive.infolist())  # torch may be told to write none
            damaged = archive.testzip() if known else None
    except OSError:
        raise
    except Exception:  # damage makes the reader fail in any way
        damaged = "its table of contents"
    file.seek(0)
    if damaged is not None:
        raise WeightsUnavailableError(
            f"{path} is damaged: the bytes of {damaged} in it are not those that were written; copy or download it "
            "again"
        )


def _reason(error: Exception) -> str:
    """Return in one line why a file was not loaded, without torch's advice to load it all the same."""
    text = str(error)
    asked_for = re.search(r"GLOBAL ([\w.]+)", text)
    if asked_for:
        return f"it asks for {asked_for.group(1)}, which may run any code"
    if "TorchScript" in text:
        return "it is a TorchScript archive"
    return "it is damaged, incomplete, or was not written by torch.save"


def _interpret(content: object, path: str, sha256: str) -> Checkpoint:
    path = os.path.abspath(os.path.join(path, BEST) if os.path.isdir(path) else path)
    file = os.path.basename(path)
    note = getattr(content, NOTE, None)
    if isinstance(note, Mapping):
        content = {**note, "state_dict": content}
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        if file in (BEST, LAST):  # as every run calls them
            file = os.path.join(os.path.basename(os.path.dirname(path)), file)
        model = content.get("model")
        name = model.get("name") if isinstance(model, Mapping) else None
        if not isinstance(name, str) or name not in MODELS:
            raise WeightsUnavailableError(f"{file} is a checkpoint of the model {name!r}, which is unknown here")
        mean, std = _normalisation(content, file)
        try:
            trained = read_trained(name, content)
        except ValueError as error:
            raise WeightsUnavailableError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from None
        return Checkpoint(file, sha256, _tensors(content.get("state_dict"), file), name, mean, std, trained)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return Checkpoint(file, sha256, _tensors(content, file))


def _normalisation(content: Mapping[str, Any], file: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return ``mean`` and ``std`` of a checkpoint, both or none."""
    if content.get("mean") is None and content.get("std") is None:
        return None, None
    mean, std = (_three_numbers(content.get(name), name, file) for name in ("mean", "std"))
    if min(std) <= 0:
        raise WeightsUnavailableError(f"{file} has {std} as std of its input, expected numbers above 0")
    return mean, std


def _three_numbers(values: object, name: str, file: str) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values if isinstance(v, int | float)) if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise WeightsUnavailableError(f"{file} has {str(values)[:60]} as {name} of its input, expected three numbers")
    return numbers


def _tensors(content: object, file: str) -> dict[str, torch.Tensor]:
    """Check that something is a state dict, and take what training put around the names away."""
    if not isinstance(content, Mapping) or not content:
        what = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
        raise WeightsUnavailableError(f"{file} holds {what}, expected a state dict of tensors")
    tensors: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsUnavailableError(
                f"{file} holds {type(value).__name__} as {str(key)[:60]!r}, expected a state dict of tensors"
            )
        name, is_part = _bare(key)
        group = tensors if is_part else beside
        if name in group:
            raise WeightsUnavailableError(f"{file} has {name} more than once: it holds several networks")
        group[name] = value
    return tensors or beside


def _bare(key: str) -> tuple[str, bool]:
    """Return a name without prefixes, and whether one of them says that it is of a part of the whole."""
    is_part = False
    while True:
        prefix = next((prefix for prefix in (*_WRAPPERS, *_PARTS) if key.startswith(prefix)), None)
        if prefix is None:
            return key, is_part
        key, is_part = key.removeprefix(prefix), is_part or prefix in _PARTS


def parameters_for(checkpoint: Checkpoint, model: str) -> dict[str, torch.Tensor]:
    """Return the parameters and statistics of a model that a file holds; its classifier is left out.

    Whole numbers are left out, too: they count batches, or follow from the model.

    Raises
    ------
    WeightsUnavailableError
        If it is another network, which is named if it is known, or has numbers that are not finite.
    """
    file = checkpoint.file
    if checkpoint.model is not None and checkpoint.model != model:
        raise WeightsUnavailableError(
            f"{file} does not fit {model}: it is a checkpoint of {checkpoint.model}; use --model {checkpoint.model}"
        )
    problems = _misfits(checkpoint.state_dict, model)
    if problems:
        fitting = [name for name in MODELS if not _misfits(checkpoint.state_dict, name)]
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        why = f"it is {fitting[0]}; use --model {fitting[0]}" if fitting else problems[0] + more
        raise WeightsUnavailableError(f"{file} does not fit {model}: {why}")
    wanted = {name: checkpoint.state_dict[name] for name in parameter_shapes(model)}
    for name, value in wanted.items():
        if not torch.isfinite(value.float()).all():
            raise WeightsUnavailableError(f"{file} has numbers in {name} that are not finite")
    return wanted


def _misfits(state_dict: Mapping[str, torch.Tensor], model: str) -> list[str]:
    """Return in words what keeps a state dict from being of a model."""
    expected = parameter_shapes(model)
    classifier = f"{family_of(model).classifier}."
    problems = []
    for name, shape in expected.items():
        value = state_dict.get(name)
        if value is None:
            problems.append(f"it has no {name}")
        elif not value.is_floating_point() or value.layout is not torch.strided or value.device.type != "cpu":
            problems.append(f"its {name} is {value.dtype}, {value.layout} on {value.device}, expected plain numbers")
        elif tuple(value.shape) != shape:
            problems.append(f"its {name} is {_product(value.shape)}, expected {_product(shape)}")
    others = [
        name
        for name, value in state_dict.items()
        if name not in expected
        and not name.startswith(classifier)
        and not name.endswith(_COUNT)
        and value.is_floating_point()
    ]
    return problems + [f"its {name[:80]} is unknown" for name in others]


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
