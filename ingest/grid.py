"""The voxel grid that all scans of a store share, and the space that a scan is in."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: Voxel (x, y, z) -> mm of FSL's MNI152 1 mm grid (182x218x182), which UK Biobank's volumes have. It is LAS.
FSL_MNI152_AFFINE = np.array([[-1, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]], dtype=np.float64)
FSL_MNI152_SHAPE = (182, 218, 182)

MNI152 = "MNI152"
NATIVE = "native"


@dataclass(frozen=True)
class Grid:
    """The grid of a store: RAS, that is x left to right, y back to front, z bottom to top.

    Attributes
    ----------
    shape_zyx
        Voxels along z, y, x.
    voxel_mm
        Edge of the cubic voxel, in mm.
    affine_ras
        4x4, voxel (x, y, z) -> mm. In MNI152 space mm of the template, in native space mm from the grid's centre.
    space
        ``"MNI152"`` or ``"native"``.
    """

    shape_zyx: tuple[int, int, int]
    voxel_mm: float
    affine_ras: tuple[tuple[float, ...], ...]
    space: str

    @property
    def affine(self) -> np.ndarray:
        """`affine_ras` as a float64 array (4, 4)."""
        return np.array(self.affine_ras, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the store's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, attrs: dict[str, Any]) -> Grid:
        """Read `to_json`'s result back."""
        return cls(
            shape_zyx=tuple(attrs["shape_zyx"]),
            voxel_mm=float(attrs["voxel_mm"]),
            affine_ras=tuple(tuple(float(v) for v in row) for row in attrs["affine_ras"]),
            space=attrs["space"],
        )


def _translation(origin_mm: tuple[float, float, float]) -> tuple[tuple[float, ...], ...]:
    x, y, z = origin_mm
    return ((1.0, 0.0, 0.0, x), (0.0, 1.0, 0.0, y), (0.0, 0.0, 1.0, z), (0.0, 0.0, 0.0, 1.0))


#: The central 160x192x160 of FSL's grid (x 11:171, y 13:205, z 11:171), flipped to RAS: the crop of the SFCN models.
MNI152_GRID = Grid((160, 192, 160), 1.0, _translation((-80.0, -113.0, -61.0)), MNI152)

#: The same box around the middle of each brain.
NATIVE_GRID = Grid((160, 192, 160), 1.0, _translation((-79.5, -95.5, -79.5)), NATIVE)

GRIDS = {MNI152: MNI152_GRID, NATIVE: NATIVE_GRID}

#: BIDS' names of templates that are smaller than MNI152, or larger, or elsewhere.
_OTHER_TEMPLATE = re.compile("space-mni(305|colin27|infant|pediatric)")


def space_of(name: str, affine: np.ndarray, shape_xyz: tuple[int, ...], form_code: int) -> str:
    """Tell whether a volume is in MNI152 space or in the scanner's.

    A file says so by its name (UK Biobank's ``*_to_MNI*``, BIDS' ``space-MNI152*``), by the code of its sform or
    qform (4 is MNI152 in the NIfTI standard), or by having FSL's very grid. A name that tells another template of
    that institute, such as ``space-MNI305``, is believed before the code: tools write 4 for any template.

    Parameters
    ----------
    name
        File name, or member of an archive.
    affine
        4x4, voxel (x, y, z) -> mm.
    shape_xyz
        Voxels along x, y, z.
    form_code
        ``sform_code`` if set, else ``qform_code``.
    """
    stem = name.lower()
    if _OTHER_TEMPLATE.search(stem):
        return NATIVE
    if "to_mni" in stem or "space-mni" in stem or form_code == 4:
        return MNI152
    if tuple(shape_xyz) == FSL_MNI152_SHAPE and np.allclose(affine, FSL_MNI152_AFFINE, atol=1e-3):
        return MNI152
    return NATIVE
