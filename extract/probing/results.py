"""What a probe found: the record that `probing.probe` fills and `probing.report` draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from extract.probing.numbers import rounded


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval and the value that guessing would reach.

    Attributes
    ----------
    low, high
        Of the corrected t interval (`probing.scores.corrected_interval`).
    boot_low, boot_high
        Percentiles over draws of the people tested (`probing.bootstrap`), None without ``bootstrap``. They tell how
        the score varies with who is tested, not with who is trained on.
    """

    score: float
    low: float
    high: float
    chance: float
    boot_low: float | None = None
    boot_high: float | None = None

    @property
    def holds_chance(self) -> bool:
        """Whether chance lies within the interval."""
        return self.low <= self.chance <= self.high


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for scans that the model had not seen, of the first repeat: for plots, never for scores.

    Attributes
    ----------
    truth
        (scan,) codes 0 ... classes-1 of a classification, else values in the variable's units.
    predicted
        (scan, class) probabilities, or (scan,) values.
    fold
        (scan,) number of the fold in which the scan was tested.
    rows
        (scan,) rows of the embeddings.
    """

    truth: np.ndarray
    predicted: np.ndarray
    fold: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class TargetResult:
    """One phenotype, probed or skipped.

    Attributes
    ----------
    task
        One of `ingest.dictionary.TASKS`.
    status, reason
        ``ok``, or ``skipped`` with the reason.
    n, participants
        Scans that have a value, and all confounds, and the people they are of.
    metric
        The headline among `metrics`: ``auc`` or ``r``.
    metrics
        ``auc`` and ``balanced_accuracy``, or ``r``, ``r2`` and ``mae`` (in the variable's units).
    labels
        Names of the classes; empty for regressions.
    units
        Of the variable, where known.
    method
        The model, its penalty, the folds, and what was done about confounds and groups, in one line.
    confounds
        Names of the confounds that were removed from the features; empty without any.
    confound_metrics
        The same metrics of a model that sees the confounds alone, on the same folds; empty without confounds.
    gains
        Scores of `metrics` minus those of `confound_metrics`, fold by fold, against a chance of 0; empty without
        confounds.
    p_value, permutations, null
        Of the permutation test, how many permutations, and what it tests; None, 0 and "" without. The p value is None,
        and `null` says why, where hardly any label can be exchanged.
    fold_scores
        Metric -> (repeat x fold,) scores of the test folds, repeat after repeat: for paired comparisons.
    test_to_train
        Scans tested over scans left to train on, mean over the folds.
    effective_groups
        How many groups of the same size the groups are worth that are never split, or those of the smallest class if
        they are fewer (`probing.scores.independent_parts`).
    smallest_class
        Groups, by default people, that have scans of the smallest class; None of a regression.
    train_participants
        People that a model was trained on, median over the folds.
    """

    name: str
    task: str
    status: str
    n: int
    participants: int
    reason: str = ""
    metric: str = ""
    metrics: dict[str, Interval] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    units: str | None = None
    method: str = ""
    out_of_fold: OutOfFold | None = None
    confounds: list[str] = field(default_factory=list)
    confound_metrics: dict[str, Interval] = field(default_factory=dict)
    gains: dict[str, Interval] = field(default_factory=dict)
    p_value: float | None = None
    permutations: int = 0
    null: str = ""
    fold_scores: dict[str, np.ndarray] = field(default_factory=dict)
    test_to_train: float = 0.0
    effective_groups: float = np.inf
    smallest_class: int | None = None
    train_participants: int = 0

    @property
    def headline(self) -> Interval:
        """The interval of `metric`; NaN throughout if the target was skipped."""
        nan = float("nan")
        return self.metrics.get(self.metric, Interval(nan, nan, nan, nan))

    def to_json(self) -> dict[str, Any]:
        """Return the result as printed by ``--json``; numbers that do not exist are None."""
        return {
            "name": self.name,
            "task": self.task,
            "status": self.status,
            "reason": self.reason,
            "n": self.n,
            "participants": self.participants,
            "train_participants": self.train_participants,
            "metric": self.metric or None,
            **_numbers(self.headline),
            "p_value": self.p_value,
            "permutations": self.permutations,
            "null": self.null,
            "metrics": {name: _numbers(interval) for name, interval in self.metrics.items()},
            "confounds": self.confounds,
            "confound_metrics": {name: _numbers(interval) for name, interval in self.confound_metrics.items()},
            "gains": {name: _numbers(interval) for name, interval in self.gains.items()},
            "fold_scores": {name: self._by_repeat(scores) for name, scores in self.fold_scores.items()},
            "labels": self.labels,
            "method": self.method,
        }

    def _by_repeat(self, scores: np.ndarray) -> list[list[float | None]]:
        """Return the score of each fold of each repeat; all repeats have as many folds as the first."""
        folds = len(scores) if self.out_of_fold is None else int(self.out_of_fold.fold.max()) + 1
        return [[rounded(score) for score in repeat] for repeat in scores.reshape(-1, folds).tolist()]


def _numbers(interval: Interval) -> dict[str, float | None]:
    values = {"score": interval.score, "low": interval.low, "high": interval.high, "chance": interval.chance}
    if interval.boot_low is not None and interval.boot_high is not None:
        values |= {"boot_low": interval.boot_low, "boot_high": interval.boot_high}
    return {key: rounded(value) for key, value in values.items()}
