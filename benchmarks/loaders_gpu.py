"""Scans a second onto a GPU: inflated there, or decoded on the CPU, by thickness of slabs, and with networks behind.

Everything is made here, so that it runs on a machine that has nothing but this package: volumes of which 40 % are
noise and the rest is nothing, which LZ4 packs about as well as brains. With ``device="cpu"`` the same code runs without
a GPU, and says nothing of one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import Report, Result
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import encode_shard, shard_path, write_shard
from ingest.store import create_store, package_versions
from loaders import Loader, VolumeReader, open_loader

SHAPE = (160, 192, 160)
SLABS = (2, 4, 8, 16)
_DIFFERENT = 32  # volumes; a store's other scans are links to them
_NETWORKS = {"resnet18": "9 axial slices of each scan", "r3d_18": "whole volumes"}


class OtherPixelsError(ValueError):
    """A loader is fast and wrong."""


def run_loaders_gpu(
    directory: Path,
    *,
    device: str = "cuda",
    scans: int = 512,
    shape: tuple[int, int, int] = SHAPE,
    slabs: tuple[int, ...] = SLABS,
    batch_size: int = 16,
    seconds: float = 6.0,
) -> Report:
    """Measure loading onto a device.

    Parameters
    ----------
    directory
        Holds the stores, which are made anew.
    scans
        Of each store.
    shape
        (z, y, x) of a volume.
    slabs
        Planes per slab that are tried; networks get the store of the fastest.
    seconds
        Each measurement lasts at least so long, and one pass.

    Returns
    -------
    Report
        ``settings["failures"]`` has what did not work, with its traceback: the rest is measured all the same.

    Raises
    ------
    OtherPixelsError
        If pixels from the GPU are not those of the CPU.
    """
    where = torch.device(device)
    failures: dict[str, str] = {}
    results: list[Result] = []
    settings: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "scans": scans, "shape_zyx": list(shape), "batch_size": batch_size, "seconds": seconds,
        "versions": package_versions("torch", "torchvision", "nvidia-dali-cuda130", "zarr", "numcodecs"),
        "cuda": torch.version.cuda, "cores_used": {}, "gigabytes_per_second": {}, "failures": failures,
    }  # fmt: skip
    volumes = make_volumes(min(scans, _DIFFERENT), shape)
    raw = int(np.prod(shape))

    def measure(name: str, work: Callable[[], int], nbytes: float, note: str = "") -> float:
        """Run a pass again and again, and note scans a second."""
        work()  # compiles, fills rings, warms caches
        speeds: list[float] = []
        busy, started, done = os.times(), time.perf_counter(), 0
        while not speeds or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            count = work()
            speeds.append(count / (time.perf_counter() - begun))
            done += count
        now = os.times()
        elapsed = time.perf_counter() - started
        speed = done / elapsed
        settings["cores_used"][name] = round((now.user + now.system - busy.user - busy.system) / elapsed, 2)
        settings["gigabytes_per_second"][name] = round(speed * nbytes / 1e9, 3)
        low, high = min(speeds), max(speeds)
        results.append(Result(name, round(speed, 2), "scans/s", round(low, 2), round(high, 2), note=note))
        return speed

    speeds: dict[int, float] = {}
    stores: dict[int, Path] = {}
    packed = 0.0
    for slab in slabs:
        stores[slab] = store = directory / f"slab-{slab}.zarr"
        packed = make_store(store, volumes, slab, scans)
        for backend, how in (("dali", "inflated there"), ("torch", "decoded on the CPU")):
            options: dict[str, Any] = {"batch_size": batch_size, "backend": backend, "device": device}
            with _noting(failures, f"{how}, slabs of {slab}") as name:
                _compare(store, volumes, options)
                with open_loader(store, shuffle=True, **options) as loader:
                    speed = measure(name, partial(_drain, loader, where), raw)
                if backend == "dali":
                    speeds[slab] = speed
    for name, nbytes in (("limit: copy of compressed bytes", packed), ("limit: copy of voxels", raw)):
        with _noting(failures, name):
            measure(name, _copying(where, int(nbytes), batch_size), nbytes)
    best = max(speeds, key=lambda slab: speeds[slab]) if speeds else slabs[0]
    settings["fastest_slab"] = best
    for model, what in _NETWORKS.items():
        _end_to_end(model, stores[best], where, measure, failures, what, raw, scans=scans, small=shape != SHAPE)
    for store in stores.values():
        shutil.rmtree(store)
    values = {result.name: result.value for result in results}
    return Report("loaders-gpu", settings, results, _ratios(values, slabs))


def _ratios(values: dict[str, float], slabs: tuple[int, ...]) -> dict[str, float]:
    ratios = {}
    for slab in slabs:
        there, here = values.get(f"inflated there, slabs of {slab}"), values.get(f"decoded on the CPU, slabs of {slab}")
        if there and here:
            ratios[f"inflated/decoded on the CPU, slabs of {slab}"] = there / here
        if there:
            ratios[f"inflated/copy of voxels, slabs of {slab}"] = there / values["limit: copy of voxels"]
    for model in _NETWORKS:
        resident = values.get(f"{model}, resident")
        for backend in ("dali", "torch"):
            fed = values.get(f"{model}, {backend}")
            if resident and fed:
                ratios[f"{model}: {backend}/resident"] = fed / resident
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


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


def _compare(store: Path, volumes: np.ndarray, options: dict[str, Any]) -> None:
    """Check that every voxel of some scans arrives as it was stored."""
    rows = list(range(min(len(volumes), 2 * options["batch_size"] + 1)))
    with open_loader(store, rows=rows, **options) as loader, VolumeReader(store) as reader:
        for batch in loader:
            if not np.array_equal(batch.images.cpu().numpy(), reader.read(batch.rows)):
                raise OtherPixelsError(f"pixels from {options} differ from those of the CPU")


def _drain(loader: Loader, device: torch.device) -> int:
    count = sum(len(batch.rows) for batch in loader)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count


def _copying(device: torch.device, nbytes: int, batch_size: int) -> Callable[[], int]:
    """Return what copies a batch's bytes from page-locked memory again and again: the least that must be done."""
    host = torch.empty(batch_size * nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)

    def copy() -> int:
        for _ in range(8):
            there.copy_(host, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 8 * batch_size

    return copy


def _end_to_end(
    model: str, store: Path, device: torch.device, measure: Callable[..., float], failures: dict[str, str], what: str,
    raw: int, *, scans: int, small: bool,
) -> None:  # fmt: skip
    """Measure a network in bfloat16, fed from the GPU's memory and by the loader."""
    from torchvision.models import resnet18
    from torchvision.models.video import r3d_18

    three_d = model == "r3d_18"
    network = (r3d_18 if three_d else resnet18)(weights=None).eval().to(device, torch.bfloat16)
    network = network.to(memory_format=torch.channels_last_3d if three_d else torch.channels_last)
    view: dict[str, Any] = {} if three_d else {"view": "axial", "slices": 2 if small else 9}
    size = 2 if small else (8 if three_d else 32)
    options: dict[str, Any] = {
        "batch_size": size, "dtype": "bfloat16", "channels": 3, "channels_last": True, "drop_last": True,
        "device": str(device), **view,
    }  # fmt: skip

    @torch.inference_mode()
    def run(batches: Iterable[torch.Tensor]) -> int:
        count = 0
        for images in batches:
            network(images if three_d else images.flatten(0, 1))
            count += len(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return count

    with _noting(failures, f"{model}, resident") as name:
        with open_loader(store, rows=list(range(size)), backend="torch", **options) as loader:
            images = next(iter(loader)).images.clone()
        measure(name, lambda: run(repeat(images, max(1, scans // size))), raw, what)
    for backend in ("dali", "torch"):
        with (
            _noting(failures, f"{model}, {backend}") as name,
            open_loader(store, shuffle=True, backend=backend, **options) as loader,
        ):
            measure(name, partial(_fed, run, loader), raw, what)


@contextlib.contextmanager
def _noting(failures: dict[str, str], name: str) -> Iterator[str]:
    """Note what goes wrong and go on: the machine is there for minutes, and what does work is worth having."""
    try:
        yield name
    except OtherPixelsError:
        raise
    except Exception as error:
        failures[name] = f"{error!r}\n{traceback.format_exc(limit=-3)}"


def _fed(run: Callable[[Iterable[torch.Tensor]], int], loader: Loader) -> int:
    return run(batch.images for batch in loader)
