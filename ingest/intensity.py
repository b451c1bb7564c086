"""Intensities -> stored grey levels, in two passes over the voxels as they lie in the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from ingest.errors import ScanError
from ingest.sampling import clean_row

_SAMPLE_STEP = (5, 7, 5)  # every 175th voxel tells well enough where to look for a percentile

_ONE = np.uint32(1)
_FINITE = np.uint32(0x7F7FFFFF)  # the bits of the largest float32
_PIECE = 32  # voxels that are looked through one by one if any of them is bright


@dataclass(frozen=True)
class IntensityRule:
    """How a scan's intensities become uint8: the percentile of the positive voxels maps to the top level, 0 stays 0."""

    percentile: float = 99.9
    top_level: int = 255

    def __post_init__(self) -> None:
        """Refuse what no scan could be stored by."""
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, expected more than 0 and at most 100")
        if not (isinstance(self.top_level, int) and 1 <= self.top_level <= 255):
            raise ValueError(f"top_level is {self.top_level!r}, expected a whole number from 1 to 255, as of a byte")

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the store's attributes."""
        return {"rule": "percentile of positive voxels to top_level, zero to zero, per scan", **asdict(self)}


@dataclass(frozen=True)
class VoxelBox:
    """The part of a volume that is stored, and where it goes on the grid.

    Attributes
    ----------
    data
        The whole volume, (z, y, x), any real dtype, C-contiguous.
    slope, inter
        ``data * slope + inter`` is the intensity; negative and non-finite ones count as 0.
    start, stop
        (z, y, x) of the box in `data`.
    flips
        Along which of z, y, x the box is turned round on its way to the grid.
    first
        (z, y, x) on the grid where the box, turned round, begins.
    shape_zyx
        Of the grid; it is 0 where the box is not.
    """

    data: np.ndarray
    slope: float
    inter: float
    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    first: tuple[int, int, int]
    shape_zyx: tuple[int, int, int]

    @classmethod
    def whole(cls, data: np.ndarray) -> VoxelBox:
        """Return the box of a volume that is on the grid already."""
        depth, height, width = data.shape
        shape = (depth, height, width)
        return cls(np.ascontiguousarray(data), 1.0, 0.0, (0, 0, 0), shape, (False,) * 3, (0, 0, 0), shape)


@dataclass(frozen=True)
class StoredVolume:
    """A scan as it is stored.

    Attributes
    ----------
    data
        uint8 (z, y, x), on the grid.
    scale
        ``data * scale`` is the source's intensity, up to rounding and clipping.
    brain_voxels
        How many voxels of `data` are not zero.
    mean
        Mean of those.
    left_out
        Positive voxels of the source outside the box.
    """

    data: np.ndarray
    scale: float
    brain_voxels: int
    mean: float
    left_out: int


def to_grey_levels(box: VoxelBox, rule: IntensityRule) -> StoredVolume:
    """Quantise a volume.

    Raises
    ------
    ScanError
        ``bad_image`` if the box is empty or constant.
    """
    top, left_out, occupied = positive_percentile(box, rule.percentile)
    scale = top / rule.top_level
    if not scale > 0 or not np.isfinite(1 / scale):
        raise ScanError("bad_image", f"intensities are too small to scale (99.9th percentile {top:g})")
    start, stop = np.array(box.start), np.array(box.stop)
    fills_grid = tuple(stop - start) == box.shape_zyx
    out = np.empty(box.shape_zyx, np.uint8) if fills_grid else np.zeros(box.shape_zyx, np.uint8)
    brain_voxels, total = _quantise(
        box.data, box.slope, box.inter, start, stop, np.array(box.flips), np.array(box.first), occupied,
        1 / scale, rule.top_level, out,
    )  # fmt: skip
    return StoredVolume(out, scale, brain_voxels, total / max(brain_voxels, 1), left_out)


def positive_percentile(box: VoxelBox, percentile: float) -> tuple[float, int, np.ndarray]:
    """Return what ``np.percentile`` gives of the positive intensities in a box, ten times as fast.

    A sample tells a value that surely lies below it; only what lies above that is sorted.

    Returns
    -------
    percentile : float
    outside : int
        Positive voxels outside the box.
    occupied : numpy.ndarray
        bool (z, y), rows of the box that have any inside.

    Raises
    ------
    ScanError
        ``bad_image`` if no voxel is positive, or all that are have one value.
    """
    start, stop = np.array(box.start), np.array(box.stop)
    sampled = _sample(box.data, box.slope, box.inter, start, stop, np.array(_SAMPLE_STEP))
    for bound in (_safely_below(sampled, percentile / 100), np.float32(0)):
        occupied = np.zeros(stop[:2] - start[:2], np.bool_)
        tail = np.empty(int(np.prod(stop - start)), np.float32)  # memory that is not written costs nothing
        if box.data.dtype == np.float32 and (box.slope, box.inter) == (1, 0):
            count, outside, found = _survey_bits(box.data.view(np.uint32), start, stop, bound, occupied, tail)
        else:
            count, outside, found = _survey(box.data, box.slope, box.inter, start, stop, bound, occupied, tail)
        if count == 0:
            raise ScanError("bad_image", "no positive voxel inside the grid")
        if bound == 0 and np.ptp(tail[:found]) == 0:  # else there is the bound, which is a voxel's, and one above it
            raise ScanError("bad_image", f"constant image: every positive voxel is {tail[0]:g}")
        rank = percentile / 100 * (count - 1)
        low = int(rank)
        if found >= count - low:
            break
    first = low - (count - found)
    last = min(first + 1, found - 1)
    above = np.partition(tail[:found], (first, last))
    value = float(above[first]) + (float(above[last]) - float(above[first])) * (rank - low)
    return value, outside, occupied


def _safely_below(sampled: np.ndarray, share: float) -> np.float32:
    """Return a value that is below the quantile `share` of all voxels unless their sample deceives."""
    if len(sampled) < 1000:
        return np.float32(0)
    error = np.sqrt(share * (1 - share) / len(sampled))
    place = int((share - (1 - share) - 5 * error) * len(sampled))
    return np.float32(np.partition(sampled, place)[place]) if place > 0 else np.float32(0)


@numba.njit(cache=True, nogil=True)
def _sample(
    data: np.ndarray, slope: float, inter: float, start: np.ndarray, stop: np.ndarray, step: np.ndarray
) -> np.ndarray:
    """Return positive intensities of voxels spread over the box, float32."""
    out = np.empty(np.prod((stop - start + step - 1) // step), np.float32)
    row = np.empty(stop[2] - start[2], np.float32)
    found = 0
    for z in range(start[0], stop[0], step[0]):
        for y in range(start[1], stop[1], step[1]):
            clean_row(data[z, y, start[2] : stop[2]], slope, inter, row)
            for x in range(0, len(row), step[2]):
                if row[x] > 0:
                    out[found] = row[x]
                    found += 1
    return out[:found]


@numba.njit(cache=True, nogil=True)
def _survey(
    data: np.ndarray, slope: float, inter: float, start: np.ndarray, stop: np.ndarray, bound: float,
    occupied: np.ndarray, tail: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    """Count the positive voxels of the box, and of the rest; collect those of the box that are above `bound`.

    Returns
    -------
    count : int
        Positive voxels in the box.
    outside : int
        Positive voxels elsewhere.
    found : int
        How many values of `tail` were written.
    """
    bits_of_bound = np.array([bound], np.float32).view(np.uint32)[0]
    row = np.empty(data.shape[2], np.float32)
    bits, tail_bits = row.view(np.uint32), tail.view(np.uint32)
    count, everywhere, found = 0, 0, 0
    for z in range(data.shape[0]):
        for y in range(data.shape[1]):
            clean_row(data[z, y], slope, inter, row)
            everywhere += _positive(bits, 0, len(bits))[0]
            if start[0] <= z < stop[0] and start[1] <= y < stop[1]:
                here, found = _survey_row(bits, start[2], stop[2], bits_of_bound, tail_bits, found)
                occupied[z - start[0], y - start[1]] = here > 0
                count += here
    return count, everywhere - count, found


@numba.njit(cache=True, nogil=True)
def _survey_bits(
    bits: np.ndarray, start: np.ndarray, stop: np.ndarray, bound: float, occupied: np.ndarray, tail: np.ndarray
) -> tuple[int, int, int]:
    """Do the same with the bits (uint32) of float32 intensities, which need no copy."""
    bits_of_bound = np.array([bound], np.float32).view(np.uint32)[0]
    tail_bits, width = tail.view(np.uint32), bits.shape[2]
    count, everywhere, found = 0, 0, 0
    for z in range(bits.shape[0]):
        plane = bits[z].reshape(-1)  # and not a view of each row, which takes as long to make as to survey
        in_plane = _positive(plane, 0, len(plane))[0]
        everywhere += in_plane
        if in_plane and start[0] <= z < stop[0]:
            for y in range(start[1], stop[1]):
                at = y * width
                here, found = _survey_row(plane, at + start[2], at + stop[2], bits_of_bound, tail_bits, found)
                occupied[z - start[0], y - start[1]] = here > 0
                count += here
    return count, everywhere - count, found


@numba.njit(cache=True, nogil=True)
def _survey_row(bits: np.ndarray, begin: int, end: int, bound: int, tail: np.ndarray, found: int) -> tuple[int, int]:
    """Append what is above `bound` to the `found` values of `tail`; return the positive voxels, and `found` anew."""
    count, highest = _positive(bits, begin, end)
    if highest > bound:
        for first in range(begin, end, _PIECE):  # few pieces of the row hold any
            last = min(first + _PIECE, end)
            if _positive(bits, first, last)[1] > bound:
                for value in bits[first:last]:
                    if bound < value <= _FINITE:
                        tail[found] = value
                        found += 1
    return count, found


@numba.njit(cache=True, nogil=True)
def _positive(bits: np.ndarray, begin: int, end: int) -> tuple[int, np.uint32]:
    """Return how many of some of the floats are positive and finite, and the bits of the largest of those, or 0.

    Their bits are in the order of the floats, and lie between 0 and those of infinity; less one, all others lie above
    them. One comparison of integers tells, and compilers make vectors of it.
    """
    count, highest = np.uint32(0), np.uint32(0)
    first = np.uint64(begin)  # unsigned: an index that cannot count from the end allows vectors
    for x in range(end - begin):
        value = bits[first + np.uint64(x)]
        positive = np.uint32(value - _ONE) < _FINITE
        highest = max(highest, value if positive else np.uint32(0))
        count = np.uint32(count + (_ONE if positive else np.uint32(0)))
    return int(count), highest


@numba.njit(cache=True, nogil=True)
def _quantise(
    data: np.ndarray, slope: float, inter: float, start: np.ndarray, stop: np.ndarray, flips: np.ndarray,
    first: np.ndarray, occupied: np.ndarray, gain: float, top_level: int, out: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Write grey levels to `out`; return how many are not zero, and their sum."""
    width = stop[2] - start[2]
    levels = np.empty(width, np.uint8)
    count, total = 0, 0
    for z in range(start[0], stop[0]):
        to_z = first[0] + (stop[0] - 1 - z if flips[0] else z - start[0])
        plane, target = data[z].reshape(-1), out[to_z].reshape(-1)
        for y in range(start[1], stop[1]):
            to_y = first[1] + (stop[1] - 1 - y if flips[1] else y - start[1])
            to = to_y * out.shape[2] + first[2]
            if not occupied[z - start[0], y - start[1]]:
                target[to : to + width] = 0
                continue
            here, sum_here = _levels(plane, y * data.shape[2] + start[2], slope, inter, gain, top_level, levels)
            count += here
            total += sum_here
            _put(levels, flips[2], target, to)
    return count, total


@numba.njit(cache=True, nogil=True)
def _levels(
    raw: np.ndarray, begin: int, slope: float, inter: float, gain: float, top_level: int, out: np.ndarray
) -> tuple[int, int]:
    """Fill `out` with the grey levels of raw values from `begin` on; return how many are not zero, and their sum."""
    first, top = np.uint64(begin), np.float64(top_level)
    count, total = np.uint32(0), np.uint32(0)  # enough for a row of 16 million voxels
    if slope == 1 and inter == 0:  # a loop of its own, which compilers turn into one of vectors
        for x in range(len(out)):
            level = _level(np.float32(np.float64(raw[first + np.uint64(x)])), gain, top)
            out[x] = np.uint8(level)
            count = np.uint32(count + (_ONE if level != 0 else np.uint32(0)))
            total = np.uint32(total + level)
    else:
        for x in range(len(out)):
            level = _level(np.float32(raw[first + np.uint64(x)] * slope + inter), gain, top)
            out[x] = np.uint8(level)
            count = np.uint32(count + (_ONE if level != 0 else np.uint32(0)))
            total = np.uint32(total + level)
    return int(count), int(total)


@numba.njit(cache=True, nogil=True)
def _level(value: np.float32, gain: float, top: float) -> np.uint32:
    """Return the grey level of an intensity (float32); of one that is negative or not finite, 0."""
    clean = value if value > 0 and value < np.inf else np.float32(0)
    return np.uint32(np.int32(min(float(clean) * gain + 0.5, top)))


@numba.njit(cache=True, nogil=True)
def _put(levels: np.ndarray, turn: bool, out: np.ndarray, at: int) -> None:
    """Copy a row to `out` from `at` on, turned round or not."""
    first, last = np.uint64(at), np.uint64(at + len(levels) - 1)  # unsigned, see `_positive`
    if turn:
        for x in range(len(levels)):
            out[last - np.uint64(x)] = levels[np.uint64(x)]
    else:
        for x in range(len(levels)):
            out[first + np.uint64(x)] = levels[np.uint64(x)]
