"""Scans a second into a store: ours, nibabel with zarr-python's defaults, dask, and the bare inflating of the bytes.

All read the same simulated UK Biobank archives, with the page cache warm, and write to the same disk.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import dask
import dask.array
import deflate
import nibabel as nib
import numpy as np
import zarr
from nibabel.affines import apply_affine, from_matvec
from nibabel.eulerangles import euler2mat
from scipy import ndimage

from benchmarks.results import Report, Result
from ingest import ingest
from ingest.archive import read_scan
from ingest.conform import conform
from ingest.grid import NATIVE_GRID
from ingest.layouts import Layout, find_scans
from ingest.memory import kept_memory
from ingest.nifti import NiftiVolume, read_nifti
from ingest.sampling import sample_trilinear
from ingest.scan import ScanSource
from ingest.simulate import simulate_cohort

LIMIT = "limit (read, inflate), 1 core"
PLAIN = "the same, plainly, 1 core"
ONE_CORE = "ours, 1 core"
ALL = "ours, all cores"
WORKERS = "ours, workers: {}"
NAIVE = "nibabel, zarr defaults, 1 core"
DASK = "dask.array.to_zarr, 1 core"
BRAIN, HEAD = "conform a brain", "conform a head"

_INFLATED_BYTES = 352 + 4 * 182 * 218 * 182  # of a simulated scan: header and float32 voxels
_CROP = (slice(11, 171), slice(13, 205), slice(11, 171))


def run_ingest(directory: Path, *, scans: int = 256, repeats: int = 3) -> Report:
    """Measure ingesting `scans` archives.

    Parameters
    ----------
    directory
        Holds the simulated cohort, used again if it is there, and the stores while they are written.
    repeats
        Of everything but the peers, which get one run over at most 64 scans.

    Raises
    ------
    ValueError
        If conforming by scipy and by us differ by more than rounding.
    """
    sources = _prepare(directory, scans)
    cohort = directory / "ukb"
    few = sources[:64]
    measured: dict[str, list[float]] = {}
    start_up: list[float] = []
    counts = (1, 2)
    with TemporaryDirectory(dir=directory) as scratch:  # emptied at the end: a disk is slow where much was deleted

        def measure(name: str, workers: int = 0) -> None:
            speed, started = _steady(cohort, Path(scratch) / uuid.uuid4().hex, workers)
            measured.setdefault(name, []).append(speed)
            if workers:
                start_up.append(started)

        ingest(cohort, Path(scratch) / "first")  # compiles what is compiled, and warms the page cache
        for _ in range(repeats):
            measured.setdefault(LIMIT, []).append(_alone(_inflate_in_kept_memory, few))
            measured.setdefault(PLAIN, []).append(_alone(_inflate_all, few))
            with _one_core():
                measure(ONE_CORE)
            measure(ALL)
            for count in counts:
                measure(WORKERS.format(count), count)
        for name, peer in ((NAIVE, _naive), (DASK, _dask)):
            measured[name] = [_alone(peer, few, Path(scratch) / peer.__name__)]
    with _one_core():
        for name in (BRAIN, HEAD):
            measured |= _conforming(name, repeats)

    middle = {name: median(values) for name, values in measured.items()}
    results = [
        Result(
            name,
            round(middle[name], 3),
            "volumes/s",
            round(min(values), 3),
            round(max(values), 3),
            limit_share=round(middle[name] / middle[LIMIT], 3) if name in (ONE_CORE, PLAIN, NAIVE, DASK) else None,
        )
        for name, values in measured.items()
    ]
    ours = middle[ONE_CORE]
    one, two = (middle[WORKERS.format(count)] for count in counts)
    ratios = {
        "ours/limit, per core": ours / middle[LIMIT],
        "ours/inflating alone, plainly": ours / middle[PLAIN],
        "ours/nibabel and zarr defaults": ours / middle[NAIVE],
        "ours/dask.array.to_zarr": ours / middle[DASK],
        "all cores/1 core": middle[ALL] / ours,
        "2 workers/1 worker": two / one,
        "a brain: ours/scipy": middle[BRAIN] / middle[f"{BRAIN}, scipy"],
        "a head: ours/scipy": middle[HEAD] / middle[f"{HEAD}, scipy"],
    }
    mb = float(np.mean([Path(source.path).stat().st_size for source in sources])) / 1e6
    settings = {
        "scans": len(sources),
        "repeats": repeats,
        "page_cache": "warm",
        "archive_mb": round(mb, 2),
        "seconds_until_workers_work": round(median(start_up), 2),
        "hours_for_40000_scans": _extrapolate(ours, mb),
    }
    return Report("ingest", settings, results, {name: round(ratio, 3) for name, ratio in ratios.items()})


def _alone(work: Callable[..., None], sources: list[ScanSource], *arguments: Path) -> float:
    """Return scans a second of something that knows nothing of us: in a process of its own, on one core."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_timed_on_one_core, work, sources, *arguments).result()


def _timed_on_one_core(work: Callable[..., None], sources: list[ScanSource], *arguments: Path) -> float:
    with _one_core():
        for source in sources:  # into the page cache
            read_scan(source)
        started = time.perf_counter()
        work(sources, *arguments)
        return len(sources) / (time.perf_counter() - started)


def _steady(cohort: Path, out: Path, workers: int) -> tuple[float, float]:
    """Return scans a second from the first ones to the last, and how many seconds it took until there was one.

    What a run takes to begin and to end, half a second and some more for workers, does not grow with its scans.
    """
    times: list[float] = []
    started = time.perf_counter()
    ingest(cohort, out, workers=workers, on_scan=lambda _: times.append(time.perf_counter()))
    skipped = min(len(times) // 2, 16)  # they come in batches: the first says nothing
    return (len(times) - skipped) / (times[-1] - times[skipped - 1]), times[0] - started


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Let this thread, and those that it starts, run on one core only."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _extrapolate(volumes_per_second: float, megabytes: float) -> dict[str, float]:
    """Return hours for 40,000 scans by cores and storage: the slower of computing and reading."""
    return {
        f"{cores} cores, {name}": round(40_000 * max(1 / (volumes_per_second * cores), megabytes / speed) / 3600, 2)
        for cores in (2, 16, 64)
        for name, speed in (("100 MB/s", 100), ("1 GB/s", 1000))
    }


def _prepare(directory: Path, scans: int) -> list[ScanSource]:
    done = directory / "done.json"
    if not (done.is_file() and json.loads(done.read_text())["scans"] == scans):
        shutil.rmtree(directory, ignore_errors=True)
        simulate_cohort(directory / "ukb", scans + scans // 20 + 2)
        _, found = find_scans(directory / "ukb", Layout.ukb)
        for source in [s for s in found if not _has_member(s)] + [s for s in found if _has_member(s)][scans:]:
            Path(source.path).unlink()
        done.write_text(json.dumps({"scans": scans}))
    return list(find_scans(directory / "ukb", Layout.ukb)[1])


def _has_member(source: ScanSource) -> bool:
    with zipfile.ZipFile(source.path) as archive:
        return source.member in archive.namelist()


def _inflate_in_kept_memory(sources: list[ScanSource]) -> None:
    """Do what nobody can do without, in memory that the system need not zero for every scan anew."""
    with kept_memory():
        _inflate_all(sources)


def _inflate_all(sources: list[ScanSource]) -> None:
    """Read the archives and inflate the members, into memory of the right size, as any program would."""
    for source in sources:
        deflate.gzip_decompress(read_scan(source).nifti, _INFLATED_BYTES)


def _load_by_nibabel(source: ScanSource) -> np.ndarray:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(read_scan(source).nifti))
    data = nib.as_closest_canonical(image).get_fdata()[_CROP].clip(0)
    top = np.percentile(data[data > 0], 99.9)
    return np.clip(data * (255 / top) + 0.5, 0, 255).astype(np.uint8).transpose(2, 1, 0)


def _naive(sources: list[ScanSource], out: Path) -> None:
    array = zarr.create_array(out, shape=(len(sources), 160, 192, 160), chunks=(1, 160, 192, 160), dtype="uint8")
    for number, source in enumerate(sources):
        array[number] = _load_by_nibabel(source)


def _dask(sources: list[ScanSource], out: Path) -> None:
    volumes = [
        dask.array.from_delayed(dask.delayed(_load_by_nibabel)(source), (160, 192, 160), np.uint8) for source in sources
    ]
    with dask.config.set(scheduler="synchronous"):  # one core, as for the others
        dask.array.stack(volumes).to_zarr(str(out))


def _conforming(name: str, repeats: int) -> dict[str, list[float]]:
    """Conform an oblique 288x288x181 volume by us (centring and all) and by scipy's sampling alone, and compare."""
    rng = np.random.default_rng(0)
    affine = from_matvec(euler2mat(0.03, 0.05, 0.1) @ np.diag([0.868, 0.868, 1.0]))
    affine[:3, 3] = -affine[:3, :3] @ (np.array([288, 288, 181]) - 1) / 2
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (288, 288, 181)], indexing="ij"), axis=-1)
    inside = ((apply_affine(affine, index) / [62, 80, 60]) ** 2).sum(axis=-1) < 1
    air = 0 if name == BRAIN else rng.uniform(1, 20, inside.shape)
    data = np.where(inside, rng.uniform(100, 1000, inside.shape), air).astype(np.float32)
    volume: NiftiVolume = read_nifti(nib.Nifti1Image(data, affine).to_bytes())
    speeds: dict[str, list[float]] = {name: [], f"{name}, scipy": []}
    conform(volume, NATIVE_GRID)
    matrix = np.linalg.inv(affine) @ NATIVE_GRID.affine
    for _ in range(repeats):
        started = time.perf_counter()
        conform(volume, NATIVE_GRID)
        speeds[name].append(1 / (time.perf_counter() - started))
        started = time.perf_counter()
        theirs = ndimage.affine_transform(data, matrix, output_shape=(160, 192, 160), order=1)
        speeds[f"{name}, scipy"].append(1 / (time.perf_counter() - started))
    ours = np.empty((160, 192, 160), np.float32)
    sample_trilinear(volume.data, 1.0, 0.0, matrix, ours)
    difference = float(np.abs(ours.transpose(2, 1, 0) - theirs).max())
    if difference > 0.01:  # of 1000: rounding
        raise ValueError(f"scipy's volume and ours differ by {difference}, expected rounding")
    return speeds
