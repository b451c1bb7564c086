"""Checkpoints: the network with all that predictions need, and, of a run under way, all that it takes to go on.

A checkpoint is a dict that ``torch.load(weights_only=True)`` reads. `extract.checkpoints` reads the same files for
their encoder: ``format``, ``model``, ``state_dict`` (``encoder.*``), ``mean`` and ``std`` are its part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from extract.checkpoints import BEST, FORMAT, load_content
from extract.errors import WeightsUnavailableError
from extract.weights import Weights
from finetune.errors import ANEW
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from finetune.settings import FinetuneSettings, make_settings
from ingest.errors import StoreError
from ingest.writing import write_whole
from loaders.views import View

VERSION = 1


@dataclass(frozen=True)
class LoadedRun:
    """What a checkpoint holds.

    Attributes
    ----------
    network
        In evaluation mode.
    heads
        What it gives.
    settings
        Of the run.
    attrs
        Provenance: ``store`` (path, id, grid), ``simulated``, ``weights`` (name, sha256, notes) that it began with,
        ``created_by`` (versions), ``resolved`` (see `finetune.results.RunResult`), and ``epoch`` and ``step`` of these
        weights.
    sha256
        Of the file.
    """

    network: ScanNetwork
    heads: list[Head]
    settings: FinetuneSettings
    attrs: dict[str, Any]
    sha256: str


def checkpoint_of(
    network: ScanNetwork,
    settings: FinetuneSettings,
    attrs: Mapping[str, Any],
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Parameters
    ----------
    state_dict
        Other weights of the network than those that it has.
    training
        What it takes to go on.
    """
    seen = network.seen
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_of(network),
        "mean": list(seen.mean),
        "std": list(seen.std),
        "settings": settings.model_dump(mode="json"),
        "attrs": dict(attrs),
        "state_dict": {name: value.cpu() for name, value in (state_dict or network.state_dict()).items()},
    }
    return document if training is None else {**document, "training": dict(training)}


def model_of(network: ScanNetwork) -> dict[str, Any]:
    """Return what a checkpoint says of a network beside its weights: which one, what it sees, its heads."""
    seen = network.seen
    return {
        "name": network.model,
        "pool": "mean" if network.attention is None else "attention",
        "input": {**asdict(seen), "view": str(seen.view), "mean": list(seen.mean), "std": list(seen.std)},
        "heads": [head.to_json() for head in network.heads_info],
    }


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; it appears whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(dict(content), file)
            except RuntimeError as error:  # of its writer, which cannot end a file that was broken off
                raise error.__context__ or error from None

    write_whole(path, write)


def read_training(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint of ours.

    Raises
    ------
    WeightsUnavailableError
        If it is something else.
    """
    return _read(os.fspath(path))[0]


def read_last(path: Path) -> dict[str, Any]:
    """Return the content of the last checkpoint of a run; StoreError if it is damaged, or something else."""
    try:
        return read_training(path)
    except WeightsUnavailableError as error:
        raise broken(error) from None


def broken(error: WeightsUnavailableError) -> StoreError:
    """Return the error of a run whose own file cannot be read, with what helps there."""
    return StoreError(f"{str(error).split('; save one with ')[0]}; {ANEW}")


def weights_of_last(path: Path) -> tuple[Weights, dict[str, Any]]:
    """Return the weights that a run began with, without their numbers, and what its last checkpoint says of them."""
    content = read_last(path)
    about = dict(content["attrs"]["weights"])
    return Weights(about["name"], about["sha256"], {}, tuple(content["mean"]), tuple(content["std"])), about


def load_run(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedRun:
    """Load the network of a run.

    Parameters
    ----------
    path
        The folder of a run, of which its best weights are taken, or a checkpoint.

    Raises
    ------
    WeightsUnavailableError
        If there is none, or it is something else.
    """
    if not os.path.exists(path):
        raise WeightsUnavailableError(f"nothing is at {path}; expected the folder of a finetune run, or a checkpoint")
    content, sha256 = _read(os.fspath(path))
    name = os.path.basename(os.path.normpath(path))
    try:
        model, settings = content["model"], make_settings(content["settings"], name)
        attrs = dict(json.loads(json.dumps(content["attrs"])))  # plain, whoever made the file
        seen, heads = _input(model["input"]), [_head(head) for head in model["heads"]]
        network = ScanNetwork(model["name"], seen, heads, pool=model["pool"], dropout=settings.dropout)
        network.load_state_dict(content["state_dict"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(what.split())[:300]
        raise WeightsUnavailableError(f"{path} is no complete checkpoint of a finetune run: {reason}") from None
    return LoadedRun(network.to(device).eval(), heads, settings, attrs, sha256)


def _read(path: str) -> tuple[dict[str, Any], str]:
    content, sha256 = load_content(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "settings" not in content:
        raise WeightsUnavailableError(f"{path} is no checkpoint of a finetune run, expected RUN_DIR or its {BEST}")
    if content.get("version") != VERSION:
        raise WeightsUnavailableError(
            f"{path} is a checkpoint of version {content.get('version')!r}, this is for {VERSION}; use the version of "
            "this package that wrote it"
        )
    return content, sha256


def _input(document: Mapping[str, Any]) -> Input:
    return Input(
        view=View(document["view"]),
        slices=int(document["slices"]),
        crop=_numbers(document["crop"]),  # type: ignore[arg-type]
        size=_numbers(document["size"]),
        scale=float(document["scale"]),
        mean=tuple(map(float, document["mean"])),
        std=tuple(map(float, document["std"])),
    )


def _head(document: Any) -> Head:
    head = Head.from_json(document)
    widths = {"binary": 1, "multiclass": len(head.labels), "ordinal": len(head.levels) - 1}
    labels = {"binary": 2, "multiclass": head.outputs}.get(head.task, 0)
    if head.outputs != widths.get(head.task, 1) or head.outputs < 1 or len(head.labels) != labels:
        raise ValueError(f"the head {head.name!r} has {head.outputs} outputs and {len(head.labels)} labels")
    return head


def _numbers(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(map(int, values))
