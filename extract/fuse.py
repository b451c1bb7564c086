"""Residual blocks whose convolutions add and rectify what they compute before they write it.

A GPU convolves in half precision about as fast as it reads and writes what comes and goes. Biases, sums and ReLUs that
are computed afterwards, each in a pass of its own, took half of a ResNet's time on an H100.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet
from torchvision.models.video import resnet as video

from extract.fold import CONVOLUTIONS

_BLOCKS = (resnet.BasicBlock, resnet.Bottleneck, video.BasicBlock, video.Bottleneck)


class FusedBlock(nn.Module):
    """Does what a residual block of torchvision does, in evaluation, whose batch norms are folded.

    Parameters
    ----------
    block
        All its convolutions have a bias.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        parts = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
        found = [
            step for step in chain.from_iterable(part.modules() for part in parts) if isinstance(step, CONVOLUTIONS)
        ]
        self.convolutions = nn.ModuleList(found)
        self.aside = None if block.downsample is None else block.downsample[0]
        if self.aside is not None:  # whose bias is added with that of the last one
            found[-1].bias = nn.Parameter(found[-1].bias + self.aside.bias, requires_grad=False)
            self.aside.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(item, channel, [z,] y, x) -> the same of the block."""
        aside = x if self.aside is None else self.aside(x)
        *first, last = self.convolutions
        for convolution in first:
            x = _convolve(x, convolution)
        return _convolve(x, last, aside)


def _convolve(x: torch.Tensor, convolution: Any, added: torch.Tensor | None = None) -> torch.Tensor:
    """Return what is above zero of a convolution, and of what is added to it."""
    if not x.is_cuda:
        found = convolution(x)
        return functional.relu(found if added is None else found + added)
    weight, bias = convolution.weight, convolution.bias
    how = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    if added is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *how)
    return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *how)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether cuDNN has such kernels for a device: in half precision, for GPUs of NVIDIA from Ampere on."""
    if device.type != "cuda" or dtype is torch.float32:
        return False
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def fuse_blocks(network: nn.Module) -> None:
    """Put a `FusedBlock` in the place of each residual block of a torchvision ResNet, in place.

    Parameters
    ----------
    network
        Whose batch norms are folded. Blocks of grouped convolutions (ResNeXt) stay as they are, for which cuDNN may
        have no such kernel.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            grouped = any(isinstance(step, CONVOLUTIONS) and step.groups > 1 for step in child.modules())
            if isinstance(child, _BLOCKS) and not grouped:
                setattr(parent, name, FusedBlock(child))
