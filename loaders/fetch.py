"""The compressed slabs of a scan, from a file, an object or the local cache, into memory that is used again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import google_crc32c
import numpy as np

from ingest.decode import COMPILED, read_index
from ingest.places import ObjectPath, Place
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes, shard_name, shard_path
from ingest.store import VolumeStore
from loaders.cache import ShardCache
from loaders.files import read_shard

_ABSENT = np.uint64(2**64 - 1)  # of an index entry: a slab that zarr left out, for it is all zero


class Buffer:
    """Memory that grows to what is asked of it."""

    def __init__(self, nbytes: int = 0) -> None:
        self.memory = np.empty(nbytes, np.uint8)

    def reserve(self, nbytes: int) -> np.ndarray:
        """Return memory of at least so many bytes; what was returned before may not be used any more."""
        if len(self.memory) < nbytes:
            self.memory = np.empty(nbytes + nbytes // 4, np.uint8)
        return self.memory


@dataclass(frozen=True)
class Payload:
    """The slabs of a scan that are wanted, as they are stored and not checked yet.

    Attributes
    ----------
    content
        uint8: bytes of the shard, or some of them.
    index
        uint64 (slab, 2): where in `content` each slab begins, and its bytes, as in a shard's index. A slab without
        bytes is all zero.
    """

    content: np.ndarray
    index: np.ndarray


def _unchecked(_: Payload) -> None:
    """Let any payload pass."""


@dataclass(frozen=True)
class ShardFetcher:
    """Knows where the shards of a store are and what is wanted of each.

    Attributes
    ----------
    slabs
        int64, in ascending order: the slabs wanted.
    cache
        Where fetched shards are kept, if anywhere.
    check
        Raises ValueError for a damaged payload. Asked of what goes to the cache, and of what comes from there: such an
        entry is fetched again.
    """

    store: VolumeStore
    slabs: np.ndarray
    cache: ShardCache | None = None
    check: Callable[[Payload], None] = _unchecked
    gap: ClassVar[int] = 64 << 10  # bytes: reading so much that is not needed takes less time than another read
    all_slabs: int = field(init=False)
    largest: int = field(init=False)
    _path: Place = field(init=False)
    _prefix: bytes | None = field(init=False)

    def __post_init__(self) -> None:
        depth, height, width = self.store.grid.shape_zyx
        raw = self.store.slab * height * width
        object.__setattr__(self, "all_slabs", depth // self.store.slab)
        # What LZ4 makes of data that cannot be compressed; a larger file is none of ours, and not worth the memory.
        most = self.all_slabs * (raw + raw // 255 + 16 + SLAB_HEADER + CRC_BYTES) + index_bytes(self.all_slabs)
        object.__setattr__(self, "largest", most)
        path = self.store.path
        if isinstance(path, Path):
            path = path.absolute()  # once: the program may change its folder
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_prefix", os.fsencode(path) if COMPILED and isinstance(path, Path) else None)
        if self._prefix is not None:
            self._read_compiled(-1, Buffer())  # is compiled, or loaded, before any deadline runs

    @property
    def compiled(self) -> bool:
        """Whether shards are files that compiled code reads by itself."""
        return self._prefix is not None and self.cache is None

    def paths(self, rows: Sequence[int]) -> np.ndarray:
        """Return the paths of files, uint8 (scan, byte), each with a zero at its end."""
        paths = [b"%s/%s\0" % (self._prefix, shard_name(row).encode()) for row in rows]
        longest = max(map(len, paths))
        return np.frombuffer(b"".join(path.ljust(longest, b"\0") for path in paths), np.uint8).reshape(-1, longest)

    @property
    def whole(self) -> bool:
        """Whether all slabs are wanted."""
        return len(self.slabs) == self.all_slabs

    def fetch(self, row: int, buffer: Buffer) -> Payload:
        """Read what is wanted of a scan.

        Parameters
        ----------
        buffer
            Where the bytes go.

        Raises
        ------
        OSError, ValueError
            If the shard cannot be read, or its index is damaged.
        """
        if self.cache is not None:
            try:
                kept = self._read_file(self.cache.path(row), buffer, len(self.slabs), whole=True)
                self.check(kept)
                return kept
            except FileNotFoundError:
                pass
            except (OSError, ValueError):
                self.cache.remove(row)
        if self.compiled and (payload := self._read_compiled(row, buffer)):
            return payload
        place = shard_path(self._path, row)
        if isinstance(place, Path):
            payload = self._read_file(place, buffer, self.all_slabs, whole=self.whole)
        else:
            payload = self._get(place, buffer)
        if self.cache is not None:
            self.check(payload)
            self.cache.add(row, payload.content.data if self.whole else _as_shard(payload))
        return payload

    def _read_compiled(self, row: int, buffer: Buffer) -> Payload | None:
        """Read a file by compiled code; None if anything is wrong with it, which `_read_file` can put in words."""
        path = self.paths([row])[0]
        index = np.empty((len(self.slabs), 2), np.uint64)
        while True:
            memory = buffer.memory
            found = read_shard(path, self.all_slabs, self.slabs, self.gap, self.largest, memory, index, 0)
            if found > 0:
                return Payload(memory[:found], index)
            if found >= -1:
                return None
            buffer.reserve(-found)

    def _read_file(self, path: Path, buffer: Buffer, slabs: int, *, whole: bool) -> Payload:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no regular file")
            size = status.st_size
            self._check_size(size, slabs)
            if whole:
                content = buffer.reserve(size)[:size]
                _pread(descriptor, content, 0)
                return Payload(content, _dense(read_index(content, slabs), self.slabs))
            tail = np.empty(index_bytes(slabs), np.uint8)
            _pread(descriptor, tail, size - len(tail))
            index = self._wanted(tail, size)
            runs = _runs(index)
            content = buffer.reserve(sum(end - start for start, end in runs))
            at = 0
            for start, end in runs:
                _pread(descriptor, content[at : at + end - start], start)
                at += end - start
            return Payload(content[:at], _moved(index, runs))
        finally:
            os.close(descriptor)

    def _get(self, place: ObjectPath, buffer: Buffer) -> Payload:
        if self.whole:
            shard, size = place.read_tail(self.largest)  # no more, however large the object is
            self._check_size(size, self.all_slabs)
            pieces, runs = [shard], [(0, size)]
            index = _dense(read_index(np.frombuffer(shard, np.uint8), self.all_slabs), self.slabs)
        else:
            tail, size = place.read_tail(index_bytes(self.all_slabs))
            self._check_size(size, self.all_slabs)
            index = self._wanted(np.frombuffer(tail, np.uint8), size)
            runs = _runs(index)
            pieces = place.read_ranges(runs)
        content = buffer.reserve(sum(map(len, pieces)))
        at = 0
        for piece, (start, end) in zip(pieces, runs, strict=True):
            if len(piece) != end - start:
                raise ValueError(f"bytes {start} to {end} were asked for, {len(piece)} came")
            content[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
        return Payload(content[:at], _moved(index, runs))

    def _check_size(self, size: int, slabs: int) -> None:
        if not index_bytes(slabs) <= size <= self.largest:
            raise ValueError(f"the shard has {size} bytes, expected {index_bytes(slabs)} to {self.largest}")

    def _wanted(self, tail: np.ndarray, size: int) -> np.ndarray:
        """Return the index entries of the slabs that are wanted, all of them within the shard."""
        index = _dense(read_index(tail, self.all_slabs)[self.slabs], self.slabs)
        inside = (index[:, 1] <= size) & (index[:, 0] <= np.uint64(size) - np.minimum(index[:, 1], np.uint64(size)))
        if not inside.all():
            number = int(np.argmin(inside))
            raise ValueError(f"slab {self.slabs[number]} lies outside the shard")
        return index


def _pread(descriptor: int, out: np.ndarray, offset: int) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:].data], offset + done)
        if count == 0:
            raise ValueError(f"the file ends {len(out) - done} bytes too early")
        done += count


def _dense(index: np.ndarray, slabs: np.ndarray) -> np.ndarray:
    """Turn entries of slabs that were left out into such without bytes; the result is always of the same layout."""
    absent = (index == _ABSENT).all(axis=1)
    if not index[:, 1].all():
        raise ValueError(f"slab {slabs[np.argmin(index[:, 1])]} has no bytes")
    return np.where(absent[:, np.newaxis], np.uint64(0), index)


def _runs(index: np.ndarray) -> list[tuple[int, int]]:
    """Return stretches (start, end) of a shard that cover all its wanted slabs, in ascending order."""
    runs: list[tuple[int, int]] = []
    for start, nbytes in sorted(index.tolist()):
        if not nbytes:
            continue
        if runs and start <= runs[-1][1] + ShardFetcher.gap:
            runs[-1] = (runs[-1][0], max(runs[-1][1], start + nbytes))
        else:
            runs.append((start, start + nbytes))
    return runs


def _moved(index: np.ndarray, runs: list[tuple[int, int]]) -> np.ndarray:
    """Return the index of slabs whose shard was read in stretches that now lie one after the other."""
    if len(runs) == 1 and runs[0][0] == 0:
        return index
    moved = index.copy()
    at = 0
    for start, end in runs:
        inside = (index[:, 1] > 0) & (index[:, 0] >= start) & (index[:, 0] < end)
        moved[inside, 0] = index[inside, 0] - np.uint64(start) + np.uint64(at)
        at += end - start
    return moved


def _as_shard(payload: Payload) -> bytes:
    """Return the wanted slabs as a shard of their own."""
    pieces, entries, at = [], [], 0
    for start, nbytes in payload.index.tolist():
        if nbytes:
            pieces.append(payload.content[start : start + nbytes].tobytes())
            entries.append((at, nbytes))
            at += nbytes
        else:
            entries.append((int(_ABSENT), int(_ABSENT)))
    index = np.array(entries, dtype="<u8").tobytes()
    return b"".join([*pieces, index, int(google_crc32c.value(index)).to_bytes(CRC_BYTES, "little")])
