"""The limit of what a network computes: how many floating-point operations a second its device does at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def arithmetic_speed(device: torch.device, dtype: torch.dtype, *, gpu_size: int = 8192) -> float:
    """Return floating-point operations a second: the best of a large product of square matrices, many times over.

    On a CPU a convolution with as many operations is tried, too, for there the two come of different libraries, and
    neither is the faster one everywhere.
    """
    size = gpu_size if device.type == "cuda" else 1024
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    speeds = [2 * size**3 / _best_seconds(partial(torch.matmul, a, b), device)]
    if device.type == "cpu":
        images, kernels = torch.randn(24, 256, 12, 10).to(dtype), torch.randn(256, 256, 3, 3).to(dtype)
        images, kernels = (given.to(memory_format=torch.channels_last) for given in (images, kernels))
        convolve = partial(nn.functional.conv2d, images, kernels, padding=1)
        speeds.append(2 * kernels.numel() * 24 * 12 * 10 / _best_seconds(convolve, device))
    return max(speeds)


def _best_seconds(function: Callable[[], torch.Tensor], device: torch.device) -> float:
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
