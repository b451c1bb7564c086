"""Every kind of picture equals plain numpy's, on both backends; slices cost only the slabs that they need."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from small_store import SHAPE, SLAB, make_store

from ingest.encode import encode_shard
from ingest.grid import NATIVE_GRID
from ingest.scan import ScanRow
from ingest.shard import index_bytes, shard_path, write_shard
from ingest.store import VolumeStore, create_store, open_store, resize_store, write_scans
from loaders import Augmentation, CorruptShardError, View, VolumeReader, open_loader, slices_of
from loaders.augment import augment
from loaders.views import each, plan_picture, slice_positions

SCANS = 5
BACKENDS = ["torch", "dali"]
VIEWS = ["volume", "axial", "coronal", "sagittal", "triplanar"]
AXES = {"axial": 0, "coronal": 1, "sagittal": 2}
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative error of one rounding


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> VolumeStore:
    path = tmp_path_factory.mktemp("pictures") / "s.zarr"
    make_store(path, SCANS)
    return open_store(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> VolumeStore:
    """Return a store of two volumes of the usual size, which cannot be compressed: each slab has 123 KB."""
    path = tmp_path_factory.mktemp("pictures") / "large.zarr"
    create_store(path, [], NATIVE_GRID, slab=4)
    resize_store(path, 2)
    rng = np.random.default_rng(0)
    rows = []
    for row in range(2):
        volume = rng.integers(0, 256, NATIVE_GRID.shape_zyx, dtype=np.uint8)
        write_shard(shard_path(path, row), encode_shard(volume, SLAB))
        rows.append(ScanRow(f"p{row}", "", "T1", f"{row}.nii.gz", status="ok"))
    write_scans(path, rows)
    return open_store(path)


def volumes_by_zarr(store: VolumeStore, rows: Sequence[int]) -> np.ndarray:
    volumes = zarr.open_group(store.path, mode="r")["volumes"]
    return np.stack([np.asarray(volumes[row]) for row in rows])


def evenly(length: int, count: int) -> list[int]:
    if count > length - 2:
        return [round((length - 1) * number / max(1, count - 1)) for number in range(count)]
    return [round((length - 1) * (number + 1) / (count + 1)) for number in range(count)]


def planes_of(volumes: np.ndarray, view: str, slices: Any) -> list[np.ndarray]:
    """Cut (scan, z, y, x) into what a loader gives: the slices of each plane, or one of them, or nothing."""
    if view != "triplanar":
        return [upright(volumes, view, slices)]
    return [
        upright(volumes, plane, slices if isinstance(slices, int) else slices[axis]) for plane, axis in AXES.items()
    ]


def upright(volumes: np.ndarray, view: str, slices: int | Sequence[int]) -> np.ndarray:
    """Cut (scan, z, y, x) as `loaders.slices_of` says: the front of the head, or its top, is up."""
    if view == "volume":
        return volumes
    axis = AXES[view]
    positions = evenly(volumes.shape[1 + axis], slices) if isinstance(slices, int) else slices
    picked = [volumes.take(at, axis=1 + axis)[:, ::-1, :] for at in positions]
    return np.stack(picked, axis=1)


def choices_of_slices(view: str) -> list[Any]:
    if view == "volume":
        return [3]
    if view == "triplanar":
        return [3, 1, [[15, 0], [11, 2, 5, 2, 2, 0], [7]]]
    last = SHAPE[AXES[view]] - 1
    return [3, 1, last + 1, [0, last], [last, 2, 5, 2, 2, 0]]


def assert_is(images: torch.Tensor, levels: np.ndarray, settings: dict[str, Any]) -> None:
    """Compare a batch with the grey levels that it is made of."""
    dtype, channels = settings["dtype"], settings["channels"]
    assert images.dtype is DTYPES[dtype]
    if channels is not None:
        axis = 1 if settings["view"] == "volume" else 2
        assert images.shape[axis] == channels
        assert images.shape == (*levels.shape[:axis], channels, *levels.shape[axis:])
        levels = np.stack([levels] * channels, axis=axis)
    assert tuple(images.shape) == levels.shape
    if settings["channels_last"]:
        if settings["view"] == "volume":
            assert images.is_contiguous(memory_format=torch.channels_last_3d)
        else:
            assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert images.stride(1 if settings["view"] == "volume" else 2) == 1 or channels == 1
    if dtype == "uint8":
        np.testing.assert_array_equal(images.numpy(), levels)
        return
    mean, std = settings["mean"], settings["std"]
    expected = (levels.astype(np.float64) / 255 - mean) / std
    # One rounding to the type of the batch, after arithmetic in float32 on numbers as large as mean and 1 over std.
    allowed = ROUNDING[dtype] * np.abs(expected) + 3 * 2.0**-24 * (1 + abs(mean)) / std
    assert (np.abs(images.double().numpy() - expected) <= allowed).all()


SCALES = [(0.0, 1.0), (0.449, 0.226)]
CHANNELS = [(None, False), (1, False), (3, False), (1, True), (3, True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_every_picture_equals_numpy(store, backend, dtype, view):
    rows = [4, 0, 3]
    volumes = volumes_by_zarr(store, rows)
    scales = SCALES if dtype != "uint8" else SCALES[:1]
    for slices, (mean, std), (channels, last) in itertools.product(choices_of_slices(view), scales, CHANNELS):
        settings: dict[str, Any] = {
            "view": view, "slices": slices, "dtype": dtype, "mean": mean, "std": std, "channels": channels,
            "channels_last": last,
        }  # fmt: skip
        with open_loader(store, rows=rows, batch_size=2, backend=backend, threads=2, **settings) as loader:
            batches = list(loader)
        assert [batch.rows.tolist() for batch in batches] == [[4, 0], [3]]
        for number, levels in enumerate(planes_of(volumes, view, slices)):
            assert_is(each(batches[0].images)[number], levels[:2], settings)
            assert_is(each(batches[1].images)[number], levels[2:], settings)
        assert len(each(batches[0].images)) == (3 if view == "triplanar" else 1)


@pytest.mark.parametrize("view", VIEWS)
def test_a_reader_gives_the_same_pictures(store, view):
    volumes = volumes_by_zarr(store, range(SCANS))
    for slices in choices_of_slices(view):
        with VolumeReader(store, view=view, slices=slices) as reader:
            for rows in ([3, 3, 1], [0], []):
                expected = planes_of(volumes[rows], view, slices)
                for found, levels in zip(each(reader.read(rows)), expected, strict=True):
                    np.testing.assert_array_equal(found, levels)
            voxels = sum(levels[0].size for levels in planes_of(volumes, view, slices))
            assert reader.shape == ((voxels,) if view == "triplanar" else expected[0].shape[1:])


@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
def test_slices_of_volumes_are_the_loaders_slices(store, view):
    with (
        open_loader(store, batch_size=SCANS) as whole,
        open_loader(store, batch_size=SCANS, view=view, slices=4) as cut,
    ):
        volumes, slices = next(iter(whole)).images, next(iter(cut)).images
    (found,) = slices_of(volumes, View(view), 4)
    assert torch.equal(found, slices)
    (found,) = slices_of(volumes, View(view), evenly(SHAPE[AXES[view]], 4))
    assert torch.equal(found, slices)
    with open_loader(store, batch_size=SCANS, view="triplanar", slices=4) as three:
        assert torch.equal(next(iter(three)).images[AXES[view]], slices)
    assert torch.equal(slices_of(volumes, View.triplanar, 4)[AXES[view]], slices)
    np.testing.assert_array_equal(slices.numpy(), upright(volumes.numpy(), view, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"view": "volume", "dtype": "uint8", "channels": None},
        {"view": "volume", "dtype": "bfloat16", "channels": 1, "channels_last": True},
        {"view": "axial", "dtype": "float16", "slices": [159, 0, 80, 80], "channels": 3, "channels_last": True},
        {"view": "coronal", "dtype": "float32", "slices": 2, "channels": None},
        {"view": "sagittal", "dtype": "uint8", "slices": 160, "channels": 3},
        {"view": "triplanar", "dtype": "bfloat16", "channels": 3, "channels_last": True},
    ],
    ids=lambda settings: f"{settings['view']}-{settings['dtype']}",
)
def test_volumes_of_the_usual_size(large, backend, settings):
    settings = {"slices": 3, "channels_last": False, "mean": 0.0, "std": 1.0, **settings}
    if settings["dtype"] != "uint8":
        settings |= {"mean": 0.4, "std": 0.3}
    with open_loader(large, rows=[1], backend=backend, threads=2, **settings) as loader:
        (batch,) = loader
    expected = planes_of(volumes_by_zarr(large, [1]), settings["view"], settings["slices"])
    for images, levels in zip(each(batch.images), expected, strict=True):
        assert_is(images, levels, settings)


@pytest.mark.parametrize(
    ("view", "slices", "message"),
    [
        ("oblique", 3, "view is 'oblique', expected one of axial, coronal, sagittal, triplanar, volume$"),
        ("triplanar", 9, "slices is 9, expected 1 to 8 in the view sagittal"),
        ("triplanar", [1, 2, 3], "expected a number, or the positions of axial, of coronal and of sagittal ones"),
        ("triplanar", [[1], [2]], "expected a number, or the positions of axial"),
        ("triplanar", [[1], [12], [0]], r"slices are \[12\], expected numbers from 0 to 11 in the view coronal"),
        ("triplanar", [[1], [1], []], r"slices are \[\], expected numbers from 0 to 7 in the view sagittal"),
        ("triplanar", 2.0, "slices is "),
        ("axial", 0, "slices is 0, expected 1 to 16 in the view axial"),
        ("axial", -1, "slices is -1"),
        ("axial", 17, "slices is 17, expected 1 to 16"),
        ("coronal", np.int64(13), "slices is 13, expected 1 to 12"),
        ("sagittal", 9, "expected 1 to 8"),
        ("axial", [0, 16], r"slices are \[0, 16\], expected numbers from 0 to 15"),
        ("coronal", [-1], "expected numbers from 0 to 11"),
        ("sagittal", [], r"slices are \[\], expected numbers from 0 to 7"),
        ("axial", [0.5, 3], "expected a whole number, or several"),
        ("axial", 2.0, "slices is 2.0, expected a whole number"),
        ("axial", True, "slices is True, expected a whole number"),
        ("axial", ["3"], "expected a whole number"),
        ("axial", [2**70], "expected a whole number"),
        (
            "axial",
            [[1, 2], [3, 4]],
            r"slices is \[\[1, 2\], \[3, 4\]\], expected a whole number, or several",
        ),
        ("axial", [[1, 2], [3]], r"slices is \[\[1, 2\], \[3\]\], expected a whole number, or several"),
        ("axial", np.array([2**64 - 1], np.uint64), "expected numbers from 0 to 15"),
    ],
)
def test_slices_that_are_not_there_are_refused(store, view, slices, message):
    with pytest.raises(ValueError, match=message):
        plan_picture(SHAPE, SLAB, view, slices)
    with pytest.raises(ValueError, match=message):
        open_loader(store, view=view, slices=slices)


def test_evenly_spaced_slices_are_all_distinct():
    for length in range(1, 60):
        for count in range(1, length + 1):
            positions = slice_positions(length, count)
            assert len(np.unique(positions)) == count
            assert 0 <= positions[0] <= positions[-1] < length
    assert slice_positions(160, 160).tolist() == list(range(160))


@pytest.mark.parametrize(
    ("view", "slices", "message"),
    [
        ("axial", 0, "slices is 0, expected 1 to 16 in the view axial"),
        ("triplanar", 9, "slices is 9, expected 1 to 8 in the view sagittal"),
        ("axial", [[1]], "expected a whole number, or several, in the view axial"),
        ("volume", 1, "view is 'volume', expected one of axial, coronal, sagittal, triplanar"),
    ],
)
def test_slices_of_volumes_that_are_not_there_are_refused(view, slices, message):
    with pytest.raises(ValueError, match=message):
        slices_of(torch.zeros(1, *SHAPE), view, slices)


def test_a_count_may_be_of_any_integer_type():
    for count in (3, np.int64(3), np.uint8(3)):
        (plane,) = plan_picture(SHAPE, SLAB, "axial", count).planes  # type: ignore[arg-type]
        assert plane.positions.tolist() == evenly(16, 3)
        three = plan_picture(SHAPE, SLAB, "triplanar", count).planes  # type: ignore[arg-type]
        assert [plane.positions.tolist() for plane in three] == [evenly(length, 3) for length in SHAPE]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "uint8", "mean": 0.5}, "uint8 pictures are not normalised"),
        ({"dtype": "uint8", "std": 2.0}, "uint8 pictures are not normalised"),
        ({"dtype": "uint8", "augmentation": Augmentation()}, "uint8 pictures are not augmented"),
        ({"planes": [[0], [0], [0]]}, "planes go with whole volumes that are augmented, not with volume and None"),
        ({"channels": 2}, "channels is 2, expected None, 1 or 3"),
        ({"channels": 0}, "channels is 0"),
        ({"channels_last": True}, "channels_last needs an axis of channels"),
        ({"dtype": "float32", "std": 0.0}, "std is 0.0, expected a number above 0"),
        ({"dtype": "float32", "std": -1.0}, "std is -1.0"),
        ({"dtype": "float32", "std": float("nan")}, "std is nan"),
        ({"dtype": "float32", "std": float("inf")}, "std is inf"),
        ({"dtype": "float32", "mean": float("nan")}, "mean is nan, expected a finite number"),
        ({"dtype": "float64"}, "dtype is float64, expected one of uint8, float32, float16, bfloat16"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_outputs_that_cannot_be_are_refused(store, settings, message):
    with pytest.raises(ValueError, match=message):
        open_loader(store, **settings)


@pytest.mark.parametrize("view", ["volume", "triplanar"])
def test_a_seed_may_be_larger_than_those_of_augmentations(store, view):
    with open_loader(store, view=view, shuffle=True, seed=2**63 + 5) as loader:
        assert sorted(row for batch in loader for row in batch.rows.tolist()) == list(range(SCANS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_planes_get_the_parameters_of_one_head(store, backend):
    ranges, settings = Augmentation(flip=0.5), {"dtype": "float32", "seed": 5, "batch_size": SCANS}
    with open_loader(store, view="triplanar", augmentation=ranges, mean=0.2, backend=backend, **settings) as loader:
        loader.epoch = 2
        (batch,) = loader
    keys = np.array([[5, 2, position] for position in range(SCANS)])
    for view, images in zip(AXES, batch.images, strict=True):
        with open_loader(store, view=view, **settings) as plain:
            expected = augment(next(iter(plain)).images, ranges, keys, view=view) - 0.2
        assert torch.equal(images, expected)


def compressed(store: VolumeStore, row: int, slabs: Sequence[int]) -> int:
    """Return how many bytes slabs have, from the index of the shard."""
    assert isinstance(store.path, Path)
    content = shard_path(store.path, row).read_bytes()
    all_slabs = store.grid.shape_zyx[0] // store.slab
    index = np.frombuffer(content[-index_bytes(all_slabs) : -4], "<u8").reshape(all_slabs, 2)
    return int(index[list(slabs), 1].sum())


def bytes_by_the_system() -> int:
    """Return how many bytes this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("\n")[0].removeprefix("rchar: "))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slices", [3, [80], [159, 0, 81, 80]])
def test_axial_slices_read_only_their_slabs(large, backend, slices):
    positions = evenly(160, slices) if isinstance(slices, int) else slices
    slabs = sorted({at // SLAB for at in positions})
    expected = sum(compressed(large, row, slabs) for row in range(2))
    with open_loader(large, batch_size=2, view="axial", slices=slices, backend=backend, threads=1) as loader:
        list(loader)  # loads what is compiled; the thread's memory grows to what it needs
        before = bytes_by_the_system()
        (batch,) = loader
        truly = bytes_by_the_system() - before
        assert loader.timing.bytes_read == expected
    assert expected <= truly < expected + 50_000, "the index, and what other threads may read"
    np.testing.assert_array_equal(batch.images.numpy(), upright(volumes_by_zarr(large, [0, 1]), "axial", slices))


@pytest.mark.parametrize("view", ["volume", "coronal", "sagittal", "triplanar"])
def test_all_else_reads_whole_shards_once(large, view):
    assert isinstance(large.path, Path)
    with open_loader(large, view=view, threads=2) as loader:
        list(loader)
        before = bytes_by_the_system()
        list(loader)
        truly = bytes_by_the_system() - before
        whole = sum(shard_path(large.path, row).stat().st_size for row in range(2))
        assert loader.timing.bytes_read == whole
        assert whole <= truly < whole + 50_000


@pytest.fixture
def damaged(store, tmp_path) -> VolumeStore:
    """Return a copy whose slabs 1 and 3 (of four) are damaged in every shard."""
    copy = shutil.copytree(store.path, tmp_path / "copy.zarr")
    for row in range(SCANS):
        path = shard_path(copy, row)
        content = bytearray(path.read_bytes())
        index = np.frombuffer(content[-index_bytes(4) : -4], "<u8").reshape(4, 2).copy()
        for slab in (1, 3):
            start, nbytes = index[slab].tolist()
            content[start : start + nbytes] = bytes(nbytes)
        path.write_bytes(content)
    return open_store(copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slabs_that_no_slice_needs_may_be_damaged(store, damaged, backend):
    volumes = volumes_by_zarr(store, range(SCANS))
    for slices in ([0, 3, 8, 11], [9], [10, 1]):
        with open_loader(damaged, view="axial", slices=slices, batch_size=SCANS, backend=backend) as loader:
            (batch,) = loader
        np.testing.assert_array_equal(batch.images.numpy(), upright(volumes, "axial", slices))
        with VolumeReader(damaged, view="axial", slices=slices) as reader:
            np.testing.assert_array_equal(reader.read(range(SCANS)), upright(volumes, "axial", slices))
    for settings in ({}, {"view": "coronal"}, {"view": "axial", "slices": [3, 4]}, {"view": "axial", "slices": 16}):
        with (
            open_loader(damaged, batch_size=SCANS, backend=backend, **settings) as loader,
            pytest.raises(CorruptShardError, match=r"row 0 \(0.nii.gz\) of .*: slab 1 has a wrong checksum"),
        ):
            list(loader)


def test_a_hole_that_no_slice_needs_is_not_read(large, tmp_path):
    assert isinstance(large.path, Path)
    copy = shutil.copytree(large.path, tmp_path / "copy.zarr")
    for row in range(2):
        path = shard_path(copy, row)
        content = path.read_bytes()
        first, last = compressed(large, row, [0]), compressed(large, row, range(39))
        with open(path, "wb") as file:  # slab 0, a hole, slab 39 and the index
            file.write(content[:first])
            file.seek(last)
            file.write(content[last:])
        assert path.stat().st_size == len(content)
        assert path.stat().st_blocks * 512 < 300_000
    slices = [2, 158]
    with open_loader(copy, view="axial", slices=slices, batch_size=2) as loader:
        list(loader)  # loads what is compiled
        before = bytes_by_the_system()
        (batch,) = loader
        assert bytes_by_the_system() - before < 1_000_000 < os.path.getsize(shard_path(copy, 0))
    np.testing.assert_array_equal(batch.images.numpy(), upright(volumes_by_zarr(large, [0, 1]), "axial", slices))
    with open_loader(copy) as loader, pytest.raises(CorruptShardError, match="slab 1 has a wrong checksum"):
        list(loader)
