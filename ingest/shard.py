"""The bytes of one shard: a whole scan as independent LZ4 slabs with a dense index at the end.

Layout (that of Zarr v3's ``sharding_indexed`` codec, so zarr-python and xarray read it; every slab is present)::

    slab 0 | slab 1 | ... | index: uint64 (offset, nbytes) per slab | crc32c of the index
    slab = raw length (uint32) | LZ4 block | crc32c (uint32)            all little-endian

The raw LZ4 block of a slab is bytes ``offset + 4`` to ``offset + nbytes - 4``: what a GPU inflates.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import uuid
from pathlib import Path
from typing import overload

from ingest.places import ObjectPath, Place

SLAB_HEADER = 4  # raw length
CRC_BYTES = 4
INDEX_ENTRY = 16

_BLOCK = 4096  # what disks want of a write that goes past the cache: its size and place are multiples of it
_of_thread = threading.local()


def index_bytes(slabs: int) -> int:
    """Return the size of the index at the end of a shard, with its checksum."""
    return slabs * INDEX_ENTRY + CRC_BYTES


def shard_name(row: int) -> str:
    """Return the name of the shard of a row, relative to its store."""
    return f"volumes/c/{row}/0/0/0"


@overload
def shard_path(store: Path, row: int) -> Path: ...


@overload
def shard_path(store: ObjectPath, row: int) -> ObjectPath: ...


def shard_path(store: Place, row: int) -> Place:
    """Return where the shard of a row lies in a store."""
    return store / shard_name(row)


def write_shard(path: Place, content: bytes) -> None:
    """Write a shard so that it is there whole or not at all, also after a power cut.

    What an earlier writer of the same shard left unfinished is removed. Two writers at once, which a cluster may start
    when it takes a slow worker for a dead one, write the same bytes; the one that comes second finds them written.
    """
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    try:
        os.makedirs(path.parent)
    except FileExistsError:
        _remove_unfinished(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        if not _write_past_the_cache(temporary, content):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except FileNotFoundError:
            if not path.is_file():
                raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_past_the_cache(path: Path, content: bytes) -> bool:
    """Write a new file from this process's memory straight to the disk; return whether the file system can do that.

    Pages of the system's cache, which nobody will read soon, need not be found, filled and thrown away: that takes
    longer than compressing what is in them, and pushes out what others have there.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    size = -(-len(content) // _BLOCK) * _BLOCK
    buffer: mmap.mmap | None = getattr(_of_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _of_thread.buffer = mmap.mmap(-1, size)  # begins at a page, as such writes must
    buffer[: len(content)] = content
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
        try:
            with memoryview(buffer) as view:
                written = os.write(file, view[:size])
            os.truncate(file, len(content))
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return written == size


def remove_shard(path: Place) -> None:
    """Remove a shard and what was left of writing it, if there is any."""
    path.unlink(missing_ok=True)
    if isinstance(path, Path):
        _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)
