"""What is in a store, in numbers."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingest.places import Place
from ingest.shard import shard_name
from ingest.store import open_store


@dataclass(frozen=True)
class StoreSummary:
    """Counts and sizes of a store.

    Attributes
    ----------
    stored_bytes
        Of all shards on disk.
    ratio
        Bytes of the voxels (uint8) over `stored_bytes`; NaN without volumes.
    phenotypes
        Per variable how many of the ok scans miss it.
    """

    scans: int
    participants: int
    status: dict[str, int]
    grid: dict[str, Any]
    slab: int
    stored_bytes: int
    ratio: float
    simulated: bool
    phenotypes: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as printed by ``--json``; without volumes the ratio is None."""
        return asdict(self) | {"ratio": None if np.isnan(self.ratio) else round(self.ratio, 3)}


def summarise_store(path: str | Place) -> StoreSummary:
    """Summarise a store.

    Raises
    ------
    FileNotFoundError, StoreError
        See `ingest.store.open_store`.
    """
    store = open_store(path)
    ok = store.ok_rows
    stored = _shard_bytes(store.path, ok)
    voxels = len(ok) * int(np.prod(store.grid.shape_zyx))
    missing = store.phenotypes.iloc[ok].isna().sum()
    return StoreSummary(
        scans=len(store.scans),
        participants=int(store.scans.loc[store.scans["status"] != "withdrawn", "participant"].nunique()),
        status=dict(sorted(Counter(store.scans["status"]).items())),
        grid=store.grid.to_json(),
        slab=store.slab,
        stored_bytes=stored,
        ratio=voxels / stored if stored else float("nan"),
        simulated=bool(store.attrs["simulated"]),
        phenotypes={str(name): {"missing": int(missing[name])} for name in store.phenotypes.columns},
    )


def _shard_bytes(path: Place, rows: np.ndarray) -> int:
    """Return the bytes of the shards of some rows; those that are missing are for ``verify`` to find."""
    if not isinstance(path, Path):
        return sum(size for _, size, _ in (path / "volumes" / "c").below())
    total, store = 0, str(path)
    for row in rows.tolist():  # to ask for each is faster than to walk through their 300,000 folders
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(f"{store}/{shard_name(row)}").st_size
    return total
