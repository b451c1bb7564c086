"""Scans a second onto a GPU: inflated there, or decoded on the CPU, by thickness of slabs, and with networks behind.

Volumes are made up, so that it runs on a machine that has nothing but this package. With ``device="cpu"`` the same
code runs without a GPU, and says nothing of one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.made import DIFFERENT, SHAPE, make_store, make_volumes
from benchmarks.results import Report, Result, failure
from ingest.decode import COMPILED
from ingest.store import package_versions
from loaders import Batch, VolumeReader, open_loader

SLABS = (1, 2, 4, 8, 16)
_WARM_UP = 8  # batches


@dataclass(frozen=True)
class Fed:
    """A network behind a loader: axial slices that it sees of a scan (0: volumes), scans of a batch and of a pass.

    A pass may have more scans than a store: then they come over and over.
    """

    model: str
    slices: int
    batch_size: int
    scans: int


NETWORKS = (Fed("resnet18", 9, 32, 40_000), Fed("r3d_18", 0, 8, 512))


class OtherPixelsError(ValueError):
    """A loader is fast and wrong."""


def run_loaders_gpu(
    directory: Path,
    *,
    device: str = "cuda",
    scans: int = 8192,
    shape: tuple[int, int, int] = SHAPE,
    slabs: tuple[int, ...] = SLABS,
    batch_size: int = 64,
    seconds: float = 6.0,
    on_report: Callable[[Report], None] | None = None,
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
    on_report
        Called with what there is, after each measurement: the machine may be there for minutes only.

    Returns
    -------
    Report
        ``settings["failures"]`` has what did not work, with its traceback: the rest is measured all the same. A
        loader that gives other pixels than the CPU is not measured.
    """
    where = torch.device(device)
    failures: dict[str, str] = {}
    results: list[Result] = []
    settings: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)), "checks_compiled": COMPILED,
        "scans": scans, "shape_zyx": list(shape), "batch_size": batch_size, "seconds": seconds,
        "versions": package_versions("torch", "torchvision", "nvidia-dali-cuda130", "zarr", "numcodecs"),
        "cuda": torch.version.cuda, "cores_used": {}, "gigabytes_per_second": {}, "failures": failures,
    }  # fmt: skip
    volumes = make_volumes(min(scans, DIFFERENT), shape)
    raw = int(np.prod(shape))

    def report() -> Report:
        values = {result.name: result.value for result in results}
        return Report("loaders-gpu", settings, list(results), _ratios(values, slabs))

    @contextlib.contextmanager
    def noting(name: str) -> Iterator[str]:
        """Note what goes wrong, and go on."""
        try:
            yield name
        except Exception as error:
            failures[name] = failure(error)
        if on_report is not None:
            on_report(report())

    def measure(name: str, work: Callable[[int | None], tuple[int, float]], nbytes: float, note: str = "") -> float:
        """Run passes again and again, and note scans a second."""
        work(_WARM_UP)  # compiles, fills rings, warms caches
        passes: list[tuple[int, float]] = []
        busy, started = os.times(), time.perf_counter()
        while not passes or time.perf_counter() - started < seconds:
            passes.append(work(None))
        now = os.times()
        used = (now.user + now.system - busy.user - busy.system) / (time.perf_counter() - started)
        speed = sum(count for count, _ in passes) / sum(taken for _, taken in passes)
        low, *_, high = sorted([count / taken for count, taken in passes] * 2)
        settings["cores_used"][name] = round(used, 2)
        settings["gigabytes_per_second"][name] = round(speed * nbytes / 1e9, 3)
        results.append(Result(name, round(speed, 2), "scans/s", round(low, 2), round(high, 2), note=note))
        return speed

    with noting("limit: copy of voxels") as name:
        measure(name, _copying(where, raw, batch_size), raw)
    speeds: dict[int, float] = {}
    stores: dict[int, Path] = {}
    packed = 0.0
    for slab in slabs:
        stores[slab] = store = directory / f"slab-{slab}.zarr"
        packed = make_store(store, volumes, slab, scans)
        for backend, how in (("dali", "inflated there"), ("torch", "decoded on the CPU")):
            options: dict[str, Any] = {"batch_size": batch_size, "backend": backend, "device": device}
            with noting(f"{how}, slabs of {slab}") as name:
                _compare(store, volumes, options)
                with open_loader(store, shuffle=True, **options) as loader:
                    speed = measure(name, partial(_pass, loader, where), raw)
                if backend == "dali":
                    speeds[slab] = speed
    with noting("limit: copy of compressed bytes") as name:
        measure(name, _copying(where, int(packed), batch_size), packed)
    best = max(speeds, key=lambda slab: speeds[slab]) if speeds else slabs[0]
    settings["fastest_slab"] = best
    for fed in NETWORKS:
        fed = replace(fed, slices=min(fed.slices, 2), batch_size=2, scans=scans) if shape != SHAPE else fed
        _end_to_end(fed, stores[best], where, measure, noting, raw, scans=scans)
    for store in stores.values():
        shutil.rmtree(store)
    return report()


def _ratios(values: dict[str, float], slabs: tuple[int, ...]) -> dict[str, float]:
    ratios = {}
    limit = values.get("limit: copy of voxels")
    for slab in slabs:
        there, here = values.get(f"inflated there, slabs of {slab}"), values.get(f"decoded on the CPU, slabs of {slab}")
        if there and here:
            ratios[f"inflated/decoded on the CPU, slabs of {slab}"] = there / here
        if there and limit:
            ratios[f"inflated/copy of voxels, slabs of {slab}"] = there / limit
    for model in (fed.model for fed in NETWORKS):
        resident = values.get(f"{model}, resident")
        for backend in ("dali", "torch"):
            fed = values.get(f"{model}, {backend}")
            if resident and fed:
                ratios[f"{model}: {backend}/resident"] = fed / resident
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


def _compare(store: Path, volumes: np.ndarray, options: dict[str, Any]) -> None:
    """Check that every voxel of some scans arrives as it was stored."""
    rows = np.resize(np.arange(len(volumes)), 2 * options["batch_size"] + 1)
    with open_loader(store, rows=rows, **options) as loader, VolumeReader(store) as reader:
        for batch in loader:
            if not np.array_equal(batch.images.cpu().numpy(), reader.read(batch.rows)):
                raise OtherPixelsError(f"pixels from {options} differ from those of the CPU")


def _pass(
    batches: Iterable[Batch | torch.Tensor],
    device: torch.device,
    most: int | None = None,
    *,
    use: Callable[[torch.Tensor], Any] | None = None,
) -> tuple[int, float]:
    """Go through batches, `most` at most; return how many scans come after the first batch, and how long they take.

    A pass begins by starting a pipeline, which is nothing in an epoch of tens of thousands.
    """
    count, begun = 0, 0.0
    for number, batch in enumerate(islice(batches, most)):
        if use is not None:
            use(_images(batch))
        if number:
            count += len(_images(batch))
        else:
            _wait_for(device)
            begun = time.perf_counter()
    _wait_for(device)
    return count, time.perf_counter() - begun


def _images(batch: Batch | torch.Tensor) -> torch.Tensor:
    return batch.images if isinstance(batch, Batch) else batch


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copying(device: torch.device, nbytes: int, batch_size: int) -> Callable[[int | None], tuple[int, float]]:
    """Return what copies a batch's bytes from page-locked memory again and again: the least that must be done."""
    host = torch.empty(batch_size * nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)

    def copy(most: int | None) -> tuple[int, float]:
        times = most or 64
        begun = time.perf_counter()
        for _ in range(times):
            there.copy_(host, non_blocking=True)
        _wait_for(device)
        return times * batch_size, time.perf_counter() - begun

    return copy


def _end_to_end(
    fed: Fed,
    store: Path,
    device: torch.device,
    measure: Callable[..., float],
    noting: Callable[[str], contextlib.AbstractContextManager[str]],
    raw: int,
    *,
    scans: int,
) -> None:
    """Measure a network in bfloat16, fed from the GPU's memory and by the loader."""
    what = f"{fed.slices} axial slices of each scan" if fed.slices else "whole volumes"
    options: dict[str, Any] = {
        "batch_size": fed.batch_size, "dtype": "bfloat16", "channels": 3, "channels_last": True, "drop_last": True,
        "device": str(device), **({"view": "axial", "slices": fed.slices} if fed.slices else {}),
    }  # fmt: skip
    rows = np.resize(np.arange(scans), fed.scans)
    with noting(f"{fed.model}, resident") as name:
        infer = _network(fed, device)
        with open_loader(store, rows=rows[: fed.batch_size], backend="torch", **options) as loader:
            images = next(iter(loader)).images.clone()
        measure(name, partial(_pass, [images] * (len(rows) // fed.batch_size), device, use=infer), raw, what)
    for backend in ("dali", "torch"):
        with (
            noting(f"{fed.model}, {backend}") as name,
            open_loader(store, rows=rows, shuffle=True, backend=backend, **options) as loader,
        ):
            infer = _network(fed, device)
            measure(name, partial(_pass, loader, device, use=infer), raw, what)


def _network(fed: Fed, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.models import resnet18
    from torchvision.models.video import r3d_18

    network = (resnet18 if fed.slices else r3d_18)(weights=None).eval().to(device, torch.bfloat16)
    network = network.to(memory_format=torch.channels_last if fed.slices else torch.channels_last_3d)

    @torch.inference_mode()
    def infer(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = network(images.flatten(0, 1) if fed.slices else images)
        return features

    return infer
