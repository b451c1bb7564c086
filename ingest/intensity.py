"""Intensities -> stored grey levels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from ingest.errors import ScanError


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
    positive = values[values > 0]
    if positive.size == 0:
        raise ScanError("bad_image", "no positive voxel inside the grid")
    if positive.min() == positive.max():
        raise ScanError("bad_image", f"constant image: every positive voxel is {positive[0]:g}")
    top = float(np.percentile(positive, rule.percentile, overwrite_input=True))
    scale = top / rule.top_level
    if not scale > 0 or not np.isfinite(1 / scale):
        raise ScanError("bad_image", f"intensities are too small to scale (99.9th percentile {top:g})")
    return StoredVolume(_quantise(values, 1 / scale, rule.top_level), scale)


@numba.njit(cache=True, nogil=True)
def _quantise(values: np.ndarray, gain: float, top_level: int) -> np.ndarray:
    flat = values.ravel()
    out = np.empty(flat.size, np.uint8)
    for i in range(flat.size):
        level = flat[i] * gain + 0.5
        out[i] = np.uint8(level) if level < top_level else np.uint8(top_level)
    return out.reshape(values.shape)
