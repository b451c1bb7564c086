"""Quality numbers of one stored volume: intensity, volume, centre of mass, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

#: A brain mask of an adult holds at most about 2 litres; where the usual scan has more, the skulls are still on.
MOST_BRAIN_ML = 2200.0

_LEAST_NOISE_VOXELS = 1000  # fewer tell nothing about noise


@dataclass(frozen=True)
class Measure:
    """One of the numbers by which scans are compared.

    Attributes
    ----------
    name
        Column of the table of numbers.
    least_spread
        Robust SDs are taken to be at least this: what is smaller does not matter, and half a cohort may be equal.
    """

    name: str
    title: str
    unit: str
    decimals: int
    least_spread: float
    meaning: str


INTENSITY = Measure("intensity", "Intensity", "grey levels", 1, 0.5, "mean grey level, of 255")
BRAIN_VOLUME = Measure("volume", "Brain volume", "ml", 0, 2.0, "voxels that are not zero")
HEAD_VOLUME = Measure("volume", "Head volume", "ml", 0, 2.0, "voxels brighter than air (Otsu's threshold)")
CENTRE = Measure("centre", "Centre of mass", "mm", 1, 0.25, "distance from the cohort's median centre")
NOISE = Measure("noise", "Noise", "grey levels", 2, 0.05, "Immerkær's estimate in axial planes, inside only")


def measures_of(*, whole_heads: bool) -> tuple[Measure, ...]:
    """Return what scans are compared by."""
    return (INTENSITY, HEAD_VOLUME if whole_heads else BRAIN_VOLUME, CENTRE, NOISE)


@dataclass(frozen=True)
class ScanQuality:
    """Quality numbers of one volume; NaN where nothing is inside.

    Attributes
    ----------
    intensity
        Mean grey level of the voxels inside.
    volume
        Of the voxels inside, in ml.
    x, y, z
        Centre of mass (weighted by grey level) in mm to the right, to the front and up from the grid's centre.
    noise
        SD of the noise in grey levels.
    """

    intensity: float = math.nan
    volume: float = math.nan
    x: float = math.nan
    y: float = math.nan
    z: float = math.nan
    noise: float = math.nan


def measure_volume(volume: np.ndarray, voxel_mm: float, *, whole_heads: bool = False) -> ScanQuality:
    """Measure one volume.

    Noise is estimated as by Immerkær (1996, Computer Vision and Image Understanding 64, 300, doi
    10.1006/cviu.1996.0060): the difference of two Laplacians, which constant and linear grey levels do not excite, in
    each axial plane; here only where all nine voxels are inside, so that the edge of a mask is no noise. What is left
    of anatomy adds to it, alike in all scans.

    Parameters
    ----------
    volume
        uint8 (z, y, x), C-contiguous.
    voxel_mm
        Edge of the voxel.
    whole_heads
        If the skulls are still on, inside is what is brighter than Otsu's threshold, for air is not zero then;
        otherwise what is not zero.
    """
    threshold = otsu_level(_count_levels(volume.reshape(-1))) if whole_heads else 0
    count, total, x, y, z, laplacian, laplacian_voxels = _sums(volume, threshold)
    if count == 0:
        return ScanQuality()
    middle_z, middle_y, middle_x = ((length - 1) / 2 for length in volume.shape)
    noise = math.nan
    if laplacian_voxels >= _LEAST_NOISE_VOXELS:
        noise = math.sqrt(math.pi / 2) / 6 * laplacian / laplacian_voxels
    return ScanQuality(
        intensity=total / count,
        volume=count * voxel_mm**3 / 1000,
        x=(x / total - middle_x) * voxel_mm,
        y=(y / total - middle_y) * voxel_mm,
        z=(z / total - middle_z) * voxel_mm,
        noise=noise,
    )


@numba.njit(cache=True, nogil=True)
def _count_levels(voxels: np.ndarray) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for value in voxels:
        counts[value] += 1
    return counts


def otsu_level(counts: np.ndarray) -> int:
    """Return the grey level that best parts the positive ones in two classes: the second is what is above it.

    Parameters
    ----------
    counts
        int64 (256,), how many voxels have each grey level.
    """
    levels = np.arange(256)
    positive = np.where(levels > 0, counts, 0).astype(np.float64)
    below, sum_below = np.cumsum(positive), np.cumsum(positive * levels)
    above, sum_above = below[-1] - below, sum_below[-1] - sum_below
    parts = (below > 0) & (above > 0)
    if not parts.any():
        return 0
    between = np.zeros(256)
    means = sum_below[parts] / below[parts] - sum_above[parts] / above[parts]
    between[parts] = below[parts] * above[parts] * means**2
    return int(between.argmax())


@numba.njit(cache=True, nogil=True)
def _sums(volume: np.ndarray, threshold: int) -> tuple[int, int, int, int, int, int, int]:
    """Sum over the voxels of uint8 (z, y, x) above the threshold.

    Returns
    -------
    count, total
        Of voxels, and of their grey levels.
    x, y, z
        Grey level times index.
    laplacian, laplacian_voxels
        Absolute responses of the kernel (1 -2 1; -2 4 -2; 1 -2 1) whose nine voxels are all inside, and how many.
    """
    depth, height, width = volume.shape
    level = np.uint8(threshold)
    columns = np.zeros(width, np.int64)
    plane_columns = np.zeros(width, np.uint32)
    second = np.zeros(width, np.int16)  # difference along y, and whether its three voxels are inside
    inside = np.zeros(width, np.int16)
    count = total = sum_y = sum_z = laplacian = laplacian_voxels = 0
    for z in range(depth):
        plane_columns[:] = 0
        plane_total = 0
        for y in range(height):
            row = volume[z, y]
            row_count = np.uint32(0)  # 32 bits, which a row cannot overflow, go faster than 64
            row_total = np.uint32(0)
            for x in range(width):
                value = np.uint32(row[x]) if row[x] > level else np.uint32(0)
                row_count = np.uint32(row_count + np.uint32(row[x] > level))
                row_total = np.uint32(row_total + value)
                plane_columns[x] = np.uint32(plane_columns[x] + value)
            count += int(row_count)
            plane_total += int(row_total)
            sum_y += y * int(row_total)
            if row_count == 0 or y == 0 or y == height - 1:
                continue
            before, after = volume[z, y - 1], volume[z, y + 1]
            for x in range(width):
                second[x] = np.int16(before[x]) + np.int16(after[x]) - np.int16(2) * np.int16(row[x])
                inside[x] = (before[x] > level) & (row[x] > level) & (after[x] > level)
            row_laplacian = np.int32(0)
            row_voxels = np.int32(0)
            for x in range(1, width - 1):
                response = np.int32(second[x - 1]) + np.int32(second[x + 1]) - np.int32(2) * np.int32(second[x])
                whole = np.int32(inside[x - 1] & inside[x] & inside[x + 1])
                row_laplacian = np.int32(row_laplacian + whole * abs(response))
                row_voxels = np.int32(row_voxels + whole)
            laplacian += int(row_laplacian)
            laplacian_voxels += int(row_voxels)
        total += plane_total
        sum_z += z * plane_total
        columns += plane_columns
    sum_x = 0
    for x in range(width):
        sum_x += x * columns[x]
    return count, total, sum_x, sum_y, sum_z, laplacian, laplacian_voxels
