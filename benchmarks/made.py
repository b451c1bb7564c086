"""Volumes, stores and files that are made up: as large as brains, and quickly there on any machine.

40 % of a volume are noise and the rest is nothing, which LZ4 packs about as well as brains.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store

SHAPE = (160, 192, 160)  # (z, y, x)
START_XYZ, STOP_XYZ = (11, 13, 11), (171, 205, 171)  # of it in the files of UK Biobank
FILE_SHAPE_XYZ = (182, 218, 182)
DIFFERENT = 32  # volumes; a store's other scans are links to them


def make_volumes(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return noise within ellipsoids, uint8 (volume, z, y, x); LZ4 packs it about 2.5 times."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    inside = (z / 0.92) ** 2 + (y / 0.92) ** 2 + (x / 0.9) ** 2 < 1
    rng = np.random.default_rng(0)
    return np.stack([np.where(inside, rng.integers(20, 250, shape, dtype=np.uint8), 0) for _ in range(count)])


def make_store(path: Path, volumes: np.ndarray, slab: int, scans: int) -> float:
    """Write a store of so many scans, the volumes in turn; return the mean bytes of a shard."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = tuple(tuple(float(a == b) for b in range(4)) for a in range(4))
    rows = [ScanRow(f"{n:05d}", "", "T1", f"{n}.nii.gz", status="ok", scale=1.0) for n in range(scans)]
    depth, height, width = volumes.shape[1:]
    grid = Grid((depth, height, width), 1.0, identity, "native")
    create_store(path, rows, grid, slab=slab, attrs={"settings": {}, "intensity": {}, "simulated": True})

    def write(number: int) -> None:
        write_shard(Path(str(shard_path(path, number))), encode_shard(volumes[number], slab))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(min(scans, len(volumes)))))
    for number in range(len(volumes), scans):
        shard = Path(str(shard_path(path, number)))
        shard.parent.mkdir(parents=True)
        os.link(shard_path(path, number % len(volumes)), shard)
    return float(np.mean([os.stat(str(shard_path(path, n))).st_size for n in range(min(scans, len(volumes)))]))


def make_files(folder: Path, volumes: np.ndarray) -> list[Path]:
    """Write volumes of `SHAPE` as .nii.gz files of UK Biobank's 182 x 218 x 182 voxels; return those, in order."""
    import nibabel as nib

    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> Path:
        voxels = np.zeros(FILE_SHAPE_XYZ, np.int16)
        inside = tuple(slice(start, stop) for start, stop in zip(START_XYZ, STOP_XYZ, strict=True))
        voxels[inside] = volumes[number].T
        path = folder / f"{number}.nii.gz"
        nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)
        return path

    with ThreadPoolExecutor() as pool:
        return list(pool.map(write, range(len(volumes))))
