"""A bounded folder on a fast disk that keeps compressed shards of a store that is slow or far away.

It holds shards as they are stored, never voxels, so it is never larger than what was fetched. All processes of a
machine share it. Once it is full it keeps what it has: of an epoch in random order that serves the same share of the
scans as any other choice would, while the usual rule, to give up what was used longest ago, gives up exactly the
scans that come next.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ingest.store import VolumeStore

logger = logging.getLogger("loaders")

_USAGE = ".bytes"  # of all files together; changed under a lock


class ShardCache:
    """Keeps shards of one store, or the same slabs of each, in a folder that other caches may use too.

    Parameters
    ----------
    directory
        The folder; it is made if it is not there.
    max_bytes
        What all files in it may have together.
    store
        Whose shards are kept. Entries of scans that changed, or are withdrawn, are removed.
    slabs
        Which slabs of each shard; part of the entries' folder name, so that views do not mix.

    Raises
    ------
    ValueError
        If `max_bytes` is not positive.
    """

    def __init__(self, directory: Path, max_bytes: int, store: VolumeStore, slabs: np.ndarray) -> None:
        if max_bytes <= 0:
            raise ValueError(f"the cache's size is {max_bytes} bytes, expected more than 0")
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._scans = store.scans
        self._folder = self.directory / f"{store.attrs['store_id']}-{zlib.crc32(slabs.astype('<i8').tobytes()):08x}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._failed = False
        with self._locked() as usage:
            self._remove_outdated()
            usage[0] = sum(size for _, _, size in self._files())

    def path(self, row: int) -> Path:
        """Return where the entry of a scan is, if there is one; its name tells versions of the scan apart."""
        scan = self._scans.iloc[row]
        version = f"{scan['source']}|{scan['source_size']}|{scan['source_mtime']}|{scan['scale']}"
        return self._folder / f"{row}-{zlib.crc32(version.encode()):08x}"

    def add(self, row: int, content: bytes | memoryview) -> bool:
        """Keep a shard if there is room; shards of other stores make room, the oldest first.

        A disk that cannot be written is told once and not used any more: a cache is no reason for a run to fail.
        """
        size = len(content)
        if self._failed or size > self.max_bytes:
            return False
        path = self.path(row)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._locked() as usage:
                if path.exists():
                    return True
                if usage[0] + size > self.max_bytes:
                    usage[0] -= self._make_room(usage[0] + size - self.max_bytes)
                if usage[0] + size > self.max_bytes:
                    return False
                usage[0] += size  # before writing, which need not hold up others
            try:
                temporary.write_bytes(content)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._failed = True
            logger.warning("the cache in %s cannot be written and is not used: %s", self.directory, error)
            return False
        return True

    def remove(self, row: int) -> None:
        """Remove the entry of a scan, if there is one."""
        path = self.path(row)
        with self._locked() as usage, contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            usage[0] -= size

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[int]]:
        """Give a list with the bytes in use, which may be changed; processes take turns."""
        with open(self.directory / _USAGE, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            usage = [int(text) if text.isdigit() else 0]
            before = usage[0]
            yield usage
            if usage[0] != before or not text:
                file.truncate(0)
                file.write(b"%d" % max(0, usage[0]))

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Yield path, time of writing and bytes of every entry of every store."""
        for parent, _, names in os.walk(self.directory):
            for name in names:
                if name != _USAGE:
                    path = Path(parent) / name
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield path, stat.st_mtime, stat.st_size

    def _remove_outdated(self) -> None:
        """Remove entries of this store whose scan is not what it was, and what killed processes left half written."""
        good = self._scans["status"].to_numpy() == "ok"
        for path in list(self._folder.parent.glob(f"{self._folder.name.rpartition('-')[0]}-*/*")):
            row = path.name.partition("-")[0]
            current = (
                row.isdigit() and int(row) < len(good) and good[int(row)] and path.name == self.path(int(row)).name
            )
            if not current:
                path.unlink(missing_ok=True)

    def _make_room(self, nbytes: int) -> int:
        """Remove entries of other stores, the oldest first, until so many bytes are free; return how many are."""
        freed = 0
        for path, _, size in sorted(self._files(), key=lambda entry: entry[1]):
            if freed >= nbytes:
                break
            if path.parent != self._folder:
                path.unlink(missing_ok=True)
                freed += size
        return freed
