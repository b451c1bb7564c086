"""What goes wrong while loading; every message names the scan."""

from __future__ import annotations

from ingest.errors import ObjectStoreError, StoreError
from ingest.store import VolumeStore


class ShardError(StoreError):
    """A scan that cannot be had."""


class CorruptShardError(ShardError):
    """A shard that is absent, or whose bytes are not what was written."""


class SlowReadError(ShardError, TimeoutError):
    """A read that took longer than the deadline."""


def describe_scan(store: VolumeStore, row: int) -> str:
    """Return what names a scan in errors."""
    return f"row {row} ({store.scans['source'].iloc[row]}) of {store.path}"


def as_shard_error(error: BaseException, scan: str) -> ShardError:
    """Return what went wrong with a scan in words that name it; an error that no scan is to blame for is raised."""
    if isinstance(error, ShardError):
        return error
    if not isinstance(error, (OSError, ValueError)):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    fix = "ingest verify STORE --against SRC --repair makes it again from its source, or leave the row out"
    if isinstance(error, ObjectStoreError):
        fix = "or leave the row out"  # it says itself what to do about the network or the rights
    wrapped = CorruptShardError(f"{scan} cannot be read: {text}; {fix}")
    wrapped.__cause__ = error
    return wrapped
