"""What a network sees of a volume: all of it, or evenly spaced slices, drawn upright."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch


class View(StrEnum):
    """Planes of the slices; ``triplanar`` is all three, ``volume`` none (3D networks)."""

    axial = "axial"
    coronal = "coronal"
    sagittal = "sagittal"
    triplanar = "triplanar"
    volume = "volume"


_AXES = {View.axial: 0, View.coronal: 1, View.sagittal: 2}  # of (z, y, x), across the slices


@dataclass(frozen=True)
class Picture:
    """What a loader gives of each scan.

    Attributes
    ----------
    view
        Not `View.triplanar`, whose slices have three shapes: take volumes, and `slices_of`.
    positions
        int64, the slices along their axis; none for volumes.
    shape
        (z, y, x), or (slice, height, width).
    slabs
        int64, in ascending order: the slabs of a shard that hold all this.
    """

    view: View
    positions: np.ndarray
    shape: tuple[int, int, int]
    slabs: np.ndarray

    @property
    def axis(self) -> int:
        """The axis of (z, y, x) across the slices; -1 for volumes."""
        return _AXES.get(self.view, -1)


def plan_picture(
    shape_zyx: tuple[int, int, int], slab: int, view: str = "volume", slices: int | Sequence[int] = 3
) -> Picture:
    """Work out what must be read for a view.

    Parameters
    ----------
    shape_zyx
        Of a stored volume.
    slab
        Planes per slab.
    slices
        How many, evenly spaced, or which ones; volumes have none.

    Raises
    ------
    ValueError
        For an unknown view, ``triplanar``, or slices that are not there.
    """
    names = [str(known) for known in View if known is not View.triplanar]
    if view not in names:
        hint = "; load volumes and cut them with loaders.slices_of" if view == View.triplanar else ""
        raise ValueError(f"view is {view!r}, expected one of {', '.join(names)}{hint}")
    all_slabs = np.arange(shape_zyx[0] // slab)
    if view == View.volume:
        return Picture(View.volume, np.empty(0, np.int64), shape_zyx, all_slabs)
    chosen = View(view)
    axis = _AXES[chosen]
    length = shape_zyx[axis]
    given = np.asarray(slices)
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"slices is {slices!r}, expected a whole number, or several")
    if given.ndim == 0:
        slices = int(given)
        if not 1 <= slices <= length:
            raise ValueError(f"slices is {slices}, expected 1 to {length} in the view {chosen}")
        positions = slice_positions(length, slices)
    else:
        positions = given.astype(np.int64).reshape(-1)
        if not len(positions) or positions.min() < 0 or positions.max() >= length:
            raise ValueError(
                f"slices are {given.tolist()}, expected numbers from 0 to {length - 1} in the view {chosen}"
            )
    height, width = (n for other, n in enumerate(shape_zyx) if other != axis)
    slabs = np.unique(positions // slab) if axis == 0 else all_slabs
    return Picture(chosen, positions, (len(positions), height, width), slabs)


def slice_positions(length: int, slices: int) -> np.ndarray:
    """Return the indices (int64) of evenly spaced slices along an axis: one slice is the middle one."""
    return np.rint((length - 1) * np.arange(1, slices + 1) / (slices + 1)).astype(np.int64)


def slices_of(images: torch.Tensor, view: View, slices: int) -> list[torch.Tensor]:
    """Cut volumes into slices.

    Parameters
    ----------
    images
        (scan, z, y, x), RAS.
    view
        Any but `View.volume`.
    slices
        Per plane.

    Returns
    -------
    list of torch.Tensor
        Per plane (scan, slice, height, width). Front is up in axial slices, the top of the head in the others; patient
        left is left.
    """
    wanted = list(_AXES) if view == View.triplanar else [view]
    return [cut(images, _AXES[plane], slice_positions(images.shape[1 + _AXES[plane]], slices)) for plane in wanted]


def cut(images: torch.Tensor, axis: int, positions: np.ndarray) -> torch.Tensor:
    """Return slices (scan, slice, height, width) of volumes (scan, z, y, x), across one of the axes (z, y, x)."""
    index = torch.from_numpy(positions).to(images.device, non_blocking=True)  # else a GPU would be waited for
    return images.index_select(1 + axis, index).movedim(1 + axis, 1).flip(2)
