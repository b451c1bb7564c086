"""Volumes a second: our loaders, a MONAI pipeline on the source files, and the bare limit, over the same scans.

Everything reads the same scans in the same random order, with the page cache warm. The source files of MONAI are the
members of the archives, written out as plain .nii.gz, for it cannot read within a zip.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numcodecs import lz4

from benchmarks.results import Report, Result
from ingest import IngestSettings, ingest, open_store
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes, shard_path
from ingest.simulate import simulate_cohort
from ingest.store import VolumeStore
from loaders import open_loader

LIMIT = "limit: read + LZ4 decode, nothing checked"
MONAI = "MONAI: LoadImage, Orientation, crop, percentile scaling"


def run_loaders(
    directory: Path, *, scans: int = 256, batch_size: int = 16, workers: int | None = None, repeats: int = 5
) -> Report:
    """Measure reading `scans` volumes in random order.

    Parameters
    ----------
    directory
        Holds the simulated cohort and its store; used again if they are there.
    workers
        Threads of ours and of the limit, worker processes of MONAI; by default one per core.
    repeats
        Epochs of everything but MONAI, which is slow and gets one; they take turns.

    Raises
    ------
    ValueError
        If MONAI's pictures and ours differ by more than a grey level: then they do not do the same work.
    """
    workers = workers or len(os.sched_getaffinity(0))
    store, files = prepare(directory, scans)
    rows = np.random.default_rng(0).permutation(store.ok_rows[:scans])
    largest_difference = compare_pictures(store, files, rows[:4])
    if largest_difference > 1:
        raise ValueError(f"MONAI's pictures differ from the store's by {largest_difference} grey levels, expected 1")

    def ours(backend: str, dtype: torch.dtype) -> Callable[[], int]:
        def epoch() -> int:
            with open_loader(store, rows=rows, batch_size=batch_size, backend=backend, threads=workers) as loader:
                return _consume(_as(batch.images, dtype) for batch in loader)

        return epoch

    epochs = {
        LIMIT: lambda: _limit(store, rows, batch_size, workers),
        "ours, torch backend, uint8": ours("torch", torch.uint8),
        "ours, torch backend, float32 in [0, 1]": ours("torch", torch.float32),
        "ours, DALI backend, uint8": ours("dali", torch.uint8),
    }
    speeds: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):  # the first, which warms the cache up, does not count
        for name, epoch in epochs.items():
            speed = _speed(epoch, len(rows))
            if repeat:
                speeds[name].append(speed)
    speeds[MONAI] = [_speed(lambda: _consume(monai_batches(files, rows, batch_size, workers)), len(rows))]

    limit = median(speeds[LIMIT])
    notes = {MONAI: "float32 in [0, 1] from .nii.gz, one epoch", LIMIT: "uint8"}
    results = [
        Result(
            name,
            round(median(values), 2),
            "volumes/s",
            round(min(values), 2),
            round(max(values), 2),
            limit_share=None if name in (LIMIT, MONAI) else round(median(values) / limit, 3),
            note=notes.get(name, ""),
        )
        for name, values in speeds.items()
    ]
    monai = median(speeds[MONAI])
    ratios = {"ours/monai": round(median(speeds["ours, torch backend, uint8"]) / monai, 2)}
    ratios["ours as float32/monai"] = round(median(speeds["ours, torch backend, float32 in [0, 1]"]) / monai, 2)
    ratios["ours through DALI/monai"] = round(median(speeds["ours, DALI backend, uint8"]) / monai, 2)
    ratios["ours/limit"] = round(median(speeds["ours, torch backend, uint8"]) / limit, 3)
    settings = {
        "scans": len(rows),
        "batch_size": batch_size,
        "workers": workers,
        "repeats": repeats,
        "order": "random",
        "page_cache": "warm",
        "largest_difference_of_pictures": largest_difference,
        "stored_mb_per_scan": round(np.mean([shard_path(store.path, r).stat().st_size for r in rows]) / 1e6, 3),
        "source_mb_per_scan": round(np.mean([files[int(r)].stat().st_size for r in rows]) / 1e6, 3),
    }
    return Report("loaders", settings, results, ratios)


def prepare(directory: Path, scans: int) -> tuple[VolumeStore, dict[int, Path]]:
    """Simulate a cohort, ingest it and write out its volumes, unless that was done before.

    Returns
    -------
    store : VolumeStore
        With at least `scans` volumes.
    files : dict
        Row -> .nii.gz file of every volume.
    """
    done = directory / "done.json"
    if not (done.is_file() and json.loads(done.read_text())["scans"] == scans):
        shutil.rmtree(directory, ignore_errors=True)
        simulate_cohort(directory / "ukb", scans + scans // 20 + 1)  # a few have no volume
        ingest(directory / "ukb", directory / "ukb.zarr", IngestSettings(), workers=0)
        _extract_members(open_store(directory / "ukb.zarr"), directory)
        done.write_text(json.dumps({"scans": scans}))
    store = open_store(directory / "ukb.zarr")
    return store, {int(row): directory / "files" / f"{row}.nii.gz" for row in store.ok_rows}


def _extract_members(store: VolumeStore, directory: Path) -> None:
    (directory / "files").mkdir()
    for row in store.ok_rows:
        archive, _, member = store.scans["source"][row].partition(".zip/")
        with zipfile.ZipFile(directory / "ukb" / f"{archive}.zip") as opened:
            (directory / "files" / f"{row}.nii.gz").write_bytes(opened.read(member))


def monai_transform() -> Any:
    """Return the pipeline that gives the store's pictures as float32 (1, x, y, z) in [0, 1]."""
    from monai.transforms import Compose, LoadImage, Orientation, SpatialCrop

    return Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation("RAS", labels=None),
            SpatialCrop(roi_start=(11, 13, 11), roi_end=(171, 205, 171)),
            scale_to_percentile,
        ]
    )


def scale_to_percentile(image: Any) -> Any:
    """Map the 99.9th percentile of the positive voxels to 1, as the store's default intensity rule does."""
    values = image.numpy()
    return (image / float(np.percentile(values[values > 0], 99.9))).clamp(0, 1)


def monai_batches(files: dict[int, Path], rows: np.ndarray, batch_size: int, workers: int) -> Iterable[torch.Tensor]:
    """Yield MONAI's batches of some rows, float32 (scan, 1, x, y, z)."""
    from monai.data import DataLoader, Dataset

    dataset = Dataset([str(files[int(row)]) for row in rows], monai_transform())
    yield from DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def compare_pictures(store: VolumeStore, files: dict[int, Path], rows: np.ndarray) -> int:
    """Return the largest difference, in grey levels, between MONAI's pictures and the stored ones."""
    transform = monai_transform()
    differences = []
    with open_loader(store, rows=rows, batch_size=1, backend="torch") as loader:
        for row, batch in zip(rows, loader, strict=True):
            theirs = torch.round(transform(str(files[int(row)]))[0].permute(2, 1, 0) * 255)
            differences.append((batch.images[0].float() - theirs).abs().max())
    return int(max(differences))


def _limit(store: VolumeStore, rows: np.ndarray, batch_size: int, threads: int) -> int:
    """Read and decode with nothing around it, into the same few arrays."""
    shape = store.grid.shape_zyx
    slabs = shape[0] // store.slab
    tail = index_bytes(slabs)

    def decode(row: int, out: np.ndarray) -> None:
        content = shard_path(store.path, row).read_bytes()
        index = np.frombuffer(content, "<u8", count=2 * slabs, offset=len(content) - tail).reshape(slabs, 2)
        view = memoryview(content)
        for number, (start, length) in enumerate(index.tolist()):
            block = view[start : start + length - CRC_BYTES]
            lz4.decompress(block, out[number * store.slab : (number + 1) * store.slab])

    assert SLAB_HEADER == 4  # numcodecs reads the length that stands before the LZ4 block
    batch = np.empty((batch_size, *shape), np.uint8)
    with ThreadPoolExecutor(threads) as executor:
        for start in range(0, len(rows), batch_size):
            list(executor.map(decode, rows[start : start + batch_size].tolist(), batch))
    return len(rows)


def _as(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return images if dtype == torch.uint8 else images.to(dtype).div_(255)


def _consume(batches: Iterable[torch.Tensor]) -> int:
    """Go through batches and return how many scans they had."""
    return sum(len(batch) for batch in batches)


def _speed(epoch: Callable[[], int], expected: int) -> float:
    started = time.perf_counter()
    scans = epoch()
    seconds = time.perf_counter() - started
    if scans != expected:
        raise ValueError(f"an epoch had {scans} scans, expected {expected}")
    return scans / seconds
