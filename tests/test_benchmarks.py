"""The benchmark runs, compares like with like, and writes what it promises. How fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import loaders
from benchmarks.loaders import compare_pictures, prepare
from ingest.shard import index_bytes, shard_path
from loaders import VolumeReader


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "loaders"
    prepare(folder, 8)
    return folder


def test_monais_pictures_are_the_stored_ones(directory):
    before = (directory / "ukb.zarr" / "zarr.json").stat().st_mtime_ns
    store, files = prepare(directory, 8)  # found there, not made again
    assert (directory / "ukb.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert len(files) >= 8
    assert compare_pictures(store, files, store.ok_rows[:2]) <= 1
    swapped = {row: files[int(store.ok_rows[-1])] for row in files}
    assert compare_pictures(store, swapped, store.ok_rows[:1]) > 1


def test_the_limit_decodes_every_byte(directory):
    store, _ = prepare(directory, 8)
    row = int(store.ok_rows[0])
    shard = np.fromfile(shard_path(store.path, row), np.uint8)
    slabs = store.grid.shape_zyx[0] // store.slab
    index = shard[len(shard) - index_bytes(slabs) : -4].view("<u8").reshape(slabs, 2)
    out = np.zeros(store.grid.shape_zyx, np.uint8)
    loaders.decode_unchecked(shard, index, out.reshape(slabs, -1))
    with VolumeReader(store) as reader:
        np.testing.assert_array_equal(out, reader.read([row])[0])


def test_command(directory, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "loaders", "--scans", "8", "--batch-size", "3", "--repeats", "1"]
    command += ["--directory", str(directory), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "ours/monai" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["machine"]["cores"] >= 1
    assert report["settings"]["scans"] == 8
    assert {"name", "value", "unit"} <= set(report["results"][0])
    speeds = {result["name"]: result["value"] for result in report["results"]}
    assert all(value > 0 for value in speeds.values())
    ours, monai = speeds["ours, torch, uint8"], speeds[loaders.MONAI]
    assert report["ratios"]["ours/monai"] == pytest.approx(ours / monai, rel=0.01)
    assert str(tmp_path.parent) not in json.dumps(report["machine"])
