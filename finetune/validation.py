"""How good a network is by now: what it predicts for a part of the people, and whether it has never been better."""

from __future__ import annotations

import numpy as np
import torch

from extract.probing.results import TargetResult
from finetune.evaluate import Outputs, predict, score_head
from finetune.losses import loss_sums
from finetune.training import Training, not_finite
from loaders import Loader


def predict_part(training: Training, loader: Loader | None) -> Outputs:
    """Return what the network gives for the scans of a part, of all processes, in the order of their rows.

    Parameters
    ----------
    loader
        Of this process's share of them; None if that is empty.

    Raises
    ------
    NonFiniteLossError
        If something is no finite number.
    """
    if loader is None:
        width = sum(head.outputs for head in training.network.heads_info)
        own = Outputs(np.empty(0, np.int64), np.empty((0, width), np.float32))
    else:
        own = predict(training.network, loader, dtype=training.dtype)
    parts = training.group.gather_all(own)
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    skipped = {row: reason for part in parts for row, reason in part.skipped.items()}
    training.skipped |= skipped
    outputs = Outputs(rows[order], np.concatenate([part.values for part in parts])[order], skipped)
    _check_finite(training, outputs)
    return outputs


def _check_finite(training: Training, outputs: Outputs) -> None:
    network, bad = training.network, ~np.isfinite(outputs.values)
    if bad.any():
        of_head = {
            head.name: np.nan if bad[:, place].any() else 0.0
            for head, place in zip(network.heads_info, network.head_slices, strict=True)
        }
        raise not_finite(training, training.step, np.nan, np.nan, of_head, outputs.rows[bad.any(axis=1)])


def validate(training: Training, outputs: Outputs) -> dict[str, float]:
    """Return loss and scores of the validation part, by their names in the history of a run."""
    network, cohort = training.network, training.cohort
    labels, weights = (torch.from_numpy(table[outputs.rows]) for table in (cohort.labels, cohort.weights))
    sums = loss_sums(torch.from_numpy(outputs.values), network.heads_info, network.head_slices, labels, weights)
    counts = weights.sum(0)
    row = {"validation_loss": float((sums / torch.where(counts > 0, counts, 1)).mean())}
    results = score_part(training, outputs, bootstrap=0)
    headlines = [result.headline.score for result in results]
    row["validation_score"] = float(np.mean([score for score in headlines if np.isfinite(score)] or [np.nan]))
    for head, result in zip(network.heads_info, results, strict=True):
        row[f"{head.name}_{head.metric}"] = result.headline.score
        row |= {f"{head.name}_{name}": found.score for name, found in result.metrics.items()}
    return row


def score_part(training: Training, outputs: Outputs, *, bootstrap: int) -> list[TargetResult]:
    """Score each target, see `finetune.evaluate.score_head`."""
    network, cohort = training.network, training.cohort
    at = np.searchsorted(cohort.rows, outputs.rows)  # which ascend
    return [
        score_head(
            head, target.values[at], head.predict(outputs.values[:, place]), cohort.groups.people[at],
            units=cohort.groups.units[at], bootstrap=bootstrap, rows=outputs.rows, seed=training.settings.seed,
        )
        for head, target, place in zip(network.heads_info, cohort.targets, network.head_slices, strict=True)
    ]  # fmt: skip


def keep_best(training: Training, row: dict[str, float]) -> None:
    """Keep the weights if a validation, a row of the history, is the best so far; else count one more without."""
    by_loss = training.settings.monitor == "loss"
    value = -row["validation_loss"] if by_loss else row["validation_score"]
    value = value if np.isfinite(value) else -np.inf  # not defined
    if training.best is None or value > training.best["value"]:
        weights = {name: tensor.detach().clone() for name, tensor in training.network.state_dict().items()}
        training.best = {"epoch": training.epoch, "step": training.step, "value": value, "state_dict": weights}
        training.waited = 0
    else:
        training.waited += 1
