"""Intensities -> stored grey levels, in two passes over the voxels as they lie in the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from ingest.errors import ScanError
from ingest.sampling import clean_row

_SAMPLE_STEP = (3, 5, 7)  # every 105th voxel tells well enough where to look for a percentile


@dataclass(frozen=True)
class IntensityRule:
    """How a scan's intensities become uint8: the percentile of the positive voxels maps to the top level, 0 stays 0."""

    percentile: float = 99.9
    top_level: int = 255

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
    top, left_out, occupied = _positive_percentile(box, rule.percentile)
    scale = top / rule.top_level
    if not scale > 0 or not np.isfinite(1 / scale):
        raise ScanError("bad_image", f"intensities are too small to scale (99.9th percentile {top:g})")
    out = np.zeros(box.shape_zyx, np.uint8)
    start, stop = np.array(box.start), np.array(box.stop)
    brain_voxels, total = _quantise(
        box.data, box.slope, box.inter, start, stop, np.array(box.flips), np.array(box.first), occupied,
        1 / scale, rule.top_level, out,
    )  # fmt: skip
    return StoredVolume(out, scale, brain_voxels, total / max(brain_voxels, 1), left_out)


def positive_percentile(box: VoxelBox, percentile: float) -> float:
    """Return what ``np.percentile`` gives of the positive intensities in a box, ten times as fast.

    A sample tells a value that surely lies below it; only what lies above that is sorted.

    Raises
    ------
    ScanError
        ``bad_image`` if no voxel is positive, or all that are have one value.
    """
    return _positive_percentile(box, percentile)[0]


def _positive_percentile(box: VoxelBox, percentile: float) -> tuple[float, int, np.ndarray]:
    """Return the percentile, the positive voxels outside the box, and which rows (z, y) of the box have any inside."""
    start, stop = np.array(box.start), np.array(box.stop)
    sampled = _sample(box.data, box.slope, box.inter, start, stop, np.array(_SAMPLE_STEP))
    for bound in (_safely_below(sampled, percentile / 100), np.float32(0)):
        occupied = np.zeros(stop[:2] - start[:2], np.bool_)
        tail = np.empty(int(np.prod(stop - start)), np.float32)  # memory that is not written costs nothing
        count, lowest, highest, outside, found = _survey(
            box.data, box.slope, box.inter, start, stop, bound, occupied, tail
        )
        if count == 0:
            raise ScanError("bad_image", "no positive voxel inside the grid")
        if lowest == highest:
            raise ScanError("bad_image", f"constant image: every positive voxel is {lowest:g}")
        rank = percentile / 100 * (count - 1)
        low = int(rank)
        if found >= count - low:
            break
    above = np.sort(tail[:found])
    first = low - (count - found)
    last = min(first + 1, found - 1)
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
) -> tuple[int, float, float, int, int]:  # fmt: skip
    """Count the positive voxels of the box, and of the rest; collect those of the box that are above `bound`.

    Returns
    -------
    count, lowest, highest
        Of the positive voxels in the box.
    outside
        Positive voxels elsewhere.
    found
        How many of `tail` were written.
    """
    count, outside, found = 0, 0, 0
    ends = np.array([np.inf, 0, bound], np.float32)
    lowest, highest, bound_bits = ends.view(np.int32)
    row = np.empty(data.shape[2], np.float32)
    left, inside, right = row[: start[2]], row[start[2] : stop[2]], row[stop[2] :]
    for z in range(data.shape[0]):
        for y in range(data.shape[1]):
            clean_row(data[z, y], slope, inter, row)
            if not (start[0] <= z < stop[0] and start[1] <= y < stop[1]):
                outside += _positive_range(row)[0]
            else:
                outside += _positive_range(left)[0] + _positive_range(right)[0]
                here, low, high = _positive_range(inside)
                count += here
                occupied[z - start[0], y - start[1]] = here > 0
                lowest, highest = min(lowest, low), max(highest, high)
                if high > bound_bits:
                    for value in inside:
                        if value > bound:
                            tail[found] = value
                            found += 1
    ends.view(np.int32)[:2] = lowest, highest
    return count, float(ends[0]), float(ends[1]), outside, found


@numba.njit(cache=True, nogil=True)
def _positive_range(row: np.ndarray) -> tuple[int, int, int]:
    """Return the count of positive values in a cleaned row, and the bits of the smallest and largest of them.

    Floats that are not negative are in the order of their bits, and integers are compared four times as fast. Without
    any the bits are those of infinity and of 0.
    """
    infinity = np.int32(0x7F800000)
    count, lowest, highest = np.int32(0), infinity, np.int32(0)
    bits = row.view(np.int32)
    for i in range(len(bits)):
        value = bits[i]
        count = np.int32(count + np.int32(value > 0))
        positive = value if value > 0 else infinity
        lowest = positive if positive < lowest else lowest
        highest = value if value > highest else highest
    return int(count), int(lowest), int(highest)


@numba.njit(cache=True, nogil=True)
def _quantise(
    data: np.ndarray, slope: float, inter: float, start: np.ndarray, stop: np.ndarray, flips: np.ndarray,
    first: np.ndarray, occupied: np.ndarray, gain: float, top_level: int, out: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Write grey levels to `out`; return how many are not zero, and their sum."""
    width = stop[2] - start[2]
    row, levels = np.empty(width, np.float32), np.empty(width, np.uint8)
    count, total = 0, 0
    for z in range(start[0], stop[0]):
        for y in range(start[1], stop[1]):
            if not occupied[z - start[0], y - start[1]]:
                continue
            clean_row(data[z, y, start[2] : stop[2]], slope, inter, row)
            _levels(row, gain, top_level, levels)
            here, sum_here = _count_and_sum(levels)
            count += here
            total += sum_here
            to_z = first[0] + (stop[0] - 1 - z if flips[0] else z - start[0])
            to_y = first[1] + (stop[1] - 1 - y if flips[1] else y - start[1])
            target = out[to_z, to_y, first[2] : first[2] + width]
            if flips[2]:
                _reverse(levels, target)
            else:
                target[:] = levels
    return count, total


@numba.njit(cache=True, nogil=True)
def _levels(row: np.ndarray, gain: float, top_level: int, out: np.ndarray) -> None:
    for x in range(len(row)):
        out[x] = np.uint8(np.int32(min(row[x] * gain + 0.5, np.float64(top_level))))


@numba.njit(cache=True, nogil=True)
def _reverse(levels: np.ndarray, out: np.ndarray) -> None:
    last = np.uint64(len(levels) - 1)  # unsigned: an index that cannot count from the end allows vectors
    for x in range(len(levels)):
        out[last - np.uint64(x)] = levels[np.uint64(x)]


@numba.njit(cache=True, nogil=True)
def _count_and_sum(levels: np.ndarray) -> tuple[int, int]:
    count, total = np.uint32(0), np.uint32(0)  # enough for a row of 16 million voxels
    for level in levels:
        count = np.uint32(count + np.uint32(level != 0))
        total = np.uint32(total + np.uint32(level))
    return int(count), int(total)
