"""Folders of runs whose networks were never trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from finetuning import SHAPE, tiny_settings

from finetune.checkpoints import checkpoint_of, write_checkpoint
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from loaders.views import View

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)


def with_network(folder: Path, network: ScanNetwork, **attrs: object) -> Path:
    """Write the folder of a run of a network that was never trained; return its path."""
    grid = {"shape_zyx": list(SHAPE), "voxel_mm": 1.0, "affine_ras": np.eye(4).tolist(), "space": "native"}
    about = {"store": {"path": "s", "id": "elsewhere", "grid": grid}, "simulated": False, "epoch": 7, "step": 9}
    seen = network.seen
    settings = tiny_settings(
        model=network.model, view=None if seen.view is View.volume else str(seen.view), target="sex",
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_checkpoint(folder / "best.pt", checkpoint_of(network, settings, about | attrs))
    return folder


def make_scan_network(view: View, pool: str = "mean", **seen: object) -> ScanNetwork:
    """Return a network whose normalisation is its own."""
    given = {"slices": 3, "crop": None, "size": None, "scale": 1.0, "mean": MEAN, "std": STD} | seen
    torch.manual_seed(3)
    head = Head("sex", "binary", ("female", "male"), frequencies=(0.5, 0.5))
    return ScanNetwork("mc3_18" if view is View.volume else "resnet18", Input(view, **given), [head], pool=pool).eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def volumes_of(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 8, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
