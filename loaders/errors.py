"""What goes wrong while loading; every message names the scan."""

from __future__ import annotations

from ingest.errors import StoreError


class ShardError(StoreError):
    """A scan that cannot be had."""


class CorruptShardError(ShardError):
    """A shard that is absent, or whose bytes are not what was written."""


class SlowReadError(ShardError, TimeoutError):
    """A read that took longer than the deadline."""
