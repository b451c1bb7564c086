"""The network that is trained: a torchvision ResNet of slices or volumes, pooled over a scan, and heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from extract.inputs import pictures_of, resize, target_size
from extract.models import FAMILIES, MODELS, family_of, make_network
from finetune.heads import Head
from finetune.planes import through
from loaders.views import Images, View

#: Those of torchvision's networks that are made of a stem and four stages.
_TRAINED = ("torchvision.models.resnet", "torchvision.models.video.resnet")

_STAGES = ("layer1", "layer2", "layer3", "layer4")
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_HIDDEN = 128  # of the attention


@dataclass(frozen=True)
class Input:
    """What a network sees of a stored volume.

    Attributes
    ----------
    view, slices
        What a 2D network sees; `View.volume` for a 3D one.
    crop
        (z, y, x) of the central part, if not all.
    size
        (height, width) or (z, y, x) that pictures are resized to, instead of by `scale`.
    mean, std
        Of the three equal channels in [0, 1].
    """

    view: View
    slices: int
    crop: tuple[int, int, int] | None
    size: tuple[int, ...] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def cut(self) -> bool:
        """Whether what a loader gives as one tensor are slices; those of three planes are three, or volumes."""
        return self.view not in (View.volume, View.triplanar)


class ScanNetwork(nn.Module):
    """Stored grey levels in, numbers for each target out.

    Parameters
    ----------
    model
        A ResNet of torchvision, 2D or 3D.
    seen
        What it sees.
    heads
        What it gives.
    pool
        Over the slices of a scan: ``mean``, or ``attention``, by which each slice has a weight that is learnt from what
        is on it (the gated one of Ilse, Tomczak & Welling 2018, ICML, PMLR 80:2127).
    dropout
        Of features before the heads.
    checkpointing
        Keep no activations within stages, and compute them again for the gradient.
    """

    def __init__(
        self,
        model: str,
        seen: Input,
        heads: Sequence[Head],
        *,
        pool: str = "mean",
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.seen, self.heads_info, self.checkpointing = model, seen, tuple(heads), checkpointing
        encoder: Any = make_network(model)  # whose parts have the names of torchvision's
        self.encoder = encoder
        features = 512 * getattr(encoder.layer4[0], "expansion", 1)
        self.attention = GatedAttention(features) if pool == "attention" and seen.view is not View.volume else None
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(_head(features, head) for head in heads)
        self._left: list[nn.Module] = []  # parts that stay as in evaluation
        spatial = 3 if seen.view is View.volume else 2
        self._mean: torch.Tensor
        self._std: torch.Tensor
        for name in ("mean", "std"):
            values = torch.tensor(getattr(seen, name)).view(1, 3, *[1] * spatial)
            self.register_buffer(f"_{name}", values, persistent=False)

    @property
    def head_slices(self) -> list[slice]:
        """Columns of the output of each head."""
        ends = [0]
        for head in self.heads_info:
            ends.append(ends[-1] + head.outputs)
        return [slice(start, end) for start, end in pairwise(ends)]

    def forward(self, images: Images, cut: bool = False) -> torch.Tensor:
        """Return the outputs of all heads, side by side.

        Parameters
        ----------
        images
            (scan, z, y, x), RAS: uint8 as stored, or floats in [0, 1].
        cut
            They are slices already, (scan, slice, height, width), of which `extract.inputs.slices_to_load` says which;
            a tuple of three planes is so in any case.

        Returns
        -------
        torch.Tensor
            float32 (scan, output).
        """
        return self.outputs(self.features(images, cut))

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the heads give, float32 (scan, output), of features (scan, feature)."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = self.dropout(features.float())
            return torch.cat([head(pooled) for head in self.heads], dim=1)

    def features(self, images: Images, cut: bool = False) -> torch.Tensor:
        """Return the features of scans, (scan, feature), that the heads see."""
        pictures = pictures_of(images, self.seen.view, self.seen.slices, self.seen.crop, cut=cut)
        if self.seen.view is View.volume:
            return self.encode(pictures[0])
        encoded = self.encode_planes([group.flatten(0, 1)[:, None] for group in pictures])
        slices = [found.unflatten(0, group.shape[:2]) for found, group in zip(encoded, pictures, strict=True)]
        return self.pool_slices(torch.cat(slices, dim=1))

    def pool_slices(self, slices: torch.Tensor) -> torch.Tensor:
        """(scan, slice, feature) -> (scan, feature)."""
        return slices.mean(dim=1) if self.attention is None else self.attention(slices)

    def encode(self, grey: torch.Tensor) -> torch.Tensor:
        """(item, 1, [z,] y, x) -> (item, feature)."""
        x = self._prepare(grey)
        if not (self.checkpointing and self.training):
            features: torch.Tensor = self.encoder(x)
            return features
        for stage in self._stage_functions():
            x = checkpoint(stage, x, use_reentrant=False, context_fn=partial(_contexts, stage))
        pooled: torch.Tensor = self.encoder.avgpool(x)
        return pooled.flatten(1)

    def encode_planes(self, planes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode the slices of each plane as `encode` does; batch norms that are trained see those of all planes."""
        if len(planes) == 1 or not any(part.training for part in self.encoder.modules() if isinstance(part, NORMS)):
            return [self.encode(grey) for grey in planes]
        pictures = [self._prepare(grey) for grey in planes]
        for stage in self._stage_functions():
            if self.checkpointing:
                run = partial(through, stage)
                pictures = checkpoint(run, pictures, use_reentrant=False, context_fn=partial(_contexts, stage))
            else:
                pictures = through(stage, pictures)
        return [self.encoder.avgpool(x).flatten(1) for x in pictures]

    def _prepare(self, grey: torch.Tensor) -> torch.Tensor:
        """Return what torchvision's network is given of grey pictures."""
        highest = 1 if grey.is_floating_point() else 255
        size = target_size(grey.shape[2:], self.seen.scale, self.seen.size)
        x = resize(grey, size).to(self._mean.dtype)
        x = (x / highest - self._mean) / self._std  # one grey channel becomes three
        return x.contiguous(memory_format=torch.channels_last_3d if grey.ndim == 5 else torch.channels_last)

    def _stage_functions(self) -> Iterator[nn.Sequential]:
        yield nn.Sequential(*(stage for _, stage in stem_of(self.encoder)))
        yield from (nn.Sequential(getattr(self.encoder, name)) for name in _STAGES)

    def freeze(self, until: str | None, *, batch_norm: bool) -> None:
        """Leave a stage and those before it as they are, and, if asked to, the statistics of all batch norms.

        Parameters
        ----------
        until
            ``stem``, ``layer1`` ... ``layer4``; None for no stage.
        batch_norm
            Use the statistics that the weights come with, instead of those of each batch.

        Raises
        ------
        ValueError
            For another stage.
        """
        self._left = []
        if until is not None:
            names = stage_names()
            if until not in names:
                raise ValueError(f"freeze_until is {until!r}, expected one of {', '.join(names)}")
            for stage in list(self.stages())[: names.index(until) + 1]:
                for part in stage:
                    part.requires_grad_(False)
                    self._left.append(part)
        if batch_norm:
            self._left += [module for module in self.encoder.modules() if isinstance(module, NORMS)]
        self.train(self.training)

    def stages(self) -> Iterator[list[nn.Module]]:
        """Yield the parts of the encoder: stem, layer1, ... layer4."""
        yield [part for _, part in stem_of(self.encoder)]
        yield from ([getattr(self.encoder, name)] for name in _STAGES)

    def train(self, mode: bool = True) -> ScanNetwork:
        """Switch dropout and the batch norms that are not frozen."""
        super().train(mode)
        for part in self._left:
            part.eval()
        return self


class GatedAttention(nn.Module):
    """Weighted mean over slices, (scan, slice, feature) -> (scan, feature)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.value = nn.Linear(features, _HIDDEN)
        self.gate = nn.Linear(features, _HIDDEN)
        self.weight = nn.Linear(_HIDDEN, 1, bias=False)  # which softmax would not see

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean."""
        scores = self.weight(torch.tanh(self.value(slices)) * torch.sigmoid(self.gate(slices)))
        return (torch.softmax(scores.float(), dim=1) * slices).sum(dim=1)


class OrdinalHead(nn.Module):
    """One weighting of the features and a threshold per step (CORAL: Cao, Mirjalili & Raschka 2020, PRL 140:325).

    Output k is the logit of being above level k.
    """

    def __init__(self, features: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Linear(features, 1, bias=False)
        # Falling from the start, as they must be: an even share of people at each level
        share = 1 - torch.arange(1, steps + 1) / (steps + 1)
        self.bias = nn.Parameter(torch.log(share / (1 - share)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(scan, feature) -> (scan, step)."""
        shifted: torch.Tensor = self.weight(features) + self.bias
        return shifted


def _head(features: int, head: Head) -> nn.Module:
    if head.task == "ordinal":
        return OrdinalHead(features, head.outputs)
    linear = nn.Linear(features, head.outputs)
    with torch.no_grad():  # begin with what is known of anybody
        if head.task == "binary":
            linear.bias.fill_(math.log(head.frequencies[1] / head.frequencies[0]))
        elif head.task == "multiclass":
            linear.bias.copy_(torch.tensor(head.frequencies).log())
        else:
            linear.bias.zero_()
    return linear


def check_model(model: str) -> None:
    """Raise ValueError for a model that cannot be fine-tuned."""
    family_of(model)
    fitting = [name for name, family in MODELS.items() if family in [FAMILIES[module] for module in _TRAINED]]
    if model not in fitting:
        raise ValueError(
            f"model {model} can be extracted from but not fine-tuned, expected one of {', '.join(fitting)}"
        )


def stage_names() -> tuple[str, ...]:
    """Return the names of the stages, in the order of computation."""
    return ("stem", *_STAGES)


def stem_of(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what comes before the first stage."""
    children = dict(encoder.named_children())
    return [(name, children[name]) for name in list(children)[: list(children).index(_STAGES[0])]]


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what a stage is computed in, the first time and again."""
    return nullcontext(), _SameStatistics(stage)


class _SameStatistics(AbstractContextManager[None]):
    """Keeps batch norms from counting a batch again that is only computed again."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [part for part in module.modules() if isinstance(part, NORMS) and part.training]
        self._kept: list[tuple[float | None, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, _copied(norm.num_batches_tracked)) for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 0.0  # counts, which are taken back, must be there for a SyncBatchNorm

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, counted) in zip(self._norms, self._kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and counted is not None:
                norm.num_batches_tracked.copy_(counted)


def _copied(counted: torch.Tensor | None) -> torch.Tensor | None:
    return None if counted is None else counted.clone()
