"""Drawing a volume through an affine and a smooth displacement: the inner loop of simulated brains."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def draw_warped(
    volume: np.ndarray, near: np.ndarray, fields: np.ndarray, spacing: int, matrix: np.ndarray, out: np.ndarray
) -> None:
    """Fill `out` with ``gain * volume`` at displaced positions, trilinear, 0 outside the volume.

    Parameters
    ----------
    volume
        float32 (z, y, x).
    near
        bool (Z, Y, X) on the coarse grid: False where `out` is 0 whatever the displacement.
    fields
        float32 (4, Z, Y, X) on a coarse grid over `volume` whose first point is the volume's first voxel: displacement
        along x, y, z in voxels, and gain. Interpolated trilinearly.
    spacing
        Voxels of `volume` between points of the coarse grid; the grid reaches beyond the volume's last voxel.
    matrix
        float64 (4, 4), voxel (x, y, z) of `out` -> voxel (x, y, z) of `volume`, before the displacement.
    out
        float32 (z, y, x), written.
    """
    depth, height, width = volume.shape
    moved = np.empty(4)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                out[z, y, x] = 0
                u = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + matrix[0, 3]
                v = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + matrix[1, 3]
                w = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + matrix[2, 3]
                if u < 0 or v < 0 or w < 0 or u > width - 1 or v > height - 1 or w > depth - 1:
                    continue
                i, j, k = int(u / spacing), int(v / spacing), int(w / spacing)
                if not near[k, j, i]:
                    continue
                a, b, c = u / spacing - i, v / spacing - j, w / spacing - k
                for part in range(4):
                    low = (fields[part, k, j, i] * (1 - a) + fields[part, k, j, i + 1] * a) * (1 - b)
                    low += (fields[part, k, j + 1, i] * (1 - a) + fields[part, k, j + 1, i + 1] * a) * b
                    high = (fields[part, k + 1, j, i] * (1 - a) + fields[part, k + 1, j, i + 1] * a) * (1 - b)
                    high += (fields[part, k + 1, j + 1, i] * (1 - a) + fields[part, k + 1, j + 1, i + 1] * a) * b
                    moved[part] = low * (1 - c) + high * c
                u, v, w = u + moved[0], v + moved[1], w + moved[2]
                if u < 0 or v < 0 or w < 0 or u >= width - 1 or v >= height - 1 or w >= depth - 1:
                    continue
                i, j, k = int(u), int(v), int(w)
                a, b, c = u - i, v - j, w - k
                low = (volume[k, j, i] * (1 - a) + volume[k, j, i + 1] * a) * (1 - b)
                low += (volume[k, j + 1, i] * (1 - a) + volume[k, j + 1, i + 1] * a) * b
                high = (volume[k + 1, j, i] * (1 - a) + volume[k + 1, j, i + 1] * a) * (1 - b)
                high += (volume[k + 1, j + 1, i] * (1 - a) + volume[k + 1, j + 1, i + 1] * a) * b
                out[z, y, x] = (low * (1 - c) + high * c) * moved[3]
