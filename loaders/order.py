"""Which scans an epoch visits, in which order, and how ranks share them.

All of it follows from the seed and the epoch alone, never from threads, ranks, batch sizes or the backend: a run that
was cut off goes on exactly, also on another number of GPUs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loaders.checks import as_whole


def epoch_order(
    rows: np.ndarray,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    weights: np.ndarray | None = None,
    strata: np.ndarray | None = None,
) -> np.ndarray:
    """Return the rows of one epoch, int64.

    Parameters
    ----------
    rows
        int64, (scan,).
    shuffle
        A permutation that depends on `seed` and `epoch` alone; otherwise `rows` as they are.
    weights
        (scan,), not negative: as many scans as there are rows are drawn, with replacement, in proportion to these.
    strata
        (scan,), any labels: a permutation in which every stretch, and so every batch, has nearly the same share of
        each of them as the whole.
    """
    rng = np.random.default_rng([seed, epoch])
    if not len(rows):
        return rows
    if weights is not None:
        bounds = np.cumsum(weights / weights.max())  # the sum of the weights themselves may overflow
        bounds /= bounds[-1]  # so that the last is 1, and no row of weight 0 lies below it
        return rows[np.searchsorted(bounds, rng.random(len(rows)), side="right")]
    if not shuffle:
        return rows
    if strata is None:
        return rng.permutation(rows)
    # The members of a stratum of n are spread over n equal parts of the epoch, all strata with a shift of their own.
    place = np.empty(len(rows))
    for label in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return rows[np.argsort(place, kind="stable")]


@dataclass(frozen=True)
class Sampling:
    """Which scans the epochs of a rank visit, and in what batches.

    Attributes
    ----------
    rows
        int64 (scan,), rows of the store.
    shuffle, seed, weights, strata
        See `epoch_order`.
    batch_size
        Scans per batch of each rank.
    rank, world_size
        This process is number `rank` of so many that share each epoch.
    drop_last
        Leave out the end that does not fill a batch on every rank.
    """

    rows: np.ndarray
    shuffle: bool = False
    seed: int = 0
    weights: np.ndarray | None = None
    strata: np.ndarray | None = None
    batch_size: int = 16
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        as_whole("batch_size", self.batch_size, 1)
        as_whole("seed", self.seed, 0)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} of world_size {self.world_size}, expected 0 <= rank < world_size")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return count_batches(len(self.rows), self.batch_size, world_size=self.world_size, drop_last=self.drop_last)

    def is_done(self, taken: int) -> bool:
        """Tell whether an epoch of which so many scans are taken has no more batches."""
        rest = max(0, len(self.rows) - taken)
        return not count_batches(rest, self.batch_size, world_size=self.world_size, drop_last=self.drop_last)

    def batches(self, epoch: int, start: int = 0) -> Iterator[BatchPlan]:
        """Yield this rank's batches of an epoch, from that of which `start` scans are done."""
        order = epoch_order(
            self.rows, shuffle=self.shuffle, seed=self.seed, epoch=epoch, weights=self.weights, strata=self.strata
        )
        return plan_batches(
            order,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=self.drop_last,
            start=start,
        )

    def identity(self) -> dict[str, int | bool]:
        """Return what decides about the order: that of two samplings is the same if these are."""
        digest = zlib.crc32(self.rows.astype("<i8").tobytes())
        for part in (self.weights, self.strata):
            if part is not None:
                digest = zlib.crc32(np.ascontiguousarray(part).tobytes(), digest)
        return {"seed": int(self.seed), "shuffle": bool(self.shuffle), "scans": len(self.rows), "digest": digest}


@dataclass(frozen=True)
class BatchPlan:
    """The scans of one batch.

    Attributes
    ----------
    rows
        int64 (scan,), rows of the store.
    positions
        int64 (scan,), their places in the order of the epoch.
    valid
        bool (scan,), False for scans that only fill up the last batch of a rank.
    end
        Scans of the epoch that are taken, by all ranks, when this batch is.
    """

    rows: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    end: int


def count_batches(scans: int, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
    """Return how many batches each rank gets of `scans` scans."""
    whole, rest = divmod(scans, batch_size * world_size)
    return whole + (1 if rest and not drop_last else 0)


def plan_batches(
    order: np.ndarray,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    start: int = 0,
) -> Iterator[BatchPlan]:
    """Cut an epoch into batches and yield those of one rank.

    The ranks take turns, a batch each. What is left at the end is shared out evenly; a rank that gets a scan less than
    the others is given one of theirs, which is marked. So all ranks have the same number of batches, of the same sizes.

    Parameters
    ----------
    order
        int64 (scan,), see `epoch_order`.
    drop_last
        Leave out the end that does not fill a batch on every rank.
    start
        Scans that were taken before.
    """
    together = batch_size * world_size
    for begin in range(start, len(order), together):
        end = min(begin + together, len(order))
        if end - begin < together and drop_last:
            return
        share, more = divmod(end - begin, world_size)  # so many ranks get one more
        size = share + (1 if more else 0)
        valid = np.arange(size) < share + (1 if rank < more else 0)
        positions = np.where(valid, begin + rank * share + min(rank, more) + np.arange(size), begin)
        yield BatchPlan(order[positions], positions, valid, end)
