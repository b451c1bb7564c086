"""A store of small random volumes, made in no time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store, resize_store, write_scans

SHAPE = (16, 12, 8)  # z, y, x
SLAB = 4


def make_store(path: Path, scans: int, *, bad: Sequence[int] = (), seed: int = 0) -> np.ndarray:
    """Write a store whose rows `bad` hold no volume; return the voxels, uint8 (scan, z, y, x)."""
    create_store(path, [], Grid(SHAPE, 1.0, tuple(map(tuple, np.eye(4).tolist())), "native"), slab=SLAB)
    resize_store(path, scans)
    voxels = np.random.default_rng(seed).integers(0, 256, (scans, *SHAPE), dtype=np.uint8)
    voxels[:, : SLAB + 1] = 0  # empty slabs are stored too
    rows = []
    for row in range(scans):
        if row not in bad:
            write_shard(shard_path(path, row), encode_shard(voxels[row], SLAB))
        status = "bad_nifti" if row in bad else "ok"
        rows.append(ScanRow(f"p{row}", "", "T1", f"{row}.nii.gz", status=status, scale=1.0, offset=0.0))
    write_scans(path, rows)
    return voxels
