"""Seeded augmentation of batches: what happens to a scan depends on its key alone, on whatever device it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn.functional import grid_sample

from loaders.noise import add_noise

# Axes of the head (0: x, to the right; 1: y, to the front; 2: z, to the top) that a picture's axes run along.
_HEAD_AXES = {"volume": [2, 1, 0], "axial": [1, 0], "coronal": [2, 0], "sagittal": [2, 1]}
VIEWS = tuple(_HEAD_AXES)

_AT_MOST = {"rotation_deg": 180, "noise": 1, "flip": 1}
_BELOW = {"translation_mm": math.inf, "scale": 1, "gain": 1, "gamma": math.inf, "bias_field": math.inf}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STREAM = 0x61756700  # sets our random numbers apart from others that are seeded with the same integers
_BIAS_ORDER = 3  # of the bias field, summed over the axes: half periods across the field of view
_PLANES_AT_ONCE = 8  # whose sampling positions are in memory, on a CPU: three times the voxels


@dataclass(frozen=True)
class Augmentation:
    """How far scans may be changed; 0 or None switches a part off.

    The parts act in this order: flip, geometry (rotation, translation, scale), bias field, gamma, gain, noise; then
    intensities are clamped to 0 to 1, and last comes the crop.

    Attributes
    ----------
    rotation_deg
        Each angle is uniform in [-r, r]. The head turns about x, then y, then z, around the centre of the grid;
        positive angles turn y to z, z to x, x to y. A slice turns in its plane, by the angle about the axis across it.
    translation_mm
        Along each axis, uniform in [-t, t]; voxels are 1 mm. Positive shifts move the head right, to the front and up.
    scale
        The head grows by a factor that is uniform in [1 - s, 1 + s].
    gain
        Intensities are multiplied by a factor that is uniform in [1 - g, 1 + g].
    gamma
        Intensities are raised to the power exp(uniform in [-g, g]).
    noise
        The standard deviation of white Gaussian noise is uniform in [0, n], as a share of the full range. It is added
        to the background, too, where the clamp leaves its positive half: the floor of a magnitude image, roughly.
    bias_field
        Intensities are multiplied by exp(f), where f is a sum of low-order cosines with a mean of 0 whose largest
        absolute value is uniform in [0, b].
    flip
        Probability of a left-right flip. Off by default, and to be asked about before it is switched on: brains are
        lateralised (language, handedness, the shape of the lobes), so that a flipped brain is none of the population,
        and a network that sees both cannot learn what is on one side. Sex and age may bear it. Sagittal slices show no
        left and right: they stay as they are.
    crop
        Cut a window of this size, (z, y, x) for volumes or (height, width) for slices, at a place that is uniform
        among those that fit.

    Raises
    ------
    ValueError
        If a range is negative, too wide, or not a number, or `crop` is no size.
    """

    rotation_deg: float = 10.0
    translation_mm: float = 5.0
    scale: float = 0.05
    gain: float = 0.1
    gamma: float = 0.2
    noise: float = 0.02
    bias_field: float = 0.2
    flip: float = 0.0
    crop: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, limit in (_AT_MOST | _BELOW).items():
            value = getattr(self, name)
            if not (0 <= value < limit or (name in _AT_MOST and value == limit)):  # refuses NaN, too
                relation = "<=" if name in _AT_MOST else "<"
                raise ValueError(f"{name} is {value}, expected 0 <= {name} {relation} {limit}; 0 switches it off")
        crop = self.crop
        if crop is not None and not (
            isinstance(crop, tuple) and len(crop) in (2, 3) and all(isinstance(n, int) and n > 0 for n in crop)
        ):
            raise ValueError(f"crop is {crop!r}, expected None, or positive integers (z, y, x) or (height, width)")


@dataclass(frozen=True)
class Draw:
    """What happens to one scan, drawn by `draw` from the ranges of an `Augmentation`."""

    flip: bool
    angles: np.ndarray  # radians, about x, y, z
    shift: np.ndarray  # mm, along x, y, z
    scale: float
    gain: float
    exponent: float
    noise_sd: float
    bias_peak: float
    bias: np.ndarray  # (z, y, x), weights of the cosines of order 0, 1, ... along each axis
    noise_keys: np.ndarray  # uint32 (view, 2, 2), for `add_noise`
    crop: np.ndarray  # where the window lies along x, y, z, as a share of the places that fit


def draw(augmentation: Augmentation, key: np.ndarray) -> Draw:
    """Draw what happens to a scan.

    Parameters
    ----------
    augmentation
        The ranges. The width of one range, or 0, does not change what is drawn from the others.
    key
        Integers (k,), none negative.
    """
    # Two words for each integer, so that no two keys of the same length give the same words.
    words = np.asarray(key).astype("<u8").view("<u4")
    rng = np.random.default_rng([_STREAM, *words.tolist()])
    symmetric = rng.uniform(-1, 1, 9)
    positive = rng.uniform(0, 1, 6)
    orders = np.indices((_BIAS_ORDER + 1,) * 3).sum(axis=0)
    bias = rng.uniform(-1, 1, orders.shape)
    return Draw(
        flip=bool(positive[0] < augmentation.flip),
        angles=np.deg2rad(augmentation.rotation_deg * symmetric[:3]),
        shift=augmentation.translation_mm * symmetric[3:6],
        scale=1 + augmentation.scale * float(symmetric[6]),
        gain=1 + augmentation.gain * float(symmetric[7]),
        exponent=math.exp(augmentation.gamma * symmetric[8]),
        noise_sd=augmentation.noise * float(positive[1]),
        bias_peak=augmentation.bias_field * float(positive[2]),
        bias=np.where((orders > 0) & (orders <= _BIAS_ORDER), bias, 0.0),
        noise_keys=rng.integers(2**32, size=(len(VIEWS), 2, 2), dtype=np.uint32),
        crop=positive[3:],
    )


@torch.no_grad()
def augment(
    images: torch.Tensor, augmentation: Augmentation, keys: np.ndarray, *, view: str = "volume"
) -> torch.Tensor:
    """Change scans at random, each by its own key.

    The same key gives the same picture in any batch, at any place in it, and on any device up to rounding. Global
    random states are neither read nor changed.

    Parameters
    ----------
    images
        float32, float16 or bfloat16, 0 to 1: (scan, z, y, x), or (scan, slice, height, width) as `extract` cuts them,
        with the front or the top of the head up. All slices of a scan change alike, but for the noise.
    augmentation
        What to do, and how much of it.
    keys
        Integers (scan, k), none negative: for instance columns of seed, epoch and row.
    view
        ``volume``, ``axial``, ``coronal`` or ``sagittal``. With the same keys, the planes of a triplanar view get the
        parameters of one head (each plane its own part of the rotation), and each its own bias field, noise and crop.

    Returns
    -------
    torch.Tensor
        Of the dtype and on the device of `images`, 0 to 1; what comes from outside the grid is 0. `images` itself if
        everything is off.

    Raises
    ------
    ValueError
        If images, keys or view are not what is described above, or are smaller than the crop.

    Examples
    --------
    >>> images = torch.rand(2, 20, 24, 20)
    >>> keys = np.array([[1, 0, 17], [1, 0, 4]])  # seed 1, epoch 0, rows 17 and 4
    >>> both = augment(images, Augmentation(crop=(16, 16, 16)), keys)
    >>> both.shape
    torch.Size([2, 16, 16, 16])
    >>> torch.equal(both[1:], augment(images[1:], Augmentation(crop=(16, 16, 16)), keys[1:]))
    True
    """
    _check(images, augmentation, keys, view)
    ranges, size = augmentation, images.shape[-len(_HEAD_AXES[view]) :]
    flips = ranges.flip > 0 and 0 in _HEAD_AXES[view]
    moves = ranges.rotation_deg or ranges.translation_mm or ranges.scale
    if not (flips or moves or ranges.bias_field or ranges.gamma or ranges.gain or ranges.noise or ranges.crop):
        return images
    crop = ranges.crop or size
    out = images.new_empty((*images.shape[: -len(size)], *crop))
    if not len(images):
        return out

    def upload(arrays: list[np.ndarray]) -> torch.Tensor:
        # All scans at once, and before the first kernel: a copy between kernels would make the GPU wait.
        return torch.from_numpy(np.stack(arrays)).to(images.device, non_blocking=True)

    draws = [draw(ranges, key) for key in np.asarray(keys)]
    if moves:
        positions = upload([_positions(drawn, view, size) for drawn in draws])
    if ranges.bias_field:
        weights = upload([_bias_weights(drawn, view) for drawn in draws])
        cosines = [upload(list(_cosines((np.arange(n) + 0.5) / n))) for n in size]
    if ranges.noise:
        noise_keys = upload([drawn.noise_keys[VIEWS.index(view)].view(np.int32) for drawn in draws])

    # One scan at a time, even where many would fit: a vectorised loop does the end of an array by other code, which may
    # round otherwise, and so the result would depend on the batch.
    for i, drawn in enumerate(draws):
        image = images[i].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if flips and drawn.flip:
            image = image.flip(-1)
        if moves:
            image = _resample(image, positions[i], size)
        if ranges.bias_field:
            image *= _bias_field(weights[i], cosines)
        if ranges.gamma:
            image.pow_(drawn.exponent)
        if ranges.gain:
            image *= drawn.gain
        if ranges.noise:
            add_noise(image, drawn.noise_sd, noise_keys[i])
        out[i] = _crop(image.clamp_(0, 1), drawn, view, crop)
    return out


def _check(images: torch.Tensor, augmentation: Augmentation, keys: np.ndarray, view: str) -> None:
    if view not in VIEWS:
        wanted = f"expected one of {', '.join(VIEWS)}; augment triplanar views plane by plane, with the same keys"
        raise ValueError(f"view {str(view)!r} is unknown, {wanted}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        axes = "(scan, z, y, x)" if view == "volume" else "(scan, slice, height, width)"
        raise ValueError(f"images have the shape {tuple(images.shape)}, expected {axes} for view {str(view)!r}")
    if images.dtype not in _DTYPES:
        wanted = "expected float32, float16 or bfloat16 from 0 to 1; divide grey levels by 255: images.float() / 255"
        raise ValueError(f"images are {images.dtype}, {wanted}")
    # Not on a GPU: to look at the values would make the program wait for everything that the GPU still has to do.
    if images.device.type == "cpu" and len(images):
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= 1):
            wanted = "expected 0 to 1; divide grey levels by 255, and standardise after augmentation"
            raise ValueError(f"images range from {low:g} to {high:g}, {wanted}")
    keys = np.asarray(keys)
    if keys.ndim != 2 or len(keys) != len(images) or not keys.shape[1] or not np.issubdtype(keys.dtype, np.integer):
        wanted = f"expected integers (scan, k) for {len(images)} scans, such as columns of seed, epoch and row"
        raise ValueError(f"keys are {keys.dtype} {keys.shape}, {wanted}")
    if keys.size and keys.min() < 0:
        raise ValueError(f"a key is {keys.min()}, expected integers of 0 or more")
    size, crop = tuple(images.shape[-len(_HEAD_AXES[view]) :]), augmentation.crop
    if crop and (len(crop) != len(size) or any(c > n for c, n in zip(crop, size, strict=True))):
        wanted = f"expected {len(size)} lengths, none larger"
        raise ValueError(f"crop {crop} does not fit images of {size} in view {str(view)!r}; {wanted}")


def _positions(drawn: Draw, view: str, size: Sequence[int]) -> np.ndarray:
    """Return where in the scan each voxel of the result comes from, as one summand per axis.

    Returns
    -------
    numpy.ndarray
        float32 (length of all axes, component): first the voxels along z (volumes only), then along y or height, then
        along x or width. The summands of a voxel make a position as `grid_sample` wants it: (x, y, z), (width, height).
    """
    axes = _HEAD_AXES[view]
    in_plane = len(axes) == 2
    signs = np.array([-1, 1] if in_plane else [1, 1, 1])  # rows of slices count downwards
    angles = np.where([in_plane and axis in axes for axis in range(3)], 0.0, drawn.angles)
    turn = Rotation.from_euler("xyz", angles).as_matrix()[np.ix_(axes, axes)] * np.outer(signs, signs)
    backward = turn.T / drawn.scale  # the inverse of "turn and grow"
    # In mm from the centre, so that a rotation is rigid; only then in halves of the grid, whose axes differ in length.
    # Without align_corners, -1 and 1 are the outer faces of the grid, and an axis may be one voxel long.
    halves = np.array(size) / 2
    summands = [
        np.outer(np.arange(n) - (n - 1) / 2, backward[:, axis] / halves)[:, ::-1] for axis, n in enumerate(size)
    ]
    summands[-1] = summands[-1] - (backward @ (drawn.shift[axes] * signs) / halves)[::-1]
    return np.concatenate(summands).astype(np.float32)


def _resample(image: torch.Tensor, positions: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate linearly at the positions of `_positions`; beyond the grid lies 0."""
    *planes, rows, columns = positions.split(list(size))
    width, components = columns.shape
    # Position and component as one long axis, so that additions run along many numbers and not along two or three.
    grid = rows.repeat(1, width) + columns.flatten()
    if not planes:
        return grid_sample(image[None], grid.view(1, *size, components), align_corners=False)[0]
    offsets = planes[0].repeat(1, width)[:, None]
    out = torch.empty_like(image)
    on_cpu = image.device.type == "cpu"
    step = _PLANES_AT_ONCE if on_cpu else len(offsets)
    for start in range(0, len(offsets), step):
        part = offsets[start : start + step] + grid
        # On a CPU, torch shares out whole entries of a batch among its threads: make each plane one.
        entries = len(part) if on_cpu else 1
        places = part.view(entries, -1, *size[1:], components)
        sampled = grid_sample(image.expand(entries, 1, *size), places, align_corners=False)
        out[start : start + step] = sampled.view(len(part), *size[1:])
    return out


def _cosines(places: np.ndarray) -> np.ndarray:
    """Return the cosines of order 0, 1, ... at places from 0 to 1 along an axis, float32 (order, place)."""
    return np.cos(np.pi * np.outer(np.arange(_BIAS_ORDER + 1), places)).astype(np.float32)


def _bias_weights(drawn: Draw, view: str) -> np.ndarray:
    """Return the weights of the cosines, float32 (z, y, x) or (height, width), that give the field its peak."""
    # A slice shows no change along the axis across it.
    weights = drawn.bias[tuple(slice(None) if axis in _HEAD_AXES[view] else 0 for axis in (2, 1, 0))]
    field = weights
    for _ in range(weights.ndim):  # each turn spends the first axis and appends the new one
        field = np.tensordot(field, _cosines(np.linspace(0, 1, 13)), axes=(0, 0))
    return (weights * (drawn.bias_peak / np.abs(field).max())).astype(np.float32)


def _bias_field(weights: torch.Tensor, cosines: list[torch.Tensor]) -> torch.Tensor:
    """Return the factor by which each voxel is multiplied."""
    with torch.autocast(weights.device.type, enabled=False):  # which would multiply matrices in half precision
        for cosine in cosines:
            weights = torch.tensordot(weights, cosine, dims=([0], [0]))
    return weights.exp_()


def _crop(image: torch.Tensor, drawn: Draw, view: str, crop: Sequence[int]) -> torch.Tensor:
    """Return the window of an image."""
    for axis, (share, length) in enumerate(zip(drawn.crop[_HEAD_AXES[view]], crop, strict=True), start=-len(crop)):
        image = image.narrow(axis, int(share * (image.shape[axis] - length + 1)), length)
    return image
