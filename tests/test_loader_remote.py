"""Stores in S3: the pictures of a store on a disk, whatever the network does; no more requests than needed, no hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import obstore
import pytest
from faulty_proxy import Fault, FaultyProxy
from object_stores import bad_network
from s3_server import S3Server, s3_server
from small_store import SHAPE, SLAB, make_store
from torch.utils.data import DataLoader

from ingest import places
from ingest.encode import encode_shard
from ingest.errors import ObjectStoreError
from ingest.grid import NATIVE_GRID
from ingest.places import as_place
from ingest.scan import ScanRow
from ingest.shard import shard_name, shard_path, write_shard
from ingest.store import VolumeStore, create_store, open_store, resize_store, write_scans
from loaders import CorruptShardError, SlowReadError, VolumeDataset, VolumeReader, fetch, open_loader

SCANS = 24
LARGE = 3
BACKENDS = ["torch", "dali"]
SHARDS = r"volumes/c/"
VIEWS: list[dict[str, Any]] = [
    {"view": "volume"},
    {"view": "axial", "slices": [0, 15]},
    {"view": "coronal", "dtype": "float32"},
]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.make_bucket("stores")
        yield running


@pytest.fixture(scope="module")
def local(server, tmp_path_factory) -> Path:
    """Return a small store on a disk, which lies at s3://stores/s.zarr too."""
    path = tmp_path_factory.mktemp("remote") / "s.zarr"
    make_store(path, SCANS)
    server.put_tree("stores", "s.zarr", path)
    return path


@pytest.fixture(scope="module")
def large(server, tmp_path_factory) -> Path:
    """Return a store of volumes of the usual size, which lies at s3://stores/large.zarr too; a slab has 58 KB."""
    path = tmp_path_factory.mktemp("remote") / "large.zarr"
    create_store(path, [], NATIVE_GRID, slab=4)
    resize_store(path, LARGE)
    rng = np.random.default_rng(0)
    for row in range(LARGE):
        volume = rng.integers(0, 256, NATIVE_GRID.shape_zyx, dtype=np.uint8)
        volume[:, :, 70:] = 0
        write_shard(shard_path(path, row), encode_shard(volume, SLAB))
    write_scans(path, [ScanRow(f"p{row}", "", "T1", f"{row}.nii.gz", status="ok") for row in range(LARGE)])
    server.put_tree("stores", "large.zarr", path)
    return path


@pytest.fixture
def network(server, monkeypatch) -> Iterator[FaultyProxy]:
    """Let this process use the server by a network that counts, and that `reset` makes bad."""
    with bad_network(server, monkeypatch) as between:
        yield between
    places._client.cache_clear()
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):  # that waits for an answer still, which does not come now
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def impatient(network, monkeypatch) -> None:  # noqa: ARG001 - whose client is made anew
    """Let requests that were given up end when the network does, instead of being tried again for a while."""
    monkeypatch.setitem(places._RETRY, "retry_timeout", places.timedelta(seconds=1))
    places._client.cache_clear()


@pytest.fixture
def store(local, network) -> VolumeStore:  # noqa: ARG001 - puts it there
    opened = open_store("s3://stores/s.zarr")
    network.reset()
    return opened


@contextlib.contextmanager
def instead(row: int, content: bytes | None) -> Iterator[None]:
    """Put something else, or nothing, in the place of a shard, for as long as the block."""
    place = as_place("s3://stores/s.zarr") / shard_name(row)
    before = place.read_bytes()
    place.unlink() if content is None else place.write_bytes(content)
    try:
        yield
    finally:
        place.write_bytes(before)


def images_of(store: Any, **settings: Any) -> np.ndarray:
    with open_loader(store, batch_size=5, **settings) as loader:
        return np.concatenate([batch.images.numpy() for batch in loader])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", VIEWS, ids=lambda settings: settings["view"])
def test_pictures_are_those_of_the_disk(local, store, network, backend, settings):
    expected = images_of(local, **settings)
    np.testing.assert_array_equal(images_of(store, backend=backend, **settings), expected)
    requests = SCANS if settings["view"] != "axial" else 2 * SCANS  # the index, and the slabs (small ones in one piece)
    assert network.count("GetObject", SHARDS) == requests
    assert network.requests.total() == requests + 1, "the layout, too"
    if settings["view"] != "coronal":
        with VolumeReader(store, view=settings["view"], slices=settings.get("slices", 3)) as reader:
            np.testing.assert_array_equal(reader.read([7, 7, 0]), expected[[7, 7, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_axial_slices_fetch_far_less_than_volumes(large, network, backend):
    store = open_store("s3://stores/large.zarr")
    fetched = {}
    for view in ("volume", "axial"):
        network.reset()
        with open_loader(store, view=view, slices=3, backend=backend) as loader:
            images = np.concatenate([batch.images.numpy() for batch in loader])
            until = time.monotonic() + 10
            while network.downloaded["GetObject"] < loader.timing.bytes_read and time.monotonic() < until:
                time.sleep(0.01)  # what is sent is counted after it has come
            truly = network.downloaded["GetObject"]
            assert loader.timing.bytes_read <= truly < loader.timing.bytes_read + 2000 * LARGE, "with the indices"
            fetched[view] = truly
        with open_loader(large, view=view, slices=3) as here:
            np.testing.assert_array_equal(images, np.concatenate([batch.images.numpy() for batch in here]))
    whole = sum(shard_path(large, row).stat().st_size for row in range(LARGE))
    assert whole <= fetched["volume"] < whole + 2000
    assert fetched["axial"] < 0.09 * whole, "3 slabs of 40"


@pytest.mark.usefixtures("network")
def test_slabs_that_lie_near_each_other_come_in_one_piece(large, monkeypatch):
    """Slabs 0 and 2 in one request with slab 1 between; slab 20 in another."""
    store = open_store("s3://stores/large.zarr")
    seen = []
    ranges = places.ObjectPath.read_ranges
    monkeypatch.setattr(
        places.ObjectPath, "read_ranges", lambda place, wanted: seen.append(wanted) or ranges(place, wanted)
    )
    slices = [81, 9, 3, 0]
    images = images_of(store, rows=[1], view="axial", slices=slices)
    np.testing.assert_array_equal(images, images_of(large, rows=[1], view="axial", slices=slices))
    ((first, second),) = seen
    index = np.frombuffer(shard_path(large, 1).read_bytes()[-644:-4], "<u8").reshape(40, 2).tolist()
    assert first == (0, sum(index[2]))
    assert second == (index[20][0], sum(index[20]))
    assert index[1][1] < fetch.ShardFetcher.gap


def test_requests_run_at_the_same_time(store, network):
    """Each answer takes 0.2 s; one after the other they would take 4.8."""
    network.reset(Fault("slow", on="GetObject", key=SHARDS, delay=0.2))
    started = time.perf_counter()
    images_of(store)  # with the threads that a remote store has by default
    assert time.perf_counter() - started < 2.4
    started = time.perf_counter()
    images_of(store, rows=range(5), threads=1)
    assert time.perf_counter() - started >= 1, "so the network is slow"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", VIEWS[:2], ids=lambda settings: settings["view"])
def test_a_bad_network_changes_nothing(local, store, network, backend, settings):
    network.reset(
        Fault("status", on="GetObject", share=0.15, status=500),
        Fault("status", on="GetObject", share=0.1, status=503),
        Fault("drop", on="GetObject", share=0.15),
        Fault("cut", on="GetObject", share=0.3, after=500),
        Fault("cut", on="GetObject", share=0.1, after=0),
        Fault("slow", on="GetObject", share=0.2, rate=20_000),
    )
    np.testing.assert_array_equal(
        images_of(store, shuffle=False, backend=backend, **settings), images_of(local, **settings)
    )
    assert {"status", "drop", "cut", "slow"} <= set(network.injected)


def test_answers_that_are_cut_in_the_middle_of_large_shards(large, network):
    store = open_store("s3://stores/large.zarr")
    network.reset(Fault("cut", on="GetObject", key=SHARDS, first=2, each=True, after=1_000_000))
    np.testing.assert_array_equal(images_of(store), images_of(large))
    assert network.injected["cut"] == 2 * LARGE
    network.reset(Fault("cut", on="GetObject", key=SHARDS, first=2, each=True, after=20_000, skip=1))
    np.testing.assert_array_equal(images_of(store, view="axial"), images_of(large, view="axial"))
    assert network.injected["cut"] == 2 * LARGE


FAULTS = [(None, "no s3://"), (b"", "has 0 bytes"), (b"x" * 50, "has 50 bytes"), (b"x" * 1000, "checksum")]


@pytest.mark.parametrize(("content", "reason"), FAULTS, ids=["missing", "empty", "short", "another"])
@pytest.mark.parametrize("settings", VIEWS[:2], ids=lambda settings: settings["view"])
def test_a_bad_object_is_named_or_skipped(local, store, content, reason, settings):
    expected = images_of(local, **settings)
    expected[13] = 0
    with instead(13, content):
        with pytest.raises(
            CorruptShardError, match=r"row 13 \(13.nii.gz\) of s3://stores/s.zarr cannot be read: .+; i"
        ):
            images_of(store, **settings)
        with open_loader(store, batch_size=5, on_error="skip", **settings) as loader:
            batches = list(loader)
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), expected)
    assert [int(row) for batch in batches for row in batch.rows[~batch.valid]] == [13] == list(loader.skipped)
    assert reason in loader.skipped[13]
    assert loader.timing.scans == SCANS - 1


@pytest.mark.parametrize("settings", VIEWS[:2], ids=lambda settings: settings["view"])
def test_an_object_that_is_too_large_is_not_downloaded(store, network, settings):
    with instead(3, bytes(20_000_000)):
        network.reset()
        with pytest.raises(CorruptShardError, match=r"row 3 .*the shard has 20000000 bytes, expected 68 to"):
            images_of(store, rows=[3], **settings)
        assert network.downloaded["GetObject"] < 10_000


def test_what_the_store_refuses_names_the_scan(store, network, monkeypatch):
    network.reset(Fault("status", on="GetObject", key=SHARDS + "5/", status=403))
    with pytest.raises(
        CorruptShardError, match=r"row 5 \(5.nii.gz\) of .*: .*access denied; .* allows; or leave the row"
    ):
        images_of(store)
    monkeypatch.setitem(places._RETRY, "max_retries", 1)
    places._client.cache_clear()
    network.reset(Fault("status", on="GetObject", key=SHARDS + "5/", status=500))
    with pytest.raises(CorruptShardError, match=r"row 5 \(5.nii.gz\) of .*cannot be reached"):
        images_of(store)
    network.reset(Fault("status", status=500))
    with pytest.raises(ObjectStoreError, match="s3://stores/sub-403/a cannot be reached"):
        as_place("s3://stores/sub-403/a").read_bytes()  # whose name is not taken for "403 Forbidden"


def test_a_forked_process_is_told_that_it_cannot_read(store):
    workers = DataLoader(VolumeDataset(store), num_workers=1, multiprocessing_context="fork", timeout=30)
    with pytest.raises(ObjectStoreError, match=r's3://stores/.* was forked .*\(..., multiprocessing_context="spawn"\)'):
        list(workers)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", VIEWS[:2], ids=lambda settings: settings["view"])
def test_a_server_that_stops_answering_is_an_error_within_the_deadline(store, network, backend, settings):
    network.reset(Fault("hang", on="GetObject", key=SHARDS, skip=10))
    started = time.perf_counter()
    with (
        pytest.raises(SlowReadError, match=r"row \d+ .* of s3://stores/s.zarr cannot be read: no answer within 0.5 s"),
        open_loader(store, batch_size=5, deadline=0.5, threads=4, backend=backend, **settings) as loader,
    ):
        list(loader)
    assert time.perf_counter() - started < 6, "the deadline, and 2 s for what hangs to end"


@pytest.mark.usefixtures("impatient")
def test_what_is_never_answered_is_skipped_and_the_next_pass_is_whole(local, store, network):
    network.reset(Fault("hang", on="GetObject", key=SHARDS + "(4|5|17)/", first=3))
    with open_loader(store, batch_size=5, deadline=0.5, threads=2, on_error="skip") as loader:
        valid = np.concatenate([batch.valid for batch in loader])
        assert np.flatnonzero(~valid).tolist() == sorted(loader.skipped) == [4, 5, 17]
        assert all("no answer within 0.5 s" in reason for reason in loader.skipped.values())
        images = np.concatenate([batch.images for batch in loader])
    np.testing.assert_array_equal(images, images_of(local))


def test_a_server_that_dies_and_comes_back_is_waited_for(server, local, store, network):
    """Connections are refused for a second: a restart is no reason for an error."""
    with open_loader(store, batch_size=2, threads=2) as loader:
        batches = iter(loader)
        images = [next(batches).images.numpy()]
        server.kill()
        restart = threading.Timer(1.0, server.start)
        restart.start()
        try:
            images += [batch.images.numpy() for batch in batches]
        finally:
            restart.join()  # it answers some time before `start` has seen that it does
    np.testing.assert_array_equal(np.concatenate(images), images_of(local))
    assert network.unreachable > 0


@pytest.mark.parametrize("settings", VIEWS[:2], ids=lambda settings: settings["view"])
def test_with_a_cache_the_second_pass_asks_for_nothing(local, store, network, tmp_path, settings):
    cache, expected = tmp_path / "cache", images_of(local, **settings)
    cached = {"cache_dir": cache, "cache_bytes": 10**7, **settings}
    with open_loader(store, batch_size=5, **cached) as loader:
        np.testing.assert_array_equal(np.concatenate([batch.images for batch in loader]), expected)
        assert network.count("GetObject", SHARDS) == (SCANS if settings["view"] == "volume" else 2 * SCANS)
        network.reset()
        np.testing.assert_array_equal(np.concatenate([batch.images for batch in loader]), expected)
        assert network.requests.total() == 0
    np.testing.assert_array_equal(images_of(store, **cached), expected)
    assert network.count(key=SHARDS) == 0
    network.reset()
    damaged = next(path for path in cache.rglob("9-*"))
    damaged.write_bytes(damaged.read_bytes()[:-30])
    np.testing.assert_array_equal(images_of(store, **cached), expected)
    assert {key for _, key in network.requests if "/c/" in key} == {f"stores/s.zarr/{shard_name(9)}"}


@pytest.mark.usefixtures("impatient")
def test_a_damaged_entry_whose_source_hangs_is_an_error_within_the_deadline(store, network, tmp_path):
    cached: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 10**7}
    images_of(store, **cached)
    damaged = next((tmp_path / "cache").rglob("9-*"))
    damaged.write_bytes(damaged.read_bytes()[:100] + b"?" + damaged.read_bytes()[101:])
    network.reset(Fault("hang", on="GetObject", key=SHARDS))
    started = time.perf_counter()
    with pytest.raises(SlowReadError, match=r"row 9 \(9.nii.gz\)"):
        images_of(store, deadline=0.5, **cached)
    assert time.perf_counter() - started < 6


def test_payloads_are_of_one_layout_wherever_they_come_from(local, store, tmp_path):
    """Compiled code is compiled once for each layout of its arguments, which takes a second."""
    layouts = set()
    for source in (open_store(local), store):
        cache = fetch.ShardCache(tmp_path / "cache", 10**7, source, np.arange(4))
        for kept in (None, cache):
            for slabs in (np.arange(4), np.array([3])) if kept is None else (np.arange(4),):
                for _ in range(2):
                    payload = fetch.ShardFetcher(source, slabs, kept).fetch(2, fetch.Buffer())
                    layouts |= {numba.typeof(payload.content), numba.typeof(payload.index)}
    assert len(layouts) == 2, layouts


def test_what_was_put_is_what_is_tested(server, local):
    """The objects are the files."""
    key = shard_name(2)
    content = bytes(obstore.get(server.store("stores", "s.zarr"), key).bytes())
    assert content == (local / key).read_bytes()
    assert len(content) < fetch.ShardFetcher.gap
    assert open_store(local).grid.shape_zyx == SHAPE
