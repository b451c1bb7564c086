"""Three planes through a volume, upright, patient left on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plane:
    """One slice as it is drawn.

    Attributes
    ----------
    pixels
        (height, width), first row on top, of the type of the volume's voxels.
    left, right
        Letters of the patient's sides at the left and right edge: L, R, P (posterior) or A (anterior).
    """

    name: str
    pixels: np.ndarray
    left: str
    right: str


def planes_of(volume: np.ndarray, at: tuple[int, int, int] | None = None) -> list[Plane]:
    """Cut the axial, coronal and sagittal plane through a voxel of a volume.

    Parameters
    ----------
    volume
        (z, y, x), RAS: x left to right, y back to front, z bottom to top.
    at
        (z, y, x) of the voxel, by default the middle.

    Returns
    -------
    list of Plane
        Front is up in the axial plane, the top of the head in the others; patient left is left (the neurological
        convention), and the sagittal plane looks to the right.
    """
    z, y, x = at or (length // 2 for length in volume.shape)
    return [
        Plane("axial", volume[z, ::-1, :], "L", "R"),
        Plane("coronal", volume[::-1, y, :], "L", "R"),
        Plane("sagittal", volume[::-1, :, x], "P", "A"),
    ]


def side_by_side(planes: Sequence[Plane], gap: int) -> tuple[np.ndarray, list[int]]:
    """Put planes beside each other on black (zeros).

    Parameters
    ----------
    gap
        Pixels between them.

    Returns
    -------
    canvas : numpy.ndarray
        (height, width), of the planes' type; lower planes lie in the middle of its height.
    starts : list of int
        The column at which each plane begins.
    """
    height = max(plane.pixels.shape[0] for plane in planes)
    width = sum(plane.pixels.shape[1] for plane in planes) + gap * (len(planes) - 1)
    canvas = np.zeros((height, width), planes[0].pixels.dtype)
    starts = []
    start = 0
    for plane in planes:
        rows, columns = plane.pixels.shape
        top = (height - rows) // 2
        canvas[top : top + rows, start : start + columns] = plane.pixels
        starts.append(start)
        start += columns + gap
    return canvas, starts
