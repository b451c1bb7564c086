"""Predictions of scans as a table: who, what is predicted, and, of a run's own people, what is true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from extract.probing.apply import as_predictions, prediction_columns
from extract.probing.targets import Target
from finetune.evaluate import Outputs
from finetune.heads import Head
from ingest.store import VolumeStore

_IDENTITY = ("participant", "session", "modality")
TRUE = "true "  # before the name of a target


def prediction_table(
    store: VolumeStore, outputs: Outputs, heads: Sequence[Head], columns: Sequence[slice]
) -> pd.DataFrame:
    """Return a row per scan: ``row`` of the store, who it is, and for each target what is predicted.

    Of values that is a column by the target's name; of classes the most probable one, and a column ``sex=male`` for the
    probability of each, as ``probe apply`` writes them.

    Raises
    ------
    ValueError
        If two columns would have one name.
    """
    scans = store.scans.iloc[outputs.rows]
    found: list[tuple[str, np.ndarray]] = [("row", outputs.rows)]
    found += [(name, scans[name].to_numpy()) for name in _IDENTITY if name in scans]
    for head, place in zip(heads, columns, strict=True):
        found += prediction_columns(head.name, head.labels, head.predict(outputs.values[:, place]))
    return as_predictions(found)


def check_names(store: VolumeStore, targets: Sequence[Target]) -> None:
    """Raise ValueError if two columns of a run's predictions would have one name."""
    taken = {"row", "part", *(name for name in _IDENTITY if name in store.scans)}
    for target in targets:
        columns = [target.name, f"{TRUE}{target.name}", *(f"{target.name}={label}" for label in target.labels)]
        for column in columns:
            if column in taken:
                raise ValueError(
                    f"target {target.name!r} would make a column {column!r} of the predictions, which have another one "
                    "of that name; rename the phenotype"
                )
            taken.add(column)


def true_column(head: Head, values: np.ndarray) -> np.ndarray:
    """Return what is true as a column of predictions: values, or the labels of classes; None where it is unknown.

    Parameters
    ----------
    values
        float64 (scan,), values or codes of classes.
    """
    if not head.labels:
        return values
    return np.array([None if np.isnan(code) else head.labels[int(code)] for code in values], dtype=object)


def truth_of(table: pd.DataFrame, head: Head) -> np.ndarray:
    """Return what is true by a table of predictions, float64 (scan,): values, or codes of classes; NaN if unknown."""
    column = table[f"{TRUE}{head.name}"]
    if not head.labels or pd.api.types.is_numeric_dtype(column):  # runs of earlier versions have written codes
        return column.to_numpy(np.float64)
    codes = {label: float(code) for code, label in enumerate(head.labels)}
    return np.array([np.nan if label is None or label != label else codes[label] for label in column], np.float64)


def predicted_of(table: pd.DataFrame, head: Head) -> np.ndarray:
    """Return what `Head.predict` gave from a table of predictions: (scan, class) or (scan,)."""
    if head.labels:
        return table[[f"{head.name}={label}" for label in head.labels]].to_numpy(np.float64)
    return table[head.name].to_numpy(np.float64)
