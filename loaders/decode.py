"""Compressed slabs -> voxels in a batch: checked, decoded, cut to slices and scaled in one pass, without Python's lock.

A slab is decoded into memory that stays in the processor's cache, and leaves it as what the batch holds. Where no
compiled decoder is found, `decode_slowly` does the same slab by slab; tests hold one against the other.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from ingest.decode import COMPILED, OK, check_slab, decode_slab, decode_slab_slowly, refuse
from loaders.fetch import Payload
from loaders.views import Picture


@dataclass(frozen=True)
class Decoder:
    """How payloads become pictures.

    Attributes
    ----------
    picture
        What is wanted of each scan.
    slab_shape
        (planes, y, x) of a slab.
    depth
        Planes of a volume.
    table
        (256,), what each grey level becomes: uint8 itself, float32, or uint16 with the bits of a float of that size.
    gain, bias
        Of a table of float32: it holds ``level * gain + bias``, which takes less time than looking it up.
    """

    picture: Picture
    slab_shape: tuple[int, int, int]
    depth: int
    table: np.ndarray
    gain: float = 1.0
    bias: float = 0.0

    @cached_property
    def slices(self) -> np.ndarray:
        """Of each slice its axis, its position along that, and where it starts in a picture: int64 (slice, 3)."""
        found, start = [], 0
        for plane in self.picture.planes:
            size = plane.shape[1] * plane.shape[2]
            found += [(plane.axis, at, start + number * size) for number, at in enumerate(plane.positions.tolist())]
            start += len(plane.positions) * size
        return np.array(found, np.int64).reshape(-1, 3)

    def decode(self, payload: Payload, out: np.ndarray) -> None:
        """Check the slabs of a scan and write its picture.

        Parameters
        ----------
        out
            Of the picture's shape and the table's type, C-contiguous.

        Raises
        ------
        ValueError
            If a slab is damaged; `out` holds anything then.
        """
        if not COMPILED:
            self.decode_slowly(payload, out)
            return
        slabs, scratch = self.picture.slabs, scratch_slab(self.slab_shape)
        content, index = payload.content, payload.index
        if self.picture.planes:
            fault, number = decode_slices(
                content, index, slabs, self.slices, self.depth, scratch, self.table, out.reshape(-1)
            )
        elif self.table.dtype == np.uint8:
            fault, number = decode_all(content, index, out.reshape(len(slabs), -1))
        elif self.table.dtype == np.float32:
            gain, bias = np.float32(self.gain), np.float32(self.bias)
            fault, number = decode_scaled(content, index, scratch.reshape(-1), out.reshape(len(slabs), -1), gain, bias)
        else:
            flat = out.reshape(len(slabs), -1)
            fault, number = decode_by_table(content, index, scratch.reshape(-1), flat, self.table)
        refuse(fault, slabs[number])

    def decode_slowly(self, payload: Payload, out: np.ndarray) -> None:
        """Do the same as `decode` in plain Python: the reference."""
        planes, height, width = self.slab_shape
        voxels = np.zeros((self.depth // planes, planes, height, width), np.uint8)
        wanted = np.empty((len(self.picture.slabs) * planes, height, width), np.uint8)
        self._decode_slabs_slowly(payload, wanted)
        voxels[self.picture.slabs] = wanted.reshape(-1, planes, height, width)
        pictures = voxels.reshape(self.depth, height, width)
        if self.picture.planes:
            cut = [np.moveaxis(pictures.take(p.positions, p.axis), p.axis, 0)[:, ::-1] for p in self.picture.planes]
            pictures = np.concatenate([slices.reshape(-1) for slices in cut]).reshape(self.picture.shape)
        out[...] = self.table[pictures]

    def _decode_slabs_slowly(self, payload: Payload, out: np.ndarray) -> None:
        planes = self.slab_shape[0]
        for number, (start, nbytes) in enumerate(payload.index.tolist()):
            target = out[number * planes : (number + 1) * planes]
            target[...] = 0
            if nbytes:
                refuse(decode_slab_slowly(payload.content, start, nbytes, target), self.picture.slabs[number])

    def decode_slabs(self, payload: Payload, out: np.ndarray) -> None:
        """Check and decode the wanted slabs themselves into `out`, uint8 (planes of all these slabs, y, x).

        Raises
        ------
        ValueError
            If a slab is damaged.
        """
        if COMPILED:
            fault, number = decode_all(payload.content, payload.index, out.reshape(len(payload.index), -1))
            refuse(fault, self.picture.slabs[number])
        else:
            self._decode_slabs_slowly(payload, out)

    def check(self, payload: Payload) -> None:
        """Check the lengths and checksums of a payload that is decoded elsewhere.

        Raises
        ------
        ValueError
            If a slab is damaged.
        """
        raw = int(np.prod(self.slab_shape))
        if COMPILED:
            fault, number = _check_slabs(payload.content, payload.index, raw)
            refuse(fault, self.picture.slabs[number])
        else:
            self._decode_slabs_slowly(
                payload, np.empty((len(payload.index) * self.slab_shape[0], *self.slab_shape[1:]), np.uint8)
            )


_local = threading.local()


def scratch_slab(shape: tuple[int, int, int]) -> np.ndarray:
    """Return memory for a slab that belongs to this thread."""
    found = getattr(_local, "slab", None)
    if found is None or found.shape != shape:
        found = _local.slab = np.empty(shape, np.uint8)
    return found


@numba.njit(cache=True, nogil=True)
def _check_slabs(content: np.ndarray, index: np.ndarray, raw: int) -> tuple[int, int]:
    """Return the first fault and the number of its slab."""
    for number in range(len(index)):
        if index[number, 1]:
            fault = check_slab(content, np.int64(index[number, 0]), np.int64(index[number, 1]), raw)
            if fault != OK:
                return fault, number
    return OK, 0


@numba.njit(cache=True, nogil=True)
def _decode_slab(content: np.ndarray, index: np.ndarray, number: int, out: np.ndarray) -> int:
    """Check a slab and decode it into `out` (byte); return what is wrong with it."""
    if index[number, 1] == 0:
        out[:] = 0
        return OK
    return decode_slab(content, np.int64(index[number, 0]), np.int64(index[number, 1]), out)


@numba.njit(cache=True, nogil=True)
def decode_all(content: np.ndarray, index: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Decode all slabs into `out`, uint8 (slab, byte)."""
    for number in range(len(index)):
        fault = _decode_slab(content, index, number, out[number])
        if fault != OK:
            return fault, number
    return OK, 0


@numba.njit(cache=True, nogil=True)
def decode_scaled(
    content: np.ndarray, index: np.ndarray, scratch: np.ndarray, out: np.ndarray, gain: float, bias: float
) -> tuple[int, int]:
    """Decode all slabs into `out`, float32 (slab, voxel)."""
    for number in range(len(index)):
        fault = _decode_slab(content, index, number, scratch)
        if fault != OK:
            return fault, number
        _scale(scratch, out[number], gain, bias)
    return OK, 0


@numba.njit(cache=True, nogil=True)
def _scale(levels: np.ndarray, out: np.ndarray, gain: float, bias: float) -> None:
    for x in range(np.uint64(len(levels))):  # unsigned: an index that cannot count from the end allows vectors
        out[x] = np.float32(levels[x]) * gain + bias


@numba.njit(cache=True, nogil=True)
def decode_by_table(
    content: np.ndarray, index: np.ndarray, scratch: np.ndarray, out: np.ndarray, table: np.ndarray
) -> tuple[int, int]:
    """Decode all slabs into `out` (slab, voxel), each grey level as the table says."""
    for number in range(len(index)):
        fault = _decode_slab(content, index, number, scratch)
        if fault != OK:
            return fault, number
        _look_up(scratch, table, out[number])
    return OK, 0


@numba.njit(cache=True, nogil=True)
def _look_up(levels: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    if table.itemsize == 1:  # bytes stay what they are
        for x in range(np.uint64(len(levels))):  # unsigned: an index that cannot count from the end allows vectors
            out[x] = levels[x]
    else:
        for x in range(np.uint64(len(levels))):
            out[x] = table[levels[x]]


@numba.njit(cache=True, nogil=True)
def decode_slices(
    content: np.ndarray, index: np.ndarray, slabs: np.ndarray, slices: np.ndarray, depth: int,
    scratch: np.ndarray, table: np.ndarray, out: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Decode slabs and write what they hold of slices, see `Decoder.slices`, upright, to `out` (voxel)."""
    planes, rows, columns = scratch.shape
    for number in range(len(index)):
        fault = _decode_slab(content, index, number, scratch.reshape(-1))
        if fault != OK:
            return fault, number
        first = slabs[number] * planes
        for which in range(len(slices)):
            axis, at, start = slices[which]
            if axis == 0:
                if first <= at < first + planes:
                    for y in range(rows):
                        to = start + (rows - 1 - y) * columns
                        _look_up(scratch[at - first, y], table, out[to : to + columns])
            elif axis == 1:
                for z in range(planes):
                    to = start + (depth - 1 - first - z) * columns
                    _look_up(scratch[z, at], table, out[to : to + columns])
            else:
                for z in range(planes):
                    to = start + (depth - 1 - first - z) * rows
                    _look_up(scratch[z, :, at], table, out[to : to + rows])
    return OK, 0
