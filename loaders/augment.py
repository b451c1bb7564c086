"""Seeded augmentation of batches: what happens to a scan depends on its key alone, on whatever device it lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loaders.augmentation import VIEWS, Augmentation, Draw, draw
from loaders.bias_field import along, bias_fields, bias_weights
from loaders.noise import add_noise, add_noise_at
from loaders.warp import HEAD_AXES, resample, sampling_positions

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Voxels that are changed at a time. On a CPU one scan after the other: a vectorised loop does the end of an array by
# other code, which may round otherwise, and so the result would depend on the batch. A GPU would wait for launches.
_AT_ONCE = {"cpu": 1}
_AT_ONCE_ELSEWHERE = 2**25


@torch.no_grad()
def augment(
    images: torch.Tensor,
    augmentation: Augmentation,
    keys: np.ndarray,
    *,
    view: str = "volume",
    planes: Sequence[np.ndarray] | None = None,
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
    planes
        Of volumes, the only slices that are wanted, as indices along z, y and x: they become what they are in the
        changed volume, in a fraction of its time, and all else is 0.

    Returns
    -------
    torch.Tensor
        Of the dtype and on the device of `images`, 0 to 1; what comes from outside the grid is 0. `images` itself if
        everything is off, and no planes are given.

    Raises
    ------
    ValueError
        If images, keys, view or planes are not what is described above, or images are smaller than the crop.

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
    _check(images, augmentation, keys, view, planes)
    ranges, size = augmentation, tuple(images.shape[-len(HEAD_AXES[view]) :])
    flips = ranges.flip > 0 and 0 in HEAD_AXES[view]
    moves = ranges.rotation_deg or ranges.translation_mm or ranges.scale
    changes_any = flips or moves or ranges.bias_field or ranges.gamma or ranges.gain or ranges.noise or ranges.crop
    if not changes_any and planes is None:
        return images
    shape = (*images.shape[: -len(size)], *(ranges.crop or size))
    out = images.new_empty(shape) if planes is None else images.new_zeros(shape)
    if not len(images):
        return out
    draws = [draw(ranges, key) for key in np.asarray(keys)]
    changes, cosines = _upload(draws, ranges, view, size, images.device)
    parts = [None] if planes is None else _parts(planes, size, images.device)
    step = max(1, _AT_ONCE.get(images.device.type, _AT_ONCE_ELSEWHERE) // images[0].numel())
    for start in range(0, len(images), step):
        some = slice(start, start + step)
        # Of all of it a copy: it may be changed, and what has just been written is gathered from in half the time.
        source = images[some].to(torch.float32, copy=planes is None, memory_format=torch.contiguous_format)
        if flips and any(drawn.flip for drawn in draws[some]):
            pairs = zip(source, draws[some], strict=True)
            source = torch.stack([image.flip(-1) if drawn.flip else image for image, drawn in pairs])
        for part in parts:
            changed = _change(source, changes.some(some), cosines, part).clamp_(0, 1)
            if part is not None:
                out[some].index_copy_(1 + part.axis, part.index, changed.to(out.dtype))
            elif ranges.crop is None:
                out[some] = changed
            else:
                for target, image, drawn in zip(out[some], changed, draws[some], strict=True):
                    target.copy_(_crop(image, drawn, view, ranges.crop))
    return out


@dataclass(frozen=True)
class _Changes:
    """What happens to scans, as tensors (scan, ...) on their device; None for what is switched off."""

    positions: tuple[torch.Tensor, ...] | None  # along each axis, of `sampling_positions`
    bias: torch.Tensor | None  # of `bias_weights`
    exponent: torch.Tensor | None
    gain: torch.Tensor | None
    noise_sd: torch.Tensor | None
    noise_keys: torch.Tensor | None

    def some(self, which: slice) -> _Changes:
        """Return those of some of the scans."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        positions = found.pop("positions")
        moved = None if positions is None else tuple(axis[which] for axis in positions)
        return _Changes(moved, **{name: None if value is None else value[which] for name, value in found.items()})


@dataclass(frozen=True)
class _Part:
    """Some slices of a volume: across which of its axes, where, and the numbers of their voxels."""

    axis: int
    index: torch.Tensor
    numbers: torch.Tensor
    voxels: int  # of the whole


def _upload(
    draws: Sequence[Draw], ranges: Augmentation, view: str, size: tuple[int, ...], device: torch.device
) -> tuple[_Changes, list[torch.Tensor]]:
    """Return what happens to all scans, and cosines along each axis: a copy between kernels makes a GPU wait."""

    def of_all(name: str) -> np.ndarray:
        return np.stack([getattr(drawn, name) for drawn in draws])

    def upload(values: np.ndarray, dtype: type = np.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device, non_blocking=True)

    positions = bias = exponent = gain = noise_sd = noise_keys = None
    cosines = []
    if ranges.rotation_deg or ranges.translation_mm or ranges.scale:
        summands = sampling_positions(of_all("angles"), of_all("shift"), of_all("scale"), view, size)
        positions = tuple(upload(along_axis) for along_axis in summands)
    if ranges.bias_field:
        # A slice shows no change along the axis across it.
        seen = tuple(slice(None) if axis in HEAD_AXES[view] else 0 for axis in (2, 1, 0))
        bias = upload(bias_weights(of_all("bias")[(slice(None), *seen)], of_all("bias_peak")))
        cosines = [upload(along(n)) for n in size]
    if ranges.gamma:
        exponent = upload(of_all("exponent"))
    if ranges.gain:
        gain = upload(of_all("gain"))
    if ranges.noise:
        noise_sd = upload(of_all("noise_sd"))
        noise_keys = upload(of_all("noise_keys")[:, VIEWS.index(view)].view(np.int32), np.int32)
    return _Changes(positions, bias, exponent, gain, noise_sd, noise_keys), cosines


def _parts(planes: Sequence[np.ndarray], size: tuple[int, ...], device: torch.device) -> list[_Part]:
    """Return the slices that are wanted, across each axis."""
    steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    parts = []
    for axis, index in enumerate(planes):
        places = [np.asarray(index, np.int64) if other == axis else np.arange(n) for other, n in enumerate(size)]
        chosen, *along = (
            torch.from_numpy(numbers).to(device, non_blocking=True)
            for numbers in (places[axis], *(place * step for place, step in zip(places, steps, strict=True)))
        )
        numbers = along[0][:, None, None] + along[1][:, None] + along[2]
        if len(index):
            parts.append(_Part(axis, chosen, numbers, math.prod(size)))
    return parts


def _change(
    source: torch.Tensor, changes: _Changes, cosines: Sequence[torch.Tensor], part: _Part | None
) -> torch.Tensor:
    """Return changed scans (scan, ...), maybe in their own memory, or a part of them, always in another."""

    def wanted(summands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of what is known at each voxel of each axis, (..., voxel, any), return that of the part."""
        if part is None:
            return list(summands)
        return [all_.index_select(-2, part.index) if i == part.axis else all_ for i, all_ in enumerate(summands)]

    if changes.positions is not None:
        images = resample(source, wanted(changes.positions))
    elif part is not None:
        images = source.index_select(1 + part.axis, part.index)
    else:
        images = source
    each = (-1, *[1] * (images.ndim - 1))
    if changes.bias is not None:
        fields = bias_fields(changes.bias, wanted(cosines))
        images *= fields if fields.ndim == images.ndim else fields[:, None]
    if changes.exponent is not None:
        images.pow_(changes.exponent.view(each))
    if changes.gain is not None:
        images *= changes.gain.view(each)
    if changes.noise_sd is not None and changes.noise_keys is not None:
        if part is None:
            add_noise(images, changes.noise_sd, changes.noise_keys)
        else:
            add_noise_at(images, part.numbers, part.voxels, changes.noise_sd, changes.noise_keys)
    return images


def _check(
    images: torch.Tensor,
    augmentation: Augmentation,
    keys: np.ndarray,
    view: str,
    planes: Sequence[np.ndarray] | None,
) -> None:
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
    size, crop = tuple(images.shape[-len(HEAD_AXES[view]) :]), augmentation.crop
    if planes is not None:
        check_planes(planes, size, augmentation, view)
    if crop and (len(crop) != len(size) or any(c > n for c, n in zip(crop, size, strict=True))):
        wanted = f"expected {len(size)} lengths, none larger"
        raise ValueError(f"crop {crop} does not fit images of {size} in view {str(view)!r}; {wanted}")


def check_planes(
    planes: Sequence[np.ndarray], size: tuple[int, ...], augmentation: Augmentation | None, view: str = "volume"
) -> None:
    """Raise ValueError if these are not slices of whole volumes that are augmented, see `augment`."""
    if view != "volume" or augmentation is None or augmentation.crop:
        raise ValueError(f"planes go with whole volumes that are augmented, not with {view} and {augmentation}")
    found = [np.asarray(index) for index in planes]
    if len(found) != 3 or not all(_are_indices(index, n) for index, n in zip(found, size, strict=True)):
        shown = [index.tolist() for index in found]
        raise ValueError(f"planes are {shown}, expected whole numbers, indices along each of the axes of {size}")


def _are_indices(index: np.ndarray, length: int) -> bool:
    if index.ndim != 1 or not index.size:
        return index.ndim == 1
    return np.issubdtype(index.dtype, np.integer) and bool(index.min() >= 0 and index.max() < length)


def _crop(image: torch.Tensor, drawn: Draw, view: str, crop: Sequence[int]) -> torch.Tensor:
    """Return the window of an image."""
    for axis, (share, length) in enumerate(zip(drawn.crop[HEAD_AXES[view]], crop, strict=True), start=-len(crop)):
        image = image.narrow(axis, int(share * (image.shape[axis] - length + 1)), length)
    return image
