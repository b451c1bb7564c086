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
import re
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ingest.store import VolumeStore
from loaders.checks import as_whole

logger = logging.getLogger("loaders")

_USAGE = ".bytes"  # see `_Usage`
_DIGITS = 20
_LEAST_FREED = 20  # of what the cache may hold a 20th at least is freed at a time: whoever frees looks at all entries
_FOLDER = re.compile(r".+-[0-9a-f]{8}")
_ENTRY = re.compile(r"[0-9]+-[0-9a-f]{8}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")


class ShardCache:
    """Keeps shards of one store, or the same slabs of each, in a folder that other caches may use too.

    Parameters
    ----------
    directory
        The folder; it is made if it is not there. What else lies in it is neither counted nor touched.
    max_bytes
        What all entries in it may have together.
    store
        Whose shards are kept. Entries of scans that changed, or are withdrawn, are removed.
    slabs
        Which slabs of each shard; part of the entries' folder name, so that views do not mix.

    Raises
    ------
    ValueError
        If `max_bytes` is no whole number above 0.
    """

    def __init__(self, directory: Path, max_bytes: int, store: VolumeStore, slabs: np.ndarray) -> None:
        self.directory = Path(directory).absolute()  # the program may change its folder
        self.max_bytes = as_whole("cache_bytes", max_bytes, 1)
        versions = (store.scans[name].tolist() for name in ("source", "source_size", "source_mtime", "scale"))
        self._versions = list(zip(*versions, strict=True))
        self._store_id = store.attrs["store_id"]
        self._folder = self.directory / f"{self._store_id}-{zlib.crc32(slabs.astype('<i8').tobytes()):08x}"
        self._failed = False
        self._telling = threading.Lock()
        self._full = False  # looking for room among 100,000 entries again and again would take longer than fetching
        self._opened = 0.0  # by the clock of the disk, which may be another machine's
        with self._not_failing():
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as usage:
                self._remove_outdated(store.scans["status"].to_numpy() == "ok")
                usage.set(self._count())
                self._opened = usage.written

    def path(self, row: int) -> Path:
        """Return where the entry of a scan is, if there is one; its name tells versions of the scan apart."""
        version = "|".join(map(str, self._versions[row]))
        return self._folder / f"{row}-{zlib.crc32(version.encode()):08x}"

    def add(self, row: int, content: bytes | memoryview) -> bool:
        """Keep a shard if there is room; shards of other stores make room, the oldest first.

        Only those that were there when this cache was opened: two loaders that share a folder would evict each other's
        for ever, and both read everything from afar.

        A disk that cannot be written is told once and not used any more: a cache is no reason for a run to fail.
        """
        if self._failed or self._full or len(content) > self.max_bytes:
            return False
        with self._not_failing():
            return self._add(self.path(row), content)
        return False

    def remove(self, row: int) -> None:
        """Remove the entry of a scan, if there is one."""
        self._full = False
        with self._not_failing(), self._locked() as usage:
            usage.set(usage.bytes - _remove(self.path(row)))

    def _add(self, path: Path, content: bytes | memoryview) -> bool:
        size, descriptor = len(content), -1
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._locked() as usage:
                if path.exists():
                    return True
                if usage.bytes + size > self.max_bytes:
                    usage.set(usage.bytes - self._make_room(usage.bytes + size - self.max_bytes))
                if usage.bytes + size > self.max_bytes:
                    self._full = True
                    return False
                usage.set(usage.bytes + size)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells it from what a killed process has left
                os.truncate(descriptor, size)  # whoever counts finds it in its full size
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            with self._locked() as usage:
                if path.exists():  # another process was faster
                    usage.set(usage.bytes - _remove(temporary))
                else:
                    temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            with self._locked() as usage:
                usage.set(self._count())
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True

    @contextlib.contextmanager
    def _not_failing(self) -> Iterator[None]:
        """Warn of errors of the disk, once, instead of raising them; nothing is added any more."""
        try:
            yield
        except OSError as error:
            with self._telling:
                told, self._failed = self._failed, True
            if not told:
                logger.warning("the cache in %s cannot be written and is not used: %s", self.directory, error)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """Give what is in use, which may be changed; processes and threads take turns."""
        descriptor = os.open(self.directory / _USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Usage(descriptor, self._count)
        finally:
            os.close(descriptor)

    def _count(self) -> int:
        return sum(size for _, _, size in self._files())

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Yield path, time of writing and bytes of every entry of every store, finished or not."""
        for folder in self.directory.iterdir():
            if _FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if _ENTRY.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
                            with contextlib.suppress(FileNotFoundError):
                                stat = entry.stat(follow_symlinks=False)
                                yield Path(entry.path), stat.st_mtime, stat.st_size

    def _remove_outdated(self, good: np.ndarray) -> None:
        """Remove entries of this store whose scan is not what it was, and what killed processes left half written."""
        for path, _, _ in list(self._files()):
            if _UNFINISHED.fullmatch(path.name):
                if _is_abandoned(path):
                    _remove(path)
            elif path.parent.name.rpartition("-")[0] == self._store_id:
                row = int(path.name.partition("-")[0])
                if not (row < len(good) and good[row] and path.name == self.path(row).name):
                    _remove(path)

    def _make_room(self, nbytes: int) -> int:
        """Remove entries of other stores, the oldest first, until so many bytes are free; return how many are."""
        freed, wanted = 0, max(nbytes, self.max_bytes // _LEAST_FREED)
        for path, written, _ in sorted(self._files(), key=lambda entry: entry[1]):
            if freed >= wanted or written >= self._opened:
                break
            if path.parent != self._folder and _ENTRY.fullmatch(path.name):
                freed += _remove(path)
        return freed


class _Usage:
    """The bytes of all entries together, in a file that is locked.

    They are counted anew where the file does not say. A process that dies in between leaves too large a number, never
    too small a one, if it tells of entries before it makes them and after it has removed them.
    """

    def __init__(self, descriptor: int, count: Callable[[], int]) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, _DIGITS + 1, 0)
        self.bytes = int(text) if len(text) == _DIGITS and text.isdigit() else count()

    def set(self, nbytes: int) -> None:
        """Write another number."""
        self.bytes = max(0, nbytes)
        os.pwrite(self._descriptor, b"%0*d" % (_DIGITS, self.bytes), 0)

    @property
    def written(self) -> float:
        """When it was written, as `os.stat` tells it of entries."""
        return os.fstat(self._descriptor).st_mtime


def _remove(path: Path) -> int:
    """Remove a file, if there is one; return the bytes that it had."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _is_abandoned(path: Path) -> bool:
    """Tell whether nobody is writing a file any more."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
