"""The cache on a local disk: bounded, what is kept and what goes, and never the reason for a wrong picture."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached_store import PLENTY, SCANS, counted, entries, flip, images_of, on_disk, remove_shards, shard_bytes, store_id
from cached_store import original as original  # a fixture
from cached_store import store as store  # a fixture
from cached_store import voxels as voxels  # a fixture
from numcodecs import lz4
from shard_cases import crc
from small_store import SHAPE, SLAB, make_store

from ingest.encode import encode_shard
from ingest.shard import shard_path, write_shard
from ingest.store import open_store, rows_of, write_scans
from loaders import CorruptShardError, dali_backend, loader, open_loader
from loaders.cache import ShardCache
from loaders.views import plan_picture

BACKENDS = ["torch", "dali"]


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


def test_loaders_that_are_open_together_do_not_evict_each_other(store, tmp_path):
    other, cache = tmp_path / "other.zarr", tmp_path / "cache"
    make_store(other, SCANS, seed=7)
    settings = {"batch_size": 1, "cache_dir": cache, "cache_bytes": int(1.3 * shard_bytes(store)), "threads": 1}
    kept: list[list[tuple[Path, int]]] = []
    with open_loader(store, **settings) as one, open_loader(other, **settings) as two:
        for _ in range(3):
            for _ in zip(one, two, strict=True):
                pass
            kept.append([(path, path.stat().st_mtime_ns) for path in entries(cache)])
    assert kept[0] == kept[1] == kept[2]
    assert len({path.parent for path, _ in kept[0]}) == 2


def test_room_is_made_for_more_than_one_entry_at_a_time(tmp_path):
    """Whoever makes room looks at all entries: for each of 100,000 that would take days."""
    for name in ("one", "two"):
        make_store(tmp_path / f"{name}.zarr", 1, seed=len(name))
    slabs = plan_picture(SHAPE, SLAB).slabs
    old = ShardCache(tmp_path / "cache", 1000, open_store(tmp_path / "one.zarr"), slabs)
    for row in range(100):
        old._add(old._folder / f"{row}-00000000", bytes(10))
    time.sleep(0.05)  # the clock of files is coarse
    new = ShardCache(tmp_path / "cache", 1000, open_store(tmp_path / "two.zarr"), slabs)
    assert new._add(new._folder / "0-00000000", bytes(10))
    assert len(entries(tmp_path / "cache")) == 100 - 5 + 1, "a 20th"


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


def test_what_a_cache_keeps_is_looked_up_in_no_time(store, tmp_path):
    """Names of entries are made for every scan that is read: with Pandas that took longer than decoding."""
    cache = ShardCache(tmp_path / "cache", PLENTY, open_store(store), plan_picture(SHAPE, SLAB).slabs)
    started = time.perf_counter()
    for _ in range(2000):
        cache.path(3)
    assert (time.perf_counter() - started) / 2000 < 40e-6
