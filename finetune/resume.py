"""Going on with a run: its last checkpoint, and whether that is of the same network, store and values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.errors import WeightsUnavailableError
from extract.weights import Weights, about_store
from finetune.build import find_weights
from finetune.checkpoints import LoadedRun, broken, load_run, model_of, read_last, weights_of_last
from finetune.errors import ANEW
from finetune.results import RESULTS
from finetune.settings import FinetuneSettings
from finetune.training import Training
from ingest.errors import StoreError
from ingest.store import VolumeStore


def weights_for(settings: FinetuneSettings, volumes: VolumeStore, last: Path | None) -> tuple[Weights, dict[str, Any]]:
    """Return the weights to begin with, and what is kept of where they are from.

    A run that goes on from a checkpoint does without them, should they be gone.

    Parameters
    ----------
    last
        The checkpoint to go on from, if there is one.
    """
    try:
        weights = find_weights(settings)
    except WeightsUnavailableError:
        if last is None:
            raise
        return weights_of_last(last)
    name = "scratch" if weights.state_dict is None else weights.name
    return weights, {"name": name, "sha256": weights.sha256, "notes": about_store(weights, volumes)}


def load_finished(run_dir: Path) -> LoadedRun:
    """Return the network of a run that is finished; StoreError if its weights are damaged."""
    try:
        return load_run(run_dir)
    except WeightsUnavailableError as error:
        raise broken(error) from None


def go_on(training: Training, path: Path, volumes: VolumeStore) -> None:
    """Load the last checkpoint of a run.

    Raises
    ------
    StoreError
        If it is damaged, of a run that is finished, or of another store, network, or values of a target.
    """
    content = read_last(path)
    if "training" not in content:
        raise StoreError(f"{path} is of a run that is finished, but {RESULTS} is not there; {ANEW}")
    check_store(path.parent, content["attrs"], volumes)
    _check_model(training, path, content["model"])
    if content["training"].get("cohort", now := training.cohort.fingerprint()) != now:  # older ones do not say
        names = ", ".join(head.name for head in training.network.heads_info)
        raise StoreError(
            f"{path.parent} was begun with other scans, or other values of {names}, which have changed in the store "
            f"since; {ANEW}"
        )
    try:
        training.network.load_state_dict(content["state_dict"])
        training.load_state_dict(content["training"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise StoreError(f"{path} is no complete checkpoint of this run: {reason}; {ANEW}") from None


def check_store(run_dir: Path, attrs: Mapping[str, Any], volumes: VolumeStore) -> None:
    """Raise StoreError if a run was begun with another store."""
    if attrs["store"]["id"] != volumes.attrs["store_id"]:
        raise StoreError(f"{run_dir} was begun with another store; give that one; {ANEW}")


def _check_model(training: Training, path: Path, before: Mapping[str, Any]) -> None:
    """Raise StoreError if a checkpoint is of another network, or of other values of a target."""
    was, now = (_flat(json.loads(json.dumps(model))) for model in (before, model_of(training.network)))
    unlike = [f"{name} {was.get(name)}, not {value}" for name, value in now.items() if was.get(name) != value]
    if unlike:
        raise StoreError(
            f"{path} is not of this run, but of a network with {'; '.join(unlike)}; put back the run's own file, or "
            f"{ANEW}"
        )
    heads = before["heads"]
    names = [head.name for head in training.network.heads_info]
    if [head["name"] for head in heads] != names:
        raise StoreError(f"{path} is not of this run: it is not of {', '.join(names)}; {ANEW}")
    for head, had in zip(training.network.heads_info, heads, strict=True):
        if head.to_json() != had:
            raise StoreError(
                f"{path.parent} was begun with other values of {head.name}, which have changed in the store since; "
                f"{ANEW}"
            )


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of a network, but of its heads, without dictionaries in it."""
    return {"model": model["name"], "pool": model["pool"], **model["input"]}
