"""How far scans may be changed at random, and what that comes to for one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loaders.bias_field import ORDER
from loaders.warp import HEAD_AXES

VIEWS = tuple(HEAD_AXES)

_AT_MOST = {"rotation_deg": 180, "noise": 1, "flip": 1}
_BELOW = {"translation_mm": math.inf, "scale": 1, "gain": 1, "gamma": math.inf, "bias_field": math.inf}
_STREAM = 0x61756700  # sets our random numbers apart from others that are seeded with the same integers
_ORDERS = np.indices((ORDER + 1,) * 3).sum(axis=0)
_LOW_ORDERS = (_ORDERS > 0) & (_ORDERS <= ORDER)  # the cosines of a bias field


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
    noise_keys: np.ndarray  # uint32 (view, 2, 2), for `loaders.noise`
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
    bias = rng.uniform(-1, 1, _LOW_ORDERS.shape)
    return Draw(
        flip=bool(positive[0] < augmentation.flip),
        angles=np.deg2rad(augmentation.rotation_deg * symmetric[:3]),
        shift=augmentation.translation_mm * symmetric[3:6],
        scale=1 + augmentation.scale * float(symmetric[6]),
        gain=1 + augmentation.gain * float(symmetric[7]),
        exponent=math.exp(augmentation.gamma * symmetric[8]),
        noise_sd=augmentation.noise * float(positive[1]),
        bias_peak=augmentation.bias_field * float(positive[2]),
        bias=bias * _LOW_ORDERS,
        noise_keys=rng.integers(2**32, size=(len(VIEWS), 2, 2), dtype=np.uint32),
        crop=positive[3:],
    )
