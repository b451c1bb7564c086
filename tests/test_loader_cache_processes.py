"""Processes and threads that share a cache: it stays within its size, also if one is killed or miscounts."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached_store import PLENTY, SCANS, counted, entries, images_of, on_disk, remove_shards, shard_bytes, store_id
from cached_store import original as original  # a fixture
from cached_store import store as store  # a fixture
from cached_store import voxels as voxels  # a fixture
from small_store import make_store

from ingest.shard import shard_path
from ingest.store import open_store
from loaders import open_loader
from loaders.cache import ShardCache

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["loaders", "small_store"])


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
