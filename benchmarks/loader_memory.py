"""Memory of a loader: over volumes of full size, and over an epoch of very many tiny ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path
from ingest.store import DEFAULT_SLAB, create_store

#: What a loader may have besides three batches.
BESIDES_BATCHES = 256 << 20
_LINKS = 30_000  # of one file: file systems allow some 65,000
_SHAPE = (8, 8, 8)


def measure_memory(store: Path, tiny: Path, *, scans: int, batch_size: int) -> dict[str, Any]:
    """Watch the resident memory of passes, each in a process of its own.

    Parameters
    ----------
    store
        Volumes of full size.
    tiny
        Where the store of tiny scans is, or is made.
    scans
        How many tiny scans.

    Returns
    -------
    dict
        ``volumes_mb``: the most above what the process had before it opened the loader; ``volumes_limit_mb``: three
        batches of float32 and 256 MiB; ``tiny_mb``: the same at each tenth of the epoch of tiny scans;
        ``tiny_start_s``: seconds from opening that store until the first batch.
    """
    make_tiny_store(tiny, scans)
    volumes = _in_process(store, batch_size=batch_size, dtype="float32")
    many = _in_process(tiny, batch_size=batch_size, dtype="uint8")
    mb = 1 / (1 << 20)
    return {
        "volumes_mb": round(volumes["peak"] * mb, 1),
        "volumes_limit_mb": round((3 * volumes["batch_bytes"] + BESIDES_BATCHES) * mb, 1),
        "tiny_scans": scans,
        "tiny_mb": [round(nbytes * mb, 1) for nbytes in many["tenths"]],
        "tiny_start_s": round(many["first_batch"], 3),
    }


def make_tiny_store(path: Path, scans: int) -> None:
    """Make a store of tiny scans, all of which have the same voxels, unless it is there."""
    done, made = path.with_name(f"{path.name}.json"), {"scans": scans, "slab": DEFAULT_SLAB}
    if done.is_file() and json.loads(done.read_text()) == made:
        return
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [ScanRow(f"{n:07d}", "2", "T1", f"{n}.zip/T1.nii.gz", status="ok", scale=1.0) for n in range(scans)]
    identity = tuple(tuple(float(a == b) for b in range(4)) for a in range(4))
    create_store(path, rows, Grid(_SHAPE, 1.0, identity, "native"), attrs={"settings": {}, "intensity": {}})
    content = encode_shard(np.arange(np.prod(_SHAPE), dtype=np.uint8).reshape(_SHAPE), DEFAULT_SLAB)
    for number in range(scans):
        shard = Path(str(shard_path(path, number)))
        shard.parent.mkdir(parents=True)
        if number % _LINKS == 0:
            shard.write_bytes(content)
            original = shard
        else:
            os.link(original, shard)  # as good as a file to whoever reads, and made in less time
    done.write_text(json.dumps(made))


def _in_process(store: Path, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loader_memory", str(store), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _watch(store: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Go over a store and watch this process."""
    import time

    from loaders import VolumeReader, open_loader

    with VolumeReader(store) as reader:  # loads and compiles what is needed, which is none of the loader's memory
        reader.read(reader.store.ok_rows[:1])
        batch_bytes = settings["batch_size"] * int(np.prod(reader.shape)) * np.dtype(settings["dtype"]).itemsize
    del reader
    before, started = _resident(), time.perf_counter()
    peak, tenths = 0, []
    with open_loader(store, backend="torch", device="cpu", shuffle=True, **settings) as loader:
        first_batch = None
        for number, _ in enumerate(loader):
            first_batch = first_batch or time.perf_counter() - started
            peak = max(peak, _resident() - before)
            if (number + 1) % max(1, len(loader) // 10) == 0:
                tenths.append(_resident() - before)
    return {"peak": peak, "tenths": tenths, "batch_bytes": batch_bytes, "first_batch": first_batch}


if __name__ == "__main__":
    print(json.dumps(_watch(sys.argv[1], json.loads(sys.argv[2]))))
