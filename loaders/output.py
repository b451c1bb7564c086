"""What batches hold: number type, scale, channels, memory layout, augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loaders.augment import Augmentation, augment
from loaders.views import Picture, View

DTYPES = {
    "uint8": torch.uint8,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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
        None: (scan, z, y, x) or (scan, slice, height, width). 1 or 3: an axis of so many channels, all the same, stands
        before the last three or two.
    channels_last
        In torch's memory format of that name.
    augmentation
        None for none.
    seed
        Of the augmentation.
    """

    picture: Picture
    dtype: torch.dtype = torch.uint8
    mean: float = 0.0
    std: float = 1.0
    channels: int | None = None
    channels_last: bool = False
    augmentation: Augmentation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels is {self.channels}, expected None, 1 or 3")
        if self.channels_last and self.channels is None:
            raise ValueError("channels_last needs an axis of channels: set channels to 1 or 3")
        if not self.std > 0:
            raise ValueError(f"std is {self.std}, expected more than 0")
        if self.dtype is torch.uint8:
            if (self.mean, self.std) != (0, 1):
                raise ValueError("uint8 pictures are not normalised: leave mean and std, or choose a floating dtype")
            if self.augmentation is not None:
                raise ValueError("uint8 pictures are not augmented; choose dtype float32, float16 or bfloat16")

    def gain_and_bias(self) -> tuple[float, float]:
        """Return (gain, bias) by which stored levels become what is wanted, or what is augmented first."""
        if self.augmentation is not None:
            return 1 / 255, 0.0
        return 1 / (255 * self.std), -self.mean / self.std

    @property
    def decoded_as(self) -> np.dtype:
        """What threads write where the batch stays on the CPU: they scale while the voxels are in their cache."""
        scaled = self.dtype is torch.float32 or self.augmentation is not None
        return np.dtype(np.float32 if scaled else np.uint8)

    def finish(self, images: torch.Tensor, epoch: int, positions: np.ndarray) -> torch.Tensor:
        """Turn decoded pictures into those of the batch, on the device where they are.

        Parameters
        ----------
        images
            uint8, or float32 that is scaled already, (scan, ...).
        epoch, positions
            With the seed, what the augmentation of each scan depends on.
        """
        if self.dtype is not torch.uint8:
            if images.dtype is torch.uint8:
                images = self._scale(images)
            if self.augmentation is not None:
                keys = np.stack([np.full_like(positions, self.seed), np.full_like(positions, epoch), positions], axis=1)
                images = augment(images, self.augmentation, keys, view=str(self.picture.view))
                if (self.mean, self.std) != (0, 1):
                    images = images.sub_(self.mean).div_(self.std)
            images = images.to(self.dtype)
        if self.channels is None:
            return images
        return self._with_channels(images)

    def _scale(self, images: torch.Tensor) -> torch.Tensor:
        """Scale scan by scan: a batch in float32 besides one in half precision would be much memory."""
        gain, bias = self.gain_and_bias()
        dtype = torch.float32 if self.augmentation is not None else self.dtype
        out = torch.empty(images.shape, dtype=dtype, device=images.device)
        for levels, scaled in zip(images, out, strict=True):
            if dtype is torch.float32:
                torch.mul(levels, gain, out=scaled)
                if bias:
                    scaled.add_(bias)
            else:
                scaled.copy_(levels.float().mul_(gain).add_(bias))
        return out

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
