"""A small store, loaders with a cache of its shards, and what lies in the folder of the cache."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import make_store

from ingest.shard import shard_path
from ingest.store import open_store
from loaders import open_loader

SCANS = 8
PLENTY = 10**7


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("cache") / "s.zarr"
    return path, make_store(path, SCANS)


@pytest.fixture
def store(original, tmp_path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "s.zarr"))


@pytest.fixture
def voxels(original) -> np.ndarray:
    return np.array(original[1])


def images_of(store: Path, cache: Path | None = None, cache_bytes: int = PLENTY, **settings: Any) -> np.ndarray:
    """Return what a pass of a new loader gives, in the order of the rows."""
    if cache is not None:
        settings |= {"cache_dir": cache, "cache_bytes": cache_bytes}
    with open_loader(store, batch_size=3, **settings) as opened:
        return np.concatenate([batch.images.numpy() for batch in opened])


def remove_shards(store: Path) -> None:
    shutil.rmtree(store / "volumes" / "c")


def entries(cache: Path) -> list[Path]:
    """Return all files but the one that counts, in any folder."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name != ".bytes")


def on_disk(cache: Path) -> int:
    """Sum what there is, under the lock, for what others are renaming must not be counted twice or not at all."""
    with open(cache / ".bytes") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in entries(cache))


def shard_bytes(store: Path, rows: range = range(SCANS)) -> int:
    return sum(shard_path(store, row).stat().st_size for row in rows)


def counted(cache: Path) -> int:
    return int((cache / ".bytes").read_text())


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def store_id(store: Path) -> str:
    return str(open_store(store).attrs["store_id"])
