"""What a network sees of a volume: all of it, or evenly spaced slices, drawn upright."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch


class View(StrEnum):
    """Planes of the slices; ``triplanar`` is all three, ``volume`` none (3D networks)."""

    axial = "axial"
    coronal = "coronal"
    sagittal = "sagittal"
    triplanar = "triplanar"
    volume = "volume"


_AXES = {View.axial: 0, View.coronal: 1, View.sagittal: 2}  # of (z, y, x), across the slices

#: How many, which ones, or which ones of each of three planes.
Slices = int | Sequence[int] | Sequence[Sequence[int]]

#: What a loader gives of a batch: pictures, or those of each plane.
Images: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"


@dataclass(frozen=True)
class Plane:
    """Slices across one axis of a volume.

    Attributes
    ----------
    view
        Of one plane.
    positions
        int64, the slices along their axis.
    shape
        (slice, height, width).
    """

    view: View
    positions: np.ndarray
    shape: tuple[int, int, int]

    @property
    def axis(self) -> int:
        """The axis of (z, y, x) across the slices."""
        return _AXES[self.view]


@dataclass(frozen=True)
class Picture:
    """What a loader gives of each scan.

    Attributes
    ----------
    view
        Whose slices these are.
    planes
        One, or the three of `View.triplanar`; none for volumes.
    shape
        In memory: (z, y, x), (slice, height, width), or (voxel,) of three planes, one after another.
    slabs
        int64, in ascending order: the slabs of a shard that hold all this.
    """

    view: View
    planes: tuple[Plane, ...]
    shape: tuple[int, ...]
    slabs: np.ndarray

    def split(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what is in memory, (scan, *shape), as the pictures of each plane, without a copy."""
        if len(self.planes) < 2:
            return (images,)
        flat = images.split([prod(plane.shape) for plane in self.planes], dim=1)
        return tuple(part.unflatten(1, plane.shape) for part, plane in zip(flat, self.planes, strict=True))


def each(images: Images) -> tuple[torch.Tensor, ...]:
    """Return pictures as those of each plane, of which there may be one."""
    return images if isinstance(images, tuple) else (images,)


def as_images(pictures: tuple[Any, ...]) -> Any:
    """Return the pictures of each plane as a loader gives them."""
    return pictures if len(pictures) > 1 else pictures[0]


def plan_picture(
    shape_zyx: tuple[int, int, int],
    slab: int,
    view: str = "volume",
    slices: Slices = 3,
) -> Picture:
    """Work out what must be read for a view.

    Parameters
    ----------
    shape_zyx
        Of a stored volume.
    slab
        Planes per slab.
    slices
        How many of each plane, evenly spaced, or which ones (``triplanar``: of each plane); volumes have none.

    Raises
    ------
    ValueError
        For an unknown view, or slices that are not there.
    """
    names = [str(known) for known in View]
    if view not in names:
        raise ValueError(f"view is {view!r}, expected one of {', '.join(names)}")
    all_slabs = np.arange(shape_zyx[0] // slab)
    if view == View.volume:
        return Picture(View.volume, (), shape_zyx, all_slabs)
    if view != View.triplanar:
        plane = _plan_plane(shape_zyx, View(view), slices)
        slabs = np.unique(plane.positions // slab) if plane.axis == 0 else all_slabs
        return Picture(plane.view, (plane,), plane.shape, slabs)
    wanted: list[Any] = list(slices) if isinstance(slices, Sequence | np.ndarray) else [np.array(slices)] * len(_AXES)
    if len(wanted) != len(_AXES) or not all(isinstance(one, Sequence | np.ndarray) for one in wanted):
        expected = "a number, or the positions of axial, of coronal and of sagittal ones"
        raise ValueError(f"slices is {slices!r}, expected {expected}")
    planes = tuple(_plan_plane(shape_zyx, one, some) for one, some in zip(_AXES, wanted, strict=True))
    return Picture(View.triplanar, planes, (sum(prod(plane.shape) for plane in planes),), all_slabs)


def _plan_plane(shape_zyx: tuple[int, int, int], view: View, slices: Any) -> Plane:
    axis = _AXES[view]
    length = shape_zyx[axis]
    try:
        given = np.asarray(slices)
    except ValueError:  # lists of several lengths
        given = np.empty((0, 0))
    if given.ndim > 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"slices is {slices!r}, expected a whole number, or several, in the view {view}")
    if given.ndim == 0:
        number = int(given)
        if not 1 <= number <= length:
            raise ValueError(f"slices is {number}, expected 1 to {length} in the view {view}")
        positions = slice_positions(length, number)
    else:
        positions = given.astype(np.int64)
        if not len(positions) or positions.min() < 0 or positions.max() >= length:
            raise ValueError(f"slices are {given.tolist()}, expected numbers from 0 to {length - 1} in the view {view}")
    height, width = (n for other, n in enumerate(shape_zyx) if other != axis)
    return Plane(view, positions, (len(positions), height, width))


def slice_positions(length: int, slices: int) -> np.ndarray:
    """Return the indices (int64) of evenly spaced slices along an axis, all distinct: one slice is the middle one."""
    if slices > length - 2:  # the ends are slices as well
        return np.rint(np.linspace(0, length - 1, slices)).astype(np.int64)
    return np.rint((length - 1) * np.arange(1, slices + 1) / (slices + 1)).astype(np.int64)


def slices_of(images: torch.Tensor, view: str, slices: Slices) -> list[torch.Tensor]:
    """Cut volumes into slices.

    Parameters
    ----------
    images
        (scan, z, y, x), RAS.
    view
        Any but ``volume``.
    slices
        So many of each plane, or which ones, as for a loader.

    Returns
    -------
    list of torch.Tensor
        Per plane (scan, slice, height, width). Front is up in axial slices, the top of the head in the others; patient
        left is left.

    Raises
    ------
    ValueError
        For another view, or slices that are not there.
    """
    if view == View.volume:
        raise ValueError(
            "view is 'volume', expected one of axial, coronal, sagittal, triplanar: volumes have no slices"
        )
    z, y, x = images.shape[1:]
    return [cut(images, plane.axis, plane.positions) for plane in plan_picture((z, y, x), 1, view, slices).planes]


def cut(images: torch.Tensor, axis: int, positions: np.ndarray) -> torch.Tensor:
    """Return slices (scan, slice, height, width) of volumes (scan, z, y, x), across one of the axes (z, y, x)."""
    import torch  # here and not above: it takes seconds, for which the command line's --help would wait

    index = torch.from_numpy(positions).to(images.device, non_blocking=True)  # else a GPU would be waited for
    return images.index_select(1 + axis, index).movedim(1 + axis, 1).flip(2)
