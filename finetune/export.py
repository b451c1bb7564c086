"""A network for elsewhere: its encoder in torchvision's names, or all of it as a program that needs torch alone."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extract.checkpoints import FORMAT, NOTE
from extract.errors import WeightsUnavailableError
from finetune.build import check_volumes
from finetune.checkpoints import LoadedRun, checkpoint_of, load_run
from finetune.heads import Head
from finetune.network import ScanNetwork
from finetune.predict import unfinished
from ingest.errors import StoreError
from ingest.grid import Grid
from ingest.store import package_versions
from ingest.writing import check_writable, write_whole

#: In the archive of a program, what goes in and what comes out.
DESCRIPTION = "brain-volumes.json"


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes
    ----------
    path
        Of it.
    description
        What it holds: of a program what is beside it as ``brain-volumes.json``, of weights their attribute
        ``brain_volumes``.
    warnings
        What is to be known of it.
    """

    path: Path
    description: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def in_words(self) -> str:
        """Return in one line what it is."""
        if self.path.suffix == ".pt":
            name, seen = self.description["model"]["name"], self.description
            mean, std = (", ".join(f"{value:.4g}" for value in seen[key]) for key in ("mean", "std"))
            return f"{self.path}: weights of {name} by torchvision's names; input / 255, minus {mean}, over {std}"
        shape = " x ".join(map(str, self.description["input"]["shape"]))
        outputs = ", ".join(self.description["outputs"])
        return f"{self.path}: program of torch.export, uint8 {shape} -> {outputs}"


def export_run(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Exported:
    """Write the network of a run for use elsewhere.

    Parameters
    ----------
    run
        Folder of a run, of which the best weights are taken, or a checkpoint.
    out
        What it becomes follows from its ending; it appears whole.

        ``.pt``: the parameters of the encoder by torchvision's names, an `OrderedDict` for ``load_state_dict`` of the
        model, without its classifier. Its attribute ``brain_volumes`` says which ``model`` it is, by which ``mean`` and
        ``std`` the three equal channels in [0, 1] are normalised, and what the network saw, by which ``extract
        --weights`` takes it.

        ``.pt2``: a program of `torch.export`, see `ScanProgram`. `description_of` it is JSON in the same archive,
        ``brain-volumes.json`` of ``extra_files``.
    overwrite
        Replace `out`.

    Returns
    -------
    Exported

    Raises
    ------
    WeightsUnavailableError
        If there is no network.
    StoreError
        If `out` exists, has another ending, or cannot be written.
    """
    run, out = Path(run), Path(out)
    if out.suffix not in _WRITERS:
        raise StoreError(
            f"{out.name} ends in {out.suffix!r}, expected .pt (weights of the encoder) or .pt2 (torch.export)"
        )
    if out.exists() and not overwrite:
        raise StoreError(f"{out} exists; add --overwrite to replace it, or choose another name")
    check_writable(out)
    loaded = load_run(run)
    try:
        _grid(loaded)
    except (LookupError, TypeError, ValueError):
        raise WeightsUnavailableError(f"{run} does not say of which grid the volumes were that it saw") from None
    return Exported(out, _WRITERS[out.suffix](loaded, out), tuple(unfinished(run, loaded)))


class ScanProgram(nn.Module):
    """Stored volumes in, predictions out, each by the name of its target.

    Parameters
    ----------
    network
        In evaluation mode.
    """

    def __init__(self, network: ScanNetwork) -> None:
        super().__init__()
        self.network = network
        self.predictors = nn.ModuleList(_Prediction(head) for head in network.heads_info)

    def forward(self, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what `finetune.heads.Head.predict` makes of the outputs.

        Parameters
        ----------
        volumes
            uint8 (scan, z, y, x), as stored.

        Returns
        -------
        dict
            float64 (scan, class) probabilities; else (scan,) values in the target's units, of an ordinal target the
            expected one.
        """
        features = self.network.features(volumes).float()
        return {
            head.name: predict(outputs(features))
            for head, outputs, predict in zip(
                self.network.heads_info, self.network.heads, self.predictors, strict=True
            )
        }  # fmt: skip


class _Prediction(nn.Module):
    """Outputs of a head, (scan, output), to predictions, as `finetune.heads.Head.predict` makes them with numpy."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.task, self.mean, self.std, self.lowest = head.task, head.mean, head.std, (head.levels or (0.0,))[0]
        self.steps: torch.Tensor
        self.register_buffer("steps", torch.tensor(head.levels or (0.0,), dtype=torch.float64).diff())

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        x = outputs.double()
        if self.task == "binary":
            positive = torch.sigmoid(x)
            return torch.cat([1 - positive, positive], dim=1)
        if self.task == "multiclass":
            return torch.softmax(x, dim=1)
        if self.task == "ordinal":
            return self.lowest + (torch.sigmoid(x) * self.steps).sum(dim=1)
        values = x[:, 0] * self.std + self.mean
        return torch.expm1(values.clamp(-1, 700)).clamp(min=0) if self.task == "count" else values


def description_of(loaded: LoadedRun) -> dict[str, Any]:
    """Return what goes into a program and what comes out of it, as plain text and numbers."""
    origin = _origin(loaded)
    return {
        "format": "brain-volumes-program",
        "version": 1,
        "input": {
            "dtype": "uint8",
            "shape": ["scan", *_grid(loaded).shape_zyx],
            "axes": "scan, z, y, x; RAS: x from left to right, y from back to front, z from bottom to top",
            "grid": origin["attrs"]["store"]["grid"],
            "intensity": origin["attrs"]["store"]["intensity"],
        },
        "outputs": {head.name: _output(head) for head in loaded.heads},
        **origin,
    }


def _output(head: Head) -> dict[str, Any]:
    return {
        "task": head.task,
        "shape": ["scan", len(head.labels)] if head.labels else ["scan"],
        "what": "probability of each class, in the order of labels" if head.labels
        else "expected level" if head.task == "ordinal" else "value",
        "labels": list(head.labels),
        "levels": list(head.levels),
        "units": head.units,
    }  # fmt: skip


def _origin(loaded: LoadedRun) -> dict[str, Any]:
    """Return what network it is, without the names of files and folders of whoever trained it."""
    model, store = checkpoint_of(loaded.network, loaded.settings, {}, state_dict={})["model"], loaded.attrs["store"]
    return {
        "model": {key: model[key] for key in ("name", "pool", "input")},
        "attrs": {
            "store": {**{key: store.get(key) for key in ("id", "intensity")}, "grid": _grid(loaded).to_json()},
            "simulated": bool(loaded.attrs.get("simulated")),
            "epoch": loaded.attrs.get("epoch"),
        },
        "checkpoint_sha256": loaded.sha256,
        "created_by": package_versions("torch", "torchvision"),
    }


def _grid(loaded: LoadedRun) -> Grid:
    """Return the grid of the volumes that a network was trained on."""
    grid: Grid = Grid.from_json(loaded.attrs["store"]["grid"])
    return grid


def _write_weights(loaded: LoadedRun, out: Path) -> dict[str, Any]:
    seen = loaded.network.seen
    note = {"format": FORMAT, **_origin(loaded), "mean": list(seen.mean), "std": list(seen.std)}
    state = OrderedDict((name, value.detach().clone()) for name, value in loaded.network.encoder.state_dict().items())
    setattr(state, NOTE, note)  # no entry: it would be taken for a parameter
    content = io.BytesIO()
    torch.save(state, content)
    _write(out, content)
    return note


def _write_program(loaded: LoadedRun, out: Path) -> dict[str, Any]:
    shape = _grid(loaded).shape_zyx
    check_volumes(loaded.network, shape)
    loaded.network.requires_grad_(False)
    program = torch.export.export(
        ScanProgram(loaded.network).eval(),
        (torch.zeros((2, *shape), dtype=torch.uint8),),  # two: of one it would be concluded that there is always one
        dynamic_shapes=({0: torch.export.Dim("scan", min=1)},),
        strict=False,
    )
    program.example_inputs = None  # zeros, as large as two volumes
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of folders
    description = description_of(loaded)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={DESCRIPTION: json.dumps(description, indent=1)})
    _write(out, content)
    return description


def _write(out: Path, content: io.BytesIO) -> None:
    """Write a file that is whole by now: torch's writers end the process where a disk is full."""
    write_whole(out, lambda temporary: temporary.write_bytes(content.getbuffer()))


_WRITERS: dict[str, Callable[[LoadedRun, Path], dict[str, Any]]] = {".pt": _write_weights, ".pt2": _write_program}
