"""A small store of which curves are made in moments, and the settings of their trainings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchvision.models import resnet18

from finetune.curves import CurveSettings
from finetune.settings import FinetuneSettings
from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store, resize_store, set_attributes, write_phenotypes, write_scans

SHAPE = (16, 20, 16)
PEOPLE = 60


def make_cohort(path: Path) -> Path:
    """Make a store of small pictures that know sex and age; the first three people have two scans each."""
    people = np.concatenate([np.arange(PEOPLE), np.arange(3)])
    rng = np.random.default_rng(0)
    create_store(path, [], Grid(SHAPE, 1.0, tuple(map(tuple, np.eye(4).tolist())), "native"), slab=4)
    resize_store(path, len(people))
    sex = rng.permutation(np.arange(PEOPLE) % 2).astype(float)[people]
    age = rng.uniform(45, 80, PEOPLE)[people]
    rows = []
    for row, person in enumerate(people):
        voxels = rng.integers(60, 160, SHAPE).astype(float)
        voxels[:, 4:10, 4:10] += 60 * sex[row]
        voxels[:, 12:18, 4:12] += 2.0 * (age[row] - 62)
        write_shard(shard_path(path, row), encode_shard(np.clip(voxels, 0, 255).astype(np.uint8), 4))
        session = str(2 + (row >= PEOPLE))
        rows.append(ScanRow(f"9{person:06d}", session, "T1", f"{row}.nii.gz", status="ok", scale=1.0, offset=0.0))
    write_scans(path, rows)
    variables = {
        "sex": {"task": "binary", "labels": {"0": "female", "1": "male"}},
        "age": {"task": "continuous", "units": "years"},
    }
    write_phenotypes(path, pd.DataFrame({"sex": sex, "age": age}), variables)
    set_attributes(path, {"simulated": True})
    return path


def make_weights(path: Path) -> Path:
    """Make a file of weights."""
    torch.manual_seed(3)
    torch.save(resnet18().state_dict(), path)
    return path


def trainings(weights: Path) -> FinetuneSettings:
    """Return the settings of trainings of a moment."""
    return FinetuneSettings(
        target="sex,age", weights=str(weights), view="axial", slices=1, size=(32, 32), epochs=3, batch_size=10, lr=1e-3,
        validation=0.2, test=0.3, tensorboard=False, bootstrap=0, device="cpu", backend="torch", threads=1,
        augmentation="none", freeze_until="layer4",
    )  # fmt: skip


CURVE = CurveSettings(sizes=(10, 15), seeds=(4,), draws=100)
