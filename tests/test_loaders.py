"""Batches: the right pixels in the right order from both backends, and errors that name the scan."""

from __future__ import annotations

import gc
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from ingest.encode import encode_shard
from ingest.errors import StoreError
from ingest.grid import NATIVE_GRID
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store, resize_store, set_attributes, write_scans
from loaders import CorruptShardError, VolumeReader, open_loader
from loaders.order import epoch_order

SCANS = 11
BAD_ROW = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store of random volumes; row 4 holds none."""
    path = tmp_path_factory.mktemp("loaders") / "a.zarr"
    create_store(path, [], NATIVE_GRID, slab=4)
    resize_store(path, SCANS)
    rng = np.random.default_rng(0)
    rows = []
    for row in range(SCANS):
        good = row != BAD_ROW
        if good:
            volume = np.repeat(rng.integers(0, 255, (160, 192, 16), dtype=np.uint8), 10, axis=2)
            volume[:40] = 0  # empty slabs are stored too
            write_shard(shard_path(path, row), encode_shard(volume, 4))
        rows.append(ScanRow(f"p{row}", "", "T1", f"{row}.nii.gz", status="ok" if good else "bad_nifti"))
    set_attributes(path, {"simulated": True})
    write_scans(path, rows)
    return path


@pytest.fixture(scope="module")
def voxels(store) -> np.ndarray:
    return zarr.open_group(store, mode="r")["volumes"][:]


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_equal_zarr(store, voxels, backend, shuffle):
    with open_loader(store, batch_size=4, shuffle=shuffle, seed=5, backend=backend) as loader:
        assert len(loader) == 3
        batches = list(loader)  # all held at once: none may be overwritten by a later one
    rows = np.concatenate([batch.rows for batch in batches])
    assert [len(batch.rows) for batch in batches] == [4, 4, 2]
    assert sorted(rows) == [row for row in range(SCANS) if row != BAD_ROW]
    assert (list(rows) == sorted(rows)) is not shuffle
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.participant == [f"p{row}" for row in batch.rows]
        np.testing.assert_array_equal(batch.images.numpy(), voxels[batch.rows])


def test_backends_agree_over_epochs(store):
    with (
        open_loader(store, batch_size=3, shuffle=True, seed=2, backend="torch") as a,
        open_loader(store, batch_size=3, shuffle=True, seed=2, backend="dali") as b,
    ):
        orders = []
        for _ in range(3):
            pairs = list(zip(a, b, strict=True))
            orders.append(np.concatenate([x.rows for x, _ in pairs]).tolist())
            for x, y in pairs:
                np.testing.assert_array_equal(x.rows, y.rows)
                assert torch.equal(x.images, y.images)
    assert orders[0] != orders[1] != orders[2]


def test_order_depends_on_seed_and_epoch_alone():
    rows = np.arange(100)
    same = [epoch_order(rows, shuffle=True, seed=3, epoch=1) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert sorted(same[0]) == list(rows)
    assert list(same[0]) != list(epoch_order(rows, shuffle=True, seed=4, epoch=1))
    assert list(same[0]) != list(epoch_order(rows, shuffle=True, seed=3, epoch=2))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_chosen_rows_and_drop_last(store, voxels, backend):
    with open_loader(store, rows=[9, 2, 2, 0, 7], batch_size=2, drop_last=True, backend=backend) as loader:
        batches = list(loader)
        assert len(loader) == len(batches) == 2
    assert [batch.rows.tolist() for batch in batches] == [[9, 2], [2, 0]]
    np.testing.assert_array_equal(batches[0].images.numpy(), voxels[[9, 2]])


def test_an_empty_selection_yields_nothing(store):
    for backend in ("torch", "dali"):
        with open_loader(store, rows=[], backend=backend) as loader:
            assert len(loader) == 0
            assert list(loader) == []


def test_memory_is_used_again_only_when_nobody_holds_it(store, voxels):
    with open_loader(store, batch_size=2, backend="torch") as loader:
        addresses = set()
        for batch in loader:
            addresses.add(batch.images.data_ptr())
        assert len(addresses) <= 4  # one in use, two ahead, one just dropped
        kept = [batch.images[1:] for batch in loader]  # a view keeps the whole batch
        del batch
        gc.collect()
        for _ in loader:
            pass
        np.testing.assert_array_equal(kept[0][0].numpy(), voxels[1])


def test_a_loader_is_no_dataset(store):
    with open_loader(store) as loader:
        with pytest.raises(TypeError, match="iterate over it, or give a DataLoader a"):
            next(iter(torch.utils.data.DataLoader(loader, batch_size=None)))
        with pytest.raises(TypeError, match="makes the batches itself"):
            pickle.dumps(loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [BAD_ROW]}, "status is bad_nifti"),
        ({"rows": [SCANS]}, "not in the store"),
        ({"rows": [-1]}, "not in the store"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"backend": "tensorflow"}, "expected one of auto, dali, torch"),
    ],
)
def test_bad_arguments_are_refused(store, arguments, message):
    with pytest.raises((ValueError, IndexError), match=message):
        open_loader(store, **arguments)


def test_without_dali_the_torch_backend_works(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with open_loader(store, rows=[0], backend="auto") as loader:
        assert loader.backend == "torch"
        assert len(list(loader)) == 1
    with pytest.raises(ValueError, match="pip install nvidia-dali"):
        open_loader(store, backend="dali")


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "absent"])
def test_a_damaged_shard_is_named(store, tmp_path, backend, fault):
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    path = shard_path(copy, 6)
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[1000] ^= 1
        path.write_bytes(content)
    elif fault == "truncated":
        path.write_bytes(content[:-100])
    else:
        path.unlink()
    with (
        open_loader(copy, batch_size=2, backend=backend) as loader,
        pytest.raises(CorruptShardError, match=r"row 6 \(6.nii.gz\)"),
    ):
        list(loader)


def test_stopping_early_leaves_no_thread_behind(store):
    import threading

    before = set(threading.enumerate())  # other tests may have left some in reads that hang
    loader = open_loader(store, batch_size=1, backend="torch")
    for _ in loader:
        break
    assert [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("decode")]
    loader.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("decode")]


def test_another_shard_layout_is_refused(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    meta = copy / "volumes" / "zarr.json"
    meta.write_text(meta.read_text().replace("numcodecs.lz4", "numcodecs.zstd"))
    with pytest.raises(ValueError, match=r"laid out as .*; ingest its source into a new store"):
        VolumeReader(copy)
    shutil.rmtree(copy / "volumes")  # without shards
    shape = (SCANS, *NATIVE_GRID.shape_zyx)
    zarr.open_group(copy, mode="a").create_array("volumes", shape=shape, chunks=(1, 4, *shape[2:]), dtype="uint8")
    with pytest.raises(StoreError, match=r"laid out as .*; ingest its source into a new store"):
        VolumeReader(copy)
