"""How much memory a run may take, and what that allows: threads, and the largest scan that is read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ingest.errors import MemoryBudgetError

#: Of a process with the libraries loaded, and of the coordinator's tables per scan; measured, rounded up.
PROCESS_BYTES = 320 << 20
ROW_BYTES = 3 << 10
#: The grid of a scan as float32 and as bytes, its shard, and what else is in hand.
GRID_BYTES = 40 << 20
#: The voxels of an ordinary scan: a float32 volume in UK Biobank's MNI152 grid has 29 MB, a head at 0.8 mm 67 MB.
VOXEL_BYTES = 72 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_ORDINARY = 4  # times the median: larger files do not decide about the others


@dataclass(frozen=True)
class MemoryPlan:
    """What a run does with its memory.

    Attributes
    ----------
    threads
        Scans at a time in this process, where no other processes work.
    scan_bytes
        What one scan may take; None if nothing was asked for.
    process_bytes
        What one worker process may take; None likewise.
    """

    threads: int
    scan_bytes: int | None = None
    process_bytes: int | None = None


def plan_memory(max_bytes: int | None, file_bytes: Sequence[int], *, scans: int, workers: int) -> MemoryPlan:
    """Decide how many scans are read at a time.

    A scan needs its file twice (an archive and the member), its voxels, and the grid. Files of ordinary size decide, at
    most four times the median; what needs more than the plan leaves becomes a row with that reason.

    Parameters
    ----------
    max_bytes
        Of all processes on this machine together; None for no limit.
    file_bytes
        Sizes of the files to read.
    scans
        Rows of the store.
    workers
        Processes beside this one; 0 works in this one.

    Raises
    ------
    MemoryBudgetError
        If not even one scan at a time is possible; shows the arithmetic.
    """
    cores = len(os.sched_getaffinity(0))
    threads = cores + 1  # one more: some wait for the disk
    if max_bytes is None:
        return MemoryPlan(threads)
    middle = median(file_bytes) if file_bytes else 0
    largest = max((size for size in file_bytes if size <= _ORDINARY * middle), default=0)
    scan = 2 * largest + VOXEL_BYTES + GRID_BYTES
    tables = PROCESS_BYTES + scans * ROW_BYTES
    one = (
        f"2 x {_mb(largest)} for the largest file + {_mb(VOXEL_BYTES)} for its voxels + {_mb(GRID_BYTES)} for the grid"
    )
    own = f"{_mb(PROCESS_BYTES)} for this process + {_mb(scans * ROW_BYTES)} for {scans} rows"
    if workers:
        needed = tables + workers * (PROCESS_BYTES + scan)
        if needed > max_bytes:
            fit = (max_bytes - tables) // (PROCESS_BYTES + scan)
            advice = f"--workers {fit}, or " if fit > 0 else ""
            raise MemoryBudgetError(
                f"--max-memory {_mb(max_bytes)} is too little for {workers} workers: {own} + {workers} x "
                f"({_mb(PROCESS_BYTES)} + {one}) = {_mb(needed)}; use {advice}--max-memory {_mb(needed)}"
            )
        process = (max_bytes - tables) // workers
        return MemoryPlan(threads, process - PROCESS_BYTES, process)
    fit = (max_bytes - tables) // scan
    if fit < 1:
        raise MemoryBudgetError(
            f"--max-memory {_mb(max_bytes)} is too little for one scan at a time: {own} + {one} = "
            f"{_mb(tables + scan)}; use --max-memory {_mb(tables + scan)}"
        )
    threads = min(threads, fit)
    return MemoryPlan(threads, (max_bytes - tables) // threads)


def keep_freed_memory() -> None:
    """Let this process use the memory of one volume for the next, rather than ask the system for it each time.

    The C library gives blocks of more than 32 MB back as soon as they are free, and dask tells its workers to do so
    from 64 KB; the system then zeroes pages for every volume, one by one, which takes as long as inflating it.
    """
    _mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    _mallopt(_M_ARENA_MAX, 1)  # one heap for all threads: what one has freed another can use


def give_memory_back() -> None:
    """Return what `keep_freed_memory` has kept to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; musl has none, and needs none
    if mallopt:
        mallopt(parameter, value)


def _mb(size: int) -> str:
    return f"{-(-size // 10**6)}MB"
