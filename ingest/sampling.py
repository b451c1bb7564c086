"""Trilinear sampling of a volume through an affine, and where its positive voxels lie: the inner loops of conforming.

All read the voxels as they lie in the file, whatever their type, and turn them into intensities row by row: a volume of
15 million voxels is never copied whole.
"""

from __future__ import annotations

import itertools

import numba
import numpy as np

#: Source voxels that a tile of the output may need: as float32 they stay in a core's second cache (0.7 MB).
_TILE_VOXELS = 180_000
_TILE = (16, 16, 160)  # z, y, x: few long rows


@numba.njit(cache=True, nogil=True)
def clean_row(raw: np.ndarray, slope: float, inter: float, out: np.ndarray) -> None:
    """Write intensities, with negative and non-finite ones set to 0.

    Parameters
    ----------
    raw
        (x,), any real dtype.
    slope, inter
        ``raw * slope + inter`` is the intensity.
    out
        float32 (x,), written.
    """
    _clean(raw, 0, len(raw), slope, inter, out, 0)


@numba.njit(cache=True, nogil=True)
def _clean(raw: np.ndarray, begin: int, count: int, slope: float, inter: float, out: np.ndarray, at: int) -> None:
    """Clean `count` values from `begin` on into `out` from `at` on."""
    first, to = np.uint64(begin), np.uint64(at)  # unsigned: an index that cannot count from the end allows vectors
    if slope == 1 and inter == 0:  # a loop of its own, which compilers turn into one of vectors
        for i in range(count):
            value = np.float32(np.float64(raw[first + np.uint64(i)]))
            out[to + np.uint64(i)] = value if value > 0 and value < np.inf else np.float32(0)
    else:
        for i in range(count):
            value = np.float32(raw[first + np.uint64(i)] * slope + inter)
            out[to + np.uint64(i)] = value if value > 0 and value < np.inf else np.float32(0)


def sample_trilinear(raw: np.ndarray, slope: float, inter: float, matrix: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with intensities at ``matrix @ (x, y, z, 1)``, trilinear, 0 outside the field of view.

    The same values as ``scipy.ndimage.affine_transform(order=1, mode="constant")`` of the cleaned volume, up to
    rounding. It goes by tiles: the source voxels of a tile are read once, in order, into a buffer that stays in the
    cache, and sampled there. Sampled in place, an oblique volume takes three times as long, for most of its voxels
    come from memory one by one. Tiles without a positive voxel are not sampled.

    Parameters
    ----------
    raw
        (z, y, x), any real dtype, C-contiguous, at least 2 voxels along each axis.
    slope, inter
        As in `clean_row`.
    matrix
        float64 (4, 4), voxel (x, y, z) of `out` -> voxel (x, y, z) of `raw`.
    out
        float32 (z, y, x), written.
    """
    tile = _tile_shape(matrix, raw.shape, out.shape)
    buffer = np.empty(int(np.prod(_source_extent(matrix, tile, raw.shape))), np.float32)
    starts = [range(0, length, step) for length, step in zip(out.shape, tile, strict=True)]
    boxes = np.array([(*start, *np.minimum(np.add(start, tile), out.shape)) for start in itertools.product(*starts)])
    _sample_tiles(raw, float(slope), float(inter), np.ascontiguousarray(matrix), boxes, buffer, out)


def _tile_shape(matrix: np.ndarray, source: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a (z, y, x) shape of tiles, long in x, for which the buffer is small enough."""
    tile = [min(length, most) for length, most in zip(_TILE, shape, strict=True)]
    while np.prod(_source_extent(matrix, tile, source)) > _TILE_VOXELS and max(tile) > 1:
        longest = max(range(3), key=tile.__getitem__)
        tile[longest] = (tile[longest] + 1) // 2
    return tile[0], tile[1], tile[2]


def _source_extent(matrix: np.ndarray, tile: tuple[int, ...] | list[int], source: tuple[int, ...]) -> np.ndarray:
    """Return how many source voxels (z, y, x) a tile may need at most: what it spans, and neighbours on both sides."""
    span = np.abs(matrix[:3, :3]) @ (np.array(tile[::-1]) - 1)
    return np.minimum(np.ceil(span)[::-1] + 4, source).astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _sample_tiles(
    raw: np.ndarray, slope: float, inter: float, matrix: np.ndarray, boxes: np.ndarray, buffer: np.ndarray,
    out: np.ndarray,
) -> None:  # fmt: skip
    first, last = np.empty(3, np.int64), np.empty(3, np.int64)  # (x, y, z) of the source
    at = np.empty(out.shape[2], np.int32)
    weights = np.empty((3, out.shape[2]))
    for number in range(len(boxes)):
        z0, y0, x0, z1, y1, x1 = boxes[number]
        empty, within = False, True
        for axis in range(3):
            low = high = matrix[axis, 3]
            for step, begin, end in ((0, x0, x1), (1, y0, y1), (2, z0, z1)):
                a, b = matrix[axis, step] * begin, matrix[axis, step] * (end - 1)
                low, high = low + min(a, b), high + max(a, b)
            most = raw.shape[2 - axis] - 1
            empty |= high < 0 or low > most
            within &= low > 1e-6 and high < most - 1e-6  # all points, though they are computed otherwise
            # One voxel more on either side: rounding may put a point that is computed otherwise beyond the edge.
            first[axis] = max(0, int(max(low, 0.0)) - 1)
            last[axis] = min(most, int(min(high, float(most))) + 2)
        if not empty:
            empty = not _fill_buffer(raw, slope, inter, first, last, buffer)
        if empty:
            out[z0:z1, y0:y1, x0:x1] = 0
            continue
        width, height = last[0] - first[0] + 1, last[1] - first[1] + 1
        for z in range(z0, z1):
            for y in range(y0, y1):
                u0 = matrix[0, 1] * y + matrix[0, 2] * z + matrix[0, 3]
                v0 = matrix[1, 1] * y + matrix[1, 2] * z + matrix[1, 3]
                w0 = matrix[2, 1] * y + matrix[2, 2] * z + matrix[2, 3]
                row = out[z, y]
                begin, end = x0, x1
                if not within:
                    begin, end = _inside(u0, matrix[0, 0], raw.shape[2] - 1, begin, end)
                    begin, end = _inside(v0, matrix[1, 0], raw.shape[1] - 1, begin, end)
                    begin, end = _inside(w0, matrix[2, 0], raw.shape[0] - 1, begin, end)
                    row[x0:begin] = 0
                    row[end:x1] = 0
                _cells(matrix, u0, v0, w0, first, last, begin, end - begin, at, weights)
                _interpolate(buffer, width, width * height, at, weights, row[begin:end])


@numba.njit(cache=True, nogil=True)
def _fill_buffer(
    raw: np.ndarray, slope: float, inter: float, first: np.ndarray, last: np.ndarray, buffer: np.ndarray
) -> bool:
    """Copy the intensities of a box of the source, both ends included; return whether one of them is positive."""
    flat, at = raw.reshape(-1), 0
    width = last[0] - first[0] + 1
    for z in range(first[2], last[2] + 1):
        for y in range(first[1], last[1] + 1):
            begin = (z * raw.shape[1] + y) * raw.shape[2] + first[0]
            _clean(flat, begin, width, slope, inter, buffer, at)
            at += width
    positive = np.int32(0)
    for bits in buffer[:at].view(np.int32):  # of values that are not negative: 0 only for 0
        positive |= bits
    return bool(positive != 0)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _inside(offset: float, step: float, last: float, begin: int, end: int) -> tuple[int, int]:
    """Narrow `begin` to `end` to those x for which ``0 <= step * x + offset <= last``."""
    if step == 0:
        return (begin, end) if 0 <= offset <= last else (begin, begin)
    low, high = -offset / step, (last - offset) / step
    if low > high:
        low, high = high, low
    # The division rounds, so the ends are tried out.
    begin = max(begin, int(min(max(low, begin - 1.0), end + 1.0)) - 1)
    end = min(end, int(max(min(high, end + 1.0), begin - 1.0)) + 2)
    while begin < end and not 0 <= step * begin + offset <= last:
        begin += 1
    while begin < end and not 0 <= step * (end - 1) + offset <= last:
        end -= 1
    return begin, max(begin, end)


@numba.njit(cache=True, nogil=True)
def _cells(
    matrix: np.ndarray, u0: float, v0: float, w0: float, first: np.ndarray, last: np.ndarray, begin: int, count: int,
    at: np.ndarray, weights: np.ndarray,
) -> None:  # fmt: skip
    """Write the place in the buffer of each point's cell, and how far the point is in it along x, y and z."""
    i0, j0, k0 = np.int32(first[0]), np.int32(first[1]), np.int32(first[2])
    # On the last plane the upper neighbour would lie outside; the cell below has it, with weight 1.
    i1, j1, k1 = np.int32(last[0] - 1), np.int32(last[1] - 1), np.int32(last[2] - 1)
    width, plane = np.int32(last[0] - first[0] + 1), np.int32((last[0] - first[0] + 1) * (last[1] - first[1] + 1))
    along_x, along_y, along_z = weights[0], weights[1], weights[2]
    for x in range(count):
        column = np.float64(np.int32(begin + x))
        u, v, w = matrix[0, 0] * column + u0, matrix[1, 0] * column + v0, matrix[2, 0] * column + w0
        i, j, k = min(np.int32(u), i1), min(np.int32(v), j1), min(np.int32(w), k1)
        along_x[x], along_y[x], along_z[x] = u - i, v - j, w - k
        at[x] = np.int32((k - k0) * plane + (j - j0) * width + (i - i0))


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _interpolate(
    buffer: np.ndarray, width: int, plane: int, at: np.ndarray, weights: np.ndarray, row: np.ndarray
) -> None:
    along_x, along_y, along_z = weights[0], weights[1], weights[2]
    right, front, front_right = buffer[1:], buffer[width:], buffer[width + 1 :]
    above, above_right = buffer[plane:], buffer[plane + 1 :]
    above_front, above_front_right = buffer[plane + width :], buffer[plane + width + 1 :]
    for x in range(len(row)):
        p = np.uint64(np.uint32(at[x]))  # unsigned: an index that cannot count from the end costs nothing
        a, b, c = along_x[x], along_y[x], along_z[x]
        low = _between(buffer[p], right[p], a)
        low += (_between(front[p], front_right[p], a) - low) * b
        high = _between(above[p], above_right[p], a)
        high += (_between(above_front[p], above_front_right[p], a) - high) * b
        row[x] = np.float32(low + (high - low) * c)


@numba.njit(cache=True, nogil=True, fastmath={"contract"}, inline="always")
def _between(left: float, right: float, share: float) -> float:
    return np.float64(left) + (np.float64(right) - np.float64(left)) * share


@numba.njit(cache=True, nogil=True)
def bounding_box_mm(
    raw: np.ndarray, slope: float, inter: float, linear: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the box, along the world's axes, around the positive voxels.

    Parameters
    ----------
    raw, slope, inter
        (z, y, x), as in `sample_trilinear`.
    linear
        float64 (3, 3), the linear part of voxel (x, y, z) -> mm.

    Returns
    -------
    low, high : numpy.ndarray
        float64 (3,), (x, y, z) in mm of the voxels' centres, without the affine's translation.
    count : int
        Positive voxels.
    """
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    total = 0
    depth, height, width = raw.shape
    flat, row = raw.reshape(-1), np.empty(width, np.float32)
    for z in range(depth):
        for y in range(height):
            _clean(flat, (z * height + y) * width, width, slope, inter, row, 0)
            count = _count_above(row, 0, width, np.float32(0))
            if count == 0:
                continue
            total += count
            first, last = 0, width - 1
            while row[first] == 0:
                first += 1
            while row[last] == 0:
                last -= 1
            for axis in range(3):  # a row's extremes are at its ends, for the map is linear
                for x in (first, last):
                    mm = linear[axis, 0] * x + linear[axis, 1] * y + linear[axis, 2] * z
                    low[axis], high[axis] = min(low[axis], mm), max(high[axis], mm)
    return low, high, total


@numba.njit(cache=True, nogil=True)
def _count_above(row: np.ndarray, begin: int, end: int, threshold: float) -> int:
    count, first = np.int32(0), np.uint64(begin)
    for x in range(end - begin):
        count = np.int32(count + np.int32(row[first + np.uint64(x)] > threshold))
    return int(count)


@numba.njit(cache=True, nogil=True)
def count_outside(
    raw: np.ndarray, slope: float, inter: float, linear: np.ndarray, threshold: float, low: np.ndarray,
    high: np.ndarray, floor: float,
) -> int:  # fmt: skip
    """Count the voxels above `threshold` whose centre lies outside the box `low` to `high` and not below `floor`.

    Parameters
    ----------
    raw, slope, inter, linear
        As in `bounding_box_mm`.
    low, high
        float64 (3,), (x, y, z) in mm, without the affine's translation.
    floor
        z in mm; what lies below it does not count.
    """
    count = 0
    depth, height, width = raw.shape
    flat, row = raw.reshape(-1), np.empty(width, np.float32)
    for z in range(depth):
        for y in range(height):
            # Along a row the world's coordinates are linear, so what lies inside is one interval.
            offset = linear[2, 1] * y + linear[2, 2] * z - floor
            begin, end = _inside(offset, linear[2, 0], np.inf, 0, width) if floor > -np.inf else (0, width)
            if begin == end:
                continue
            _clean(flat, (z * height + y) * width, width, slope, inter, row, 0)
            count += _count_above(row, begin, end, threshold)
            for axis in range(3):
                offset = linear[axis, 1] * y + linear[axis, 2] * z - low[axis]
                begin, end = _inside(offset, linear[axis, 0], high[axis] - low[axis], begin, end)
            count -= _count_above(row, begin, end, threshold)
    return count
