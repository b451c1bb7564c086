"""Work that a frozen network need not do: batch norms, and what its first max pool throws away again."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(network: nn.Module) -> None:
    """Fold every batch norm that follows a convolution into it, in place: it is a scale and a shift per channel.

    Parameters
    ----------
    network
        In evaluation mode. Where it has a batch norm next to a convolution among the children of a module, or of a
        sequence at its end, that must be what sees the convolution's output, as in all ResNets and the S3D of
        torchvision.
    """
    for parent in list(network.modules()):
        for (before, _), (name, norm) in pairwise(list(parent.named_children())):
            holder, place = _last_step(parent, before)
            convolution = getattr(holder, place)
            if isinstance(norm, _NORMS) and isinstance(convolution, CONVOLUTIONS):
                setattr(holder, place, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, name, nn.Identity())


def pool_before_relu(network: nn.Module) -> None:
    """Swap the ReLU and the max pool after the first convolution of a torchvision ResNet, in place.

    The greatest of what is above zero is what is above zero of the greatest, bit for bit, and a quarter of the numbers
    is left. Video ResNets have no such pool, and stay as they are.
    """
    relu, pool = getattr(network, "relu", None), getattr(network, "maxpool", None)
    if isinstance(relu, nn.ReLU) and isinstance(pool, nn.MaxPool2d):
        network.relu, network.maxpool = nn.Identity(), nn.Sequential(pool, relu)


def _last_step(parent: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return what holds the last step of a child, and that step's name there: R(2+1)D nests sequences."""
    module = getattr(parent, name)
    while isinstance(module, nn.Sequential) and len(module):
        parent, name, module = module, list(module._modules)[-1], module[-1]
    return parent, name
