"""Shards as picture or as error: compiled code, plain Python and a third reading agree, whatever the bytes are."""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import lz4
from small_store import SHAPE, SLAB, make_store

from ingest.decode import COMPILED
from ingest.grid import NATIVE_GRID, Grid
from ingest.scan import ScanRow
from ingest.shard import encode_shard, shard_name, shard_path, write_shard
from ingest.store import VolumeStore, create_store, grow_store, open_store, write_scans
from loaders import CorruptShardError, VolumeReader, fetch, open_loader
from loaders.decode import Decoder
from loaders.fetch import Buffer, Payload, ShardFetcher
from loaders.output import Output, make_decoder
from loaders.views import Picture, plan_picture

ABSENT = 2**64 - 1
CPU = torch.device("cpu")
BACKENDS = ["torch", "dali"]
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = [0, 1, 8, 9, 100, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**63 + 9, ABSENT - 8, ABSENT - 1, ABSENT]


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def with_crc(data: bytes) -> bytes:
    return data + crc(data)


def with_index(body: bytes, entries: Sequence[Sequence[int]]) -> bytes:
    return body + with_crc(np.array(entries, dtype="<u8").tobytes())


@dataclass(frozen=True)
class Shard:
    """A shard as some writer may have made it: slabs in any order, with or without bytes in between, or left out."""

    voxels: np.ndarray  # (slab, plane, y, x)
    body: bytes
    entries: tuple[tuple[int, int], ...]

    @property
    def content(self) -> bytes:
        return with_index(self.body, self.entries)

    def store(self, folder: Path) -> VolumeStore:
        """Return an open store with nothing but this shard."""
        slabs, planes, height, width = self.voxels.shape
        grid = Grid((slabs * planes, height, width), 1.0, (), "native")
        path = folder / shard_name(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return VolumeStore(folder, {"store_id": "0" * 32}, grid, planes, pd.DataFrame(), pd.DataFrame(), {})


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    slabs, planes = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    voxels = np.zeros((slabs, planes, height, width), np.uint8)
    blocks: list[bytes | None] = []
    for slab in range(slabs):
        kind = draw(st.sampled_from(["noise", "zero", "left out", "constant", "repeats"]))
        if kind == "noise":
            voxels[slab] = rng.integers(0, 256, voxels.shape[1:])
        elif kind == "constant":
            voxels[slab] = draw(st.integers(0, 255))
        elif kind == "repeats":
            voxels[slab] = rng.integers(0, 3, width)
        blocks.append(None if kind == "left out" else with_crc(lz4.compress(voxels[slab], draw(st.integers(1, 9)))))
    body, entries = b"", [(ABSENT, ABSENT)] * slabs
    order = draw(st.permutations(range(slabs))) if draw(st.booleans()) else range(slabs)
    for slab in order:
        block = blocks[slab]
        if block is not None:
            body += rng.bytes(draw(st.sampled_from([0, 0, 1, 7])))
            entries[slab] = (len(body), len(block))
            body += block
    return Shard(voxels, body, tuple(entries))


@st.composite
def pictures(draw: st.DrawFn, shard: Shard) -> Picture:
    slabs, planes, height, width = shard.voxels.shape
    shape = (slabs * planes, height, width)
    view = draw(st.sampled_from(["volume", "axial", "axial", "coronal", "sagittal"]))
    length = {"axial": shape[0], "coronal": height, "sagittal": width}.get(view, 1)
    positions = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5))
    return plan_picture(shape, planes, view, positions)


def output_of(picture: Picture, dtype: str) -> Output:
    if dtype == "uint8":
        return Output(picture)
    return Output(picture, getattr(torch, dtype), 0.3, 0.7)


def read_plainly(content: bytes, shape: tuple[int, ...], picture: Picture) -> np.ndarray | None:
    """Read a shard as its specification says; None if it is damaged. Slabs that are not wanted are zero.

    An implementation for this test, with nothing of `loaders` or `ingest`.
    """
    slabs, raw = shape[0], int(np.prod(shape[1:]))
    length = 16 * slabs + 4
    if not length <= len(content) <= slabs * (raw + raw // 255 + 24) + length:
        return None
    index = content[-length:]
    if crc(index[:-4]) != index[-4:]:
        return None
    voxels = np.zeros((slabs, raw), np.uint8)
    for slab in picture.slabs.tolist():
        start, nbytes = (int.from_bytes(index[at : at + 8], "little") for at in (16 * slab, 16 * slab + 8))
        if start == nbytes == ABSENT:
            continue
        block = content[start : start + nbytes] if start < len(content) else b""
        if len(block) != nbytes or nbytes < 9 or crc(block[:-4]) != block[-4:]:
            return None
        if int.from_bytes(block[:4], "little") != raw:
            return None
        try:
            voxels[slab] = np.frombuffer(lz4.decompress(block[:-4]), np.uint8)
        except RuntimeError:
            return None
    return voxels.reshape(-1, *shape[2:])


def picture_of(volume: np.ndarray, picture: Picture) -> np.ndarray:
    if picture.axis < 0:
        return volume
    return np.stack([volume.take(at, axis=picture.axis)[::-1] for at in picture.positions])


def outcome(make: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return make()
    except ValueError as error:
        return str(error)


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
    assert len(reasons) <= 1, reasons
    return expected is not None


@pytest.mark.skipif(not COMPILED, reason="no compiled decoder here")
@MANY
@given(data=st.data(), shard=shards(), dtype=st.sampled_from(["uint8", "float32", "float16", "bfloat16"]))
def test_all_decoders_give_what_was_written(tmp_path, data, shard, dtype):
    picture = data.draw(pictures(shard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_GAP", data.draw(st.sampled_from([0, 5, 64 << 10])))
        largest = ShardFetcher(shard.store(tmp_path), picture.slabs).largest
        good = check_all_readings(shard.store(tmp_path), shard.content, shard.voxels.shape, picture, dtype)
    assert good or len(shard.content) > largest
    if good:
        volume = shard.voxels.reshape(-1, *shard.voxels.shape[2:]).copy()
        read = read_plainly(shard.content, shard.voxels.shape, picture)
        assert read is not None
        np.testing.assert_array_equal(picture_of(read, picture), picture_of(volume, picture))


@st.composite
def damages(draw: st.DrawFn, shard: Shard) -> bytes:
    """Return the bytes of a shard that something has happened to; it may be of no consequence."""
    content = bytearray(shard.content)
    entries = [list(entry) for entry in shard.entries]
    there = [slab for slab, (_, nbytes) in enumerate(entries) if nbytes != ABSENT]
    kinds = ["flip", "cut", "cut in front", "append", "number", "number", "swap", "swap numbers"]
    kind = draw(st.sampled_from(kinds + (["header", "block", "short block"] if there else [])))
    if kind == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif kind == "cut in front":
        del content[: draw(st.integers(1, len(content)))]
    elif kind == "append":
        content += draw(st.binary(min_size=1, max_size=20))
    elif kind in ("number", "swap", "swap numbers"):  # with an index whose checksum is right
        slabs = st.integers(0, len(entries) - 1)
        one, two, part = draw(slabs), draw(slabs), draw(st.integers(0, 1))
        if kind == "number":
            entries[one][part] = draw(st.sampled_from(NUMBERS) | st.integers(0, len(content) + 9))
        elif kind == "swap":
            entries[one], entries[two] = entries[two], entries[one]
        else:
            entries[one][part], entries[two][part] = entries[two][part], entries[one][part]
        content = bytearray(with_index(shard.body, entries))
    else:  # with checksums that are right
        slab = draw(st.sampled_from(there))
        start, nbytes = entries[slab]
        raw = shard.voxels[0].size
        block = bytearray(shard.body[start : start + nbytes - 4])
        if kind == "header":
            block[:4] = (raw + draw(st.sampled_from([-raw, -1, 1, 2**31, 2**32 - 1 - raw]))).to_bytes(4, "little")
        elif kind == "block":
            block[draw(st.integers(4, len(block) - 1))] ^= 1 << draw(st.integers(0, 7))
        else:
            less = lz4.compress(shard.voxels[slab].reshape(-1)[: draw(st.integers(0, raw - 1))].copy())
            block = bytearray(raw.to_bytes(4, "little") + less[4:])
        entries[slab] = [len(shard.body), len(block) + 4]
        content = bytearray(with_index(shard.body + with_crc(bytes(block)), entries))
    return bytes(content)


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


def test_a_swap_in_the_index_is_found_by_its_checksum(tmp_path):
    make_store(tmp_path / "s.zarr", 1)
    path = shard_path(tmp_path / "s.zarr", 0)
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)[[0, 2, 1, 3]]
    path.write_bytes(content[:-68] + index.tobytes() + content[-4:])
    with VolumeReader(tmp_path / "s.zarr") as reader, pytest.raises(CorruptShardError, match="checksum of the index"):
        reader.read([0])


@pytest.mark.parametrize("view", ["volume", "axial", "sagittal"])
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ((0, 0), "slab 2 has no bytes"),
        ((ABSENT, 0), "slab 2 has no bytes"),
        ((100, ABSENT), "slab 2 lies outside the shard"),
        ((ABSENT, 100), "slab 2 lies outside the shard"),
        ((2**63, 100), "slab 2 lies outside the shard"),
        ((2**63, 2**63), "slab 2 lies outside the shard"),
        ((0, 8), "slab 2 lies outside the shard"),
        ((0, 10**6), "slab 2 lies outside the shard"),
        ((0, 40), "slab 2 has a wrong checksum"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(tmp_path, view, entry, reason):
    make_store(tmp_path / "s.zarr", 2)
    path = shard_path(tmp_path / "s.zarr", 1)
    content = path.read_bytes()
    entries = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).tolist()
    entries[2] = list(entry)
    path.write_bytes(with_index(content[:-68], entries))
    for settings_ in ({"backend": "torch"}, {"backend": "dali", "dtype": "float16"}):
        with (
            open_loader(tmp_path / "s.zarr", view=view, slices=[0, 1, 7], **settings_) as loader,  # type: ignore[arg-type]
            pytest.raises(CorruptShardError, match=rf"row 1 \(1.nii.gz\) of .*: {reason}")
            if view != "axial"
            else pytest.MonkeyPatch.context(),  # slab 2 is not looked at
        ):
            list(loader)
    with VolumeReader(tmp_path / "s.zarr", view="axial", slices=[9, 0]) as reader:
        np.testing.assert_array_equal(reader.read([0]), VolumeReader(tmp_path / "s.zarr").read([0])[:, [9, 0], ::-1])
        with pytest.raises(CorruptShardError, match=reason):
            reader.read([1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal"])
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
    with open_loader(path, view=view, slices=[7, 0, 3], batch_size=4, backend=backend, dtype=dtype) as loader:
        (batch,) = loader
    picture = plan_picture(SHAPE, SLAB, view, [7, 0, 3])
    expected = np.stack([picture_of(volume, picture) for volume in voxels])
    np.testing.assert_allclose(batch.images.numpy(), expected / (1 if dtype == "uint8" else 255), rtol=1e-6)
    np.testing.assert_array_equal(VolumeReader(path).read(range(4)), voxels)
    with VolumeReader(path, view="axial", slices=[8, 11]) as reader:  # none of whose slabs there are
        np.testing.assert_array_equal(reader.read([3, 1]), np.zeros((2, 2, *SHAPE[1:]), np.uint8))


def faulty(path: Path, fault: str) -> Callable[[], None]:
    """Put something else in a file's place; return what removes it."""
    path.unlink()
    if fault == "a folder":
        path.mkdir()
    elif fault == "an empty file":
        path.touch()
    elif fault == "a device":
        path.symlink_to("/dev/zero")
    elif fault == "a socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    elif fault == "10 GB of nothing":
        path.touch()
        os.truncate(path, 10 << 30)
    elif fault == "10 GB and a good index":
        index = with_crc(np.array([(number * 100, 100) for number in range(4)], "<u8").tobytes())
        path.touch()
        os.truncate(path, (10 << 30) - len(index))
        with open(path, "ab") as file:
            file.write(index)
    return lambda: path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("view", ["volume", "axial"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nothing", "No such file"),
        ("a folder", "no regular file"),
        ("an empty file", "the shard has 0 bytes, expected 68 to"),
        ("a device", "no regular file"),
        ("a socket", "No such device"),
        ("10 GB of nothing", "the shard has 10737418240 bytes, expected 68 to"),
        ("10 GB and a good index", "the shard has 10737418240 bytes, expected 68 to"),
    ],
)
def test_what_is_no_shard_is_not_read_and_named(tmp_path, view, fault, reason):
    voxels = make_store(tmp_path / "s.zarr", 3)
    remove = faulty(shard_path(tmp_path / "s.zarr", 1), fault)
    try:
        with open_loader(tmp_path / "s.zarr", view=view, on_error="skip", batch_size=3) as loader:
            list(loader)  # loads what is compiled
            started = time.perf_counter()
            before = bytes_by_the_system()
            (batch,) = loader
            assert bytes_by_the_system() - before < 200_000
            assert time.perf_counter() - started < 10
        assert list(loader.skipped) == [1]
        assert re.search(rf"row 1 \(1.nii.gz\) of .*s.zarr cannot be read: .*{reason}", loader.skipped[1])
        picture = plan_picture(SHAPE, SLAB, view)
        np.testing.assert_array_equal(batch.images[2], picture_of(voxels[2], picture))
        with (
            VolumeReader(tmp_path / "s.zarr", view=view) as reader,
            pytest.raises(CorruptShardError, match=rf"row 1 \(1.nii.gz\) of .*: .*{reason}"),
        ):
            reader.read([1])
    finally:
        remove()


def bytes_by_the_system() -> int:
    return int(Path("/proc/self/io").read_text().split("\n")[0].removeprefix("rchar: "))


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
@pytest.mark.parametrize("view", ["volume", "axial", "coronal", "sagittal"])
def test_decoders_agree_on_the_usual_grid(tmp_path, view, dtype):
    rng = np.random.default_rng(3)
    volume = rng.integers(0, 9, NATIVE_GRID.shape_zyx, dtype=np.uint8)
    volume[rng.random(volume.shape) < 0.7] = 0
    volume[:37] = 0
    create_store(tmp_path / "s.zarr", [], NATIVE_GRID)
    grow_store(tmp_path / "s.zarr", 1)
    write_shard(shard_path(tmp_path / "s.zarr", 0), encode_shard(volume, SLAB))
    write_scans(tmp_path / "s.zarr", [ScanRow("p", "", "T1", "p.nii.gz", status="ok")])
    store = open_store(tmp_path / "s.zarr")
    picture = plan_picture(volume.shape, SLAB, view, [159, 1, 77])
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
    for view in ("volume", "axial", "coronal", "sagittal"):
        picture = plan_picture(SHAPE, SLAB, view)
        with open_loader(tmp_path / "s.zarr", view=view, batch_size=3) as loader:
            (batch,) = loader
        np.testing.assert_array_equal(batch.images, np.stack([picture_of(volume, picture) for volume in voxels]))
    path = shard_path(tmp_path / "s.zarr", 1)
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with open_loader(tmp_path / "s.zarr") as loader, pytest.raises(CorruptShardError, match=r"row 1 .*slab 0 has a"):
        list(loader)
