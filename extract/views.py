"""What a 2D network sees of a volume: evenly spaced slices, drawn upright."""

from __future__ import annotations

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
    planes = {View.axial: 1, View.coronal: 2, View.sagittal: 3}
    wanted = list(planes) if view is View.triplanar else [view]
    groups = []
    for plane in wanted:
        axis = planes[plane]
        index = torch.from_numpy(slice_positions(images.shape[axis], slices)).to(images.device)
        groups.append(images.index_select(axis, index).movedim(axis, 1).flip(2))
    return groups
