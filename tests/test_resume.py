"""Killed, repeated, extended, locked out, out of disk: the store is always what an undisturbed run would have made.

BRAIN_VOLUMES_KILLS sets how many random kills are tried (5 unless told; 60 take two and a half minutes).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ellipsoid, write_nifti
from killed import DIED, die_at, kill_after, run

from ingest import IngestSettings, ingest, open_store
from ingest.errors import StoreError
from ingest.journal import journal_path, open_journal, read_journal
from ingest.lock import store_lock
from ingest.plan import make_plan
from ingest.scan import ScanRow, ScanSource
from loaders import VolumeReader

KILLS = int(os.environ.get("BRAIN_VOLUMES_KILLS", "4"))
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]


def add_scan(folder: Path, number: int, *, seed: int | None = None) -> Path:
    data = ellipsoid(AFFINE, (32, 42, 32), seed=number if seed is None else seed).astype(np.int16)
    return write_nifti(folder / f"{9000000 + number}.nii.gz", data, AFFINE)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a folder with eight good scans, one that is broken, and a table."""
    folder = tmp_path_factory.mktemp("resume") / "src"
    for number in range(8):
        add_scan(folder, number)
    (folder / "9000009.nii.gz").write_bytes(b"broken")
    lines = [f"{9000000 + number},{number % 2},{50 + number}" for number in range(20)]
    (folder.parent / "p.csv").write_text("\n".join(["eid,31-0.0,21003-2.0", *lines]))
    return folder


def content(store: Path) -> dict[str, bytes]:
    """Return every file of a store but for its random identity, and what lies beside it."""
    files = {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}
    meta = json.loads(files["zarr.json"])
    meta["attributes"].pop("store_id")
    meta["attributes"]["settings"].pop("source")
    files["zarr.json"] = json.dumps(meta, sort_keys=True).encode()
    beside = [f.name for f in store.parent.iterdir() if f.name.startswith(store.name + ".")]
    assert beside == [], "nothing is left beside the store"
    return files


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    run(source, out)
    return content(out)


def test_killed_at_random_moments(source, undisturbed, tmp_path):
    rng = random.Random(0)
    started = time.perf_counter()
    assert kill_after(120, source, tmp_path / "warm.zarr") == 0
    whole = time.perf_counter() - started
    kills = finished = 0
    while kills < KILLS:
        out = tmp_path / f"{finished}.zarr"
        while True:
            code = kill_after(rng.uniform(0, whole), source, out)
            kills += code == -signal.SIGKILL
            if code == 0:
                break
            assert code == -signal.SIGKILL
            if kills >= KILLS:
                assert kill_after(120, source, out) == 0
                break
        assert content(out) == undisturbed
        finished += 1


def test_killed_before_every_step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "src"
    add_scan(folder, 0)
    (folder.parent / "p.csv").write_text("eid,31-0.0\n9000000,1\n9000001,0\n")
    reference = folder.parent / "reference.zarr"
    run(folder, reference)
    add_scan(folder, 1)
    shutil.copytree(reference, grown := folder.parent / "grown.zarr")
    run(folder, grown)
    expected = content(grown)
    died = 0
    for operation in range(1, 1000):
        out = folder.parent / f"{operation}.zarr"
        shutil.copytree(reference, out)
        code = die_at(operation, run, folder, out)
        assert code in (0, DIED)
        died += code == DIED
        run(folder, out)
        assert content(out) == expected, f"killed before operation {operation}"
        shutil.rmtree(out)
        if code == 0:
            break
    assert died > 8


def test_a_second_writer_is_refused_by_name(source, tmp_path):
    out = tmp_path / "s.zarr"
    with store_lock(out), pytest.raises(StoreError, match=f"is being written by process {os.getpid()} on "):
        run(source, out)
    assert not out.exists()
    run(source, out)
    assert not (tmp_path / "s.zarr.lock").exists()


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "s.zarr.lock").mkdir()
    (tmp_path / "file").touch()
    for store in (tmp_path / "s.zarr", tmp_path / "file" / "s.zarr"):
        with (
            pytest.raises(StoreError, match=f"{store} cannot be written: no lock can be made beside it"),
            store_lock(store),
        ):
            pass


def test_a_lock_dies_with_its_holder(source, tmp_path):
    assert kill_after(0.5, source, tmp_path / "s.zarr") in (0, -signal.SIGKILL)
    with store_lock(tmp_path / "s.zarr"):
        pass


def test_only_what_is_new_or_changed_is_read(source, tmp_path):
    src, out = tmp_path / "src", tmp_path / "s.zarr"
    shutil.copytree(source, src)
    shutil.copy(source.parent / "p.csv", tmp_path)
    run(src, out)
    before = content(out)
    read: list[str] = []
    settings = IngestSettings(phenotypes=tmp_path / "p.csv")

    def again(**options) -> None:
        read.clear()
        ingest(src, out, settings, on_scan=lambda row: read.append(row.participant), **options)

    again()
    assert read == []
    assert content(out) == before
    again(retry_failed=True)
    assert read == ["9000009"]

    add_scan(src, 5, seed=99)  # another picture of the same person
    os.utime(src / "9000005.nii.gz", (1, 1))
    add_scan(src, 9)  # the broken file was replaced
    shutil.copy(src / "9000001.nii.gz", src / "8999999.nii.gz")  # sorts first, but comes last
    summary = ingest(src, out, settings, on_scan=lambda row: read.append(row.participant))
    assert (summary.new, summary.changed, summary.retried) == (1, 2, 0)
    after = content(out)
    for row in (0, 1, 2, 3, 4, 6, 7):
        assert after[f"volumes/c/{row}/0/0/0"] == before[f"volumes/c/{row}/0/0/0"]
    assert after["volumes/c/5/0/0/0"] != before["volumes/c/5/0/0/0"]
    store = open_store(out)
    assert list(store.scans["participant"][-2:]) == ["9000009", "8999999"]
    assert (store.scans["status"] == "ok").all()
    assert len(store.phenotypes) == 10
    assert np.isnan(store.phenotypes["age"].iloc[-1])
    with VolumeReader(out) as reader:
        np.testing.assert_array_equal(*reader.read([1, 9]))


def test_a_file_that_became_bad_loses_its_shard(source, tmp_path):
    src, out = tmp_path / "src", tmp_path / "s.zarr"
    shutil.copytree(source, src)
    ingest(src, out)
    write_nifti(src / "9000003.nii.gz", np.zeros((40, 48, 40), np.int16), np.diag([4.0, 4, 4, 1]))
    summary = ingest(src, out)
    assert summary.changed == 1
    assert open_store(out).scans["status"][3] == "bad_image"
    assert not (out / "volumes/c/3/0/0/0").exists()
    (src / "9000004.nii.gz").unlink()  # what is stored stays, whatever becomes of the source
    ingest(src, out)
    assert open_store(out).scans["status"][4] == "ok"


def test_phenotypes_can_be_given_later_and_again(source, tmp_path):
    out = tmp_path / "s.zarr"
    ingest(source, out)
    assert list(open_store(out).phenotypes.columns) == []
    shards = {f: f.stat().st_mtime_ns for f in (out / "volumes" / "c").rglob("*") if f.is_file()}
    run(source, out)
    assert open_store(out).phenotypes["age"].iloc[2] == 52
    (tmp_path / "new.csv").write_text("eid,21003-2.0\n9000002,77\n")
    summary = ingest(source, out, IngestSettings(phenotypes=tmp_path / "new.csv"))
    assert any("new.csv lacks sex" in warning for warning in summary.warnings)
    assert list(open_store(out).phenotypes.columns) == ["age"]
    assert open_store(out).phenotypes["age"].iloc[2] == 77
    assert {f: f.stat().st_mtime_ns for f in shards} == shards


def test_new_scans_without_a_table_have_no_phenotypes(source, tmp_path):
    src, out = tmp_path / "src", tmp_path / "s.zarr"
    shutil.copytree(source, src)
    shutil.copy(source.parent / "p.csv", tmp_path)
    run(src, out)
    add_scan(src, 12)
    summary = ingest(src, out)
    assert any("1 new scans have no phenotypes" in warning for warning in summary.warnings)
    phenotypes = open_store(out).phenotypes
    assert len(phenotypes) == 10
    assert phenotypes["age"].iloc[2] == 52
    assert np.isnan(phenotypes["age"].iloc[-1])


def test_other_settings_are_refused(source, tmp_path):
    out = tmp_path / "s.zarr"
    run(source, out)
    before = content(out)
    for settings, word in ((IngestSettings(slab=8), "slab"), (IngestSettings(image="900"), "image")):
        with pytest.raises(StoreError, match=f"was made with {word}"):
            ingest(source, out, settings)
    assert content(out) == before
    ingest(source, out, IngestSettings(slab=8), overwrite=True)
    assert open_store(out).slab == 8


def full_disk(folder: Path, size: int) -> None:
    """Mount a disk that is too small, fill it, make room, go on; in a mount namespace of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder / "disk"], check=True)
    out = folder / "disk" / "s.zarr"
    message = ""
    try:
        run(folder / "src", out)
    except StoreError as error:
        message = str(error)
    done = sum(row.status == "ok" for row in read_journal(out, open_store(out).attrs["store_id"])[0].values())
    subprocess.run(["mount", "-o", "remount,size=200m", folder / "disk"], check=True)
    run(folder / "src", out)
    (folder / "result.json").write_text(json.dumps({"message": message, "done": done}))
    shutil.copytree(out, folder / "s.zarr")


def test_a_full_disk_ends_clearly_and_the_store_goes_on(source, undisturbed, tmp_path):
    probe = subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this user may not mount a small disk")
    (tmp_path / "disk").mkdir()
    shutil.copytree(source, tmp_path / "src")
    shutil.copy(source.parent / "p.csv", tmp_path)
    for number in range(8):  # so that they have the same times as in the undisturbed run
        shutil.copystat(source / f"{9000000 + number}.nii.gz", tmp_path / "src" / f"{9000000 + number}.nii.gz")
    size = sum(map(len, undisturbed.values())) * 2 // 3
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
    script += f"import test_resume; test_resume.full_disk(Path({str(tmp_path)!r}), {size})"
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert "No space left on device" in result["message"]
    assert "run the same command again" in result["message"]
    assert 0 < result["done"] < 8
    assert content(tmp_path / "s.zarr") == undisturbed


def test_a_worker_that_is_killed_costs_nothing_but_time(source, undisturbed, tmp_path):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        victims = [info["pid"] for info in client.run(_process_info).values()]
        finished: list[str] = []

        def kill_one(row: ScanRow) -> None:
            finished.append(row.participant)
            if len(finished) == 2:
                os.kill(victims[0], signal.SIGKILL)

        settings = IngestSettings(phenotypes=source.parent / "p.csv")
        ingest(source, tmp_path / "s.zarr", settings, scheduler=cluster.scheduler_address, on_scan=kill_one)
    assert len(finished) == 9
    assert content(tmp_path / "s.zarr") == undisturbed


def _process_info() -> dict[str, int]:
    return {"pid": os.getpid()}


def test_a_journal_survives_a_torn_line(tmp_path):
    store = tmp_path / "s.zarr"
    rows = [ScanRow("9000001", "2", "T1", f"{k}.nii", status="ok", mean=float(k)) for k in range(3)]
    with open_journal(store, "a") as append:
        append(0, rows[0], False)
        append(1, rows[1], True)
    text = journal_path(store).read_bytes()
    journal_path(store).write_bytes(text[:-30])
    with open_journal(store, "a") as append:
        append(2, rows[2], False)
    found, simulated = read_journal(store, "a")
    assert set(found) == {0, 2}
    assert found[2].mean == 2.0
    assert not simulated
    assert read_journal(store, "another store") == ({}, False)


def test_plan_marks_duplicates_and_what_is_gone(tmp_path):
    paths = [tmp_path / name for name in ("a.nii", "b.nii")]
    for path in paths:
        path.write_bytes(b"x")
    found = [ScanSource(path=str(p), name=p.name, participant="9000001", session="2", modality="T1") for p in paths]
    plan = make_plan([], found)
    assert [row.status for row in plan.rows] == ["pending", "duplicate"]
    assert list(plan.todo) == [0]
    assert plan.new == 2
    again = make_plan(plan.rows, found[1:])
    assert [row.status for row in again.rows] == ["read_error", "duplicate"]
    assert "no longer there" in again.rows[0].error
