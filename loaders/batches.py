"""Batches in the memory of the host: filled ahead by threads, used again once nobody holds them."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from loaders.errors import ShardError, as_shard_error
from loaders.order import BatchPlan
from loaders.threads import BatchGroups, ScanGroup, ScanThreads
from loaders.timing import Timing

logger = logging.getLogger("loaders")

_TORCH_TYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
_MOST_IN_GROUP = 16  # scans; of larger groups all threads would long be at work before the first batch is there
_KEPT = 3  # batches whose memory is kept: one in use, one that is ready, one that is being filled


class BatchPool:
    """Hands out batches of uninitialised memory, and the same again when nobody holds them any more.

    No page faults, and no batch is overwritten that somebody still holds. Who holds it, Python's own count of
    references tells when the next batch is asked for: a callback on the last one's end may swallow Ctrl-C.

    Parameters
    ----------
    shape
        Of the largest batch.
    dtype
        What threads write.
    pinned
        Page-locked memory, from which a GPU copies by itself.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, *, pinned: bool = False) -> None:
        self._shape = shape
        self._dtype = dtype
        self._pinned = pinned
        self._memories: list[np.ndarray] = []

    def take(self, scans: int) -> np.ndarray:
        """Return an array (scans, ...). Its views, and tensors made of them, keep it from being used again."""
        free = [number for number in range(len(self._memories)) if self._is_free(number)]
        for number in reversed(free[_KEPT:]):  # of a consumer that held many once
            del self._memories[number]
        if free:
            memory = self._memories[free[0]]
        else:
            memory = self._allocate()
            self._memories.append(memory)
        return memory[:scans]

    def _is_free(self, number: int) -> bool:
        # Every view of an array refers to the array itself. One reference is the list's, one that of the call.
        return sys.getrefcount(self._memories[number]) <= 2

    def _allocate(self) -> np.ndarray:
        nbytes = int(np.prod(self._shape)) * self._dtype.itemsize
        # Not a view of an array, to which its own views would refer instead: its base is the tensor.
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned).view(_TORCH_TYPES[self._dtype.name])
        return memory.view(self._shape).numpy()


def loaded_batches(
    plans: Iterator[BatchPlan],
    threads: ScanThreads,
    new_batch: Callable[[int], Any],
    describe: Callable[[int], str],
    timing: Timing,
    *,
    ahead: int,
    most_groups: int,
    skipped: dict[int, str] | None,
    blank: Callable[[Any, int], None],
) -> Generator[tuple[BatchPlan, Any]]:
    """Yield batches in order while the next ones are being loaded.

    Parameters
    ----------
    new_batch
        ``new_batch(scans)`` gives what threads fill, the target of their groups.
    describe
        Names a row in errors.
    ahead
        Batches under way while the consumer has one.
    most_groups
        Of a batch, each of which a thread loads scan after scan; more if those were large.
    skipped
        None if a scan that cannot be had is an error; else the reasons are put there by row, and such scans are not
        valid in the plans that are yielded.
    blank
        ``blank(batch, place)`` makes an empty picture of such a scan.

    Raises
    ------
    ShardError
        Naming the scan.
    """
    running: deque[tuple[BatchPlan, Any, BatchGroups]] = deque()
    yielded = time.perf_counter()
    try:
        while True:
            asked = time.perf_counter()
            if running and not any(groups.remaining for _, _, groups in running):
                done = max(yielded, *(groups.finished for _, _, groups in running))
                timing.idle += max(0.0, asked - done)
            while len(running) < ahead and (plan := next(plans, None)) is not None:
                batch = new_batch(len(plan.rows))
                rows, places = plan.rows.tolist(), range(len(plan.rows))
                size = min(-(-len(rows) // most_groups), _MOST_IN_GROUP)
                parts = [slice(start, start + size) for start in range(0, len(rows), size)]
                groups = BatchGroups([ScanGroup(rows[part], places[part], batch) for part in parts])
                threads.submit(groups)
                running.append((plan, batch, groups))
            if not running:
                return
            plan, batch, groups = running.popleft()
            try:
                threads.wait(groups)
            except BaseException:
                threads.cancel(groups)
                raise
            timing.starved += time.perf_counter() - asked
            plan = _settle(plan, batch, groups, describe, skipped, blank)
            yielded = time.perf_counter()
            yield plan, batch
            del plan, batch, groups  # else this frame would hold memory that the consumer has let go of
    finally:
        for _, _, groups in running:
            threads.cancel(groups)


def _settle(
    plan: BatchPlan,
    batch: Any,
    groups: BatchGroups,
    describe: Callable[[int], str],
    skipped: dict[int, str] | None,
    blank: Callable[[Any, int], None],
) -> BatchPlan:
    """Raise what went wrong with a batch, or mark the scans and blank their pictures."""
    wrong = {place: error for group in groups.groups for place, error in group.errors.items()}
    valid = plan.valid
    for place in sorted(wrong):
        row = int(plan.rows[place])
        error: ShardError = as_shard_error(wrong[place], describe(row))
        if skipped is None:
            raise error
        if row not in skipped:
            logger.warning("skipped: %s", error)
        skipped[row] = str(error)
        valid = valid.copy()
        valid[place] = False
        blank(batch, place)
    return plan if valid is plan.valid else BatchPlan(plan.rows, plan.positions, valid, plan.end)
