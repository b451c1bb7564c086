"""What a network gives for each target: how labels become numbers to learn, and outputs become predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from extract.probing.targets import CLASSIFICATIONS, Target

_MOST_LEVELS = 20


@dataclass(frozen=True)
class Head:
    """One target of a network.

    Attributes
    ----------
    name, task, labels, units
        Of the target, see `extract.probing.targets.Target`.
    outputs
        Numbers that the network gives: one of a binary target and of values, one per class of a multiclass one, and
        one per step between the levels of an ordinal one.
    mean, std
        Of values among the scans trained on (of counts, of log(1 + count)): the network learns (value - mean) / std.
    typical
        The mean of values among the scans trained on, in their units: what one would say of anybody.
    levels
        Values of an ordinal target, in ascending order.
    frequencies
        Of the classes, as the probabilities take them to be: those among the scans trained on, or equal ones if classes
        were weighted.
    """

    name: str
    task: str
    labels: tuple[str, ...] = ()
    units: str | None = None
    outputs: int = 1
    mean: float = 0.0
    std: float = 1.0
    typical: float = 0.0
    levels: tuple[float, ...] = ()
    frequencies: tuple[float, ...] = ()

    @property
    def metric(self) -> str:
        """The headline among its scores: ``auc`` or ``r``."""
        return "auc" if self.labels else "r"

    @property
    def guess(self) -> float:
        """The mean of the scans trained on, on the scale of `scaled`."""
        return self.mean if self.task == "count" else self.typical

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Return values on the scale on which they are learnt and scored: of counts, log(1 + count)."""
        return np.log1p(values) if self.task == "count" else values

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Turn values of the target into numbers to learn, float32 (scan,); NaN stays NaN.

        Classes are codes 0, 1, ...; levels of an ordinal target are counted.
        """
        if self.task == "ordinal":
            places = np.searchsorted(self.levels, np.where(np.isnan(values), self.levels[0], values))
            return np.where(np.isnan(values), np.nan, places).astype(np.float32)
        if self.labels:
            return values.astype(np.float32)
        scaled = self.scaled(values)
        return ((scaled - self.mean) / self.std).astype(np.float32)

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """Turn what the network gives into predictions.

        Parameters
        ----------
        outputs
            float32 (scan, output).

        Returns
        -------
        numpy.ndarray
            float64 (scan, class) probabilities; else (scan,) values in the target's units, of an ordinal target the
            expected one.
        """
        x = outputs.astype(np.float64)
        if self.task == "binary":
            positive = expit(x[:, 0])
            return np.stack([1 - positive, positive], axis=1)
        if self.task == "multiclass":
            shares: np.ndarray = softmax(x, axis=1)
            return shares
        if self.task == "ordinal":
            expected: np.ndarray = self.levels[0] + expit(x) @ np.diff(self.levels)
            return expected
        values = x[:, 0] * self.std + self.mean
        return np.maximum(np.expm1(np.clip(values, -1, 700)), 0.0) if self.task == "count" else values

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain numbers and text."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Head:
        """Return the head of which `to_json` made a document; ValueError if it is none."""
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"this is no head of a network: {error}") from None


def make_head(target: Target, train: np.ndarray, *, balanced: bool = False) -> Head:
    """Make the head of a target.

    Parameters
    ----------
    target
        Read by `extract.probing.targets.read_targets`, without a reason against it.
    train
        bool (scan,), the scans trained on.
    balanced
        Classes will be weighted so that all count the same.

    Raises
    ------
    ValueError
        If the scans trained on have not every class, or one value only.
    """
    values = target.values[train & target.present]
    if not len(values):
        raise ValueError(
            f"nobody of the training part has a value of {target.name!r}; use more people, or another split"
        )
    name, task, labels = target.name, target.task, tuple(target.labels)
    if task in CLASSIFICATIONS:
        counts = np.bincount(values.astype(np.int64), minlength=len(labels))
        if counts.min() == 0:
            raise ValueError(
                f"nobody of the training part has {name} {labels[int(counts.argmin())]!r}; use more people, or another "
                "split"
            )
        shares = np.full(len(labels), 1 / len(labels)) if balanced else counts / counts.sum()
        outputs = 1 if task == "binary" else len(labels)
        return Head(name, task, labels, target.units, outputs, frequencies=tuple(shares.tolist()))
    scaled = np.log1p(values) if task == "count" else values
    if np.ptp(scaled) == 0:
        raise ValueError(f"everybody of the training part has {name} {values[0]:g}; there is nothing to learn")
    if task == "ordinal":
        levels = np.unique(target.values[target.present])
        if len(levels) > _MOST_LEVELS:
            raise ValueError(
                f"{name} has {len(levels)} levels, expected {_MOST_LEVELS} at most of an ordinal target; "
                f"use --task {name}=continuous"
            )
        typical = float(values.mean())
        return Head(name, task, (), target.units, len(levels) - 1, typical=typical, levels=tuple(levels.tolist()))
    return Head(name, task, (), target.units, 1, float(scaled.mean()), float(scaled.std()), float(values.mean()))
