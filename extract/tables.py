"""What an embedding file holds besides the features, and how its columns are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

#: Scans whose features are written and read at a time, at most.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Tables:
    """All that an embedding file holds besides the features; see `extract.embeddings.Embeddings`."""

    scans: pd.DataFrame
    phenotypes: pd.DataFrame
    variables: dict[str, dict[str, Any]]
    attrs: dict[str, Any]


#: Gives the features of scans [start, stop), float32 (scan, feature); asked for one range after the other.
Features = Callable[[int, int], np.ndarray]


def feature_names(count: int) -> list[str]:
    """Return the names of features as columns of a table: f0, f1, ..."""
    return [f"f{number}" for number in range(count)]


def flat_names(tables: Tables, features: int) -> list[str]:
    """Return the names of all columns side by side: of the scans, the phenotypes, the features.

    A phenotype whose name is taken is called ``phenotype_NAME``.
    """
    others = [*map(str, tables.scans.columns), *feature_names(features)]
    taken = set(others)
    phenotypes = []
    for column in map(str, tables.phenotypes.columns):
        name = column
        while name in taken:
            name = f"phenotype_{name}"
        taken.add(name)
        phenotypes.append(name)
    scans = len(tables.scans.columns)
    return [*others[:scans], *phenotypes, *others[scans:]]


def ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Return start and stop of each block of so many rows."""
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def check_features(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise ValueError if an array is not one of features."""
    if len(shape) != 2 or dtype != np.float32:
        raise ValueError(f"embeddings is {dtype} of shape {shape}, expected float32 (scan, feature)")


def is_text(values: np.ndarray) -> bool:
    """Tell whether a column is one of texts."""
    return values.dtype.kind in "OUT"


def all_columns(tables: Tables) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield group, name and values of each column."""
    for group, table in (("scans", tables.scans), ("phenotypes", tables.phenotypes)):
        for name in table.columns:
            yield group, str(name), table[name].to_numpy()
