"""Every peer of the loader benchmark gives the stored pictures, of each scan once. How fast, no test says."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.charts import bar_chart
from benchmarks.loader_peers import PEERS, Peer, Source, check_pictures, open_peer, prepare_peer, stored_bytes
from benchmarks.loaders import prepare
from benchmarks.results import Report, Result

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*[.]tar'>:ResourceWarning"),  # webdataset leaves them to Python
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on machines of one core
    pytest.mark.filterwarnings("ignore:.* is multi-threaded, use of fork:DeprecationWarning"),  # torch forks; 3.12 on
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def source(directory):
    store, files = prepare(directory / "loaders", 5)
    return Source(store, files, np.random.default_rng(0).permutation(store.ok_rows[:5]))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_give_the_stored_pictures_of_each_row_once(peer, source, directory):
    folder = prepare_peer(peer, source, directory)
    children = multiprocessing.active_children()
    allowed = 1 if ".nii.gz" in peer.stores or peer.package == "monai" else 0
    assert check_pictures(peer, source, folder, source.rows, workers=2) <= allowed
    assert check_pictures(peer, source, folder, source.rows[2:4]) <= allowed  # in this process, and of some rows
    assert multiprocessing.active_children() == children
    assert 1e5 < stored_bytes(peer, source, folder) < 2.1e7


def test_every_pass_is_a_whole_epoch(source, directory):
    for peer in PEERS:
        if peer.package != "webdataset":
            continue
        folder = prepare_peer(peer, source, directory)
        batches = open_peer(peer, source, folder, source.rows, batch_size=4, workers=0)
        assert [len(batch) for batch in batches] == [len(batch) for batch in batches] == [4, 1]


def test_files_are_written_once_for_the_same_scans(source, directory):
    written = []
    peer = Peer("a peer", "nothing", "none", lambda *_: [], lambda source, _: written.append(len(source.rows)))
    folder = prepare_peer(peer, source, directory)
    assert prepare_peer(peer, replace(source, rows=source.rows[::-1]), directory) == folder
    assert written == [5]
    prepare_peer(peer, replace(source, rows=source.rows[:3]), directory)
    assert written == [5, 3]


def test_a_write_that_fails_leaves_nothing_to_be_used(source, directory):
    def fail(_, folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    peer = Peer("a failing peer", "nothing", "none", lambda *_: [], fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_peer(peer, source, directory)
    folder = prepare_peer(replace(peer, write=lambda *_: None), source, directory)
    assert [file.name for file in folder.iterdir()] == ["done.json"]


def test_a_peer_that_gives_other_pictures_is_found(source, directory):
    npy = next(peer for peer in PEERS if peer.name == "npy")
    folder = prepare_peer(npy, source, directory)
    rows = source.rows[:3]
    reversed_ = replace(npy, dataset=lambda source, folder, rows: npy.dataset(source, folder, rows[::-1]))
    assert check_pictures(reversed_, source, folder, rows) > 1
    assert check_pictures(replace(reversed_, in_order=False), source, folder, rows) == 0
    first = replace(npy, in_order=False, dataset=lambda s, f, r: npy.dataset(s, f, np.repeat(r[:1], len(r))))
    with pytest.raises(ValueError, match=r"did not give each of the rows \[\d+, \d+, \d+\] once"):
        check_pictures(first, source, folder, rows)
    fewer = replace(npy, dataset=lambda source, folder, rows: npy.dataset(source, folder, rows[1:]))
    with pytest.raises(ValueError, match=r"npy gave torch\.float32 "):
        check_pictures(fewer, source, folder, rows)
    whole = replace(npy, dataset=lambda s, f, r: [one.to(torch.float64) for one in npy.dataset(s, f, r)])
    with pytest.raises(ValueError, match=r"npy gave torch\.float64 "):
        check_pictures(whole, source, folder, rows)


def test_what_memory_cannot_hold_is_refused(source, directory):
    cached = next(peer for peer in PEERS if peer.max_scans)
    with pytest.raises(ValueError, match="expected at most 64"):
        open_peer(cached, source, directory, np.zeros(65, np.int64), batch_size=1, workers=0)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_chart(tmp_path, suffix):
    speeds = {"limit (read + LZ4)": 1597.4, "ours, uint8": 1386.6, "MONAI": 10.4, "$HDF5$": 43.1}
    results = [Result(name, value, "volumes/s", value, value) for name, value in speeds.items()]
    path = tmp_path / "charts" / f"loaders.{suffix}"
    bar_chart(Report("loaders", {}, results), path)
    assert 1000 < path.stat().st_size < 150_000
    if suffix == "svg":
        text = path.read_text()
        for part in ("limit (read + LZ4): 1,597", "ours, uint8", "1,387", "MONAI", "10.4", "$HDF5$"):
            assert part in text
    with pytest.raises(ValueError, match="one unit, got 0 results of the units"):
        bar_chart(Report("loaders", {}, results[:1]), path)
    with pytest.raises(ValueError, match=r"units \['MB/s', 'volumes/s'\]"):
        bar_chart(Report("loaders", {}, [*results, Result("x", 1, "MB/s", 1, 1)]), path)
