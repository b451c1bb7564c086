"""What batches hold: number type, scale, channels, memory layout, augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ingest.store import VolumeStore
from loaders.augment import augment, check_planes
from loaders.augmentation import Augmentation
from loaders.checks import as_whole, check_number
from loaders.decode import Decoder
from loaders.views import Images, Picture, View, as_images

DTYPES = {
    "uint8": torch.uint8,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


_PRODUCTS = 1 << 25  # voxels that a GPU scales at a time: 128 MiB of float32


@dataclass(frozen=True)
class Output:
    """How decoded pictures become a batch.

    Attributes
    ----------
    picture
        What was decoded.
    dtype
        uint8: grey levels as they are stored. Others: ``(stored / 255 - mean) / std``.
    channels
        None: (scan, z, y, x) or (scan, slice, height, width), of each plane. 1 or 3: an axis of so many channels, all
        the same, stands before the last three or two.
    channels_last
        In torch's memory format of that name.
    augmentation
        None for none.
    seed
        Of the augmentation.
    planes
        None, or of volumes the slices that alone are augmented, see `loaders.augment.augment`.
    """

    picture: Picture
    dtype: torch.dtype = torch.uint8
    mean: float = 0.0
    std: float = 1.0
    channels: int | None = None
    channels_last: bool = False
    augmentation: Augmentation | None = None
    seed: int = 0
    planes: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels is {self.channels}, expected None, 1 or 3")
        if self.channels_last and self.channels is None:
            raise ValueError("channels_last needs an axis of channels: set channels to 1 or 3")
        check_number("mean", self.mean)
        check_number("std", self.std)
        if not 0 < self.std < math.inf:
            raise ValueError(f"std is {self.std}, expected a number above 0")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean is {self.mean}, expected a finite number")
        if self.dtype is torch.uint8:
            if (self.mean, self.std) != (0, 1):
                raise ValueError("uint8 pictures are not normalised: leave mean and std, or choose a floating dtype")
            if self.augmentation is not None:
                raise ValueError("uint8 pictures are not augmented; choose dtype float32, float16 or bfloat16")
        if as_whole("seed", self.seed, 0) >= 2**63 and self.augmentation is not None:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**63 - 1 with an augmentation")
        if self.planes is not None:
            check_planes(self.planes, self.picture.shape, self.augmentation, str(self.picture.view))

    def gain_and_bias(self) -> tuple[float, float]:
        """Return (gain, bias) by which stored levels become what is wanted, or what is augmented first."""
        if self.augmentation is not None:
            return 1 / 255, 0.0
        return 1 / (255 * self.std), -self.mean / self.std

    def table(self, device: torch.device) -> np.ndarray:
        """Return what threads make of each grey level, (256,).

        On the CPU that is what the batch holds (of half-precision floats the bits, uint16), or what is augmented:
        scaling takes the least time while voxels are in the cache. A GPU scales by itself, and gets bytes.
        """
        levels = torch.arange(256, dtype=torch.uint8)
        if device.type != "cpu" or self.dtype is torch.uint8:
            return levels.numpy()
        if self.augmentation is not None or self.dtype is torch.float32:
            return _scaled(levels, *self.gain_and_bias(), torch.float32).numpy()
        return _scaled(levels, *self.gain_and_bias(), self.dtype).view(torch.uint16).numpy()

    def finish(self, pictures: tuple[torch.Tensor, ...], epoch: int, positions: np.ndarray) -> Images:
        """Turn decoded pictures into those of the batch, on the device where they are.

        Parameters
        ----------
        pictures
            Of each plane (scan, ...), as `table` says; see `loaders.views.Picture.split`.
        epoch, positions
            With the seed, what the augmentation of each scan depends on.
        """
        views = [plane.view for plane in self.picture.planes] or [self.picture.view]
        planes = zip(pictures, views, strict=True)
        return as_images(tuple(self._finish(one, view, epoch, positions) for one, view in planes))

    def _finish(self, images: torch.Tensor, view: View, epoch: int, positions: np.ndarray) -> torch.Tensor:
        if images.dtype is torch.uint16:
            images = images.view(self.dtype)
        if images.dtype is torch.uint8 and self.dtype is not torch.uint8:
            if self.augmentation is None and self.channels_last:
                return self._scaled_channels(images)
            dtype = torch.float32 if self.augmentation is not None else self.dtype
            images = _scaled(images, *self.gain_and_bias(), dtype)
        if self.augmentation is not None:
            keys = np.stack([np.full_like(positions, self.seed), np.full_like(positions, epoch), positions], axis=1)
            images = augment(images, self.augmentation, keys, view=str(view), planes=self.planes)
            if (self.mean, self.std) != (0, 1):
                images = images.sub_(self.mean).div_(self.std)
            images = images.to(self.dtype)
        if self.channels is None:
            return images
        return self._with_channels(images)

    def _scaled_channels(self, levels: torch.Tensor) -> torch.Tensor:
        """Scale grey levels into a batch whose channels are the last axis in memory: what a GPU writes once."""
        assert self.channels is not None
        out = torch.empty((*levels.shape, self.channels), dtype=self.dtype, device=levels.device)
        _scale(levels.unsqueeze(-1), out, *self.gain_and_bias())
        return out.movedim(-1, 1 if self.picture.view is View.volume else 2)

    def _with_channels(self, images: torch.Tensor) -> torch.Tensor:
        assert self.channels is not None
        volumes = self.picture.view is View.volume
        images = images.unsqueeze(1 if volumes else 2)
        if self.channels > 1:
            images = images.expand(
                *images.shape[: 1 if volumes else 2], self.channels, *images.shape[-3 if volumes else -2 :]
            )
        if not self.channels_last:
            return images
        if volumes:
            return images.contiguous(memory_format=torch.channels_last_3d)
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, images.shape[:2])


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the number type that is meant, of `DTYPES`.

    Raises
    ------
    ValueError
        For any other.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!s}, expected one of {', '.join(DTYPES)}")
    return found


def make_decoder(store: VolumeStore, output: Output, device: torch.device) -> Decoder:
    """Return what decodes the scans of a store to what is wanted of them on a device."""
    depth, height, width = store.grid.shape_zyx
    return Decoder(output.picture, (store.slab, height, width), depth, output.table(device), *output.gain_and_bias())


def _scaled(levels: torch.Tensor, gain: float, bias: float, dtype: torch.dtype) -> torch.Tensor:
    """Return ``levels * gain + bias``, computed in float32."""
    out = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    _scale(levels, out, gain, bias)
    return out


def _scale(levels: torch.Tensor, out: torch.Tensor, gain: float, bias: float) -> None:
    """Write ``levels * gain + bias`` to `out`, of the shape that grey levels are broadcast to.

    Some scans at a time: the products of a whole batch may be much memory. On a GPU each call takes longer than a
    scan's slices do, so they are many.
    """
    per_scan = max(1, levels[:1].numel())
    scans = max(1, _PRODUCTS // per_scan) if levels.is_cuda else 1
    for some, target in zip(levels.split(scans), out.split(scans), strict=True):
        if bias:
            torch.add(torch.mul(some, gain).expand(target.shape), bias, out=target)
        else:
            torch.mul(some.expand(target.shape), gain, out=target)
