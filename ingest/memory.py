"""How much memory a run may take, and what that allows: threads, and the largest scan that is read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from ingest.errors import MemoryBudgetError

#: Of a process with the libraries loaded; measured, rounded up. 150 MB of it go into compiling the inner loops, which
#: happens once on a machine.
PROCESS_BYTES = 440 << 20
#: Of the coordinator's tables, per scan, and per phenotype of a scan, whose text is there until all are numbers.
ROW_BYTES = 3 << 10
PHENOTYPE_BYTES = 26
#: The grid of a scan as float32 and as bytes, its shard, and what else is in hand.
GRID_BYTES = 64 << 20
#: The voxels of an ordinary scan: a float32 volume in UK Biobank's MNI152 grid has 29 MB, a head at 0.8 mm 67 MB. They
#: are there twice if the axes of a volume must be put into another order.
VOXEL_BYTES = 72 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_ORDINARY = 4  # times the median: larger files do not decide about the others
_MB = 10**6


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
        The limit at which dask ends a worker process; None likewise. It is a third more than what one may take, for
        `kept_memory` keeps.
    """

    threads: int
    scan_bytes: int | None = None
    process_bytes: int | None = None


def plan_memory(
    max_bytes: int | None,
    file_bytes: Sequence[int],
    *,
    scans: int,
    workers: int,
    remote: bool = False,
    phenotypes: int = 0,
) -> MemoryPlan:
    """Decide how many scans are read at a time.

    A scan needs its file twice (an archive and the member), its voxels twice (see `VOXEL_BYTES`), and the grid. Files
    of ordinary size decide, at most four times the median; what needs more than the plan leaves becomes a row with that
    reason. Everything is counted in whole megabytes, rounded up, so that the sums shown are right.

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
    remote
        Processes elsewhere do the work, one scan at a time each, and `max_bytes` is what one of them may take.
    phenotypes
        Columns of the table.

    Raises
    ------
    MemoryBudgetError
        If not even one scan at a time is possible; shows the arithmetic.
    """
    cores = len(os.sched_getaffinity(0))
    threads = 1 if remote else cores + 1  # one more: some wait for the disk
    if remote:
        scans = 0  # the tables are not there
    if max_bytes is None:
        return MemoryPlan(threads)
    middle = median(file_bytes) if file_bytes else 0
    largest = _mb(max((size for size in file_bytes if size <= _ORDINARY * middle), default=0))
    rows = scans * (ROW_BYTES + phenotypes * PHENOTYPE_BYTES)
    process, voxels, grid, table = map(_mb, (PROCESS_BYTES, VOXEL_BYTES, GRID_BYTES, rows))
    given, own, scan = max_bytes // _MB, process + table, 2 * largest + 2 * voxels + grid
    one = f"2 x {largest}MB for the largest file + 2 x {voxels}MB for its voxels + {grid}MB for the grid"
    of_table = f" of {phenotypes} phenotypes" if phenotypes else ""
    mine = f"{process}MB for this process + {table}MB for {scans} rows{of_table}"
    if workers:
        needed = own + workers * (process + scan)
        if needed > given:
            fit = (given - own) // (process + scan)
            advice = f"--workers {fit}, or " if fit > 0 else ""
            raise MemoryBudgetError(
                f"--max-memory {_as_given(max_bytes)} is too little for {workers} workers: {mine} + {workers} x "
                f"({process}MB + {one}) = {needed}MB; use {advice}--max-memory {needed}MB"
            )
        share = (max_bytes - own * _MB) // workers
        return MemoryPlan(threads, share - process * _MB, share * 4 // 3)
    fit = (given - own) // scan
    if fit < 1:
        raise MemoryBudgetError(
            f"--max-memory {_as_given(max_bytes)} is too little for one scan at a time: {mine} + {one} = "
            f"{own + scan}MB; use --max-memory {own + scan}MB"
        )
    threads = min(threads, fit)
    return MemoryPlan(threads, (max_bytes - own * _MB) // threads)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let this process use the memory of one volume or batch for the next, rather than ask the system each time.

    The C library gives blocks of more than 32 MB back as soon as they are free, and dask tells its workers to do so
    from 64 KB; the system then zeroes pages for every volume, one by one, which takes as long as inflating it. What a
    network makes of a batch is as large. What was kept is given back in the end.
    """
    _mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    _mallopt(_M_ARENA_MAX, 1)  # one heap for all threads: what one has freed another can use
    try:
        yield
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; musl has none, and needs none
    if mallopt:
        mallopt(parameter, value)


def _as_given(size: int) -> str:
    """Return a limit as it was meant; one below a megabyte was hardly meant in bytes."""
    return f"{size // _MB}MB" if size >= _MB else f"{size} (bytes, as all sizes without a unit)"


def _mb(size: int) -> int:
    """Return megabytes, rounded up."""
    return -(-size // _MB)
