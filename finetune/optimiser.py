"""AdamW with a learning rate per stage, warm-up and a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from finetune.network import ScanNetwork
from finetune.settings import FinetuneSettings


def make_optimiser(network: ScanNetwork, settings: FinetuneSettings) -> AdamW:
    """Return an optimiser of what is not frozen.

    The heads (and attention) learn at ``head_lr``, the last stage at ``lr``, and each stage before it at
    ``layer_decay`` times the rate of the next. Biases and the parameters of norms, which are vectors, do not decay.
    """
    groups = []
    for rate, parameters in _by_rate(network, settings):
        for decays in (True, False):
            chosen = [p for p in parameters if p.requires_grad and (p.ndim > 1) == decays]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": settings.weight_decay if decays else 0.0})
    return AdamW(groups, lr=settings.lr, fused=True)  # in one pass over each parameter: half the time on a CPU


def _by_rate(network: ScanNetwork, settings: FinetuneSettings) -> Iterator[tuple[float, list[nn.Parameter]]]:
    stages = list(network.stages())
    taken: set[int] = set()
    for depth, parts in enumerate(stages):
        parameters = [parameter for part in parts for parameter in part.parameters()]
        taken.update(map(id, parameters))
        yield settings.lr * settings.layer_decay ** (len(stages) - 1 - depth), parameters
    yield settings.head_lr or settings.lr, [p for p in network.parameters() if id(p) not in taken]


def make_schedule(optimiser: AdamW, steps: int, warmup: float) -> LambdaLR:
    """Return a schedule: a straight line up over a share of the steps, then a half cosine down to 0."""
    rising = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return LambdaLR(optimiser, factor)


def trained_parameters(network: nn.Module) -> list[torch.Tensor]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
