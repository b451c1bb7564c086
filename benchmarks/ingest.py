"""Scans a second into a store: ours, nibabel with zarr-python's defaults, dask, and the bare inflating of the bytes.

All read the same simulated UK Biobank archives, with the page cache warm, and write to the same disk.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

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
from ingest.nifti import NiftiVolume, read_nifti
from ingest.sampling import clean, sample_trilinear
from ingest.scan import ScanSource
from ingest.simulate import simulate_cohort

LIMIT = "limit (inflate only)"
ONE = "ours, 1 process"
TWO = "ours, 2 workers"
NAIVE = "nibabel, zarr defaults"
DASK = "dask.array.to_zarr"
CONFORM = "ours, conform"
SCIPY = "scipy, conform"

_CROP = (slice(11, 171), slice(13, 205), slice(11, 171))


def run_ingest(directory: Path, *, scans: int = 64, repeats: int = 3) -> Report:
    """Measure ingesting `scans` archives.

    Parameters
    ----------
    directory
        Holds the simulated cohort, used again if it is there, and the stores while they are written.
    repeats
        Of everything but the peers, which get one.

    Raises
    ------
    ValueError
        If conforming by scipy and by us differ by more than rounding.
    """
    sources = _prepare(directory, scans)
    scratch = directory / "scratch.zarr"

    def timed(work: Callable[[], Any]) -> float:
        shutil.rmtree(scratch, ignore_errors=True)
        started = time.perf_counter()
        work()
        return len(sources) / (time.perf_counter() - started)

    cohort = directory / "ukb"
    measured: dict[str, list[float]] = {LIMIT: [], ONE: [], TWO: []}
    ingest(cohort, scratch)  # compiles what is compiled, and warms the page cache
    for _ in range(repeats):
        measured[LIMIT].append(timed(lambda: [_inflate(source) for source in sources]))
        measured[ONE].append(timed(lambda: ingest(cohort, scratch)))
        measured[TWO].append(timed(lambda: ingest(cohort, scratch, workers=2)))
    measured[NAIVE] = [timed(lambda: _naive(sources, scratch))]
    measured[DASK] = [timed(lambda: _dask(sources, scratch))]
    shutil.rmtree(scratch, ignore_errors=True)
    measured |= _conforming(repeats)

    limit = median(measured[LIMIT])
    results = [
        Result(
            name,
            round(median(values), 3),
            "volumes/s",
            round(min(values), 3),
            round(max(values), 3),
            limit_share=round(median(values) / limit, 3) if name in (ONE, NAIVE, DASK) else None,
        )
        for name, values in measured.items()
    ]
    ours = median(measured[ONE])
    ratios = {
        "ours/limit, per core": ours / limit,
        "ours/nibabel and zarr defaults": ours / measured[NAIVE][0],
        "ours/dask.array.to_zarr": ours / measured[DASK][0],
        "2 workers/1 process": median(measured[TWO]) / ours,
        "conform/scipy": median(measured[CONFORM]) / median(measured[SCIPY]),
    }
    mb = float(np.mean([Path(source.path).stat().st_size for source in sources])) / 1e6
    settings = {
        "scans": len(sources),
        "repeats": repeats,
        "page_cache": "warm",
        "archive_mb": round(mb, 2),
        "hours_for_40000_scans": _extrapolate(ours, mb),
    }
    return Report("ingest", settings, results, {name: round(ratio, 3) for name, ratio in ratios.items()})


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


def _inflate(source: ScanSource) -> int:
    """Read the archive and inflate the member: what nobody can do without."""
    return len(deflate.gzip_decompress(read_scan(source).nifti, 64 << 20))


def _load_by_nibabel(source: ScanSource) -> np.ndarray:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(read_scan(source).nifti))
    data = nib.as_closest_canonical(image).get_fdata(dtype=np.float32)[_CROP].clip(0)
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


def _conforming(repeats: int) -> dict[str, list[float]]:
    """Conform an oblique 288x288x181 volume by us and by scipy, and compare."""
    rng = np.random.default_rng(0)
    affine = from_matvec(euler2mat(0.03, 0.05, 0.1) @ np.diag([0.868, 0.868, 1.0]))
    affine[:3, 3] = -affine[:3, :3] @ (np.array([288, 288, 181]) - 1) / 2
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (288, 288, 181)], indexing="ij"), axis=-1)
    inside = ((apply_affine(affine, index) / [62, 80, 60]) ** 2).sum(axis=-1) < 1
    data = np.where(inside, rng.uniform(100, 1000, inside.shape), 0).astype(np.float32)
    content = nib.Nifti1Image(data, affine).to_bytes()
    volume: NiftiVolume = read_nifti(content)
    speeds: dict[str, list[float]] = {CONFORM: [], SCIPY: []}
    conform(volume, NATIVE_GRID)
    matrix = np.linalg.inv(affine) @ NATIVE_GRID.affine
    for _ in range(repeats):
        started = time.perf_counter()
        conform(volume, NATIVE_GRID)
        speeds[CONFORM].append(1 / (time.perf_counter() - started))
        started = time.perf_counter()
        theirs = ndimage.affine_transform(data, matrix, output_shape=(160, 192, 160), order=1)
        speeds[SCIPY].append(1 / (time.perf_counter() - started))
    ours = np.empty((160, 192, 160), np.float32)
    sample_trilinear(clean(volume.data, 1.0, 0.0), matrix, ours)
    difference = float(np.abs(ours.transpose(2, 1, 0) - theirs).max())
    if difference > 0.01:  # of 1000: rounding
        raise ValueError(f"scipy's volume and ours differ by {difference}, expected rounding")
    return speeds
