"""Which scans of a store: by list, by what is known of them, by what must be known of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ingest.store import VolumeStore


def select_rows(
    store: VolumeStore,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    where: str | None = None,
    known: Sequence[str] = (),
) -> np.ndarray:
    """Return rows (int64) that hold a volume, in ascending order or that of `rows`.

    Parameters
    ----------
    rows
        Row numbers, or a mask (bool, one for each row of the store); by default all rows of status ``ok``.
    where
        A condition on the columns of ``scans/`` and ``phenotypes/`` in the language of `pandas.DataFrame.query`:
        ``"age >= 60 and sex == 1 and session == '2'"``.
    known
        Phenotypes that must not be missing.

    Raises
    ------
    IndexError
        If one of `rows` is not in the store, or holds no volume.
    ValueError
        For rows that are no whole numbers, a mask of another length, a condition that cannot be evaluated, or an
        unknown phenotype.
    """
    if rows is None:
        wanted = store.ok_rows
    else:
        given = np.asarray(rows)
        if given.dtype == np.bool_:
            if given.shape != (len(store.scans),):
                raise ValueError(f"the mask of rows has shape {given.shape}, expected ({len(store.scans)},)")
            given = np.flatnonzero(given & (store.scans["status"].to_numpy() == "ok"))
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise ValueError(f"rows are {given.dtype}, expected whole numbers, or a mask of bool")
        wanted = check_rows(store, given.astype(np.int64).reshape(-1))
    for name in known:
        wanted = wanted[~np.isnan(phenotype(store, name)[wanted])]
    if where is not None:
        wanted = wanted[_matches(store, where)[wanted]]
    return wanted


def check_rows(store: VolumeStore, rows: np.ndarray) -> np.ndarray:
    """Return rows, all of which hold a volume.

    Raises
    ------
    IndexError
        Naming the first that does not.
    """
    status = store.scans["status"].to_numpy()
    outside = (rows < 0) | (rows >= len(status))
    if outside.any():
        row = rows[np.argmax(outside)]
        raise IndexError(f"row {row} is not in the store, which has rows 0 to {len(status) - 1}")
    bad = status[rows] != "ok"
    if bad.any():
        row = rows[np.argmax(bad)]
        raise IndexError(f"row {row} holds no volume: its status is {status[row]}; use rows with status ok")
    return rows


def phenotype(store: VolumeStore, name: str) -> np.ndarray:
    """Return a phenotype, float64 (row,).

    Raises
    ------
    ValueError
        If the store has none of that name.
    """
    if name not in store.phenotypes.columns:
        there = ", ".join(store.phenotypes.columns) or "none"
        raise ValueError(f"the store has no phenotype {name!r}; it has {there}")
    return store.phenotypes[name].to_numpy(np.float64)


def strata_of(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return labels (int64) of groups by which to stratify: the values, or so many quantiles if there are more.

    Missing values are a group of their own.
    """
    missing = np.isnan(values)
    there = values[~missing]
    labels = np.full(len(values), -1, np.int64)
    distinct = np.unique(there)
    if len(distinct) <= bins:
        labels[~missing] = np.searchsorted(distinct, there)
    else:
        inner = np.quantile(there, np.arange(1, bins) / bins)
        labels[~missing] = np.searchsorted(inner, there)  # to the left: a value that many share is a group of its own
    return labels


def balancing_weights(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return weights (float64) by which every group of `strata_of` is drawn equally often."""
    labels = strata_of(values, bins)
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: np.ndarray = 1.0 / counts[which]
    return weights


def _matches(store: VolumeStore, where: str) -> np.ndarray:
    table = pd.concat([store.scans, store.phenotypes.drop(columns=store.scans.columns, errors="ignore")], axis=1)
    try:
        matches = table.eval(where)
    except Exception as error:  # of many kinds: syntax, names, types
        raise ValueError(
            f"the condition {where!r} cannot be evaluated: {error}; columns are {', '.join(map(str, table.columns))}"
        ) from None
    if not isinstance(matches, pd.Series) or matches.dtype != np.bool_:
        raise ValueError(f"the condition {where!r} is not true or false for each scan; for example: age >= 60")
    return matches.to_numpy()
