"""Which scans of a store: by list, by what is known of them, by what must be known of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ingest.store import VolumeStore

logger = logging.getLogger("loaders")

_NONE_LEFT = (
    "where=%r is true of none of %d scans; categories are stored as codes, see store.variables[name]['labels'], and "
    "ids as text, in quotes"
)


def select_rows(
    store: VolumeStore,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    where: str | None = None,
    known: str | Sequence[str] = (),
) -> np.ndarray:
    """Return rows (int64) that hold a volume, in ascending order or that of `rows`.

    A condition, or a phenotype, that leaves none of them is logged as a warning.

    Parameters
    ----------
    rows
        Row numbers, or a mask (bool, one for each row of the store); by default all rows of status ``ok``.
    where
        A condition on the columns of ``scans/`` and ``phenotypes/`` in the language of `pandas.DataFrame.query`:
        ``"age >= 60 and sex == 1 and session == '2'"``. A name that both have is refused as it stands; with the
        backticks, ```phenotypes.mean` < 5`` and ```scans.mean` < 5`` say which is meant. Categories are stored as
        codes (what they mean is in ``store.variables[name]["labels"]``), ids as text.
    known
        Phenotypes, or one, that must not be missing.

    Raises
    ------
    IndexError
        If one of `rows` is not in the store, or holds no volume.
    ValueError
        For rows that are no whole numbers, a mask of another length, a condition that cannot be evaluated or has a name
        of two meanings, or an unknown phenotype.
    """
    wanted = store.ok_rows if rows is None else as_rows(store, rows)
    for name in [known] if isinstance(known, str) else known:
        there = wanted[~np.isnan(phenotype(store, name)[wanted])]
        if len(wanted) and not len(there):
            logger.warning("known=%r leaves no scan: the phenotype is missing of all %d", name, len(wanted))
        wanted = there
    if where is not None:
        there = wanted[_matches(store, where)[wanted]]
        if len(wanted) and not len(there):
            logger.warning(_NONE_LEFT, where, len(wanted))
        wanted = there
    return wanted


def as_rows(store: VolumeStore, given: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the row numbers (int64) that a list or a mask means; all of them hold a volume.

    Raises
    ------
    IndexError
        Naming the first row that is not in the store, or holds no volume. (A mask leaves out those that hold none.)
    ValueError
        For rows that are no whole numbers, or a mask of another length.
    """
    status = store.scans["status"].to_numpy()
    found = np.asarray(given)
    if found.dtype == np.bool_:
        if found.shape != status.shape:
            raise ValueError(f"the mask of rows has shape {found.shape}, expected ({len(status)},)")
        found = np.flatnonzero(found & (status == "ok"))
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"rows are {found.dtype}, expected whole numbers, or a mask of bool")
    rows = found.astype(np.int64).reshape(-1)
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
    both = store.scans.columns.intersection(store.phenotypes.columns)
    named = {
        group: columns.rename(columns={name: f"{group}.{name}" for name in both})
        for group, columns in (("scans", store.scans), ("phenotypes", store.phenotypes))
    }
    table = pd.concat(named.values(), axis=1)
    try:
        matches = table.eval(where)
    except Exception as error:  # of many kinds: syntax, names, types
        for name in both:
            if str(error) == f"name {name!r} is not defined":
                raise ValueError(
                    f"the condition {where!r} has {name}, which is a column of the scans and a phenotype; write "
                    f"`scans.{name}` or `phenotypes.{name}`, with the backticks"
                ) from None
        raise ValueError(
            f"the condition {where!r} cannot be evaluated: {error}; columns are {', '.join(map(str, table.columns))}"
        ) from None
    if not isinstance(matches, pd.Series) or matches.dtype != np.bool_:
        raise ValueError(f"the condition {where!r} is not true or false for each scan; for example: age >= 60")
    return matches.to_numpy()
