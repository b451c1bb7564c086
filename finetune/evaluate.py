"""What a network predicts for scans, and how well that fits what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from extract.inputs import seen_slices, slices_to_load
from extract.probing.bootstrap import (
    draw_weights,
    percentile_interval,
    weighted_auc,
    weighted_balanced_accuracy,
    weighted_mean_absolute_error,
    weighted_pearson,
    weighted_r_squared,
)
from extract.probing.folds import class_sizes
from extract.probing.results import Interval, OutOfFold, TargetResult
from extract.probing.scores import (
    RANGES,
    auc,
    balanced_accuracy,
    least_after_successes,
    mean_absolute_error,
    pearson,
    r_squared,
)
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from ingest.store import VolumeStore
from loaders import Loader, open_loader
from loaders.views import View

_LIKELY_BATCH = 8


@dataclass(frozen=True)
class Outputs:
    """What a network gives.

    Attributes
    ----------
    rows
        int64 (scan,), rows of the store.
    values
        float32 (scan, output).
    skipped
        By row, why others could not be read.
    """

    rows: np.ndarray
    values: np.ndarray
    skipped: dict[int, str] = field(default_factory=dict)


def what_to_load(
    seen: Input, shape_zyx: tuple[int, int, int], *, augmented: bool = False
) -> tuple[View, list[int] | list[list[int]]]:
    """Return view and slices for a loader.

    Parameters
    ----------
    augmented
        Slices of three planes are cut out of volumes then, which move as a whole.
    """
    view = View.volume if augmented and seen.view is View.triplanar else seen.view
    return view, slices_to_load(shape_zyx, view, seen.slices, seen.crop)


def what_to_augment(seen: Input, shape_zyx: tuple[int, int, int]) -> list[np.ndarray] | None:
    """Return the slices along z, y and x that will be cut out of volumes; None where all that is loaded is seen."""
    return seen_slices(shape_zyx, seen.view, seen.slices, seen.crop) if seen.view is View.triplanar else None


def predict_rows(
    network: ScanNetwork,
    store: VolumeStore,
    rows: Sequence[int] | np.ndarray,
    *,
    batch_size: int = _LIKELY_BATCH,
    backend: str = "auto",
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    on_error: str = "raise",
    on_batch: Callable[[int], None] | None = None,
) -> Outputs:
    """Return what a network gives for some rows of a store, in their order; see `predict`."""
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        return Outputs(rows, np.empty((0, sum(head.outputs for head in network.heads_info)), np.float32))
    view, slices = what_to_load(network.seen, store.grid.shape_zyx)
    device = next(network.parameters()).device
    with open_loader(
        store, rows=rows, view=view, slices=slices, batch_size=batch_size, backend=backend, device=device,
        threads=threads, on_error=on_error, rank=0, world_size=1,
    ) as loader:  # fmt: skip
        return predict(network, loader, dtype=dtype, on_batch=on_batch)


def predict(
    network: ScanNetwork,
    loader: Loader,
    *,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] | None = None,
) -> Outputs:
    """Return what a network gives for all scans of a loader.

    Parameters
    ----------
    network
        Is in evaluation mode meanwhile.
    dtype
        Of what is computed.
    on_batch
        Called after each batch with its number of scans.
    """
    rows, values = [], []
    cut = network.seen.cut
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            for batch in loader:
                outputs = network(batch.images, cut=cut)
                rows.append(batch.rows[batch.valid])
                # A mask makes a GPU be waited for, and hardly ever leaves out anything.
                values.append(outputs if batch.valid.all() else outputs[torch.from_numpy(batch.valid).to(device)])
                if on_batch:
                    on_batch(len(batch.rows))
    finally:
        network.train(training)
    return Outputs(np.concatenate(rows), torch.cat(values).float().cpu().numpy(), dict(loader.skipped))


def score_head(
    head: Head,
    truth: np.ndarray,
    predicted: np.ndarray,
    people: np.ndarray,
    *,
    units: np.ndarray | None = None,
    bootstrap: int = 2000,
    rows: np.ndarray | None = None,
    seed: int = 0,
) -> TargetResult:
    """Score the predictions of one target; r and R2 of a count are those of log(1 + count), as probes have them.

    Intervals are percentiles over draws of the units tested, see `extract.probing.bootstrap`; without draws they are
    not known (NaN). They tell nothing of who was trained on. Of a perfect score, which no draw changes, the lower end
    is the exact one of as many successes as units of the smallest class, see `least_after_successes`.

    Parameters
    ----------
    truth
        float64 (scan,), values or codes; scans that have none (NaN) are left out.
    predicted
        Of `Head.predict`, (scan, class) or (scan,).
    people
        (scan,), whose scans they are.
    units
        (scan,), what is drawn as a whole, such as families; by default people.
    bootstrap
        Draws.
    rows
        (scan,), of the store.

    Returns
    -------
    TargetResult
        ``skipped`` with a reason where a score is not defined: nobody is known, a class is absent, or one value only.
    """
    known = ~np.isnan(truth)
    truth, predicted = truth[known], predicted[known]
    whole = np.unique((people if units is None else units)[known], return_inverse=True)[1]
    reason = why_undefined(head, truth)
    result = TargetResult(
        head.name, head.task, "skipped", len(truth), len(np.unique(people[known])), reason, labels=list(head.labels),
        units=head.units,
    )  # fmt: skip
    if reason:
        return result
    drawn = draw_weights(int(whole.max()) + 1, bootstrap, seed)[:, whole].astype(np.float32) if bootstrap else None
    chance = _chances(head, truth)
    metrics = {}
    for name, score in _scores(head, truth, predicted).items():
        low, high = np.nan, np.nan
        if drawn is not None:
            interval = percentile_interval(_weighted(name, head, truth, predicted, drawn)[None])
            low, high = interval or (np.nan, np.nan)
            if head.labels and low == high == RANGES[name][1]:
                low = least_after_successes(int(class_sizes(whole, truth.astype(np.int64)).min()))
        metrics[name] = Interval(score, low, high, chance[name])
    places = np.arange(len(known)) if rows is None else rows
    out = OutOfFold(truth, predicted, np.zeros(len(truth), np.int64), places[known])
    return replace(result, status="ok", metric=head.metric, metrics=metrics, out_of_fold=out)


def why_undefined(head: Head, truth: np.ndarray) -> str:
    """Return why there is no score of some scans, of what is true of them; nothing if there is one."""
    if len(truth) < 2:
        return f"{len(truth)} scans of the part have a value, at least 2 are needed"
    if head.labels:
        counts = np.bincount(truth.astype(np.int64), minlength=len(head.labels))
        if counts.min() == 0:
            return f"nobody of the part has {head.labels[int(counts.argmin())]!r}"
    elif np.ptp(truth) == 0:
        return f"everybody of the part has {truth[0]:g}"
    return ""


def _scores(head: Head, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    if head.labels:
        codes = truth.astype(np.int64)
        frequencies = np.array(head.frequencies)
        return {"auc": auc(codes, predicted), "balanced_accuracy": balanced_accuracy(codes, predicted, frequencies)}
    learnt = head.scaled(truth), head.scaled(predicted)
    return {
        "r": pearson(*learnt),
        "r2": r_squared(*learnt, head.guess),
        "mae": mean_absolute_error(truth, predicted),
    }


def _weighted(name: str, head: Head, truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if name == "auc":
        return weighted_auc(truth.astype(np.int64), predicted, weights)
    if name == "balanced_accuracy":
        return weighted_balanced_accuracy(truth.astype(np.int64), predicted, np.array(head.frequencies), weights)
    if name == "r":
        return weighted_pearson(head.scaled(truth), head.scaled(predicted), weights)
    if name == "r2":
        return weighted_r_squared(head.scaled(truth), head.scaled(predicted), head.guess, weights)
    return weighted_mean_absolute_error(truth, predicted, weights)


def _chances(head: Head, truth: np.ndarray) -> dict[str, float]:
    if head.labels:
        return {"auc": 0.5, "balanced_accuracy": 1 / len(head.labels)}
    return {"r": 0.0, "r2": 0.0, "mae": mean_absolute_error(truth, head.typical)}
