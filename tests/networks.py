"""Networks whose every part does something, and what torchvision alone makes of grey levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

#: Relative to the largest feature; float32 keeps seven digits, and a network adds up thousands of products.
TOLERANCE = 1e-5


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network whose batch norms have something to fold: statistics, scales and shifts of their own."""
    torch.manual_seed(7)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return network


def grey_levels(size: tuple[int, ...], items: int = 2) -> torch.Tensor:
    """Return uint8 (item, 1, *size)."""
    return torch.randint(0, 256, (items, 1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(grey: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Make three channels of grey levels as torchvision's users do."""
    means, stds = (torch.tensor(values).view(1, 3, *[1] * (grey.ndim - 2)) for values in (mean, std))
    return (grey.float() / 255 - means) / stds


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)]
