"""Intensities -> stored grey levels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from ingest.errors import ScanError

_BINS = 4096


@dataclass(frozen=True)
class IntensityRule:
    """How a scan's intensities become uint8: the percentile of the positive voxels maps to the top level, 0 stays 0."""

    percentile: float = 99.9
    top_level: int = 255

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the store's attributes."""
        return {"rule": "percentile of positive voxels to top_level, zero to zero, per scan", **asdict(self)}


@dataclass(frozen=True)
class StoredVolume:
    """A scan as it is stored.

    Attributes
    ----------
    data
        uint8 (z, y, x).
    scale
        ``data * scale`` is the source's intensity, up to rounding and clipping.
    """

    data: np.ndarray
    scale: float


def to_grey_levels(values: np.ndarray, rule: IntensityRule) -> StoredVolume:
    """Quantise a volume.

    Parameters
    ----------
    values
        float32 (z, y, x), no negative or non-finite values.

    Raises
    ------
    ScanError
        ``bad_image`` if the volume is empty or constant.
    """
    count, lowest, highest = _positive_range(values.ravel())
    if count == 0:
        raise ScanError("bad_image", "no positive voxel inside the grid")
    if lowest == highest:
        raise ScanError("bad_image", f"constant image: every positive voxel is {lowest:g}")
    top = positive_percentile(values, rule.percentile, count, highest)
    scale = top / rule.top_level
    if not scale > 0 or not np.isfinite(1 / scale):
        raise ScanError("bad_image", f"intensities are too small to scale (99.9th percentile {top:g})")
    return StoredVolume(_quantise(values, 1 / scale, rule.top_level), scale)


def positive_percentile(values: np.ndarray, percentile: float, count: int, highest: float) -> float:
    """Return what ``np.percentile`` gives of the positive values, in a third of its time.

    A histogram tells the bin of the value that is sought; only what lies in it or above is sorted.

    Parameters
    ----------
    values
        float32, any shape.
    count, highest
        How many are positive, and the largest.
    """
    flat = values.ravel()
    gain = _BINS / float(highest)
    if not np.isfinite(gain):  # the largest is next to nothing
        return float(np.percentile(flat[flat > 0].astype(np.float64), percentile))
    rank = percentile / 100 * (count - 1)
    low = int(rank)
    above = count - np.cumsum(_histogram(flat, gain))  # values above each bin
    sought = int(np.argmax(above < count - low))
    tail = np.sort(_tail(flat, gain, sought, int(above[sought - 1]) if sought else count))
    first = low - (count - len(tail))
    last = min(first + 1, len(tail) - 1)
    return float(tail[first]) + (float(tail[last]) - float(tail[first])) * (rank - low)


@numba.njit(cache=True, nogil=True)
def _positive_range(flat: np.ndarray) -> tuple[int, float, float]:
    count, lowest, highest = 0, np.float32(np.inf), np.float32(0)
    for value in flat:
        if value > 0:
            count += 1
            lowest, highest = min(lowest, value), max(highest, value)
    return count, float(lowest), float(highest)


@numba.njit(cache=True, nogil=True)
def _histogram(flat: np.ndarray, gain: float) -> np.ndarray:
    counts = np.zeros(_BINS, np.int64)
    for value in flat:
        if value > 0:
            counts[min(int(value * gain), _BINS - 1)] += 1
    return counts


@numba.njit(cache=True, nogil=True)
def _tail(flat: np.ndarray, gain: float, first_bin: int, count: int) -> np.ndarray:
    """Return the positive values of bin `first_bin` and above, of which there are `count`."""
    out = np.empty(count, np.float32)
    found = 0
    for value in flat:
        if value > 0 and min(int(value * gain), _BINS - 1) >= first_bin:
            out[found] = value
            found += 1
    return out


@numba.njit(cache=True, nogil=True)
def _quantise(values: np.ndarray, gain: float, top_level: int) -> np.ndarray:
    flat = values.ravel()
    out = np.empty(flat.size, np.uint8)
    for i in range(flat.size):
        level = flat[i] * gain + 0.5
        out[i] = np.uint8(level) if level < top_level else np.uint8(top_level)
    return out.reshape(values.shape)
