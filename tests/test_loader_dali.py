"""What the GPU is given: the very bytes of the shards, where they were read to, and how they come back as batches."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import lz4
from nvidia.dali import fn, pipeline_def, types
from small_store import SHAPE, SLAB, make_store

from ingest.shard import index_bytes, shard_path
from ingest.store import open_store
from loaders import dali_backend, loader, open_loader
from loaders.dali_backend import inflate_arguments
from loaders.fetch import Buffer, ShardFetcher
from loaders.output import Output, make_decoder
from loaders.slots import SlotBatch, SlotRing, fills_slots
from loaders.threads import ScanGroup
from loaders.timing import Timing
from loaders.views import each, plan_picture

SCANS = 11
ABSENT = 2**64 - 1
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", SCANS)
    return tmp_path / "s.zarr"


@pytest.fixture
def voxels(tmp_path) -> np.ndarray:
    return make_store(tmp_path / "same.zarr", SCANS)


def decode_lz4(content: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Decode bare blocks as a GPU does: nothing around them is looked at."""
    out = np.empty((len(offsets), SLAB, *SHAPE[1:]), np.uint8)
    length = int(out[0].nbytes).to_bytes(4, "little")  # numcodecs wants it before the block
    for slab, offset, size in zip(out, offsets, sizes, strict=True):
        lz4.decompress(length + content[offset : offset + size].tobytes(), slab)
    return out


def filled(path: Path, rows: list[int], **view: Any) -> tuple[SlotBatch, SlotRing, Timing]:
    """Read scans into slots, as the threads do."""
    opened = open_store(path)
    picture = plan_picture(opened.grid.shape_zyx, opened.slab, **view)
    fetcher, timing = ShardFetcher(opened, picture.slabs), Timing()
    decoder = make_decoder(opened, Output(picture), CPU)
    ring = SlotRing(len(rows), decoder, timing, pinned=False)
    batch = ring.take(len(rows))
    group = ScanGroup(rows, range(len(rows)), batch)
    fills_slots(fetcher, decoder, ring)(group, Buffer())
    for error in group.errors.values():
        raise error
    ring.settle(batch)
    return batch, ring, timing


def leave_out_a_slab(path: Path, number: int) -> None:
    """Write a shard's index as zarr does that leaves out slabs of nothing but zeros."""
    content = bytearray(path.read_bytes())
    slabs = SHAPE[0] // SLAB
    begin = len(content) - 16 * slabs - 4
    content[begin + 16 * number : begin + 16 * number + 16] = ABSENT.to_bytes(8, "little") * 2
    content[-4:] = int(google_crc32c.value(bytes(content[begin:-4]))).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(("view", "slices"), [("volume", 3), ("axial", [0, 13, 14]), ("coronal", 2)])
def test_the_arguments_of_inflate_decode_to_the_voxels(store, voxels, view, slices):
    batch, _, timing = filled(store, [3, 0, 10], view=view, slices=slices)
    content, offsets, sizes = inflate_arguments(batch, 3)
    wanted = plan_picture(SHAPE, SLAB, view, slices).slabs
    assert wanted.tolist() == ([0, 3] if view == "axial" else [0, 1, 2, 3])
    assert offsets.dtype == sizes.dtype == np.int32
    assert offsets.shape == sizes.shape == (3 * len(wanted),)
    decoded = decode_lz4(np.asarray(content), offsets, sizes)
    np.testing.assert_array_equal(
        decoded, voxels[[3, 0, 10]].reshape(3, -1, SLAB, *SHAPE[1:])[:, wanted].reshape(decoded.shape)
    )
    assert not timing.decoded_on_cpu


def test_bytes_are_those_of_the_file_and_not_copied_again(store):
    batch, _, _ = filled(store, [4, 7])
    content, offsets, sizes = inflate_arguments(batch, 2)
    assert content.data_ptr() == batch.memory.ctypes.data
    for place, row in enumerate((4, 7)):
        file = shard_path(store, row).read_bytes()
        blocks = slice(place * len(offsets) // 2, (place + 1) * len(offsets) // 2)
        start, last = place * batch.memory.shape[1], int(sizes[blocks][-1] + offsets[blocks][-1])
        assert np.asarray(content)[start:last].tobytes() == file[: last - start]


def test_a_scan_that_is_too_large_for_its_slot_has_slots_enlarged(store, voxels, monkeypatch):
    monkeypatch.setattr("loaders.slots._LIKELY", 0.01)
    monkeypatch.setattr("loaders.slots._ROUNDED", 16)
    batch, ring, timing = filled(store, [3, 0, 10])
    assert not batch.larger
    assert ring.slot >= max(shard_path(store, row).stat().st_size for row in (3, 0, 10))
    decoded = decode_lz4(*map(np.asarray, inflate_arguments(batch, 3)))
    np.testing.assert_array_equal(decoded.reshape(3, *SHAPE), voxels[[3, 0, 10]])
    ring.give_back(batch)
    assert ring.take(3) is batch
    ring.enlarge(2 * ring.slot)
    assert ring.take(3) is not batch
    assert not timing.decoded_on_cpu


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_scans_too_large_for_their_slots_come_beside_bad_ones(store, voxels, monkeypatch):
    monkeypatch.setattr("loaders.slots._LIKELY", 0.01)
    monkeypatch.setattr("loaders.slots._ROUNDED", 16)
    shard_path(store, 5).unlink()
    with open_loader(store, backend="dali", batch_size=4, on_error="skip") as loader:
        images = np.concatenate([batch.images for batch in loader])
    voxels[5] = 0
    np.testing.assert_array_equal(images, voxels)
    assert list(loader.skipped) == [5]


def test_more_bytes_than_offsets_can_count_are_refused(store, monkeypatch):
    batch, _, _ = filled(store, [0, 1])
    monkeypatch.setattr(dali_backend, "MOST_BYTES", 2 * batch.memory.shape[1] - 1)
    with pytest.raises(ValueError, match=r"2 scans has slots of \d+ bytes, at most \d+ can be inflated at once"):
        inflate_arguments(batch, 2)
    inflate_arguments(batch, 1)


def test_slots_are_used_again_only_when_they_are_given_back(store):
    batch, ring, _ = filled(store, [0, 1])
    assert ring.take(2) is not batch
    ring.give_back(batch)
    assert ring.take(2) is batch


def test_slabs_that_were_left_out_are_decoded_here_and_packed_again(store, voxels, caplog):
    for row in (2, 5):
        leave_out_a_slab(shard_path(store, row), 2)
    batch, _, timing = filled(store, [1, 2, 5])
    assert timing.decoded_on_cpu == 2
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "row 2 has slabs that were left out, which a GPU cannot inflate: it is decoded here"
    ]
    expected = voxels[[1, 2, 5]]
    expected[1:, 2 * SLAB : 3 * SLAB] = 0
    decoded = decode_lz4(*map(np.asarray, inflate_arguments(batch, 3)))
    np.testing.assert_array_equal(decoded.reshape(3, *SHAPE), expected)


@pytest.mark.parametrize("what", ["checksum", "length"])
def test_damage_is_found_before_the_gpu_sees_it(store, what):
    path = shard_path(store, 6)
    content = bytearray(path.read_bytes())
    if what == "checksum":
        content[200] ^= 1
    else:  # of the first slab, with a checksum that is right
        size = int.from_bytes(content[-68 + 8 : -68 + 16], "little")
        content[:4] = (1000).to_bytes(4, "little")
        content[size - 4 : size] = int(google_crc32c.value(bytes(content[: size - 4]))).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="wrong checksum" if what == "checksum" else "another length"):
        filled(store, [6])


def test_dali_takes_the_arguments_without_a_copy(store):
    batches = [filled(store, rows)[0] for rows in ([0, 1, 2], [3, 4, 5], [6, 7])]
    given = [inflate_arguments(batch, len(batch.memory)) for batch in batches]
    waiting = iter(given)

    @pipeline_def(batch_size=1, num_threads=2, device_id=None, prefetch_queue_depth=2, exec_dynamic=True)
    def pipeline():
        content, offsets, sizes = fn.external_source(
            source=lambda: [[argument] for argument in next(waiting)], num_outputs=3, batch=True, no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1],
        )  # fmt: skip
        return content, offsets, sizes

    built = pipeline()
    built.build()
    for content, offsets, sizes in given:
        outputs = built.run()
        for output, expected in zip(outputs, (np.asarray(content), offsets, sizes), strict=True):
            np.testing.assert_array_equal(output.at(0), expected)
    with pytest.raises(StopIteration):
        built.run()


def inflate_on_cpu(content: Any, offsets: Any, sizes: Any, slab_shape: list[int]) -> Any:
    """Stand in for DALI's `inflate`, which no machine without a GPU has."""
    assert slab_shape == [SLAB, *SHAPE[1:]]
    return fn.python_function(content, offsets, sizes, function=decode_lz4, output_layouts="FDHW")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Let the loader take the way of a GPU, but for `inflate` and page-locked memory."""
    monkeypatch.setattr(dali_backend, "_inflate", inflate_on_cpu)
    monkeypatch.setattr(loader, "_inflates", lambda backend, _: backend == "dali")


@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal", "triplanar"])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_the_whole_way_gives_what_the_cpu_gives(store, view, dtype):
    settings: dict[str, Any] = {
        "batch_size": 4,
        "shuffle": True,
        "seed": 3,
        "view": view,
        "dtype": dtype,
        "channels": 1,
    }
    with (
        open_loader(store, backend="dali", **settings) as there,
        open_loader(store, backend="torch", **settings) as here,
    ):
        for _ in range(3):  # passes: slots are used again
            batches = list(there)  # all held at once: none may be overwritten by a later one
            for batch, expected in zip(batches, here, strict=True):
                assert batch.rows.tolist() == expected.rows.tolist()
                for one, same in zip(each(batch.images), each(expected.images), strict=True):
                    assert one.dtype == same.dtype
                    assert torch.equal(one, same)
    assert there.timing.decoded_on_cpu == 0
    tails = SCANS * index_bytes(SHAPE[0] // SLAB) if view != "axial" else 0  # of whole shards, which are not kept
    assert there.timing.bytes_read == here.timing.bytes_read - tails


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_on_the_whole_way_bad_scans_are_skipped_or_named(store, voxels):
    shard_path(store, 3).unlink()
    leave_out_a_slab(shard_path(store, 8), 1)
    with open_loader(store, backend="dali", batch_size=4, on_error="skip") as skipping:
        batches = list(skipping)
    expected = voxels.copy()
    expected[3] = 0
    expected[8, SLAB : 2 * SLAB] = 0
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), expected)
    assert [int(row) for batch in batches for row in batch.rows[~batch.valid]] == [3] == list(skipping.skipped)
    assert skipping.timing.decoded_on_cpu == 1
    with open_loader(store, backend="dali", batch_size=4) as strict, pytest.raises(ValueError, match=r"row 3 \(3.nii"):
        list(strict)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_the_ring_is_as_large_as_what_is_under_way(store, monkeypatch):
    made: Counter[str] = Counter()
    before = SlotBatch.__init__

    def count(batch: SlotBatch, *arguments: Any, **settings: Any) -> None:
        made["batches"] += 1
        before(batch, *arguments, **settings)

    monkeypatch.setattr(SlotBatch, "__init__", count)
    with open_loader(store, backend="dali", batch_size=2) as small:
        for _ in range(4):
            assert sum(len(batch.rows) for batch in small) == SCANS
    assert made["batches"] <= dali_backend.QUEUE_DEPTH + 4


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_too_many_slabs_for_nvcomp_are_refused(store):
    with (
        open_loader(store, backend="dali", batch_size=20_000) as large,
        pytest.raises(ValueError, match="80000 slabs, at most 65535"),
    ):
        list(large)


@pytest.mark.gpu
@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal", "triplanar"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
def test_a_gpu_gives_the_pixels_of_the_cpu(store, view, dtype):
    settings: dict[str, Any] = {"batch_size": 4, "shuffle": True, "view": view, "dtype": dtype}
    with (
        open_loader(store, backend="dali", device="cuda", **settings) as inflated,
        open_loader(store, backend="torch", device="cuda", **settings) as copied,
        open_loader(store, backend="torch", device="cpu", **settings) as here,
    ):
        for _ in range(3):
            for one, two, expected in zip(list(inflated), list(copied), here, strict=True):
                for images in (one.images, two.images):
                    for found, same in zip(each(images), each(expected.images), strict=True):
                        assert found.is_cuda
                        assert torch.equal(found.cpu(), same)
