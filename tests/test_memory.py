"""--max-memory: what fits is planned by arithmetic that is shown, and what processes really take stays below it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ellipsoid, mni_brain, write_nifti
from typer.testing import CliRunner

import ingest.cli
from ingest import IngestSettings, open_store
from ingest import ingest as run_ingest
from ingest.errors import MemoryBudgetError
from ingest.grid import FSL_MNI152_AFFINE
from ingest.memory import plan_memory

GB, MB = 10**9, 10**6
COARSE = np.diag([4.0, 4.0, 4.0, 1.0])
COARSE[:3, 3] = [-60, -80, -60]


def processes(pid: int) -> list[int]:
    """Return a process and all below it, without those that are being started and share their parent's memory yet."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            if command_line(child) != command_line(pid):  # vfork: until exec, the child shows what its parent has
                found += processes(child)
    return found


def command_line(pid: int) -> bytes:
    """Return the arguments of a process; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def peak_bytes(pid: int) -> int:
    """Return the most that a process has had in memory since it began (its rusage would include its parent's)."""
    try:
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
    except (OSError, IndexError):  # it has ended
        return 0


def run_watched(*arguments: object, seconds: float = 240) -> tuple[int, str, int]:
    """Run ``ingest``; return its exit code, what it printed, and the sum of the peaks of all its processes."""
    command = [str(Path(sys.executable).with_name("ingest")), *map(str, arguments)]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + seconds
        while process.poll() is None:
            for pid in processes(process.pid):
                peaks[pid] = peak_bytes(pid) or peaks.get(pid, 0)  # it only grows, but for an exec
            if time.monotonic() > end:
                process.kill()
                pytest.fail(f"ingest did not end in {seconds:g} s: {process.communicate()[0]}")
            time.sleep(0.02)
        text = process.communicate()[0]
    return process.returncode, text, sum(peaks.values())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with three small scans."""
    for number in range(3):
        data = ellipsoid(COARSE, (32, 42, 32), seed=number).astype(np.int16)
        write_nifti(tmp_path / "src" / f"{9000000 + number}.nii.gz", data, COARSE)
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * GB),
        ("512MiB", 512 << 20),
        ("512 MB", 512 * MB),
        ("2e9", 2 * GB),
        ("1.5 GiB", 3 << 29),
        ("7gb", 7 * GB),
    ],
)
def test_sizes(monkeypatch, tmp_path, text, size):
    asked: list[int | None] = []

    def refuse(*_: object, max_memory: int | None, **__: object) -> None:
        asked.append(max_memory)
        raise MemoryBudgetError("enough")

    monkeypatch.setattr(ingest.cli, "ingest", refuse)
    CliRunner().invoke(ingest.cli.app, ["run", str(tmp_path), "o.zarr", "--max-memory", text])
    CliRunner().invoke(ingest.cli.app, ["run", str(tmp_path), "o.zarr"])
    assert asked == [size, None]


@pytest.mark.parametrize("text", ["", "GB", "much", "-4GB", "0", "0.2", "4XB", "nan", "1e999", "inf"])
def test_what_is_no_size_is_refused_with_an_example(tmp_path, text):
    done = CliRunner().invoke(ingest.cli.app, ["run", str(tmp_path), str(tmp_path / "o.zarr"), "--max-memory", text])
    assert done.exit_code == 2
    assert "4GB or 512MiB" in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "o.zarr").exists()


def add_up(sums: str) -> int:
    """Compute an expression such as ``336MB for this process + 2 x (3MB for it + 4MB)``."""
    expression = re.sub(r"(\d+)MB", r"\1", sums)
    expression = re.sub(r" for [a-z ]*(?:\d+ rows)?", " ", expression).replace("x", "*")
    assert re.fullmatch(r"[\d+*() ]+", expression), expression
    return int(eval(expression))  # digits and signs only


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("files", [[], [1], [3_456_789] * 9, [10_000_000, 11_000_000, 900_000_000]])
@pytest.mark.parametrize("scans", [1, 333, 100_000])
def test_the_arithmetic_of_a_refusal_adds_up_and_its_advice_works(workers, files, scans):
    with pytest.raises(MemoryBudgetError) as refused:
        plan_memory(100 * MB, files, scans=scans, workers=workers)
    sums, total, advised = re.findall(r": (\d+MB for .*) = (\d+)MB; use --max-memory (\d+)MB$", str(refused.value))[0]
    assert add_up(sums) == int(total) == int(advised)
    assert "--max-memory 100MB is too little" in str(refused.value)
    plan = plan_memory(int(advised) * MB, files, scans=scans, workers=workers)
    assert plan.scan_bytes is not None
    ordinary = [size for size in files if size < 100 * MB]
    assert plan.scan_bytes > 2 * max(ordinary, default=0)
    with pytest.raises(MemoryBudgetError):
        plan_memory((int(advised) - 1) * MB, files, scans=scans, workers=workers)


def test_a_limit_without_a_unit_is_shown_as_given():
    with pytest.raises(MemoryBudgetError, match=r"^--max-memory 4000 \(bytes, as all sizes without a unit\) is too"):
        plan_memory(4000, [MB], scans=1, workers=0)


def test_a_wide_table_counts(source, tmp_path):
    with pytest.raises(MemoryBudgetError, match="2908MB for 100000 rows of 1000 phenotypes"):
        plan_memory(1500 * MB, [GB // 100], scans=100_000, workers=0, phenotypes=1000)
    people = [path.name.removesuffix(".nii.gz") for path in source.iterdir()]
    table = pd.DataFrame({"participant": people, **{f"v{k}": 1.0 for k in range(20)}})
    table.to_csv(tmp_path / "p.csv", index=False)
    settings = IngestSettings(phenotypes=tmp_path / "p.csv")
    for _ in range(2):  # of the table, and then of the store
        with pytest.raises(MemoryBudgetError, match="for 3 rows of 20 phenotypes"):
            run_ingest(source, tmp_path / "s.zarr", settings, max_memory=500 * MB)
        run_ingest(source, tmp_path / "s.zarr", settings)
        settings = IngestSettings()


def test_too_many_workers_are_told_how_many_fit():
    with pytest.raises(MemoryBudgetError, match=r"use --workers (\d+), or --max-memory (\d+)MB") as refused:
        plan_memory(4 * GB, [30 * MB] * 5, scans=5, workers=12)
    fit = int(re.findall(r"--workers (\d+)", str(refused.value))[0])
    assert 1 <= fit < 12
    plan_memory(4 * GB, [30 * MB] * 5, scans=5, workers=fit)
    with pytest.raises(MemoryBudgetError):
        plan_memory(4 * GB, [30 * MB] * 5, scans=5, workers=fit + 1)


def test_less_memory_is_fewer_threads_and_never_too_much_in_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert plan_memory(None, [MB], scans=1, workers=0).threads == 17
    assert plan_memory(None, [MB], scans=1, workers=0).scan_bytes is None
    threads = []
    for gigabytes in (1, 2, 3, 4, 6, 100):
        plan = plan_memory(gigabytes * GB, [30 * MB] * 50, scans=50, workers=0)
        assert plan.scan_bytes is not None
        assert plan.threads * plan.scan_bytes < gigabytes * GB
        threads.append(plan.threads)
    assert threads == sorted(threads)
    assert threads[0] == 1
    assert threads[-1] == 17
    shares = []
    for gigabytes in (4, 8):
        plan = plan_memory(gigabytes * GB, [30 * MB] * 50, scans=50, workers=2)
        assert plan.process_bytes is not None
        assert plan.scan_bytes is not None
        assert 2 * plan.scan_bytes < 2 * plan.process_bytes * 3 / 4 < gigabytes * GB  # dask is told a third more
        shares.append(plan.scan_bytes)
    assert shares[1] > shares[0] + GB


def advised(source: Path, *options: object) -> int:
    """Return the megabytes that a run asks for."""
    _, text, _ = run_watched(source, source.parent / "none.zarr", "--max-memory", "1MB", *options)
    return int(re.findall(r"use --max-memory (\d+)MB", " ".join(text.split()))[0])


def test_a_worker_of_a_cluster_has_its_memory_for_one_scan():
    plan = plan_memory(4 * GB, [30 * MB] * 50, scans=100_000, workers=0, remote=True)
    assert plan.threads == 1
    assert 3 * GB < plan.scan_bytes < 4 * GB


def test_what_is_too_large_becomes_a_row_and_is_read_with_more_memory(source, tmp_path):
    affine = np.diag([0.6, 0.6, 0.6, 1.0])
    affine[:3, 3] = -105
    data = np.zeros((350, 350, 350), np.float32)
    data[100:250, 100:250, 100:250] = np.arange(150, dtype=np.float32) + 1
    write_nifti(source / "9000007.nii.gz", data, affine)  # a small file with 171 MB of voxels
    write_nifti(source / "9000008.nii", data, affine)  # a large file
    out, least = tmp_path / "s.zarr", advised(source)
    code, text, _ = run_watched(source, out, "--max-memory", f"{least}MB")
    assert code == 1
    assert text.count("read_error") >= 2
    scans = open_store(out).scans
    assert list(scans["status"]) == ["ok", "ok", "ok", "read_error", "read_error"]
    for reason in scans["error"][3:]:
        assert re.search(r"1715\d{5} bytes; --max-memory leaves room for", reason)
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("c/*/0/0/0")}
    assert len(shards) == 3
    code, text, _ = run_watched(source, out, "--max-memory", "4GB", "--retry-failed")
    assert code == 0, text
    assert (open_store(out).scans["status"] == "ok").all()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_too_little_memory_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(MemoryBudgetError, match="is too little"):
        run_ingest(source, tmp_path / "s.zarr", max_memory=50 * MB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    code, text, _ = run_watched(source, tmp_path / "s.zarr", "--max-memory", "50MB")
    assert code == 1
    assert text.startswith("error: --max-memory 50MB is too little for one scan at a time")


@pytest.fixture(scope="module")
def template_scans(tmp_path_factory) -> Path:
    """Return a folder with 12 float32 volumes on FSL's MNI152 grid."""
    folder = tmp_path_factory.mktemp("memory") / "src"
    for number in range(12):
        brain = (mni_brain(seed=number % 3) * np.float32(1.01)).astype(np.float32)
        write_nifti(folder / f"{9000000 + number}.nii.gz", brain, FSL_MNI152_AFFINE, code=4)
    return folder


@pytest.mark.parametrize("more", [0, 1000])
def test_threads_stay_below_the_limit(template_scans, tmp_path, more):
    limit = advised(template_scans) + more
    code, text, peak = run_watched(template_scans, tmp_path / "s.zarr", "--max-memory", f"{limit}MB", "--json")
    assert code == 0, text
    assert json.loads(text)["status"] == {"ok": 12}
    assert 150 * MB < peak <= limit * MB


def test_workers_stay_below_the_limit(template_scans, tmp_path):
    limit = advised(template_scans, "--workers", 2)
    options = ("--workers", 2, "--max-memory", f"{limit}MB")
    code, text, peak = run_watched(template_scans, tmp_path / "s.zarr", *options)
    assert code == 0, text
    assert "12 ok" in text
    assert 450 * MB < peak <= limit * MB


def test_volumes_that_are_turned_stay_below_the_limit(tmp_path):
    """Their voxels are there twice; dask must not hold a worker's tasks back for it, which would be for ever."""
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 0, 1]] = 0.9  # sagittal: the file's first axis runs to the front
    affine[:3, 3] = [-115, -115, -121]
    affine[3, 3] = 1
    data = np.round(ellipsoid(affine, (256, 270, 256)) / 50).astype(np.float32) * 50  # 71 MB in a file of 3 MB
    first = write_nifti(tmp_path / "src" / "9000000.nii.gz", data, affine)
    for number in range(1, 4):
        os.link(first, tmp_path / "src" / f"{9000000 + number}.nii.gz")
    options = ("--workers", 1)
    limit = advised(tmp_path / "src", *options)
    code, text, peak = run_watched(tmp_path / "src", tmp_path / "s.zarr", "--max-memory", f"{limit}MB", *options)
    assert code == 0, text
    assert peak <= limit * MB
