"""Errors of the package. Each names the value, what was expected and the fix."""

from __future__ import annotations

import errno

#: What the system says where nothing can be written: the disk is full, over quota, read-only, or not ours.
CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class StoreError(ValueError):
    """A store (or embedding file) that cannot be used as asked."""


class StoreBusyError(StoreError):
    """A store (or embedding file, or run) that another process is writing."""


class SourceError(FileNotFoundError):
    """A source folder in which no scans can be found."""


class ObjectStoreError(OSError):
    """An object store that does not answer, refuses, or lacks the bucket."""


class SchedulerError(ConnectionError):
    """A dask scheduler that does not answer, or an address that cannot be one."""


class TableError(ValueError):
    """A phenotype table that cannot be read or joined."""


class MemoryBudgetError(ValueError):
    """A limit of memory in which the work asked for cannot be done."""


class ScanError(Exception):
    """One scan that cannot be stored; it becomes a row of the store, never the end of a run.

    Parameters
    ----------
    status
        One of `ingest.scan.STATUSES`.
    reason
        A sentence for the ``error`` column.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
