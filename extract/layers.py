"""What is taken of a network: one or several layers in one pass, each pooled over its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from extract.models import Family, family_of, outline

POOLINGS = ("mean", "max", "both")


@dataclass(frozen=True)
class Layer:
    """The features that a layer gives: ``features`` of them, from column ``start`` on.

    Where the pooling is ``both``, the first half are means and the second half maxima, channel by channel.
    """

    name: str
    features: int
    start: int


class PooledLayers(nn.Module):
    """Some layers of a network, pooled over positions: (item, 3 or 1, [z,] y, x) -> float32 (item, feature).

    Layers come in the order of ``names``. What the network does after the last of them is left out, in place.

    Parameters
    ----------
    network
        See `extract.models.make_network`; it may have been made faster.
    model
        Its name.
    names
        Of layers, see `check_layers`.
    pooling
        ``mean``, ``max`` or ``both``: means, then maxima.
    vectors_once
        Layers of one position have nothing to choose between, and are taken once even for ``both``.
    """

    def __init__(
        self, network: nn.Module, model: str, names: Sequence[str], pooling: str, *, vectors_once: bool
    ) -> None:
        super().__init__()
        self._family = family_of(model)
        self._names = tuple(names)
        self._pooling = pooling
        self._vectors_once = vectors_once
        self._taken: dict[str, torch.Tensor] = {}
        order = layer_names(network, self._family)
        _cut_after(network, self._family, max(names, key=order.index))
        self.network = network
        for name in names:
            layer = network.get_submodule(self._family.modules.get(name, name))
            layer.register_forward_hook(partial(self._take, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of all layers, side by side."""
        return torch.cat(self.parts(x), dim=1)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of each layer, float32 (item, feature)."""
        self.network(x)
        return [self._taken.pop(name) for name in self._names]

    def _take(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Pool at once: a feature map may be as large as the volume."""
        once = self._vectors_once and self._family.vector and name == self._family.last
        self._taken[name] = _pooled(self._family.positions(name, output), "mean" if once else self._pooling)


def _pooled(values: torch.Tensor, pooling: str) -> torch.Tensor:
    """(item, channel, position) -> float32 (item, feature)."""
    parts = []
    if pooling != "max":
        parts.append(values.mean(2, dtype=torch.float32))
    if pooling != "mean":
        parts.append(values.amax(2).float())
    return torch.cat(parts, dim=1)


def pool_slices(features: torch.Tensor, layers: Sequence[Layer], pooling: str) -> torch.Tensor:
    """Pool over the slices of a scan: the mean of means, the greatest of maxima.

    Parameters
    ----------
    features
        (scan, slice, feature), of one slice at least.

    Returns
    -------
    torch.Tensor
        (scan, feature).
    """
    if pooling == "mean" or features.shape[1] == 1:
        return features.mean(dim=1)
    if pooling == "max":
        return features.amax(dim=1)
    parts = []
    for layer in layers:
        means, maxima = features[..., layer.start : layer.start + layer.features].chunk(2, dim=-1)
        parts += [means.mean(dim=1), maxima.amax(dim=1)]
    return torch.cat(parts, dim=1)


def check_layers(model: str, layers: Sequence[str] | None, pooling: str, *, one_picture: bool) -> tuple[str, ...]:
    """Return the layers to take, by default the one that the classifier sees.

    Parameters
    ----------
    layers
        Names of torchvision's modules: stages (``layer3``) or parts of them (``layer3.0``). That of the class token of
        an MViT is ``class_token``.
    pooling
        See `PooledLayers`.
    one_picture
        A scan is one volume or one slice, so that nothing is pooled over slices.

    Raises
    ------
    ValueError
        For layers that the model has not, or that are named twice, an unknown pooling, or one that would do nothing.
    """
    family = family_of(model)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is unknown, expected one of {', '.join(POOLINGS)}")
    names = (family.last,) if layers is None else tuple(layers)
    if not names:
        raise ValueError("layers is empty, expected the name of one or more")
    if layers is not None:
        network = outline(model)
        known = layer_names(network, family)
        for name in names:
            if name not in known:
                raise ValueError(
                    f"layer {name!r} is not in {model}, expected one of {_layers_in_words(network, family)}"
                )
    if len(set(names)) < len(names):
        raise ValueError(f"layers are {','.join(names)}, expected each once")
    if pooling != "mean" and one_picture and family.vector and names == (family.last,):
        raise ValueError(
            f"pooling is {pooling}, but {family.last} of {model} has one position, and a scan is one picture: there is "
            f"nothing to pool; use --pooling mean, or --layers {family.stages[-2]}"
        )
    return names


def plan_layers(model: str, names: Sequence[str], pooling: str, *, vectors_once: bool) -> tuple[Layer, ...]:
    """Work out how many features each layer gives, without computing one."""
    size = (64, 64) if family_of(model).axes == 2 else (16, 224, 224)  # which every network takes
    network = PooledLayers(outline(model), model, names, pooling, vectors_once=vectors_once)
    layers: list[Layer] = []
    start = 0
    with torch.inference_mode():
        parts = network.parts(torch.empty((1, 3, *size), device="meta"))
    for name, part in zip(names, parts, strict=True):
        layers.append(Layer(name, part.shape[1], start))
        start += part.shape[1]
    return tuple(layers)


def layer_names(network: nn.Module, family: Family) -> list[str]:
    """Return the layers that may be asked for, in the order of computation."""
    names: list[str] = []
    for stage in family.stages:
        if stage in family.blocks:
            names += [f"{stage}.{index}" for index in range(_length(network, stage))]
        if not isinstance(getattr(network, stage, None), nn.ModuleList):  # which has no output of its own
            names.append(stage)
    return names


def _layers_in_words(network: nn.Module, family: Family) -> str:
    words = []
    for stage in family.stages:
        parts = f"{stage}.0 to {stage}.{_length(network, stage) - 1}" if stage in family.blocks else ""
        if isinstance(getattr(network, stage, None), nn.ModuleList):
            words.append(parts)
        else:
            words.append(f"{stage} ({parts})" if parts else stage)
    return ", ".join(words)


def _length(network: nn.Module, stage: str) -> int:
    return len(list(network.get_submodule(stage).children()))


def _cut_after(network: nn.Module, family: Family, name: str) -> None:
    """Have a network do nothing after a layer: the rest hands on what it is given."""
    stage, _, index = name.partition(".")
    blocks = network.get_submodule(family.modules.get(stage, stage))
    if index and isinstance(blocks, nn.ModuleList):
        del blocks[int(index) + 1 :]
    elif index:
        assert isinstance(blocks, nn.Sequential)
        for later in range(int(index) + 1, len(blocks)):
            blocks[later] = nn.Identity()
    for later_stage in family.stages[family.stages.index(stage) + 1 :]:
        setattr(network, family.modules.get(later_stage, later_stage), nn.Identity())
