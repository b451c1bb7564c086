"""The first convolution of a network for colours, collapsed to the one grey channel that a scan has.

Of three normalised channels ``x_c = (g - mean_c) / std_c`` it makes ``sum_c W_c * x_c``. That is ``g`` seen by a kernel
of one channel, ``sum_c W_c / std_c``, plus what it makes of the constants ``-mean_c / std_c``. Inside a picture those
give a bias. At the borders they give another: zeros are padded after normalising, and no grey level becomes zero in all
three channels. The difference is worked out once for each size of picture, and added to the outermost rows and columns
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import nn

from extract.fold import CONVOLUTIONS

_ALIGNED = 8  # values that tensor cores read at once
_MOST_VALUES = 1 << 28  # that are laid out at a time

#: Places (item, channel, [z,] y, x) and what is added there.
Borders = list[tuple[tuple[slice, ...], torch.Tensor]]


class GreyConvolution(nn.Module):
    """Makes of stored grey levels, 0 to 255, what a convolution makes of three normalised channels.

    Parameters
    ----------
    colour
        Over three channels, padded with zeros.
    mean, std
        By which each channel, in [0, 1], is normalised.

    Raises
    ------
    ValueError
        For other convolutions.
    """

    def __init__(self, colour: nn.Conv2d | nn.Conv3d, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        by_numbers = colour.padding_mode == "zeros" and not isinstance(colour.padding, str)
        if colour.in_channels != len(mean) or colour.groups != 1 or not by_numbers:
            raise ValueError(f"cannot collapse {colour}: expected {len(mean)} channels, one group, zeros as padding")
        weight = colour.weight.detach().double()
        means, stds = (
            torch.tensor(values, dtype=torch.float64, device=weight.device).view(1, -1, *[1] * (weight.ndim - 2))
            for values in (mean, std)
        )
        constants = (weight * -means / stds).sum(1)
        bias = constants.flatten(1).sum(1)
        if colour.bias is not None:
            bias += colour.bias.detach()
        self.convolution = copy.deepcopy(colour)
        self.convolution.in_channels = 1
        summed = (weight / (255 * stds)).sum(1, keepdim=True)
        self.convolution.weight = nn.Parameter(summed.to(colour.weight.dtype), requires_grad=False)
        self.convolution.bias = nn.Parameter(bias.to(colour.weight.dtype), requires_grad=False)
        self._constants = constants.cpu()  # no buffer, which would lose digits where the network is made bfloat16
        self._borders: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Borders] = {}

    def forward(self, grey: torch.Tensor) -> torch.Tensor:
        """(item, 1, [z,] y, x) -> (item, channel, [z,] y, x)."""
        half = grey.dtype in (torch.bfloat16, torch.float16)
        out = convolve_by_products(grey, self.convolution) if grey.is_cuda and half else self.convolution(grey)
        for place, difference in self.borders(tuple(grey.shape[2:]), out.device, out.dtype):
            out[place] += difference
        return out

    def borders(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Borders:
        """Return what must be added to the outermost results for pictures of a size; worked out once."""
        key = (size, device, dtype)
        if key not in self._borders:
            layout = torch.channels_last_3d if len(size) == 3 else torch.channels_last
            self._borders[key] = [
                (place, difference[None].to(device, dtype, memory_format=layout))
                for place, difference in self._differences(size)
            ]
        return self._borders[key]

    def _differences(self, size: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        inside = [self._taps_inside(axis, length) for axis, length in enumerate(size)]
        region = [slice(0, len(taps)) for taps in inside]
        for axis, taps in enumerate(inside):
            complete = taps.all(1).nonzero().flatten().tolist()
            first, last = (complete[0], complete[-1] + 1) if complete else (len(taps), len(taps))
            for part in (slice(0, first), slice(last, len(taps))):
                place = [*region[:axis], part, *region[axis + 1 :]]
                if all(where.start < where.stop for where in place):
                    given = self._constants
                    for taps_of, where in zip(inside, place, strict=True):  # axis by axis: taps go, positions come last
                        given = torch.tensordot(given, taps_of[where].double(), dims=([1], [1]))
                    missing = given - self._constants.flatten(1).sum(1).view(-1, *[1] * len(size))
                    yield (slice(None), slice(None), *place), missing
            region[axis] = slice(first, last)

    def _taps_inside(self, axis: int, length: int) -> torch.Tensor:
        """Return which elements of the kernel lie on the picture, bool (result, element), along an axis."""
        step, padding, reach, dilation = (
            int(values[axis])
            for values in (
                self.convolution.stride, self.convolution.padding, self.convolution.kernel_size,
                self.convolution.dilation,
            )
        )  # fmt: skip
        results = (length + 2 * padding - dilation * (reach - 1) - 1) // step + 1
        at = torch.arange(results)[:, None] * step - padding + torch.arange(reach) * dilation
        return (at >= 0) & (at < length)


def convolve_by_products(grey: torch.Tensor, convolution: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """Do what a convolution of one channel does by products of matrices: each result's voxels, laid out, with kernels.

    Tensor cores want several channels. For one, cuDNN's kernels took three times as long as this on an H100.

    Parameters
    ----------
    grey
        (item, 1, [z,] y, x).
    convolution
        Padded with zeros.

    Returns
    -------
    torch.Tensor
        (item, channel, [z,] y, x), channels last in memory.
    """
    kernel, step, dilation = (
        tuple(map(int, v)) for v in (convolution.kernel_size, convolution.stride, convolution.dilation)
    )
    padding = [int(n) for n in convolution.padding]
    spare = -kernel[-1] % _ALIGNED
    pads = [(n, n) for n in padding[:-1]] + [(padding[-1], padding[-1] + spare * dilation[-1])]
    padded = nn.functional.pad(grey[:, 0], [n for pair in reversed(pads) for n in pair])
    results = [
        (n + 2 * pad - gap * (reach - 1) - 1) // stride + 1
        for n, pad, gap, reach, stride in zip(grey.shape[2:], padding, dilation, kernel, step, strict=True)
    ]
    first, *along = padded.stride()
    shape = (*results, *kernel[:-1], kernel[-1] + spare)
    strides = [n * s for n, s in zip(along, step, strict=True)] + [n * s for n, s in zip(along, dilation, strict=True)]
    weight = nn.functional.pad(convolution.weight[:, 0], (0, spare)).flatten(1)
    found = []
    some = max(1, _MOST_VALUES // prod(shape))
    for start in range(0, len(grey), some):
        items = min(some, len(grey) - start)
        laid_out = padded.as_strided((items, *shape), (first, *strides), start * first)
        products = nn.functional.linear(laid_out.reshape(-1, weight.shape[1]), weight, convolution.bias)
        found.append(products.view(items, *results, -1))
    return (torch.cat(found) if len(found) > 1 else found[0]).movedim(-1, 1)


def collapse_to_grey(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Have a network take stored grey levels, (item, 1, [z,] y, x) from 0 to 255, in place.

    Parameters
    ----------
    network
        Its first convolution is what sees the input, three channels of the same picture.
    mean, std
        By which each channel, in [0, 1], was to be normalised.
    """
    name, first = next((name, m) for name, m in network.named_modules() if isinstance(m, CONVOLUTIONS))
    holder, _, place = name.rpartition(".")
    setattr(network.get_submodule(holder), place, GreyConvolution(first, mean, std))
