"""Pictures of several shapes through one network, whose batch norms see all of them at once.

The slices of three planes have three shapes, and no tensor holds them. One plane after the other, each would be
normalised by its own mean and variance in training, and by those of all planes afterwards: what was trained would not
be what is tested. So all planes go through the network side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

Pictures = list[torch.Tensor]  # each (item, channel, height, width), of a shape of its own


def through(part: nn.Module, pictures: Pictures) -> Pictures:
    """Return what a part of torchvision's 2D ResNets makes of pictures."""
    if isinstance(part, nn.Sequential):
        for child in part:
            pictures = through(child, pictures)
        return pictures
    if isinstance(part, BasicBlock | Bottleneck):
        return _through_block(part, pictures)
    if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm):
        return normalise(part, pictures)
    if isinstance(part, nn.ReLU):  # torchvision's would write into what is a part of something else here
        return [functional.relu(x) for x in pictures]
    return [part(x) for x in pictures]


def _through_block(block: Any, pictures: Pictures) -> Pictures:
    layers = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    if isinstance(block, Bottleneck):
        layers += [block.relu, block.conv3, block.bn3]
    out = pictures
    for layer in layers:
        out = through(layer, out)
    aside = pictures if block.downsample is None else through(block.downsample, pictures)
    return [functional.relu(x + y) for x, y in zip(out, aside, strict=True)]


def normalise(norm: nn.Module, pictures: Sequence[torch.Tensor]) -> Pictures:
    """Return pictures normalised together if their norm is trained, else by its statistics, one by one."""
    if not norm.training:
        return [norm(x) for x in pictures]
    last = [x.movedim(1, -1) for x in pictures]
    flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in last])
    found = norm(flat[:, :, None, None]).flatten(1)
    ends = [0]
    for x in last:
        ends.append(ends[-1] + x.shape[:-1].numel())
    parts = [found[start:end] for start, end in pairwise(ends)]
    return [part.view(x.shape).movedim(-1, 1) for part, x in zip(parts, last, strict=True)]
