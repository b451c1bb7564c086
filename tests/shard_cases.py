"""Shards as some writer may have made them, damage to them, and a plain reading of their specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
import torch
from hypothesis import strategies as st
from numcodecs import lz4

from ingest.grid import Grid
from ingest.shard import shard_name
from ingest.store import VolumeStore
from loaders.output import Output
from loaders.views import Picture, plan_picture

ABSENT = 2**64 - 1
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
    view = draw(st.sampled_from(["volume", "axial", "axial", "coronal", "sagittal", "triplanar"]))
    along = dict(zip(("axial", "coronal", "sagittal"), shape, strict=True))
    wanted = [
        draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5))
        for plane, length in along.items()
        if view in (plane, "triplanar")
    ]
    return plan_picture(shape, planes, view, wanted if view == "triplanar" else (wanted or [3])[0])


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
    """Return what is in memory of a scan."""
    if not picture.planes:
        return volume
    slices = [volume.take(at, axis=plane.axis)[::-1] for plane in picture.planes for at in plane.positions]
    return np.concatenate([one.reshape(-1) for one in slices]).reshape(picture.shape)


def outcome(make: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return make()
    except ValueError as error:
        return str(error)
