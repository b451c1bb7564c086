"""What a probe found: the record that `extract.probe` fills and `extract.report` draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval and the value that guessing would reach."""

    score: float
    low: float
    high: float
    chance: float

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
    """

    truth: np.ndarray
    predicted: np.ndarray
    fold: np.ndarray


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
        Scans that have a value, and the people they are of.
    metric
        The headline among `metrics`: ``auc`` or ``r``.
    metrics
        ``auc`` and ``balanced_accuracy``, or ``r``, ``r2`` and ``mae`` (in the variable's units).
    labels
        Names of the classes; empty for regressions.
    units
        Of the variable, where known.
    method
        The model and its penalty in one line.
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

    @property
    def headline(self) -> Interval:
        """The interval of `metric`; NaN throughout if the target was skipped."""
        nan = float("nan")
        return self.metrics.get(self.metric, Interval(nan, nan, nan, nan))

    def to_json(self) -> dict[str, Any]:
        """Return the result as printed by ``--json``; numbers that do not exist are None."""
        found = {name: _numbers(interval) for name, interval in self.metrics.items()}
        return {
            "name": self.name,
            "task": self.task,
            "status": self.status,
            "reason": self.reason,
            "n": self.n,
            "participants": self.participants,
            "metric": self.metric or None,
            **_numbers(self.headline),
            "metrics": found,
            "labels": self.labels,
            "method": self.method,
        }


def _numbers(interval: Interval) -> dict[str, float | None]:
    values = {"score": interval.score, "low": interval.low, "high": interval.high, "chance": interval.chance}
    return {key: None if np.isnan(value) else round(float(value), 4) for key, value in values.items()}
