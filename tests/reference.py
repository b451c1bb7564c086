"""What a stored picture must be, by nibabel, numpy and scipy alone: slow and plain."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage


def grey_levels(values: np.ndarray) -> np.ndarray:
    """The 99.9th percentile of the positive voxels becomes 255."""
    top = np.percentile(values[values > 0], 99.9)
    return np.clip(np.rint(values * 255 / top), 0, 255).astype(np.uint8)


def _canonical(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.load(path))
    values = image.get_fdata()
    values[~np.isfinite(values) | (values < 0)] = 0
    return values, image.affine


def mni_picture(path: Path) -> np.ndarray:
    """The central crop of a volume on FSL's MNI152 grid, uint8 (z, y, x)."""
    values, _ = _canonical(path)
    return grey_levels(values[11:171, 13:205, 11:171]).transpose(2, 1, 0)


def native_picture(path: Path) -> np.ndarray:
    """A skull-stripped volume at 1 mm, centred on the box around its non-zero voxels, uint8 (z, y, x)."""
    values, affine = _canonical(path)
    mm = nib.affines.apply_affine(affine, np.argwhere(values > 0))
    centre = (mm.min(axis=0) + mm.max(axis=0)) / 2
    target = np.eye(4)
    target[:3, 3] = centre - np.array([79.5, 95.5, 79.5])
    sampled = ndimage.affine_transform(values, np.linalg.inv(affine) @ target, output_shape=(160, 192, 160), order=1)
    return grey_levels(sampled).transpose(2, 1, 0)
