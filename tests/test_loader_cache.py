"""The cache on a local disk: bounded, shared, and never the reason for a wrong picture or a failed run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import lz4
from small_store import SHAPE, SLAB, make_store

from ingest.shard import encode_shard, shard_path, write_shard
from ingest.store import open_store, rows_of, write_scans
from loaders import CorruptShardError, dali_backend, loader, open_loader
from loaders.cache import ShardCache
from loaders.views import plan_picture

SCANS = 8
PLENTY = 10**7
BACKENDS = ["torch", "dali"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["loaders", "small_store"])


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("cache") / "s.zarr"
    return path, make_store(path, SCANS)


@pytest.fixture
def store(original, tmp_path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "s.zarr"))


@pytest.fixture
def voxels(original) -> np.ndarray:
    return np.array(original[1])


def images_of(store: Path, cache: Path | None = None, cache_bytes: int = PLENTY, **settings: Any) -> np.ndarray:
    """Return what a pass of a new loader gives, in the order of the rows."""
    if cache is not None:
        settings |= {"cache_dir": cache, "cache_bytes": cache_bytes}
    with open_loader(store, batch_size=3, **settings) as opened:
        return np.concatenate([batch.images.numpy() for batch in opened])


def remove_shards(store: Path) -> None:
    shutil.rmtree(store / "volumes" / "c")


def entries(cache: Path) -> list[Path]:
    """Return all files but the one that counts, in any folder."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name != ".bytes")


def on_disk(cache: Path) -> int:
    """Sum what there is, under the lock, for what others are renaming must not be counted twice or not at all."""
    with open(cache / ".bytes") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in entries(cache))


def shard_bytes(store: Path, rows: range = range(SCANS)) -> int:
    return sum(shard_path(store, row).stat().st_size for row in rows)


def counted(cache: Path) -> int:
    return int((cache / ".bytes").read_text())


def decode_lz4(content: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    out = np.empty((len(offsets), SLAB, *SHAPE[1:]), np.uint8)
    length = int(out[0].nbytes).to_bytes(4, "little")
    for slab, offset, size in zip(out, offsets, sizes, strict=True):
        lz4.decompress(length + content[offset : offset + size].tobytes(), slab)
    return out


@pytest.fixture
def as_if_on_a_gpu(monkeypatch) -> None:
    """Let the DALI backend take the way of a GPU, which is given compressed bytes, but for `inflate`."""

    def inflate(content: Any, offsets: Any, sizes: Any, _: list[int]) -> Any:
        return dali_backend.fn.python_function(content, offsets, sizes, function=decode_lz4, output_layouts="FDHW")

    monkeypatch.setattr(dali_backend, "_inflate", inflate)
    monkeypatch.setattr(loader, "_inflates", lambda backend, _: backend == "dali")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["volume", "axial", "coronal"])
def test_the_second_pass_reads_nothing_from_the_source(store, tmp_path, backend, view):
    settings: dict[str, Any] = {"view": view, "slices": [2, 9], "backend": backend}
    expected = images_of(store, **settings)
    cache = tmp_path / "cache"
    with open_loader(store, batch_size=3, cache_dir=cache, cache_bytes=PLENTY, **settings) as loaded:
        first = np.concatenate([batch.images.numpy() for batch in loaded])
        remove_shards(store)
        again = np.concatenate([batch.images.numpy() for batch in loaded])
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(images_of(store, cache, **settings), expected)  # of another loader too
    with pytest.raises(CorruptShardError, match="No such file"):
        images_of(store, **settings)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_the_way_of_a_gpu_uses_the_cache_and_repairs_it(store, voxels, tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):
        np.testing.assert_array_equal(images_of(store, cache, backend="dali"), voxels)
    flip(entries(cache)[3])
    np.testing.assert_array_equal(images_of(store, cache, backend="dali"), voxels)
    remove_shards(store)
    np.testing.assert_array_equal(images_of(store, cache, backend="dali"), voxels)


def test_the_cache_holds_shards_as_they_are_stored_and_no_more(store, tmp_path):
    cache = tmp_path / "cache"
    images_of(store, cache)
    assert [path.read_bytes() for path in entries(cache)] == [
        shard_path(store, row).read_bytes() for row in range(SCANS)
    ]
    assert on_disk(cache) == shard_bytes(store) == counted(cache)
    images_of(store, tmp_path / "axial", view="axial", slices=[0, 5])  # two slabs of four
    assert on_disk(tmp_path / "axial") < shard_bytes(store) / 2
    assert on_disk(tmp_path / "axial") == counted(tmp_path / "axial")


def test_a_full_cache_keeps_what_it_has(store, voxels, tmp_path):
    cache, limit = tmp_path / "cache", int(shard_bytes(store) * 0.45)
    with open_loader(store, batch_size=3, cache_dir=cache, cache_bytes=limit, shuffle=True, threads=3) as loaded:
        for number in range(4):
            kept = entries(cache)
            for batch in loaded:
                np.testing.assert_array_equal(batch.images, voxels[batch.rows])
                assert on_disk(cache) <= limit
            if number:
                assert entries(cache) == kept
    assert len(kept) == int(SCANS * 0.45)
    for path in kept:  # these are served from the cache, the others from the store
        shard_path(store, int(path.name.partition("-")[0])).unlink()
    np.testing.assert_array_equal(images_of(store, cache, limit), voxels)


def test_a_cache_that_is_smaller_than_a_shard_stays_empty(store, voxels, tmp_path):
    np.testing.assert_array_equal(images_of(store, tmp_path / "cache", 100), voxels)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("size", [0, -5])
def test_a_size_that_cannot_be_is_refused(store, tmp_path, size):
    with pytest.raises(ValueError, match="cache"):
        open_loader(store, cache_dir=tmp_path / "cache", cache_bytes=size)


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "flipped in the index": lambda path: flip(path, path.stat().st_size - 30),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 10),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "of another scan's size": lambda path: path.write_bytes(os.urandom(500)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "huge": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("view", ["volume", "axial"])
def test_a_damaged_entry_is_repaired_from_the_store(store, tmp_path, damage, view):
    cache, expected = tmp_path / "cache", images_of(store, view=view)
    images_of(store, cache, view=view)
    before = {path: path.read_bytes() for path in entries(cache)}
    damaged = entries(cache)[5]
    DAMAGES[damage](damaged)
    np.testing.assert_array_equal(images_of(store, cache, view=view), expected)
    if damage != "a folder":  # which is none of ours; the scan is fetched each time
        assert {path: path.read_bytes() for path in entries(cache)} == before
        assert counted(cache) == on_disk(cache)
        remove_shards(store)
    np.testing.assert_array_equal(images_of(store, cache, view=view), expected)


def test_a_damaged_entry_whose_source_is_gone_is_an_error_that_names_the_scan(store, tmp_path):
    images_of(store, tmp_path / "cache")
    flip(entries(tmp_path / "cache")[5])
    remove_shards(store)
    with pytest.raises(CorruptShardError, match=r"row 5 \(5.nii.gz\) of .*: No such file"):
        images_of(store, tmp_path / "cache")


def test_what_is_damaged_in_the_store_is_not_kept(store, voxels, tmp_path):
    """Also if its index says of each slab that it is the whole shard, so that what is wanted of it would be larger."""
    cache, path = tmp_path / "cache", shard_path(store, 2)
    good = path.read_bytes()
    lie = np.array([[0, len(good)]] * 4, "<u8").tobytes()
    for bad in (good[:100] + bytes([good[100] ^ 1]) + good[101:], good[:-68] + lie + crc(lie)):
        path.write_bytes(bad)
        for settings in ({}, {"view": "axial", "slices": [2, 5]}):
            for _ in range(2):
                with pytest.raises(CorruptShardError, match=r"row 2 \(2.nii.gz\) of .*: slab \d has a wrong checksum"):
                    images_of(store, cache, **settings)
        assert not [entry for entry in entries(cache) if entry.name.startswith("2-")]
        assert on_disk(cache) == counted(cache) < 2 * shard_bytes(store)
    path.write_bytes(good)
    np.testing.assert_array_equal(images_of(store, cache), voxels)


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def test_views_do_not_mix(store, tmp_path):
    cache = tmp_path / "cache"
    settings: list[dict[str, Any]] = [
        {"view": "axial", "slices": [0]},
        {"view": "axial", "slices": [15, 1]},
        {},
        {"view": "coronal"},
        {"view": "axial", "slices": [3, 1]},
    ]
    expected = [images_of(store, **each) for each in settings]
    for _ in range(2):
        for each, images in zip(settings, expected, strict=True):
            np.testing.assert_array_equal(images_of(store, cache, **each), images)
    assert len({path.parent for path in entries(cache)}) == 3  # slab 0, slabs 0 and 3, all
    assert len(entries(cache)) == 3 * SCANS
    assert counted(cache) == on_disk(cache)


def test_slabs_that_zarr_left_out_are_kept_as_such(store, tmp_path):
    """As a store that was rewritten by zarr has them."""
    path = shard_path(store, 4)
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).copy()
    index[1] = 2**64 - 1
    path.write_bytes(content[:-68] + index.tobytes() + crc(index.tobytes()))
    for settings in ({}, {"view": "axial", "slices": [5, 9]}, {"view": "axial", "slices": [5]}):
        expected = images_of(store, **settings)
        for _ in range(2):
            np.testing.assert_array_equal(images_of(store, tmp_path / "cache", **settings), expected)


def test_other_stores_make_room_the_oldest_first(store, voxels, tmp_path):
    other = tmp_path / "other.zarr"
    theirs = make_store(other, SCANS, seed=7)
    cache, limit = tmp_path / "cache", shard_bytes(store) + 10
    np.testing.assert_array_equal(images_of(other, cache, limit), theirs)
    for age, path in enumerate(entries(cache)):
        os.utime(path, (10**9 - 100 * age,) * 2)  # the last one is the oldest
    with open_loader(store, rows=[0, 1, 2], batch_size=1, cache_dir=cache, cache_bytes=limit, threads=1) as loaded:
        for _ in loaded:
            assert on_disk(cache) <= limit
    folder = next(path.parent for path in entries(cache) if path.parent.name.startswith(store_id(other)))
    left = [int(path.name.partition("-")[0]) for path in entries(cache) if path.parent == folder]
    assert 3 <= len(left) < SCANS - 2
    assert left == list(range(len(left))), "the oldest went"
    np.testing.assert_array_equal(images_of(store, cache, limit), voxels)
    assert {path.parent.name for path in entries(cache)} == {f"{store_id(store)}-{folder.name[-8:]}"}
    np.testing.assert_array_equal(images_of(other, cache, limit), theirs)
    assert on_disk(cache) == counted(cache) <= limit


def store_id(store: Path) -> str:
    return str(open_store(store).attrs["store_id"])


def test_what_else_lies_in_the_folder_is_left_alone(store, voxels, tmp_path):
    cache = tmp_path / "scratch"
    foreign = [
        cache / "thesis.tex",
        cache / "run-01234567" / "weights.pt",
        cache / ".hidden",
        cache / "a" / "0-12345678",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100_000)
        os.utime(path, (1, 1))
    (cache / "link-01234567").symlink_to(cache / "a")
    make_store(tmp_path / "other.zarr", SCANS)
    limit = shard_bytes(store) + 10
    for source in (tmp_path / "other.zarr", store):
        np.testing.assert_array_equal(images_of(source, cache, limit), voxels)
    for path in foreign:
        assert path.read_bytes() == b"x" * 100_000
    remove_shards(store)  # all of it is in the cache
    np.testing.assert_array_equal(images_of(store, cache, limit), voxels)


def test_withdrawn_scans_disappear(store, voxels, tmp_path):
    cache = tmp_path / "cache"
    images_of(store, cache)
    images_of(store, cache, view="axial")
    rows = rows_of(open_store(store).scans)
    for row in (1, 6):
        rows[row] = replace(rows[row], status="withdrawn")
    write_scans(store, rows)
    np.testing.assert_array_equal(images_of(store, cache), np.delete(voxels, [1, 6], axis=0))
    for view_of_all in {path.parent for path in entries(cache)}:
        kept = sorted(int(path.name.partition("-")[0]) for path in view_of_all.iterdir())
        assert kept == [0, 2, 3, 4, 5, 7]
    assert counted(cache) == on_disk(cache)


@pytest.mark.parametrize("change", [{"source_mtime": 5.0}, {"scale": 2.0}, {"source_size": 7}, {"source": "new.nii"}])
def test_a_scan_that_was_ingested_again_is_not_served_from_the_cache(store, voxels, tmp_path, change):
    cache = tmp_path / "cache"
    images_of(store, cache)
    old = entries(cache)
    rows = rows_of(open_store(store).scans)
    rows[3] = replace(rows[3], **change)
    write_scans(store, rows)
    voxels[3] = voxels[3][::-1]
    write_shard(shard_path(store, 3), encode_shard(voxels[3].copy(), SLAB))
    np.testing.assert_array_equal(images_of(store, cache), voxels)
    new = entries(cache)
    assert len(new) == SCANS
    assert [path.name for path in set(old) - set(new)] == [path.name for path in old if path.name.startswith("3-")]
    assert counted(cache) == on_disk(cache)


def test_a_store_that_was_made_anew_shares_nothing_with_the_old_one(store, tmp_path):
    cache = tmp_path / "cache"
    images_of(store, cache)
    shutil.rmtree(store)
    fresh = make_store(store, SCANS, seed=3)
    np.testing.assert_array_equal(images_of(store, cache), fresh)


def test_entries_beyond_a_store_that_has_become_shorter_are_removed(store, tmp_path):
    cache = tmp_path / "cache"
    images_of(store, cache)
    write_scans(store, rows_of(open_store(store).scans)[:5])
    images_of(store, cache)
    assert len(entries(cache)) == 5


# ---- several processes


def read_passes(store: Path, cache: Path, limit: int, seed: int, passes: int, failed: Any) -> None:
    """Go over a store with a cache and put what is wrong into a queue."""
    logging.getLogger("loaders").addHandler(handler := Collector())
    expected = make_store(cache.with_name(f"same-{os.getpid()}.zarr"), SCANS)
    for number in range(passes):
        with open_loader(
            store, batch_size=2, shuffle=True, seed=seed + number, cache_dir=cache, cache_bytes=limit, threads=3
        ) as loaded:
            for batch in loaded:
                if not np.array_equal(batch.images.numpy(), expected[batch.rows]):
                    failed.put("other pictures")
                if on_disk(cache) > limit:
                    failed.put("too large")
    for message in handler.messages:
        failed.put(message)


class Collector(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_processes_share_a_folder(store, tmp_path):
    """Opening, writing, reading at the same time, with room for some of two stores' shards."""
    other = shutil.copytree(store, tmp_path / "other.zarr")
    meta = other / "zarr.json"
    meta.write_text(meta.read_text().replace(store_id(store), "f" * 32))
    cache, limit = tmp_path / "cache", int(shard_bytes(store) * 1.4)
    failed = PROCESSES.Queue()
    workers = [
        PROCESSES.Process(target=read_passes, args=(source, cache, limit, number, 5, failed))
        for number, source in enumerate([store, other, store])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert failed.empty(), failed.get()
    assert not [path for path in entries(cache) if path.name.endswith(".tmp")]
    assert counted(cache) == on_disk(cache) <= limit


def write_slowly(store: Path, cache: Path, started: Any) -> None:
    """Begin to write an entry and never end."""
    write = os.write

    def hang(descriptor: int, content: bytes) -> int:
        done = write(descriptor, content[:50])
        started.set()
        time.sleep(60)
        return done

    os.write = hang
    images_of(store, cache, rows=[5], threads=1)


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(store, voxels, tmp_path):
    cache, started = tmp_path / "cache", PROCESSES.Event()
    images_of(store, cache, rows=[0])
    worker = PROCESSES.Process(target=write_slowly, args=(store, cache, started))
    worker.start()
    assert started.wait(60)
    (unfinished,) = [path for path in entries(cache) if path.name.endswith(".tmp")]
    size = shard_path(store, 5).stat().st_size
    assert unfinished.stat().st_size == size, "counts in full from the beginning"
    images_of(store, cache, rows=[1])  # by another process, which leaves alone what is being written
    assert unfinished.exists()
    assert counted(cache) == on_disk(cache) == shard_bytes(store, range(2)) + size
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert unfinished.exists()
    np.testing.assert_array_equal(images_of(store, cache), voxels)
    assert not unfinished.exists()
    assert counted(cache) == on_disk(cache) == shard_bytes(store)
    remove_shards(store)
    np.testing.assert_array_equal(images_of(store, cache), voxels)


@pytest.mark.parametrize("text", [b"", b"17", b"nonsense", b"9" * 30])
def test_a_count_that_cannot_be_read_is_made_again(store, tmp_path, text):
    cache, limit = tmp_path / "cache", int(shard_bytes(store) * 0.6)
    with open_loader(store, batch_size=1, cache_dir=cache, cache_bytes=limit, threads=1) as loaded:
        for _ in loaded:
            with open(cache / ".bytes", "ab") as count:
                fcntl.flock(count, fcntl.LOCK_EX)  # or a thread's digits could follow ours, and make a number of them
                count.truncate(0)
                count.write(text)
            assert on_disk(cache) <= limit
        for _ in loaded:
            assert on_disk(cache) <= limit
    assert len(entries(cache)) == int(SCANS * 0.6)


def test_two_that_fetch_the_same_scan_count_it_once(store, tmp_path):
    """Both find no entry, both write one; the second leaves the first one's."""
    opened = open_store(store)
    cache = ShardCache(tmp_path / "cache", PLENTY, opened, np.arange(4))
    content = shard_path(store, 0).read_bytes()
    barrier, write = threading.Barrier(2), os.write

    def together(descriptor: int, rest: memoryview) -> int:
        barrier.wait(10)
        return write(descriptor, rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", together)
        threads = [threading.Thread(target=cache.add, args=(0, content)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(entries(cache.directory)) == 1
    assert counted(cache.directory) == on_disk(cache.directory) == len(content)


# ---- disks that fail


@contextlib.contextmanager
def failing(name: str, error: int, after: int = 0) -> Iterator[list[int]]:
    """Let a function of `os` fail from its call number `after` on, for what lies in a cache."""
    real, calls = getattr(os, name), []

    def fail(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield calls


@pytest.mark.parametrize("function", ["write", "truncate", "pwrite", "rename"])
def test_a_full_disk_is_told_once_and_the_pass_goes_on(store, voxels, tmp_path, caplog, monkeypatch, function):
    cache = tmp_path / "cache"
    # Telling takes time, in which another thread finds the disk full.
    monkeypatch.setattr(logging.getLogger("loaders"), "filters", [lambda _: time.sleep(0.1) is None])
    images_of(store, cache, rows=[0, 1])
    with open_loader(store, batch_size=2, cache_dir=cache, cache_bytes=PLENTY, threads=2) as loaded:
        patched = {"rename": "replace"}.get(function, function)
        with failing(patched, errno.ENOSPC) as calls:
            for _ in range(2):
                for batch in loaded:
                    np.testing.assert_array_equal(batch.images, voxels[batch.rows])
            assert 1 <= len(calls) <= 4, "one of the threads each, and not again"
        assert [record.getMessage() for record in caplog.records] == [
            f"the cache in {cache} cannot be written and is not used: [Errno 28] No space left on device"
        ]
        shard_path(store, 0).unlink()  # what is there is read still
        np.testing.assert_array_equal(next(iter(loaded)).images, voxels[:2])
    assert len(entries(cache)) == 2
    write_shard(shard_path(store, 0), encode_shard(voxels[0], SLAB))
    if function != "pwrite":  # else the number stays too large, until somebody opens the cache
        assert counted(cache) == on_disk(cache)
    np.testing.assert_array_equal(images_of(store, cache), voxels)
    assert counted(cache) == on_disk(cache) == shard_bytes(store)


@pytest.mark.parametrize("function", ["mkdir", "pwrite", "open"])
def test_a_full_disk_at_the_beginning_is_told_too(store, voxels, tmp_path, caplog, monkeypatch, function):
    opened = open_store(store)
    cache = tmp_path / "cache"
    real = getattr(os, function)

    def fail(*arguments: Any, **more: Any) -> Any:
        if function == "pwrite" or str(cache) in str(arguments[0]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*arguments, **more)

    monkeypatch.setattr(os, function, fail)
    with open_loader(opened, batch_size=3, cache_dir=cache, cache_bytes=PLENTY) as loaded:
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate([batch.images for batch in loaded]), voxels)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Read-only file system" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_told(store, voxels, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    np.testing.assert_array_equal(images_of(store, tmp_path / "cache"), voxels)
    assert len(caplog.records) == 1
    assert "is not used" in caplog.text


def test_an_entry_that_cannot_be_read_or_removed_does_not_matter(store, voxels, tmp_path, caplog, monkeypatch):
    cache = tmp_path / "cache"
    images_of(store, cache)
    with open_loader(store, batch_size=3, cache_dir=cache, cache_bytes=PLENTY, threads=1) as loaded:
        real_open, real_unlink = os.open, os.unlink

        def fail(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(cache) in str(path) and not str(path).endswith(".bytes"):
                raise OSError(errno.EIO, "the disk is broken")
            return (real_open if arguments else real_unlink)(path, *arguments, **more)

        monkeypatch.setattr(os, "open", fail)
        monkeypatch.setattr(os, "unlink", fail)
        np.testing.assert_array_equal(np.concatenate([batch.images for batch in loaded]), voxels)
    assert len(caplog.records) == 1
    assert "the disk is broken" in caplog.text


def test_a_folder_that_is_removed_in_between_does_not_matter(store, voxels, tmp_path, caplog):
    cache = tmp_path / "cache"
    with open_loader(store, batch_size=3, cache_dir=cache, cache_bytes=PLENTY) as loaded:
        list(loaded)
        shutil.rmtree(cache)
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate([batch.images for batch in loaded]), voxels)
    assert len(caplog.records) == 1
    np.testing.assert_array_equal(images_of(store, cache), voxels)
    assert on_disk(cache) == shard_bytes(store)


def test_what_a_cache_keeps_is_looked_up_in_no_time(store, tmp_path):
    """Names of entries are made for every scan that is read: with Pandas that took longer than decoding."""
    cache = ShardCache(tmp_path / "cache", PLENTY, open_store(store), plan_picture(SHAPE, SLAB).slabs)
    started = time.perf_counter()
    for _ in range(2000):
        cache.path(3)
    assert (time.perf_counter() - started) / 2000 < 40e-6
