"""Rotations, shifts and growth of scans: where each voxel comes from, and what lies there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn.functional import grid_sample

# Axes of the head (0: x, to the right; 1: y, to the front; 2: z, to the top) that a picture's axes run along.
HEAD_AXES = {"volume": [2, 1, 0], "axial": [1, 0], "coronal": [2, 0], "sagittal": [2, 1]}
_PLANES_AT_ONCE = 8  # whose sampling positions are in memory, on a CPU: three times the voxels


def sampling_positions(
    angles: np.ndarray, shift: np.ndarray, scale: np.ndarray, view: str, size: Sequence[int]
) -> list[np.ndarray]:
    """Return where in a scan each voxel of the result comes from, as one summand per axis.

    Parameters
    ----------
    angles, shift
        (scan, 3): radians about x, y, z, in this order; mm along them.
    scale
        (scan,), factors by which heads grow.
    view, size
        ``volume`` of (z, y, x), or a plane of (height, width).

    Returns
    -------
    list of numpy.ndarray
        float32 (scan, length of the axis, component), along z (volumes only), y or height, x or width. The summands of
        a voxel make a position as `grid_sample` wants it: (x, y, z), (width, height).
    """
    axes = HEAD_AXES[view]
    in_plane = len(axes) == 2
    signs = np.array([-1, 1] if in_plane else [1, 1, 1])  # rows of slices count downwards
    turned = np.where([in_plane and axis in axes for axis in range(3)], 0.0, angles)
    turn = Rotation.from_euler("xyz", turned).as_matrix()[:, axes][:, :, axes] * np.outer(signs, signs)
    # In mm from the centre, so that a rotation is rigid; only then in halves of the grid, whose axes differ in length.
    # Without align_corners, -1 and 1 are the outer faces of the grid, and an axis may be one voxel long.
    halves = np.array(size) / 2
    backward = turn.swapaxes(1, 2) / scale[:, None, None]  # the inverse of "turn and grow"
    moved = np.einsum("sij,sj->si", backward, shift[:, axes] * signs)
    summands = [
        (np.arange(n) - (n - 1) / 2)[:, None] * (backward[:, None, :, axis] / halves) for axis, n in enumerate(size)
    ]
    summands[-1] -= (moved / halves)[:, None]
    return [summand[..., ::-1].astype(np.float32) for summand in summands]


def resample(images: torch.Tensor, summands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Interpolate linearly; beyond the grid lies 0.

    Parameters
    ----------
    images
        float32 (scan, z, y, x), or (scan, slice, height, width), whose slices are sampled alike.
    summands
        Of `sampling_positions`, (scan, length, component) for each axis: of all voxels of it, or of those that are
        wanted.

    Returns
    -------
    torch.Tensor
        float32, of the lengths of the summands.
    """
    *planes, rows, columns = summands
    scans, width, components = columns.shape
    lengths = [summand.shape[1] for summand in summands]
    # Position and component as one long axis, so that additions run along many numbers and not along two or three.
    grid = rows.repeat(1, 1, width) + columns.flatten(1)[:, None]
    if not planes:
        return grid_sample(images, grid.view(scans, *lengths, components), align_corners=False)
    offsets = planes[0].repeat(1, 1, width)[:, :, None]
    if images.device.type != "cpu":
        places = (offsets + grid[:, None]).view(scans, *lengths, components)
        return grid_sample(images[:, None], places, align_corners=False)[:, 0]
    # On a CPU, torch shares out whole entries of a batch among its threads: make each plane one.
    out = images.new_empty((scans, *lengths))
    for scan in range(scans):
        for start in range(0, lengths[0], _PLANES_AT_ONCE):
            part = offsets[scan, start : start + _PLANES_AT_ONCE] + grid[scan]
            places = part.view(len(part), 1, *lengths[1:], components)
            image = images[scan].expand(len(part), 1, *images.shape[1:])
            out[scan, start : start + _PLANES_AT_ONCE] = grid_sample(image, places, align_corners=False)[:, 0, 0]
    return out
