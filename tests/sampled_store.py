"""A store with phenotypes to sample by, and the rows that loaders visit in a pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_store import make_store

from ingest.store import VolumeStore, open_store, rows_of, write_phenotypes, write_scans
from loaders import Batch, open_loader

SCANS = 26
BAD = (4, 17)
OK = [row for row in range(SCANS) if row not in BAD]
SAMPLINGS = {
    "in order": {},
    "shuffle": {"shuffle": True, "seed": 3},
    "weights": {"weights": np.arange(len(OK)) % 4, "seed": 4},
    "balance": {"balance": "site", "seed": 5},
    "stratify": {"shuffle": True, "stratify": "sex", "seed": 6},
}


@pytest.fixture(scope="module")
def voxels(tmp_path_factory) -> np.ndarray:
    return make_store(tmp_path_factory.mktemp("same") / "s.zarr", SCANS, bad=BAD)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Return a store with phenotypes: age 50 and up, sex 0 and 1, site 1 to 3 (few of 3), and gaps in age."""
    path = tmp_path_factory.mktemp("sampling") / "s.zarr"
    make_store(path, SCANS, bad=BAD)
    row = np.arange(SCANS)
    rows = rows_of(open_store(path).scans)
    write_scans(path, [dataclasses.replace(scan, session=str(2 + i % 2)) for i, scan in enumerate(rows)])
    age = np.where(np.isin(row, [2, 9, 11]), np.nan, 50.0 + row)
    site = np.where(row < 12, 1.0, np.where(row < 22, 2.0, 3.0))
    write_phenotypes(path, pd.DataFrame({"age": age, "sex": row % 2, "site": site, "1st": row}), {})
    return path


@pytest.fixture(scope="module")
def store(path) -> VolumeStore:
    return open_store(path)


def visited(batches: list[Batch]) -> list[int]:
    """Return the rows that count."""
    return [int(row) for batch in batches for row in batch.rows[batch.valid]]


def visited_by_ranks(store: VolumeStore, world_size: int, state: dict | None = None, **options) -> list[int]:
    """Return what ranks visit in a pass, step by step."""
    passes = []
    for rank in range(world_size):
        with open_loader(store, rank=rank, world_size=world_size, backend="torch", threads=1, **options) as loader:
            if state is not None:
                loader.load_state_dict(state)
            passes.append(list(loader))
    assert len({len(batches) for batches in passes}) == 1
    return [row for step in zip(*passes, strict=True) for row in visited(list(step))]


def whole_pass(store: VolumeStore, epoch: int = 0, **options) -> list[int]:
    """Return the rows of a pass, in order."""
    with open_loader(store, backend="torch", threads=1, **options) as loader:
        loader.epoch = epoch
        return visited(list(loader))
