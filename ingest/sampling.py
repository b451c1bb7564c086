"""Trilinear sampling of a volume through an affine: the inner loops of conforming a scan."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def clean(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Return intensities as float32 with negative and non-finite ones set to 0.

    Parameters
    ----------
    raw
        (z, y, x), any real dtype, any strides.

    Returns
    -------
    numpy.ndarray
        float32 (z, y, x), C-contiguous.
    """
    depth, height, width = raw.shape
    out = np.empty((depth, height, width), np.float32)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                value = np.float32(raw[z, y, x] * slope + inter)
                out[z, y, x] = value if value > 0 and value < np.inf else np.float32(0)
    return out


@numba.njit(cache=True, nogil=True)
def crop(raw: np.ndarray, first: np.ndarray, slope: float, inter: float, out: np.ndarray) -> int:
    """Fill `out` with intensities as in `clean`, and count the positive ones that lie outside it, in one pass.

    Parameters
    ----------
    raw
        (z, y, x), any real dtype, any strides.
    first
        int64 (3,): voxel (z, y, x) of `raw` at which `out` begins; may be negative.
    out
        float32 (z, y, x); written where `raw` has voxels.
    """
    z0, y0, x0 = first
    outside = 0
    for z in range(raw.shape[0]):
        for y in range(raw.shape[1]):
            inside = 0 <= z - z0 < out.shape[0] and 0 <= y - y0 < out.shape[1]
            start, stop = (max(0, x0), min(raw.shape[2], x0 + out.shape[2])) if inside else (0, 0)
            for x in range(start, stop):
                value = np.float32(raw[z, y, x] * slope + inter)
                out[z - z0, y - y0, x - x0] = value if value > 0 and value < np.inf else np.float32(0)
            for begin, end in ((0, start), (stop, raw.shape[2])):
                for x in range(begin, end):
                    value = np.float32(raw[z, y, x] * slope + inter)
                    if value > 0 and value < np.inf:
                        outside += 1
    return outside


@numba.njit(cache=True, nogil=True)
def sample_trilinear(volume: np.ndarray, matrix: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with `volume` at ``matrix @ (x, y, z, 1)``, trilinear, 0 outside the field of view.

    The same values as ``scipy.ndimage.affine_transform(order=1, mode="constant")``.

    Parameters
    ----------
    volume
        float32 (z, y, x).
    matrix
        float64 (4, 4), voxel (x, y, z) of `out` -> voxel (x, y, z) of `volume`.
    out
        float32 (z, y, x), written.
    """
    depth, height, width = volume.shape
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                u = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + matrix[0, 3]
                v = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + matrix[1, 3]
                w = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + matrix[2, 3]
                if u < 0 or v < 0 or w < 0 or u > width - 1 or v > height - 1 or w > depth - 1:
                    out[z, y, x] = 0
                    continue
                # On the last plane the upper neighbour is the plane itself, with weight 0.
                i, j, k = min(int(u), width - 2), min(int(v), height - 2), min(int(w), depth - 2)
                a, b, c = u - i, v - j, w - k
                low = (volume[k, j, i] * (1 - a) + volume[k, j, i + 1] * a) * (1 - b)
                low += (volume[k, j + 1, i] * (1 - a) + volume[k, j + 1, i + 1] * a) * b
                high = (volume[k + 1, j, i] * (1 - a) + volume[k + 1, j, i + 1] * a) * (1 - b)
                high += (volume[k + 1, j + 1, i] * (1 - a) + volume[k + 1, j + 1, i + 1] * a) * b
                out[z, y, x] = low * (1 - c) + high * c


@numba.njit(cache=True, nogil=True)
def bounding_box_mm(volume: np.ndarray, linear: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the box, along the world's axes, around the voxels above `threshold`.

    Parameters
    ----------
    volume
        float32 (z, y, x).
    linear
        float64 (3, 3), the linear part of voxel (x, y, z) -> mm.

    Returns
    -------
    low, high : numpy.ndarray
        float64 (3,), (x, y, z) in mm of the voxels' centres, without the affine's translation.
    count : int
        Voxels above the threshold.
    """
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    count = 0
    depth, height, width = volume.shape
    for z in range(depth):
        for y in range(height):
            first, last = -1, -1
            for x in range(width):
                if volume[z, y, x] > threshold:
                    if first < 0:
                        first = x
                    last = x
                    count += 1
            if first < 0:
                continue
            for axis in range(3):  # a row's extremes are at its ends, for the map is linear
                for x in (first, last):
                    mm = linear[axis, 0] * x + linear[axis, 1] * y + linear[axis, 2] * z
                    low[axis], high[axis] = min(low[axis], mm), max(high[axis], mm)
    return low, high, count


@numba.njit(cache=True, nogil=True)
def count_outside(
    volume: np.ndarray, linear: np.ndarray, threshold: float, low: np.ndarray, high: np.ndarray, floor: float
) -> int:
    """Count the voxels above `threshold` whose centre lies outside the box `low` to `high` and not below `floor`.

    Parameters
    ----------
    volume, linear, threshold
        As in `bounding_box_mm`.
    low, high
        float64 (3,), (x, y, z) in mm, without the affine's translation.
    floor
        z in mm; what lies below it does not count.
    """
    count = 0
    depth, height, width = volume.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                height_mm = linear[2, 0] * x + linear[2, 1] * y + linear[2, 2] * z
                if volume[z, y, x] > threshold and height_mm >= floor:
                    for axis in range(3):
                        mm = linear[axis, 0] * x + linear[axis, 1] * y + linear[axis, 2] * z
                        if mm < low[axis] or mm > high[axis]:
                            count += 1
                            break
    return count
