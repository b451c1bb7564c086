"""Damaged entries of the cache and disks that fail: repaired or told, and never a wrong picture or a failed run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cached_store import PLENTY, counted, entries, flip, images_of, on_disk, remove_shards, shard_bytes
from cached_store import original as original  # a fixture
from cached_store import store as store  # a fixture
from cached_store import voxels as voxels  # a fixture
from shard_cases import crc
from small_store import SLAB

from ingest.encode import encode_shard
from ingest.shard import shard_path, write_shard
from ingest.store import open_store
from loaders import CorruptShardError, open_loader

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
