"""Scans a second: our loaders, everybody else's, and the bare limit, over the same scans in random order, in one run.

The batches of peers are float32 in [0, 1], and so are ours where the two are compared; against the limit, which reads
and decodes and no more, ours give bytes. With a warm page cache everything has been read before; with a cold one the
system was told to forget the files.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np

from benchmarks.loader_memory import measure_memory
from benchmarks.loader_peers import PEERS, Peer, Source, check_pictures, open_peer, prepare_peer, stored_bytes
from benchmarks.results import Report, Result
from ingest import IngestSettings, ingest, open_store
from ingest.decode import lz4_decompress_safe
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes, shard_path
from ingest.simulate import simulate_cohort
from ingest.store import DEFAULT_SLAB, VolumeStore, package_versions
from loaders import open_loader
from loaders.profile import profile_store

LIMIT = "limit (read + LZ4), uint8"
BYTES, DALI, FLOATS = "ours, uint8", "ours, uint8, through DALI", "ours, float32"
AXIAL, AXIAL_FLOATS = "ours, 3 axial slices, uint8", "ours, 3 axial slices, float32"
PEER_SCANS = 64  # of those that take long, enough to measure them
_COLD = ", cold"


def run_loaders(
    directory: Path,
    *,
    scans: int = 256,
    batch_size: int = 16,
    workers: int | None = None,
    repeats: int = 5,
    peers: bool = True,
    many: int = 100_000,
) -> Report:
    """Measure reading `scans` volumes in random order.

    Parameters
    ----------
    directory
        Holds the simulated cohort, its store, and what peers make of it; used again if they are there.
    workers
        Threads of ours and of the limit, worker processes of peers; by default one per core.
    repeats
        Epochs of ours and the limit, which take turns. Peers get one over at most 64 scans, with the workers or, where
        that may be faster, without any.
    peers
        Measure them.
    many
        Tiny scans over whose epoch memory is watched, see `benchmarks.loader_memory`.

    Raises
    ------
    ValueError
        If a peer's pictures and ours differ by more than a grey level: then they do not do the same work.
    """
    workers = workers or len(os.sched_getaffinity(0))
    store, files = prepare(directory, scans)
    rows = np.random.default_rng(0).permutation(store.ok_rows[:scans])
    shards = [Path(str(shard_path(store.path, int(row)))) for row in rows]
    batch = np.empty((batch_size, *store.grid.shape_zyx), np.uint8)
    speeds: dict[str, list[float]] = {}
    with ExitStack() as stack:

        def ours(**settings: Any) -> Callable[[], int]:
            loader = open_loader(store, rows=rows, batch_size=batch_size, threads=workers, device="cpu", **settings)
            stack.enter_context(loader)
            return lambda: sum(int(batch.valid.sum()) for batch in loader)

        epochs = {
            LIMIT: lambda: _limit(store, rows, batch, workers),
            BYTES: ours(backend="torch"),
            DALI: ours(backend="dali"),
            FLOATS: ours(backend="torch", dtype="float32"),
            AXIAL: ours(backend="torch", view="axial"),
            AXIAL_FLOATS: ours(backend="torch", view="axial", dtype="float32"),
        }
        for repeat in range(repeats + 1):  # the first, which warms everything up, does not count
            for name, epoch in epochs.items():
                speed = _speed(epoch, len(rows))
                if repeat:
                    speeds.setdefault(name, []).append(speed)
        for name in (LIMIT, BYTES, FLOATS, AXIAL):
            for _ in range(max(1, repeats // 2)):
                forget(shards)
                speeds.setdefault(name + _COLD, []).append(_speed(epochs[name], len(rows)))

    notes = {LIMIT: "the same threads around the C library, nothing checked"}
    disk = {name: float(np.mean([shard.stat().st_size for shard in shards])) for name in epochs}
    if peers:
        source = Source(store, files, rows[:PEER_SCANS])
        for peer in PEERS:
            folder = prepare_peer(peer, source, directory / "peers")
            difference = check_pictures(peer, source, folder, source.rows[:4])
            if difference > 1:
                raise ValueError(f"pictures of {peer.name} differ from the store's by {difference} grey levels, not 1")
            name = f"{peer.name}, float32"
            disk[name] = stored_bytes(peer, source, folder)
            for ending, cold in (("", False), (_COLD, True)):
                speed, used = _measure_peer(peer, source, folder, batch_size, workers, cold=cold)
                speeds[name + ending] = [speed]
                notes[name + ending] = f"{peer.stores}; {used} workers"
    middle = {name: median(values) for name, values in speeds.items()}
    results = [
        Result(
            name,
            round(middle[name], 2),
            "scans/s",
            round(min(values), 2),
            round(max(values), 2),
            limit_share=_share(name, middle),
            note=notes.get(name, ""),
        )
        for name, values in speeds.items()
    ]
    settings = {
        "scans": len(rows),
        "batch_size": batch_size,
        "workers": workers,
        "repeats": repeats,
        "order": "random",
        "peer_scans": min(PEER_SCANS, len(rows)) if peers else 0,
        "mb_on_disk_per_scan": {name: round(nbytes / 1e6, 3) for name, nbytes in disk.items()},
        "peer_versions": package_versions("monai", "torchio", "webdataset", "h5py", "zarr", "torch"),
        "stages": [asdict(stage) for stage in profile_store(store, scans=scans, threads=workers, device="cpu").stages],
        "memory": measure_memory(directory / "ukb.zarr", directory / "tiny", scans=many, batch_size=batch_size),
    }
    return Report("loaders", settings, results, _ratios(middle))


def _share(name: str, middle: dict[str, float]) -> float | None:
    if not name.startswith("ours") or "axial" in name:
        return None
    return round(middle[name] / middle[LIMIT + (_COLD if name.endswith(_COLD) else "")], 3)


def _ratios(middle: dict[str, float]) -> dict[str, float]:
    """Return what the product promises, as ratios: floats to floats, bytes to the limit."""
    ratios = {
        "ours/limit": middle[BYTES] / middle[LIMIT],
        "ours through DALI/limit": middle[DALI] / middle[LIMIT],
        "3 axial slices/volumes": middle[AXIAL] / middle[BYTES],
        "3 axial slices/volumes, float32": middle[AXIAL_FLOATS] / middle[FLOATS],
        "cold: ours/limit": middle[BYTES + _COLD] / middle[LIMIT + _COLD],
    }
    for peer in PEERS:
        name = f"{peer.name}, float32"
        if name in middle:
            ratios[f"ours/{peer.name.lower()}"] = middle[FLOATS] / middle[name]
            ratios[f"cold: ours/{peer.name.lower()}"] = middle[FLOATS + _COLD] / middle[name + _COLD]
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def _measure_peer(
    peer: Peer, source: Source, folder: Path, batch_size: int, workers: int, *, cold: bool
) -> tuple[float, int]:
    """Return scans a second of a peer, and with how many workers it was fastest."""
    rows = source.rows[: peer.max_scans]
    files = [source.files[int(row)] for row in rows] if peer.write is None else list(folder.rglob("*"))
    best, used = 0.0, workers
    for count in (workers, 0) if peer.try_without_workers else (workers,):
        batches = open_peer(peer, source, folder, rows, batch_size=batch_size, workers=count)
        if cold:
            forget(path for path in files if path.is_file())
        else:
            for path in files:
                if path.is_file():
                    path.read_bytes()
        speed = _speed(partial(_count, batches), len(rows))
        if speed > best:
            best, used = speed, count
    return best, used


def prepare(directory: Path, scans: int) -> tuple[VolumeStore, dict[int, Path]]:
    """Simulate a cohort, ingest it and write out its volumes, unless that was done before.

    Returns
    -------
    store : VolumeStore
        With at least `scans` volumes.
    files : dict
        Row -> .nii.gz file of every volume.
    """
    done, made = directory / "done.json", {"scans": scans, "slab": DEFAULT_SLAB}
    if not (done.is_file() and json.loads(done.read_text()) == made):
        shutil.rmtree(directory, ignore_errors=True)
        simulate_cohort(directory / "ukb", scans + scans // 20 + 1)  # a few have no volume
        ingest(directory / "ukb", directory / "ukb.zarr", IngestSettings(), workers=0)
        _extract_members(open_store(directory / "ukb.zarr"), directory)
        done.write_text(json.dumps(made))
    store = open_store(directory / "ukb.zarr")
    return store, {int(row): directory / "files" / f"{row}.nii.gz" for row in store.ok_rows}


def _extract_members(store: VolumeStore, directory: Path) -> None:
    (directory / "files").mkdir()
    for row in store.ok_rows:
        archive, _, member = store.scans["source"][row].partition(".zip/")
        with zipfile.ZipFile(directory / "ukb" / f"{archive}.zip") as opened:
            (directory / "files" / f"{row}.nii.gz").write_bytes(opened.read(member))


def forget(files: Iterable[Path]) -> None:
    """Have the system drop files from its page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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


def _count(batches: Iterable[Any]) -> int:
    return sum(len(batch) for batch in batches)


def _speed(epoch: Callable[[], int], expected: int) -> float:
    started = time.perf_counter()
    scans = epoch()
    seconds = time.perf_counter() - started
    if scans != expected:
        raise ValueError(f"an epoch had {scans} scans, expected {expected}")
    return scans / seconds
