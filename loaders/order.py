"""The order in which an epoch visits its rows."""

from __future__ import annotations

import numpy as np


def epoch_order(rows: np.ndarray, *, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """Return the rows of one epoch.

    Parameters
    ----------
    rows
        int64, (scan,).
    shuffle
        A permutation that depends on `seed` and `epoch` alone; otherwise `rows` as they are.
    """
    if not shuffle:
        return rows
    return np.random.default_rng([seed, epoch]).permutation(rows)


def split_batches(rows: np.ndarray, batch_size: int, *, drop_last: bool) -> list[np.ndarray]:
    """Cut rows into batches; the last one is smaller, or dropped."""
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    return batches
