"""Heads for targets of every task, and small networks with them."""

from __future__ import annotations

import torch
from finetuning import SHAPE, tiny_settings

from extract.weights import Weights
from finetune.build import build_network
from finetune.heads import Head
from finetune.network import ScanNetwork
from finetune.settings import FinetuneSettings

NO_WEIGHTS = Weights("random", "", None, (0.4, 0.45, 0.5), (0.2, 0.22, 0.24))
SEX = Head("sex", "binary", ("f", "m"), frequencies=(0.25, 0.75))
SITE = Head("site", "multiclass", ("a", "b", "c"), outputs=3, frequencies=(0.2, 0.3, 0.5))
INCOME = Head("income", "ordinal", outputs=3, typical=3.0, levels=(1.0, 2.0, 4.0, 5.5))
AGE = Head("age", "continuous", units="years", mean=60.0, std=8.0, typical=60.0)
DRINKS = Head("drinks", "count", mean=1.2, std=0.6, typical=3.0)
HEADS = (SEX, SITE, INCOME, AGE, DRINKS)


def make_network(heads=(SEX, AGE), **changes) -> ScanNetwork:
    return build_network(tiny_settings(dropout=0, **changes), heads, NO_WEIGHTS)


def solid(**changes) -> FinetuneSettings:
    return tiny_settings(model="r3d_18", dropout=0, **changes).model_copy(update={"view": None})


def volumes(scans: int = 4, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randint(0, 256, (scans, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
