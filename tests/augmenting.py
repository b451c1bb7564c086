"""Images to augment, the keys of their draws, and augmentations of some parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy import ndimage

from loaders.augmentation import Augmentation

SIZE = (24, 32, 28)
OFF = Augmentation(rotation_deg=0, translation_mm=0, scale=0, gain=0, gamma=0, noise=0, bias_field=0)
EVERYTHING = Augmentation(flip=0.5, crop=(20, 28, 24))
EVERYTHING_WHOLE = dataclasses.replace(EVERYTHING, crop=None)
KEYS = np.array([[1, 0, 17], [1, 0, 4], [1, 1, 17], [2, 0, 17]])
PLANES = {"axial": 1, "coronal": 2, "sagittal": 3}  # the axis of (scan, z, y, x) across each


def only(**parts: float) -> Augmentation:
    """Return an augmentation of these parts."""
    return dataclasses.replace(OFF, **parts)


def smooth(scans: int = 4, size: tuple[int, ...] = SIZE, *, seed: int = 0) -> torch.Tensor:
    """Return smooth random images from 0 to 1."""
    noise = np.random.default_rng(seed).normal(size=(scans, *size))
    images = np.stack([ndimage.gaussian_filter(image, 1.5) for image in noise])
    low, high = images.min(), images.max()
    return torch.from_numpy((images - low) / (high - low)).to(torch.float32)
