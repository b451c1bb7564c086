"""Volumes a second: our loaders, a MONAI pipeline on the source files, and the bare limit, over the same scans.

Everything reads the same scans in the same random order, with the page cache warm. The source files of MONAI are the
members of the archives, written out as plain .nii.gz, for it cannot read within a zip.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.results import Report, Result
from ingest import IngestSettings, ingest, open_store
from ingest.decode import lz4_decompress_safe
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes, shard_path
from ingest.simulate import simulate_cohort
from ingest.store import VolumeStore
from loaders import open_loader

LIMIT = "limit (read + LZ4)"
MONAI = "MONAI, float32"


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

    batch = np.empty((batch_size, *store.grid.shape_zyx), np.uint8)
    with ExitStack() as stack:

        def ours(backend: str, scaled: torch.Tensor | None = None) -> Callable[[], int]:
            opened = open_loader(store, rows=rows, batch_size=batch_size, backend=backend, threads=workers)
            loader = stack.enter_context(opened)
            if scaled is None:
                return lambda: _consume(batch.images for batch in loader)
            return lambda: _consume(torch.div(b.images, 255, out=scaled[: len(b.images)]) for b in loader)

        epochs = {
            LIMIT: lambda: _limit(store, rows, batch, workers),
            "ours, torch, uint8": ours("torch"),
            "ours, torch, float32": ours("torch", torch.empty(batch_size, *store.grid.shape_zyx)),
            "ours, DALI, uint8": ours("dali"),
        }
        speeds: dict[str, list[float]] = {name: [] for name in epochs}
        for repeat in range(repeats + 1):  # the first, which warms everything up, does not count
            for name, epoch in epochs.items():
                speed = _speed(epoch, len(rows))
                if repeat:
                    speeds[name].append(speed)
    speeds[MONAI] = [_speed(lambda: _consume(monai_batches(files, rows, batch_size, workers)), len(rows))]

    limit = median(speeds[LIMIT])
    notes = {
        LIMIT: "the same threads around the C library, nothing checked",
        MONAI: "LoadImage, Orientation, crop, percentile scaling of .nii.gz; one epoch",
    }
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
    ratios = {"ours/monai": round(median(speeds["ours, torch, uint8"]) / monai, 2)}
    ratios["ours as float32/monai"] = round(median(speeds["ours, torch, float32"]) / monai, 2)
    ratios["ours through DALI/monai"] = round(median(speeds["ours, DALI, uint8"]) / monai, 2)
    ratios["ours/limit"] = round(median(speeds["ours, torch, uint8"]) / limit, 3)
    settings = {
        "scans": len(rows),
        "batch_size": batch_size,
        "workers": workers,
        "repeats": repeats,
        "order": "random",
        "page_cache": "warm",
        "largest_difference_of_pictures": largest_difference,
        "stored_mb_per_scan": round(np.mean([os.stat(str(shard_path(store.path, r))).st_size for r in rows]) / 1e6, 3),
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


def _limit(store: VolumeStore, rows: np.ndarray, batch: np.ndarray, threads: int) -> int:
    """Read and decode with nothing around it, into the same few arrays over and over."""
    slabs = len(batch[0]) // store.slab
    local = threading.local()

    def decode(row: int, out: np.ndarray) -> None:
        with open(str(shard_path(store.path, row)), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not hasattr(local, "buffer") or len(local.buffer) < size:
                local.buffer = np.empty(2 * size, np.uint8)
            content = local.buffer[:size]
            file.readinto(content.data)
        index = content[size - index_bytes(slabs) : -CRC_BYTES].view("<u8").reshape(slabs, 2)
        decode_unchecked(content, index, out.reshape(slabs, -1))

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(decode, rows.tolist(), itertools.cycle(batch)))
    return len(rows)


@numba.njit(cache=True, nogil=True)
def decode_unchecked(content: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    """Decode LZ4 slabs into `out` (slab, byte): a loop around the C library and nothing else."""
    for number in range(len(index)):
        block = content.ctypes.data + np.int64(index[number, 0]) + SLAB_HEADER
        nbytes = np.int64(index[number, 1]) - SLAB_HEADER - CRC_BYTES
        lz4_decompress_safe(block, out.ctypes.data + number * out.shape[1], nbytes, out.shape[1])


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
