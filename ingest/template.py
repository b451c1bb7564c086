"""The MNI152 template and the directions in which simulated brains differ from it.

Template: ICBM 2009a nonlinear symmetric (Fonov et al. 2011, doi 10.1016/j.neuroimage.2010.07.033), which nilearn ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage

from ingest.grid import FSL_MNI152_AFFINE, FSL_MNI152_SHAPE

#: Voxels of the template (1 mm) between points of the displacement fields.
SPACING = 4

_Vector = tuple[float, float, float]

# Where (mm of MNI152) and in which direction shapes differ. The places are invented; that they are fixed matters.
_SEX_BUMPS: list[tuple[_Vector, _Vector]] = [
    ((-44, 8, -22), (-1, 0.3, -0.4)),
    ((44, 8, -22), (1, 0.3, -0.4)),
    ((0, -62, 44), (0, -0.6, 0.8)),
    ((0, 46, 6), (0, 0.9, -0.3)),
]
_INTELLIGENCE_BUMPS: list[tuple[_Vector, _Vector]] = [
    ((-34, 28, 34), (-0.7, 0.5, 0.5)),
    ((34, 28, 34), (0.7, 0.5, 0.5)),
]


@dataclass(frozen=True)
class Template:
    """The template and the directions in which brains differ.

    Attributes
    ----------
    t1
        float32 (z, y, x), RAS, 1 mm; 1 is white matter.
    mask
        bool (z, y, x).
    contrast
        float32 (z, y, x): what is added to `t1` to take away all of the grey/white contrast.
    affine
        float64 (4, 4), voxel (x, y, z) -> mm.
    fsl_mask
        bool (z, y, x): `mask` on FSL's grid, x from right to left.
    near
        bool (Z, Y, X): points of the coarse grid from which a displacement can reach the brain.
    ventricles, sex, intelligence
        float32 (3, Z, Y, X) displacement fields along x, y, z with a largest length of 1, on the coarse grid.
    """

    t1: np.ndarray
    mask: np.ndarray
    contrast: np.ndarray
    affine: np.ndarray
    fsl_mask: np.ndarray
    near: np.ndarray
    ventricles: np.ndarray
    sex: np.ndarray
    intelligence: np.ndarray


@cache
def load_template() -> Template:
    """Load the template that nilearn ships and derive the fields of the effects from its anatomy."""
    from nilearn import datasets  # two seconds to import, needed by no other command

    image = datasets.load_mni152_template(resolution=1)
    t1 = _zyx(image)
    grey = _zyx(datasets.load_mni152_gm_template(resolution=1))
    white = _zyx(datasets.load_mni152_wm_template(resolution=1))
    mask = _zyx(datasets.load_mni152_brain_mask(resolution=1)) > 0
    affine = np.asarray(image.affine, dtype=np.float64)
    middle = float((np.median(t1[grey > 0.8]) + np.median(t1[white > 0.8])) / 2)
    contrast = (np.clip(grey + white, 0, 1) * (middle - t1)).astype(np.float32)
    return Template(
        t1=np.where(mask, t1, 0).astype(np.float32),
        mask=mask,
        contrast=np.where(mask, contrast, 0).astype(np.float32),
        affine=affine,
        fsl_mask=mask[np.ix_(*_fsl_voxels(affine))],
        near=ndimage.binary_dilation(_coarse(mask[None])[0], iterations=4),
        ventricles=_outward_from(lateral_ventricles(t1, grey + white, mask, affine)),
        sex=_bumps(affine, t1.shape, _SEX_BUMPS, 22.0),
        intelligence=_bumps(affine, t1.shape, _INTELLIGENCE_BUMPS, 18.0),
    )


def lateral_ventricles(t1: np.ndarray, tissue: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the lateral ventricles of the template: dark, no tissue, connected to their bodies.

    Parameters
    ----------
    t1, tissue, mask
        (z, y, x); `tissue` is the probability of grey or white matter.
    affine
        float64 (4, 4), a translation.

    Returns
    -------
    numpy.ndarray
        bool (z, y, x).
    """
    z, y, x = (np.arange(n, dtype=np.float32) + affine[2 - axis, 3] for axis, n in enumerate(t1.shape))
    z, y, x = z[:, None, None], y[None, :, None], np.abs(x)[None, None, :]
    dark = mask & (tissue < 0.5) & (t1 < 0.62) & (x < 45) & (y > -50) & (y < 35) & (z > -20) & (z < 32)
    bodies = dark & (x > 4) & (x < 20) & (y > 0) & (y < 22) & (z > 4) & (z < 26)
    parts, _ = ndimage.label(dark)
    return np.isin(parts, np.unique(parts[bodies]))


def _fsl_voxels(affine: np.ndarray) -> list[np.ndarray]:
    """Return which z, y, x of the template FSL's voxels are: both grids coincide, with x turned round."""
    start = np.linalg.inv(affine) @ FSL_MNI152_AFFINE[:, 3]
    step = np.diag(FSL_MNI152_AFFINE)
    return [np.rint(start[i] + step[i] * np.arange(FSL_MNI152_SHAPE[i])).astype(int) for i in (2, 1, 0)]


def _zyx(image: Any) -> np.ndarray:
    """Return the voxels of a nibabel image as float32 (z, y, x)."""
    return np.ascontiguousarray(image.get_fdata(dtype=np.float32).T)


def _outward_from(region: np.ndarray) -> np.ndarray:
    """Return a displacement field that widens a region: against the gradient of its smoothed mask."""
    along_z, along_y, along_x = np.gradient(ndimage.gaussian_filter(region.astype(np.float32), 4.0))
    return _unit(_coarse(-np.stack([along_x, along_y, along_z])))


def _bumps(
    affine: np.ndarray, shape: tuple[int, ...], bumps: list[tuple[_Vector, _Vector]], sigma_mm: float
) -> np.ndarray:
    """Return a sum of Gaussians, each a centre (mm) and a direction (x, y, z)."""
    z, y, x = (np.arange(-(-n // SPACING) + 1) * SPACING + affine[2 - axis, 3] for axis, n in enumerate(shape))
    field = np.zeros((3, len(z), len(y), len(x)))
    for (x0, y0, z0), direction in bumps:
        squared = (z[:, None, None] - z0) ** 2 + (y[:, None] - y0) ** 2 + (x - x0) ** 2
        field += np.reshape(direction, (3, 1, 1, 1)) * np.exp(-squared / (2 * sigma_mm**2))
    return _unit(field)


def _coarse(field: np.ndarray) -> np.ndarray:
    """Take every `SPACING`-th point of a field (part, z, y, x), and one more beyond the end."""
    shape = [-(-n // SPACING) + 1 for n in field.shape[1:]]
    padding = [(0, 0)] + [(0, count * SPACING - n) for count, n in zip(shape, field.shape[1:], strict=True)]
    return np.pad(field, padding, mode="edge")[:, ::SPACING, ::SPACING, ::SPACING]


def _unit(field: np.ndarray) -> np.ndarray:
    """Scale a displacement field (3, z, y, x) so that its largest length is 1."""
    return (field / np.sqrt((field**2).sum(axis=0).max())).astype(np.float32)
