"""Smooth fields of intensity, as coils make them: a sum of low-order cosines along the axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ORDER = 3  # of the cosines, summed over the axes: half periods across the field of view


def cosines_at(places: np.ndarray) -> np.ndarray:
    """Return the cosines of order 0, 1, ... at places from 0 to 1 along an axis, float32 (place, order)."""
    return np.cos(np.pi * np.outer(places, np.arange(ORDER + 1))).astype(np.float32)


def along(length: int) -> np.ndarray:
    """Return the cosines at the voxels of an axis, float32 (voxel, order)."""
    return cosines_at((np.arange(length) + 0.5) / length)


def bias_weights(weights: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Scale the weights of fields so that their largest absolute values are about `peaks`.

    Parameters
    ----------
    weights
        (scan, order, ...), of the products of cosines along the axes; not all 0.
    peaks
        (scan,).

    Returns
    -------
    numpy.ndarray
        float32, as `weights`.
    """
    fields = weights
    for _ in range(weights.ndim - 1):  # each turn spends the first of the axes and appends the new one
        fields = np.tensordot(fields, cosines_at(np.linspace(0, 1, 13)), axes=(1, 1))
    each = (-1, *[1] * (weights.ndim - 1))
    largest = np.abs(fields).reshape(len(fields), -1).max(axis=1)
    return (weights * (peaks / largest).reshape(each)).astype(np.float32)


def bias_fields(weights: torch.Tensor, cosines: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the factors by which voxels are multiplied.

    Parameters
    ----------
    weights
        float32 (scan, order, ...), of `bias_weights`.
    cosines
        Of `along`, one for each axis: of all its voxels, or of those that are wanted.

    Returns
    -------
    torch.Tensor
        float32 (scan, voxel, ...).
    """
    with torch.autocast(weights.device.type, enabled=False):  # which would multiply matrices in half precision
        for cosine in cosines:
            weights = torch.tensordot(weights, cosine, dims=([1], [1]))
    return weights.exp_()
