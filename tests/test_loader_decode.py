"""Shards as picture or as error: compiled code, plain Python and a third reading agree, whatever the bytes are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import lz4
from shard_cases import ABSENT, NUMBERS, Shard, damages, outcome, output_of, picture_of, pictures, read_plainly, shards
from small_store import SHAPE, SLAB, make_store

from ingest.decode import COMPILED
from ingest.encode import encode_shard
from ingest.grid import NATIVE_GRID
from ingest.scan import ScanRow
from ingest.shard import shard_name, shard_path, write_shard
from ingest.store import VolumeStore, create_store, open_store, resize_store, write_scans
from loaders import CorruptShardError, VolumeReader, open_loader
from loaders.decode import Decoder
from loaders.fetch import Buffer, Payload, ShardFetcher
from loaders.groups import decodes_groups
from loaders.output import Output, make_decoder
from loaders.slots import SlotRing, fills_slots
from loaders.threads import ScanGroup
from loaders.timing import Timing
from loaders.views import Picture, each, plan_picture

CPU = torch.device("cpu")
BACKENDS = ["torch", "dali"]
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_all_readings(
    store: VolumeStore, content: bytes, shape: tuple[int, ...], picture: Picture, dtype: str
) -> bool:
    """Compare every way from the file to the picture with `read_plainly`; tell whether the shard is good."""
    output = output_of(picture, dtype)
    decoder = make_decoder(store, output, CPU)
    volume = read_plainly(content, shape, picture)
    expected = None if volume is None else decoder.table[picture_of(volume, picture)]
    compiled = ShardFetcher(store, picture.slabs)
    plain = ShardFetcher(store, picture.slabs)
    object.__setattr__(plain, "_prefix", None)  # as where there is no compiler for it
    buffer = Buffer()
    reasons = set()
    for fetcher in (compiled, plain):
        for decode in (decoder.decode, decoder.decode_slowly):
            out = np.full(picture.shape, 77, decoder.table.dtype)
            for memory in (Buffer(), buffer, buffer):  # growing, and used again with other bytes in it

                def load(fetcher=fetcher, decode=decode, out=out, memory=memory) -> np.ndarray:
                    decode(fetcher.fetch(0, memory), out)
                    return out

                found = outcome(load)
                if expected is None:
                    assert isinstance(found, str), "garbage was taken for a picture"
                    reasons.add(found)
                else:
                    assert isinstance(found, np.ndarray), found
                    np.testing.assert_array_equal(found, expected)
        group = ScanGroup([0, 0], [2, 0], np.full((3, *picture.shape), 77, decoder.table.dtype))
        batch = group.target
        decodes_groups(fetcher, decoder)(group, buffer)
        assert (batch[1] == 77).all(), "a place of another group was written to"
        reasons |= {str(error) for error in group.errors.values()}
        assert set(group.errors) == (set() if expected is not None else {0, 2})
        if expected is not None:
            np.testing.assert_array_equal(batch[[0, 2]], np.stack([expected] * 2))
        check_slots(fetcher, decoder, volume, reasons)
    assert len(reasons) <= 1, reasons
    return expected is not None


def check_slots(fetcher: ShardFetcher, decoder: Decoder, volume: np.ndarray | None, reasons: set[str]) -> None:
    """Check what a GPU would be given: the blocks of the slabs, or why there are none."""
    ring = SlotRing(3, decoder, Timing(), pinned=False)
    batch = ring.take(3)
    group = ScanGroup([0, 0], [2, 0], batch)
    fills_slots(fetcher, decoder, ring)(group, Buffer())
    ring.settle(batch)
    assert {str(error) for error in group.errors.values()} <= reasons
    if volume is None:
        return  # blocks are not looked into before the GPU does
    assert not group.errors
    slabs = volume.reshape(-1, *decoder.slab_shape)[decoder.picture.slabs]
    for place in (0, 2):
        for slab, offset, size in zip(slabs, batch.offsets[place], batch.sizes[place], strict=True):
            block = batch.memory[place, offset : offset + size].tobytes()
            decoded = lz4.decompress(int(slab.nbytes).to_bytes(4, "little") + block)
            assert decoded == slab.tobytes()


@pytest.mark.skipif(not COMPILED, reason="no compiled decoder here")
@MANY
@given(data=st.data(), shard=shards(), dtype=st.sampled_from(["uint8", "float32", "float16", "bfloat16"]))
def test_all_decoders_give_what_was_written(tmp_path, data, shard, dtype):
    picture = data.draw(pictures(shard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFetcher, "gap", data.draw(st.sampled_from([0, 5, 64 << 10])))
        largest = ShardFetcher(shard.store(tmp_path), picture.slabs).largest
        good = check_all_readings(shard.store(tmp_path), shard.content, shard.voxels.shape, picture, dtype)
    assert good or len(shard.content) > largest
    if good:
        volume = shard.voxels.reshape(-1, *shard.voxels.shape[2:]).copy()
        read = read_plainly(shard.content, shard.voxels.shape, picture)
        assert read is not None
        np.testing.assert_array_equal(picture_of(read, picture), picture_of(volume, picture))


@pytest.mark.skipif(not COMPILED, reason="no compiled decoder here")
@settings(MANY, max_examples=500)
@given(data=st.data(), shard=shards(), dtype=st.sampled_from(["uint8", "float32", "float16"]))
def test_damage_is_an_error_or_of_no_consequence(tmp_path, data, shard, dtype):
    picture = data.draw(pictures(shard))
    content = data.draw(damages(shard))
    store = shard.store(tmp_path)
    (tmp_path / shard_name(0)).write_bytes(content)
    check_all_readings(store, content, shard.voxels.shape, picture, dtype)


@pytest.mark.parametrize("view", ["volume", "axial", "coronal"])
def test_every_flipped_bit_of_a_shard_is_found(tmp_path, view):
    """All of a volume's bytes are under checksums; of axial slices, those of their slabs and the index."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 4, (3, 2, 4, 6), dtype=np.uint8)
    content = encode_shard(voxels.reshape(6, 4, 6), 2)
    shard = Shard(voxels, b"", ((0, 0),) * 3)
    picture = plan_picture((6, 4, 6), 2, view, [0, 1])
    store = shard.store(tmp_path)
    decoder, fetcher, buffer = make_decoder(store, Output(picture), CPU), ShardFetcher(store, picture.slabs), Buffer()
    first = int.from_bytes(content[-52:][8:16], "little")
    for at in range(len(content)):
        for bit in range(0, 8, 3):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            (tmp_path / shard_name(0)).write_bytes(flipped)
            found = outcome(lambda: decode(decoder, fetcher.fetch(0, buffer)))
            matters = view != "axial" or at < first or at >= len(content) - 52
            assert isinstance(found, str) is matters, (at, bit)
    for length in range(len(content)):
        (tmp_path / shard_name(0)).write_bytes(content[:length])
        assert isinstance(outcome(lambda: decode(decoder, fetcher.fetch(0, buffer))), str)


def decode(decoder: Decoder, payload: Payload) -> np.ndarray:
    out = np.empty(decoder.picture.shape, decoder.table.dtype)
    decoder.decode(payload, out)
    return out


@pytest.mark.skipif(not COMPILED, reason="no compiled decoder here")
@settings(MANY, max_examples=300)
@given(
    data=st.data(),
    shard=shards(),
    numbers=st.lists(st.sampled_from(NUMBERS) | st.integers(0, 300), min_size=10, max_size=10),
)
def test_a_payload_of_any_numbers_is_an_error_or_decoded_alike(data, shard, numbers):
    """What a decoder is given may be anything: it looks at no byte outside, and never dies."""
    slabs, planes, height, width = shard.voxels.shape
    picture = data.draw(pictures(shard))
    entries = np.array(shard.entries, np.uint64)
    entries[entries == ABSENT] = 0
    for slab in range(slabs):
        if data.draw(st.booleans()):
            entries[slab] = numbers[2 * slab : 2 * slab + 2]
    payload = Payload(np.frombuffer(bytearray(shard.content), np.uint8), entries[picture.slabs])
    table = np.arange(256, dtype=np.uint8)
    decoder = Decoder(picture, (planes, height, width), slabs * planes, table)
    slowly = np.zeros(picture.shape, np.uint8)
    one = outcome(lambda: decode(decoder, payload))
    two = outcome(lambda: decoder.decode_slowly(payload, slowly) or slowly)
    raw = np.zeros((len(picture.slabs) * planes, height, width), np.uint8)
    three = outcome(lambda: decoder.decode_slabs(payload, raw) or raw)
    checked = outcome(lambda: decoder.check(payload) or raw)
    if isinstance(one, str):
        assert one == two == three
        assert checked == one or "no LZ4 block" in one
    else:
        np.testing.assert_array_equal(one, two)
        assert isinstance(checked, np.ndarray)
        assert isinstance(three, np.ndarray)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal", "triplanar"])
def test_shards_that_zarr_wrote_without_empty_slabs_are_read(tmp_path, backend, view):
    path = tmp_path / "s.zarr"
    voxels = make_store(path, 4)
    voxels[1, SLAB:] = 0  # slabs 1, 2, 3 of row 1 are left out
    voxels[2, SLAB + 2 :] = 0
    voxels[3, 8:12] = 0
    voxels[1, 0, 0, 0] = 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volumes = zarr.open_array(path / "volumes", mode="r+", config={"write_empty_chunks": False})
        for row in range(1, 4):
            volumes[row] = voxels[row]
    index = np.frombuffer(shard_path(path, 1).read_bytes()[-68:-4], "<u8").reshape(4, 2)
    assert (index[1:] == ABSENT).all()
    assert index[0, 1] < 1000
    dtype = "uint8" if view != "coronal" else "float32"
    slices = [[7, 0, 3]] * 3 if view == "triplanar" else [7, 0, 3]
    with open_loader(path, view=view, slices=slices, batch_size=4, backend=backend, dtype=dtype) as loader:
        (batch,) = loader
    picture = plan_picture(SHAPE, SLAB, view, slices)
    expected = np.stack([picture_of(volume, picture) for volume in voxels])
    found = np.concatenate([images.flatten(1).numpy() for images in each(batch.images)], axis=1)
    np.testing.assert_allclose(found, expected.reshape(4, -1) / (1 if dtype == "uint8" else 255), rtol=1e-6)
    np.testing.assert_array_equal(VolumeReader(path).read(range(4)), voxels)
    with VolumeReader(path, view="axial", slices=[8, 11]) as reader:  # none of whose slabs there are
        np.testing.assert_array_equal(reader.read([3, 1]), np.zeros((2, 2, *SHAPE[1:]), np.uint8))


@pytest.mark.parametrize("length", [1, 100, 254, 255, 256, 70_000, 1_000_003])
def test_no_shard_of_ours_is_taken_for_too_large(tmp_path, length):
    """What cannot be compressed grows; the limit knows by how much."""
    rng = np.random.default_rng(length)
    volume = rng.integers(0, 256, (2, 1, length), dtype=np.uint8)
    shard = Shard(volume.reshape(2, 1, 1, length), b"", ((0, 0),) * 2)
    store = shard.store(tmp_path)
    content = encode_shard(volume, 1)
    write_shard(tmp_path / shard_name(0), content)
    fetcher = ShardFetcher(store, np.arange(2))
    assert len(content) <= fetcher.largest
    decoder = make_decoder(store, Output(plan_picture((2, 1, length), 1)), CPU)
    np.testing.assert_array_equal(decode(decoder, fetcher.fetch(0, Buffer())), volume)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16"])
@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal", "triplanar"])
def test_decoders_agree_on_the_usual_grid(tmp_path, view, dtype):
    rng = np.random.default_rng(3)
    volume = rng.integers(0, 9, NATIVE_GRID.shape_zyx, dtype=np.uint8)
    volume[rng.random(volume.shape) < 0.7] = 0
    volume[:37] = 0
    create_store(tmp_path / "s.zarr", [], NATIVE_GRID, slab=4)
    resize_store(tmp_path / "s.zarr", 1)
    write_shard(shard_path(tmp_path / "s.zarr", 0), encode_shard(volume, SLAB))
    write_scans(tmp_path / "s.zarr", [ScanRow("p", "", "T1", "p.nii.gz", status="ok")])
    store = open_store(tmp_path / "s.zarr")
    picture = plan_picture(volume.shape, SLAB, view, 4 if view == "triplanar" else [159, 1, 77])
    decoder = make_decoder(store, output_of(picture, dtype), CPU)
    payload = ShardFetcher(store, picture.slabs).fetch(0, Buffer())
    slowly = np.empty(picture.shape, decoder.table.dtype)
    decoder.decode_slowly(payload, slowly)
    np.testing.assert_array_equal(decode(decoder, payload), slowly)
    np.testing.assert_array_equal(slowly, decoder.table[picture_of(volume, picture)])


def test_without_compiled_code_the_loader_gives_the_same(tmp_path, monkeypatch):
    voxels = make_store(tmp_path / "s.zarr", 3)
    monkeypatch.setattr("loaders.decode.COMPILED", False)
    monkeypatch.setattr("loaders.fetch.COMPILED", False)
    for view in ("volume", "axial", "coronal", "sagittal", "triplanar"):
        picture = plan_picture(SHAPE, SLAB, view)
        with open_loader(tmp_path / "s.zarr", view=view, batch_size=3) as loader:
            (batch,) = loader
        found = np.concatenate([images.flatten(1) for images in each(batch.images)], axis=1)
        np.testing.assert_array_equal(found, np.stack([picture_of(volume, picture).reshape(-1) for volume in voxels]))
    path = shard_path(tmp_path / "s.zarr", 1)
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with open_loader(tmp_path / "s.zarr") as loader, pytest.raises(CorruptShardError, match=r"row 1 .*slab 0 has a"):
        list(loader)
