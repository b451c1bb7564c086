"""One scan -> the store's grid: RAS, cropped in MNI152 space, conformed and centred in native space."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy import ndimage

from ingest.errors import ScanError
from ingest.grid import MNI152, Grid
from ingest.intensity import VoxelBox
from ingest.nifti import NiftiVolume
from ingest.sampling import bounding_box_mm, count_outside, sample_trilinear

#: A brain mask of an adult holds at most about 2 litres; a head with its neck 3 and more.
MAX_BRAIN_ML = 2200

#: How much of the grid a template-space volume must cover; 91x109x91 at 2 mm and 193x229x193 cover all of it.
MIN_COVERAGE = 0.9

_COARSE_MM = 4.0  # finding a head needs no more detail
_BRAIN_HEIGHT_MM = 120.0  # below this from the vertex, noses and shoulders would shift the middle
_VERTEX_MARGIN_MM = 4.0


@dataclass(frozen=True)
class ConformedVolume:
    """A scan on the store's grid.

    Attributes
    ----------
    box
        Its voxels: a box of the source's own, or all of what was sampled.
    cut_off_voxels
        Positive source voxels outside the grid, unless they are those of `box` that are left out.
    """

    box: VoxelBox
    cut_off_voxels: int = 0


def conform(volume: NiftiVolume, grid: Grid) -> ConformedVolume:
    """Put a volume on the grid of the store.

    In MNI152 space the affine alone decides, so that every voxel keeps its place in the template; on FSL's own grid
    that is a flip and a crop. In native space the volume is resampled to the grid's voxels along the world's axes and
    centred: on the middle of the non-zero voxels if it is skull-stripped, else on the head.

    Raises
    ------
    ScanError
        ``bad_image`` if nothing positive is in it, ``wrong_shape`` if it covers too little of the grid.
    """
    if grid.space == MNI152:
        return _conform_template(volume, grid)
    return _conform_native(volume, grid)


def to_ras(volume: NiftiVolume) -> tuple[np.ndarray, tuple[bool, bool, bool], np.ndarray]:
    """Permute the axes so that they run closest to left-right, posterior-anterior, inferior-superior.

    Returns
    -------
    data : numpy.ndarray
        (z, y, x), C-contiguous; the volume's own memory if its axes were in that order.
    flips : tuple of bool
        Which of z, y, x must be turned round to run towards right, anterior, superior.
    affine : numpy.ndarray
        (4, 4), voxel (x, y, z) -> mm, of the data turned round.
    """
    order, flips, affine = _orientation(volume.affine.tobytes(), volume.data.shape[::-1])
    data = np.ascontiguousarray(volume.data.transpose(2, 1, 0).transpose(order).transpose(2, 1, 0))
    return data, flips, affine.copy()


@functools.lru_cache(maxsize=64)
def _orientation(affine: bytes, shape_xyz: tuple[int, ...]) -> tuple[np.ndarray, tuple[bool, bool, bool], np.ndarray]:
    """Return the order of the axes (x, y, z) and the rest of `to_ras`; the scans of a cohort often share an affine."""
    matrix = np.frombuffer(affine).reshape(4, 4)
    orientation = nib.orientations.io_orientation(matrix)
    order = np.argsort(orientation[:, 0])
    right, anterior, superior = (bool(direction < 0) for direction in orientation[order, 1])
    return order, (superior, anterior, right), matrix @ nib.orientations.inv_ornt_aff(orientation, shape_xyz)


def _conform_template(volume: NiftiVolume, grid: Grid) -> ConformedVolume:
    data, flips, affine = to_ras(volume)
    matrix, shift = _place(affine.tobytes(), grid)
    box = None if shift is None else _crop(volume, data, flips, shift[::-1], grid.shape_zyx)
    coverage = _share(box) if box else _coverage(matrix, data.shape, grid.shape_zyx)
    if coverage < MIN_COVERAGE:
        raise ScanError(
            "wrong_shape",
            f"shape {data.shape[::-1]} covers {coverage:.0%} of the {grid.space} grid, expected {MIN_COVERAGE:.0%}",
        )
    if box:
        return ConformedVolume(box)
    out = np.empty(grid.shape_zyx, np.float32)
    sample_trilinear(data, volume.slope, volume.inter, _unflipped(matrix, flips, data.shape), out)
    low = grid.affine[:3, 3] - grid.voxel_mm / 2
    high = low + np.array(grid.shape_zyx[::-1]) * grid.voxel_mm
    return ConformedVolume(VoxelBox.whole(out), _count_outside(volume, 0.0, low, high, -np.inf))


@functools.lru_cache(maxsize=64)
def _place(affine: bytes, grid: Grid) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the matrix from voxels (x, y, z) of a grid to those of a scan; if they are the same, by how many moved."""
    matrix = np.linalg.inv(np.frombuffer(affine).reshape(4, 4)) @ grid.affine
    shift = np.rint(matrix[:3, 3]).astype(int)
    off = np.abs(matrix[:3] - np.column_stack([np.eye(3), shift])).max(axis=0)
    return matrix, shift if off[:3].max() < 1e-4 and off[3] < 1e-2 else None


def _conform_native(volume: NiftiVolume, grid: Grid) -> ConformedVolume:
    data, flips, affine = to_ras(volume)
    linear, origin = np.ascontiguousarray(affine[:3, :3]), affine[:3, 3]
    own_linear = np.ascontiguousarray(volume.affine[:3, :3])
    low, high, count = bounding_box_mm(volume.data, volume.slope, volume.inter, own_linear)
    if count == 0:
        raise ScanError("bad_image", "no positive voxel")
    low, high = low + volume.affine[:3, 3], high + volume.affine[:3, 3]
    half_mm = np.array(grid.shape_zyx[::-1]) * grid.voxel_mm / 2
    threshold = 0.0
    centre = (low + high) / 2
    floor = -np.inf
    if count * abs(np.linalg.det(linear)) / 1000 > MAX_BRAIN_ML:
        turned = data[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        centre, threshold = _head_centre(turned, volume.slope, volume.inter, affine, half_mm)
        floor = centre[2] - half_mm[2]  # a neck is meant to be cut off

    inverse = np.linalg.inv(linear)
    matrix = np.eye(4)
    matrix[:3, :3] = inverse * grid.voxel_mm
    matrix[:3, 3] = inverse @ (centre - origin) + matrix[:3, :3] @ grid.affine[:3, 3] / grid.voxel_mm
    if np.allclose(matrix[:3, :3], np.eye(3), atol=1e-6):
        matrix[:3, 3] = np.floor(matrix[:3, 3])  # same voxels: shift by whole ones rather than blur by half of one
    out = np.empty(grid.shape_zyx, np.float32)
    sample_trilinear(data, volume.slope, volume.inter, _unflipped(matrix, flips, data.shape), out)
    cut_off = 0
    if (low < centre - half_mm).any() or (high > centre + half_mm).any():
        cut_off = _count_outside(volume, threshold, centre - half_mm, centre + half_mm, floor)
    return ConformedVolume(VoxelBox.whole(out), cut_off)


def _unflipped(matrix: np.ndarray, flips: tuple[bool, bool, bool], shape: tuple[int, ...]) -> np.ndarray:
    """Return a matrix to voxels (x, y, z) of the data turned round as one to voxels of the data as they lie."""
    turn = np.eye(4)
    for axis in range(3):
        if flips[2 - axis]:
            turn[axis, axis], turn[axis, 3] = -1, shape[2 - axis] - 1
    return np.asarray(turn @ matrix)


def _count_outside(volume: NiftiVolume, threshold: float, low: np.ndarray, high: np.ndarray, floor: float) -> int:
    """Count voxels outside the box `low` to `high`, in mm of the world, see `ingest.sampling.count_outside`."""
    linear, origin = np.ascontiguousarray(volume.affine[:3, :3]), volume.affine[:3, 3]
    below = floor - float(origin[2])
    return count_outside(volume.data, volume.slope, volume.inter, linear, threshold, low - origin, high - origin, below)


def _crop(
    volume: NiftiVolume,
    data: np.ndarray,
    flips: tuple[bool, bool, bool],
    begin: np.ndarray,
    shape: tuple[int, int, int],
) -> VoxelBox:
    """Take the box of `shape` that begins at voxel `begin` (z, y, x) of the data turned round."""
    start, stop = np.maximum(begin, 0), np.minimum(begin + shape, data.shape)
    first = start - begin
    turned = np.where(flips, data.shape - stop, start), np.where(flips, data.shape - start, stop)
    (z0, y0, x0), (z1, y1, x1), (z, y, x) = (corner.tolist() for corner in (*turned, first))
    return VoxelBox(data, volume.slope, volume.inter, (z0, y0, x0), (z1, y1, x1), flips, (z, y, x), shape)


def _share(box: VoxelBox) -> float:
    """Return the share of the grid that a box covers."""
    sides = np.clip(np.subtract(box.stop, box.start), 0, None)
    return float(np.prod(sides / np.array(box.shape_zyx)))


def _coverage(matrix: np.ndarray, source_zyx: tuple[int, ...], grid_zyx: tuple[int, ...], step: int = 8) -> float:
    """Return the share of the grid that lies inside the source's field of view."""
    axes = [np.arange(0, n, step) for n in grid_zyx[::-1]]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    index = points @ matrix[:3, :3].T + matrix[:3, 3]
    inside = (index >= -0.5) & (index <= np.array(source_zyx[::-1]) - 0.5)
    return float(inside.all(axis=1).mean())


def _head_centre(
    turned: np.ndarray, slope: float, inter: float, affine: np.ndarray, half_mm: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return where the grid's centre goes in a scan with skull, and the intensity that parts head from air.

    The head is the largest component above Otsu's threshold. Its vertex goes to the top of the grid, for what is
    below (neck, shoulders) depends on the scanner's field of view; left-right and front-back it is the middle of the
    part that holds the brain. The data come turned round, for every fourth voxel decides, and it must be the same ones
    however the file's axes run.

    Returns
    -------
    centre : numpy.ndarray
        float64 (3,), (x, y, z) in mm of the world.
    threshold : float
    """
    linear, origin = affine[:3, :3], affine[:3, 3]
    steps = np.maximum(np.rint(_COARSE_MM / np.linalg.norm(linear, axis=0)), 1).astype(int)  # along x, y, z
    along_x, along_y, along_z = steps.tolist()
    with np.errstate(over="ignore", invalid="ignore"):
        coarse = (turned[::along_z, ::along_y, ::along_x] * slope + inter).astype(np.float32)
    coarse[~((coarse > 0) & (coarse < np.inf))] = 0

    positive = coarse[coarse > 0]
    if positive.size == 0:
        raise ScanError("bad_image", "positive voxels are scattered so thinly that no head can be found")
    threshold = otsu_threshold(positive)
    labels, found = ndimage.label(coarse > threshold)
    if found == 0:
        raise ScanError("bad_image", "all positive voxels have the same intensity")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    index = np.argwhere(labels == sizes.argmax())[:, ::-1] * steps
    x, y, z = linear @ index.T
    brain = z > z.max() - _BRAIN_HEIGHT_MM
    middle = [(axis[brain].min() + axis[brain].max()) / 2 for axis in (x, y)]
    centre = origin + np.array([*middle, z.max() + _VERTEX_MARGIN_MM - half_mm[2]])
    return centre, threshold


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """Return the threshold that best parts `values` in two classes (Otsu 1979, doi 10.1109/TSMC.1979.4310076)."""
    values = values.astype(np.float64)  # float32 has no room for 256 bins of the smallest, or sums of the largest
    counts, edges = np.histogram(values, bins=bins, range=(0, np.percentile(values, 99.5)))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sum_below / below - (sum_below[-1] - sum_below) / above) ** 2
    if np.isnan(between[:-1]).all():
        return float(edges[-2])  # all in the last bin: nothing to part
    return float(edges[1:][np.nanargmax(between[:-1])])
