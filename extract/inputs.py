"""What a network sees of a scan: the central part of it, the slices of that, and how large they are made."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import nn

from loaders.views import Images, View, each, plan_picture, slices_of

MOST_VOXELS = 1 << 27  # of one picture: 512 x 512 x 512 are more than any network here can work on


def as_crop(crop: Sequence[int] | None) -> tuple[int, int, int] | None:
    """Return a crop as three numbers (z, y, x).

    Raises
    ------
    ValueError
        If it is something else.
    """
    if crop is None:
        return None
    try:
        z, y, x = (operator.index(n) for n in crop)
    except (TypeError, ValueError):
        raise ValueError(f"crop is {crop!r}, expected three whole numbers: z,y,x") from None
    if min(z, y, x) < 1:
        raise ValueError(f"crop is {z},{y},{x}, expected 1 or more along each axis")
    return z, y, x


def as_size(size: int | Sequence[int] | None, axes: int) -> tuple[int, ...] | None:
    """Return a size as one number for each axis of a picture.

    Raises
    ------
    ValueError
        If it is something else, or too large.
    """
    if size is None:
        return None
    order = "height,width" if axes == 2 else "z,y,x"
    try:
        given = tuple(operator.index(n) for n in ([size] if isinstance(size, int | np.integer) else size))
    except TypeError:
        given = ()
    lengths = given * axes if len(given) == 1 else given
    if len(lengths) != axes or min(lengths) < 1:
        shown = ",".join(map(str, given)) or repr(size)
        raise ValueError(f"size is {shown}, expected one number or {axes} ({order}), each 1 or more")
    if prod(lengths) > MOST_VOXELS:
        raise ValueError(f"size is {','.join(map(str, lengths))}, expected {MOST_VOXELS:,} voxels or fewer in all")
    return lengths


def seen_slices(
    shape_zyx: tuple[int, int, int], view: View, slices: int, crop: tuple[int, int, int] | None
) -> list[np.ndarray]:
    """Return the indices (int64) of the slices of a stored volume that a network sees: evenly spaced in the crop.

    Parameters
    ----------
    view
        Of slices.

    Returns
    -------
    list of np.ndarray
        Of each plane.

    Raises
    ------
    ValueError
        If the crop is larger than the volume, or has fewer slices.
    """
    starts = _starts(shape_zyx, crop)
    return [plane.positions + starts[plane.axis] for plane in plan_picture(crop or shape_zyx, 1, view, slices).planes]


def crop_volumes(images: torch.Tensor, crop: tuple[int, int, int] | None) -> torch.Tensor:
    """Return the central part of volumes (..., z, y, x); of an odd rest the larger half is cut off at the end.

    Raises
    ------
    ValueError
        If the crop is larger than they are.
    """
    for axis, (start, length) in enumerate(_spans(tuple(images.shape[-3:]), crop)):
        images = images.narrow(axis - 3, start, length)
    return images


def crop_pictures(pictures: torch.Tensor, view: View, crop: tuple[int, int, int] | None) -> torch.Tensor:
    """Return what `crop_volumes` leaves of slices (scan, slice, height, width) that a loader has cut of whole volumes.

    Slices are upright: their height goes down the second of (z, y, x), or the first, from its far end.

    Raises
    ------
    ValueError
        If the crop is larger than they are.
    """
    if crop is None:
        return pictures
    _, height, width = plan_picture(crop, 1, view, 1).shape
    (down, rows), (left, columns) = _spans(tuple(pictures.shape[-2:]), (height, width))
    top = pictures.shape[-2] - down - rows
    return pictures[..., top : top + rows, left : left + columns]


def slices_to_load(
    shape_zyx: tuple[int, int, int], view: View, slices: int, crop: tuple[int, int, int] | None
) -> list[int] | list[list[int]]:
    """Return the indices of the slices that a loader is to cut of stored volumes, as `loaders.open_loader` takes them.

    Raises
    ------
    ValueError
        See `seen_slices`.
    """
    if view is View.volume:
        return []
    planes = [positions.tolist() for positions in seen_slices(shape_zyx, view, slices, crop)]
    return planes if view is View.triplanar else planes[0]


def pictures_of(
    images: Images, view: View, slices: int, crop: tuple[int, int, int] | None, *, cut: bool
) -> list[torch.Tensor]:
    """Return what is seen of scans: per plane (scan, slice, height, width), or volumes (scan, 1, z, y, x).

    Parameters
    ----------
    images
        (scan, z, y, x), RAS; or those slices that `slices_to_load` names, (scan, slice, height, width), of three planes
        a tuple.
    cut
        They are slices already, as a tuple is in any case.

    Raises
    ------
    ValueError
        If the crop is larger than they are, or there are fewer slices.
    """
    if cut or isinstance(images, tuple):
        planes = [View.axial, View.coronal, View.sagittal] if view is View.triplanar else [view]
        return [crop_pictures(one, plane, crop) for one, plane in zip(each(images), planes, strict=True)]
    images = crop_volumes(images, crop)
    return [images[:, None]] if view is View.volume else slices_of(images, view, slices)


def target_size(shape: Sequence[int], scale: float, size: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return how large pictures of a shape are made."""
    return size or tuple(max(1, round(n * scale)) for n in shape)


def resize(grey: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize pictures (item, channel, [z,] y, x): along axes that shrink areas are averaged, others are interpolated.

    Returns
    -------
    torch.Tensor
        float32, or what was given where nothing changes.
    """
    lengths = tuple(grey.shape[2:])
    smaller = tuple(map(min, lengths, size))
    if smaller != lengths:
        grey = nn.functional.interpolate(grey.float(), size=smaller, mode="area")
    if smaller != tuple(size):
        grey = nn.functional.interpolate(grey.float(), size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)
    return grey


_LINEAR = {2: "bilinear", 3: "trilinear"}


def _starts(shape: Sequence[int], crop: Sequence[int] | None) -> list[int]:
    return [start for start, _ in _spans(shape, crop)]


def _spans(shape: Sequence[int], crop: Sequence[int] | None) -> list[tuple[int, int]]:
    """Return where the central part of a picture starts along each axis, and how long it is."""
    if crop is None:
        return [(0, n) for n in shape]
    if any(wanted > n for wanted, n in zip(crop, shape, strict=True)):
        wanted, there = (" x ".join(map(str, lengths)) for lengths in (crop, shape))
        raise ValueError(f"crop is {wanted}, expected no more than the {there} voxels of a scan")
    return [((n - wanted) // 2, wanted) for wanted, n in zip(crop, shape, strict=True)]
