"""The benchmarks run, compare like with like, and write what they promise. How fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import loaders
from benchmarks.loader_memory import make_tiny_store
from benchmarks.loaders import forget, prepare
from benchmarks.loaders_gpu import SLABS
from ingest.shard import index_bytes, shard_path
from loaders import VolumeReader


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "loaders"
    prepare(folder, 8)
    return folder


def run(*arguments: str | Path) -> tuple[str, dict[str, Any]]:
    """Run a benchmark and return what it prints and what it writes."""
    report = Path(arguments[arguments.index("--json") + 1])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(report.read_text())


def test_the_cohort_is_made_once(directory):
    before = (directory / "ukb.zarr" / "zarr.json").stat().st_mtime_ns
    _, files = prepare(directory, 8)
    assert (directory / "ukb.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert len(files) >= 8


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


def test_files_are_forgotten_by_the_system_and_not_by_us(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    forget([path])
    assert path.read_bytes() == b"abc"


def test_loaders(directory, tmp_path):
    printed, report = run(
        "loaders", "--scans", "8", "--batch-size", "3", "--repeats", "1", "--no-peers", "--many", "200",
        "--directory", directory, "--json", tmp_path / "r.json", "--chart", tmp_path / "c.png",
    )  # fmt: skip
    assert "ours/limit" in printed
    assert report["machine"]["cores"] >= 1
    assert report["settings"]["scans"] == 8
    speeds = {result["name"]: result["value"] for result in report["results"]}
    assert all(value > 0 for value in speeds.values())
    assert {loaders.LIMIT, loaders.BYTES, loaders.FLOATS, loaders.AXIAL, f"{loaders.BYTES}, cold"} <= set(speeds)
    assert report["ratios"]["ours/limit"] == pytest.approx(speeds[loaders.BYTES] / speeds[loaders.LIMIT], rel=0.01)
    assert str(tmp_path.parent) not in json.dumps(report["machine"])
    memory, volume = report["settings"]["memory"], 160 * 192 * 160 * 4 / (1 << 20)
    assert memory["volumes_limit_mb"] == pytest.approx(3 * 3 * volume + 256, abs=1)
    assert memory["volumes_mb"] >= 3 * volume, "a batch at least is there"
    assert len(memory["tiny_mb"]) >= 10
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_peers_are_measured_and_compared(directory, monkeypatch):
    wanted = [peer for peer in loaders.PEERS if peer.name in ("npy", "MONAI")]
    monkeypatch.setattr(loaders, "PEERS", tuple(wanted))
    monkeypatch.setattr(
        loaders, "measure_memory", lambda *_, **__: {}
    )  # in processes of its own, which other tests see
    report = loaders.run_loaders(directory, scans=8, batch_size=4, repeats=1, many=100)
    values = {result.name: result.value for result in report.results}
    for peer in ("npy", "MONAI"):
        assert report.ratios[f"ours/{peer.lower()}"] == pytest.approx(
            values[loaders.FLOATS] / values[f"{peer}, float32"], rel=0.01
        )
        assert f"{peer}, float32, cold" in values
    assert report.settings["mb_on_disk_per_scan"]["npy, float32"] == pytest.approx(4.915, abs=0.01)


def test_a_peer_that_gives_other_pictures_is_not_measured(directory, monkeypatch):
    monkeypatch.setattr(loaders, "check_pictures", lambda *_: 7)
    with pytest.raises(ValueError, match="differ from the store's by 7 grey levels"):
        loaders.run_loaders(directory, scans=8, repeats=1, many=100)


def test_tiny_scans_are_made_once(tmp_path):
    for _ in range(2):
        make_tiny_store(tmp_path / "tiny", 200)
    with VolumeReader(tmp_path / "tiny") as reader:
        assert len(reader.store.ok_rows) == 200
        assert reader.read([199]).sum() == reader.read([0]).sum() > 0


def test_loaders_gpu_runs_without_one(tmp_path):
    _, report = run(
        "loaders-gpu", "--device", "cpu", "--scans", "5", "--shape", "16", "24", "16", "--batch-size", "2",
        "--seconds", "0", "--directory", tmp_path / "g", "--json", tmp_path / "r.json",
    )  # fmt: skip
    names = {result["name"] for result in report["results"]}
    assert {f"inflated there, slabs of {slab}" for slab in SLABS} <= names
    assert {"limit: copy of voxels", "resnet18, resident", "r3d_18, dali"} <= names
    assert report["settings"]["failures"] == {}
    assert report["settings"]["fastest_slab"] in SLABS
    assert {"resnet18: dali/resident", "r3d_18: torch/resident"} <= set(report["ratios"])


def test_loaders_gpu_goes_on_when_something_fails(tmp_path, monkeypatch):
    from benchmarks import loaders_gpu

    def fail(*_: Any, **options: Any) -> Any:
        if options.get("backend") == "dali":
            raise RuntimeError("no inflate here")
        return opened(*_, **options)

    opened = loaders_gpu.open_loader
    monkeypatch.setattr(loaders_gpu, "open_loader", fail)
    options = {"device": "cpu", "scans": 4, "shape": (16, 24, 16), "slabs": (4,), "batch_size": 2, "seconds": 0}
    kept: list = []
    report = loaders_gpu.run_loaders_gpu(tmp_path, **options, on_report=kept.append)
    assert "no inflate here" in report.settings["failures"]["inflated there, slabs of 4"]
    names = {result.name for result in report.results}
    assert "decoded on the CPU, slabs of 4" in names
    assert "resnet18, torch" in names
    assert [len(one.results) for one in kept][-1] == len(names), "what there is, is handed over after each measurement"
    assert len(kept) == len(names) + len(report.settings["failures"])


def test_loaders_gpu_does_not_measure_a_loader_of_other_pixels(tmp_path, monkeypatch):
    from benchmarks import loaders_gpu

    monkeypatch.setattr(loaders_gpu.VolumeReader, "read", lambda _, rows: np.ones((len(rows), 16, 24, 16), np.uint8))
    options = {"device": "cpu", "scans": 4, "shape": (16, 24, 16), "slabs": (4,), "batch_size": 2, "seconds": 0}
    report = loaders_gpu.run_loaders_gpu(tmp_path, **options)
    assert "OtherPixelsError" in report.settings["failures"]["inflated there, slabs of 4"]
    assert "inflated there, slabs of 4" not in {result.name for result in report.results}
    assert "limit: copy of voxels" in {result.name for result in report.results}


class Here(Executor):
    """Does in this process what is to be done in another one, which would import torch for seconds."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments, **options))
        return done


def test_extract_over_scans_that_are_made_up(tmp_path, monkeypatch):
    from benchmarks import extract

    monkeypatch.setattr(extract, "prepare", lambda folder, _: extract.make_data(folder, 2))  # as for a GPU
    monkeypatch.setattr(extract, "ProcessPoolExecutor", Here)
    case = extract.Case("resnet18", 0.25, 1, 1, 1, 2)
    report = extract.run_extract(tmp_path, repeats=1, cases=[case])
    ways = {extract.PLAIN, extract.TUNED, extract.CHANNELS_LAST, extract.LOOP, extract.OURS, extract.EXTRACT}
    assert report.settings["failures"] == {}
    assert {f"resnet18, {way}" for way in ways} <= {result.name for result in report.results}
    assert {"resnet18: extract/fed from memory", f"resnet18: extract/{extract.LOOP}"} <= set(report.ratios)

    store, files = extract.make_data(tmp_path / "again", 2)
    given = (case, str(store.path), store.ok_rows, files, "cpu")
    (whole, _), (cut, _) = (extract._begin(way, *given) for way in (extract.OURS, extract.SLICES))
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(extract, "_measure", lambda *_: [][0])
    report = extract.run_extract(tmp_path, cases=[case])
    assert "IndexError" in report.settings["failures"]["resnet18"], "and the report is there"


def test_probe(tmp_path):
    printed, report = run(
        "probe", "--scans", "400", "--few-scans", "200", "--features", "12", "--repeats", "1", "--phenotypes", "7",
        "--patterns", "3", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert "limit with 400 scans" in printed
    speeds = {result["name"]: result for result in report["results"]}
    for kind in ("regressions", "classifications"):
        for scans in (200, 400):
            ours, theirs = (speeds[f"{who}, {kind}, {scans} scans"]["value"] for who in ("ours", "scikit-learn"))
            ratio = report["ratios"][f"{kind}: ours/scikit-learn, {scans} scans"]
            assert ratio == pytest.approx(ours / theirs, rel=0.02)
            assert 0 < speeds[f"ours, {kind}, {scans} scans"]["limit_share"] < 1
    assert speeds["ours, 3 patterns of missing values, 400 scans"]["value"] > 0
    assert report["settings"]["penalties"] == 21
    assert report["settings"]["patterns"] == 3
    assert report["settings"]["estimated_seconds"] > 0


def test_a_probe_that_scores_otherwise_is_not_measured(monkeypatch):
    from benchmarks import probe as benchmark

    monkeypatch.setattr(benchmark, "_ridge_peer", lambda *_: 0.0)
    with pytest.raises(ValueError, match=r"age of 200 scans: scikit-learn scores 0\.0000"):
        benchmark.run_probe(scans=200, few_scans=200, features=8, turns=1)
