"""The networks that can be encoders: torchvision's ResNets see slices, its video networks see volumes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum


def _channels_first(_: str, output: torch.Tensor) -> torch.Tensor:
    return output.flatten(2)


def _swin_positions(layer: str, output: torch.Tensor) -> torch.Tensor:
    return output.flatten(2) if layer == "avgpool" else output.flatten(1, -2).transpose(1, 2)


def _mvit_positions(layer: str, output: Any) -> torch.Tensor:
    tokens: torch.Tensor = output[:, :1] if layer == "class_token" else output[0][:, 1:]
    return tokens.transpose(1, 2)


@dataclass(frozen=True)
class Family:
    """What networks of one design have in common.

    Attributes
    ----------
    axes
        Of a picture: 2 or 3.
    classifier
        The child that makes classes of features.
    stages
        Layers that may be asked for, in the order of computation; what the classifier sees comes last.
    blocks
        Those of them that are sequences, whose parts may be asked for, too (``layer3.0``).
    positions
        Turns what a layer gives into (item, channel, position). Layers of transformers have their channels last.
    modules
        Where a layer has another name in torchvision's network.
    vector
        The last layer has one position.
    fixed
        The one size of picture that a network takes, if there is but one.
    multiple
        Each length of a picture must be a multiple of this.
    smallest, smallest_last
        Lengths of the smallest picture for all layers, and for the last one.
    telling
        Length below which a picture is taken, but shrinks to a position or two, which tell little of it.
    """

    axes: int
    classifier: str
    stages: tuple[str, ...]
    blocks: frozenset[str]
    positions: Callable[[str, Any], torch.Tensor] = _channels_first
    modules: dict[str, str] = field(default_factory=dict)
    vector: bool = True
    fixed: tuple[int, ...] | None = None
    multiple: tuple[int, ...] | None = None
    smallest: tuple[int, ...] | None = None
    smallest_last: tuple[int, ...] | None = None
    telling: int = 1

    @property
    def last(self) -> str:
        """The layer that the classifier sees."""
        return self.stages[-1]

    @property
    def pretrained(self) -> str:
        """Name of the pretrained weights, by the pictures that they are of."""
        return "imagenet" if self.axes == 2 else "kinetics"


_LAYERS = ("layer1", "layer2", "layer3", "layer4")

#: By the module of torchvision that makes the networks.
FAMILIES = {
    "torchvision.models.resnet": Family(2, "fc", ("maxpool", *_LAYERS, "avgpool"), frozenset(_LAYERS), telling=32),
    "torchvision.models.video.resnet": Family(3, "fc", ("stem", *_LAYERS, "avgpool"), frozenset(_LAYERS), telling=32),
    # Its last pool has a kernel of 2 x 7 x 7 positions, each 8 x 32 x 32 voxels; its pool before that one of 2 x 2 x 2.
    "torchvision.models.video.s3d": Family(
        3, "classifier", ("features", "avgpool"), frozenset({"features"}), vector=False,
        smallest=(5, 17, 17), smallest_last=(13, 209, 209),
    ),
    # Other lengths are padded with zeros, after normalising, which no grey level gives in all three channels.
    "torchvision.models.video.swin_transformer": Family(
        3, "head", ("patch_embed", "features", "norm", "avgpool"), frozenset({"features"}), _swin_positions,
        multiple=(2, 4, 4),
    ),
    # It has learnt a vector for each position.
    "torchvision.models.video.mvit": Family(
        3, "head", ("blocks", "class_token"), frozenset({"blocks"}), _mvit_positions, {"class_token": "norm"},
        fixed=(16, 224, 224),
    ),
}  # fmt: skip


def _known_models() -> dict[str, Family]:
    names = [*models.list_models(module=models), *models.list_models(module=models.video)]
    made_by = {name: models.get_model_builder(name).__module__ for name in names}
    return {name: FAMILIES[module] for name, module in made_by.items() if module in FAMILIES}


#: Every model by its name in torchvision.
MODELS = _known_models()


def family_of(model: str) -> Family:
    """Return the family of a model.

    Raises
    ------
    ValueError
        For an unknown name; the message has the nearest known one.
    """
    if model not in MODELS:
        nearest = difflib.get_close_matches(model.lower().replace("-", "_"), MODELS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"model {model!r} is unknown, expected one of {', '.join(MODELS)}{hint}")
    return MODELS[model]


def default_weights(model: str) -> WeightsEnum:
    """Return torchvision's default pretrained weights of a model."""
    default: WeightsEnum = models.get_model_weights(model).DEFAULT
    return default


def make_network(model: str) -> nn.Module:
    """Make a network with random weights, in evaluation mode, that gives what its classifier would see."""
    network: nn.Module = models.get_model(model, weights=None)
    setattr(network, family_of(model).classifier, nn.Identity())
    return network.eval()


def outline(model: str) -> nn.Module:
    """Make a network without numbers (on torch's meta device), which tells names and shapes in milliseconds."""
    with torch.device("meta"):
        return make_network(model)


@cache
def parameter_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter and statistic of a model, without its classifier, by name."""
    state = outline(model).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()}


def check_picture(model: str, size: Sequence[int], layers: Sequence[str]) -> None:
    """Check that a network takes pictures or volumes of a size.

    Parameters
    ----------
    size
        (height, width) or (z, y, x), of what the network sees.
    layers
        That are asked for.

    Raises
    ------
    ValueError
        If it does not; the message says what helps.
    """
    family = family_of(model)
    size = tuple(size)
    if family.fixed and size != family.fixed:
        raise ValueError(
            f"{model} takes {_product(family.fixed)} voxels and no others, not {_product(size)}; "
            f"use --size {_listed(family.fixed)}"
        )
    if family.multiple and any(n % step for n, step in zip(size, family.multiple, strict=True)):
        fitting = [max(step, n // step * step) for n, step in zip(size, family.multiple, strict=True)]
        raise ValueError(
            f"{model} takes multiples of {_product(family.multiple)} voxels, not {_product(size)}; "
            f"use --size {_listed(fitting)}, or --crop"
        )
    last = family.last in layers
    least = family.smallest_last if last else family.smallest
    if least and any(n < enough for n, enough in zip(size, least, strict=True)):
        hint = f", or --layers {family.stages[-2]}" if last else ""
        raise ValueError(
            f"{model} needs {_product(least)} voxels or more, not {_product(size)}; "
            f"use --size {_listed(map(max, size, least))}{hint}"
        )


def about_pictures(model: str, sizes: Sequence[Sequence[int]]) -> list[str]:
    """Return a warning if pictures of these sizes, of one plane each, are so small that features tell little."""
    least = family_of(model).telling
    smallest = min(sizes, key=min)
    if min(smallest) >= least:
        return []
    return [
        f"{model} sees pictures of {_product(smallest)} voxels; below {least} along an axis hardly a position is left "
        "in its last layers: use a larger --size, --scale or --crop"
    ]


def _product(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _listed(size: Any) -> str:
    return ",".join(map(str, size))
