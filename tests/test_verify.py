"""Every kind of damage to a store is found, named, and can be repaired from the sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from calling import call
from conftest import mni_brain, write_nifti, write_ukb_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest import IngestSettings, ingest, open_store
from ingest.cli import main
from ingest.errors import SourceError, StoreError
from ingest.grid import FSL_MNI152_AFFINE
from ingest.lock import store_lock
from ingest.shard import index_bytes, shard_path
from ingest.verify import VerifyReport, verify

MEMBER = "T1/T1_brain_to_MNI.nii.gz"
OK, ABSENT = (0, 1), 2  # rows
ZIPS = [f"90/900000{number}_20252_2_0.zip" for number in (1, 2, 3)]
SLAB = 4  # planes
INDEX = index_bytes(160 // SLAB)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Return a cohort of two good scans and an expected absence, and its store."""
    folder = tmp_path_factory.mktemp("verify")
    for number in (1, 2):
        brain = write_nifti(folder / "scratch.nii.gz", mni_brain(seed=number), FSL_MNI152_AFFINE, code=4)
        write_ukb_zip(folder / "src", f"900000{number}", {MEMBER: brain.read_bytes()})
    write_ukb_zip(folder / "src", "9000003", {"T1/T1.nii.gz": b""})
    (folder / "ages.csv").write_text("eid,21003-2.0\n9000001,55\n9000002,61\n")
    ingest(folder / "src", folder / "a.zarr", IngestSettings(phenotypes=folder / "ages.csv", slab=SLAB))
    return folder / "src", folder / "a.zarr"


@pytest.fixture
def store(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "a.zarr"))


@pytest.fixture
def source(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "src"))


def found(report: VerifyReport) -> list[tuple[str, int | None]]:
    return [(finding.kind, finding.row) for finding in report.findings]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def shard(store: Path, row: int) -> Path:
    return shard_path(store, row)


def column(store: Path, name: str) -> zarr.Array:
    return zarr.open_array(store / name, mode="r+")


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_a_sound_store_has_no_finding(made):
    source, store = made
    before = files(store)
    done = []
    report = verify(store, against=source, sample=0, on_scan=done.append)
    assert report.findings == []
    assert report.clean
    assert (report.scans, report.checked, report.compared) == (3, 2, 2)
    assert sorted(done) == [0, 1]
    assert report.bytes == sum(shard(store, row).stat().st_size for row in OK)
    assert verify(store, against=source, sample=1, threads=1).compared == 1
    assert verify(store).compared == 0
    assert files(store) == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.sampled_from(OK),
    position=st.one_of(st.floats(0, 1, exclude_max=True), st.integers(1, INDEX).map(lambda n: -n)),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_of_a_shard_is_named(store, row, position, bit):
    path = shard(store, row)
    size = path.stat().st_size
    place = position % size if isinstance(position, int) else int(position * size)
    with open(path, "r+b") as file:
        sound = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([sound[0] ^ 1 << bit]), place)
        try:
            report = verify(store)
        finally:
            os.pwrite(file.fileno(), sound, place)
    (finding,) = report.findings
    assert (finding.kind, finding.row) == ("shard_damaged", row)
    assert (finding.participant, finding.session) == (f"900000{row + 1}", "2")
    assert finding.source == f"{ZIPS[row]}/{MEMBER}"
    assert not report.clean


def with_index(content: bytes, change: Callable[[np.ndarray], None], gap: bytes = b"") -> bytes:
    """Return a shard with another index, whose checksum is right."""
    index = np.frombuffer(content[-INDEX:-4], "<u8").reshape(-1, 2).copy()
    change(index)
    raw = index.tobytes()
    return content[:-INDEX] + gap + raw + int(google_crc32c.value(raw)).to_bytes(4, "little")


def set_absent(index: np.ndarray) -> None:
    index[3] = 2**64 - 1


def swap_slabs(index: np.ndarray) -> None:
    index[[10, 11]] = index[[11, 10]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:0], "shorter than its index"),
        (lambda content: content[:-1], "checksum of the index"),
        (lambda content: content + b"\0", "checksum of the index"),
        (lambda content: content * 4, "at most"),
        (lambda content: with_index(content, set_absent), "slab 3 is absent"),
        (lambda content: with_index(content, swap_slabs), "slab 10 begins"),
        (lambda content: with_index(content, np.asarray, b"gap"), "the index begins"),
    ],
)
def test_a_shard_that_is_not_as_version_1_says_is_named(store, damage, words):
    path = shard(store, 1)
    path.write_bytes(damage(path.read_bytes()))
    (finding,) = verify(store).findings
    assert (finding.kind, finding.row) == ("shard_damaged", 1)
    assert words in finding.detail


def swap_shards(store: Path) -> None:
    a, b = shard(store, 0), shard(store, 1)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def orphan(row: int) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        shard(store, row).parent.mkdir(parents=True)
        shutil.copy(shard(store, 0), shard(store, row))

    return damage


def shorten(name: str) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        column(store, name).resize(2)

    return damage


def assign(name: str, row: int, value: object) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        column(store, name)[row] = value

    return damage


def set_attribute(name: str, value: object) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        edit_json(store / "zarr.json", lambda meta: meta["attributes"].update({name: value}))

    return damage


def to_numbers(store: Path) -> None:
    shutil.rmtree(store / "scans/participant")
    shutil.copytree(store / "scans/source_size", store / "scans/participant")


def halve_grid(store: Path) -> None:
    edit_json(store / "zarr.json", lambda meta: meta["attributes"]["grid"].update(shape_zyx=[80, 96, 80]))


def to_uint16(store: Path) -> None:
    edit_json(store / "volumes/zarr.json", lambda meta: meta.update(data_type="uint16"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: shard(s, 1).unlink(), [("shard_missing", 1)]),
        (swap_shards, [("statistics_wrong", 0), ("statistics_wrong", 1)]),
        (orphan(ABSENT), [("shard_orphan", ABSENT)]),
        (orphan(99), [("shard_orphan", None)]),
        (lambda s: (shard(s, 0).parent / "1").write_bytes(b""), [("shard_orphan", 0)]),
        (lambda s: (shard(s, 0).parent / ".0.77.tmp").write_bytes(b""), [("leftover", None)]),
        (lambda s: s.with_name(".a.zarr.staged").mkdir(), [("leftover", None)]),
        (lambda s: s.with_name("a.zarr.journal").touch(), [("unfinished", None)]),
        (assign("scans/status", ABSENT, "pending"), [("unfinished", None)]),
        (assign("scans/status", ABSENT, "fine"), [("status_unknown", ABSENT)]),
        (assign("scans/scale", 0, np.nan), [("statistics_wrong", 0)]),
        (assign("scans/mean", 1, 100.0), [("statistics_wrong", 1)]),
        (assign("scans/brain_voxels", 1, 100), [("statistics_wrong", 1)]),
        (lambda s: shutil.rmtree(s / "scans/mean"), [("column_missing", None)]),
        (lambda s: shutil.rmtree(s / "scans/status"), [("column_missing", None)]),
        (lambda s: (s / "scans/mean/c/0").write_bytes(b"\0" * 9), [("column_damaged", None)]),
        (shorten("scans/mean"), [("column_length", None)]),
        (shorten("phenotypes/age"), [("column_length", None)]),
        (to_numbers, [("column_damaged", None)]),
        (set_attribute("format_version", 7), [("attributes_wrong", None)]),
        (set_attribute("format", "other"), [("attributes_wrong", None)]),
        (set_attribute("grid", None), [("attributes_wrong", None)]),
        (halve_grid, [("layout_wrong", None)]),
        (to_uint16, [("layout_wrong", None)]),
        (lambda s: (s / "zarr.json").write_text("{"), [("attributes_wrong", None)]),
        (lambda s: (s / "volumes/zarr.json").unlink(), [("layout_wrong", None)]),
    ],
)
def test_each_kind_of_damage_is_named(store, damage, expected):
    damage(store)
    report = verify(store)
    assert found(report) == expected
    assert all(finding.detail for finding in report.findings)
    assert not report.clean


def test_sources_are_compared(store, source, tmp_path):
    os.utime(source / ZIPS[0], (1e9, 1e9))
    (source / ZIPS[1]).unlink()
    report = verify(store, against=source)
    assert found(report) == [("source_changed", 0), ("source_missing", 1)]
    assert "the voxels are the same" in report.findings[0].detail

    brain = write_nifti(tmp_path / "other.nii.gz", mni_brain(seed=3), FSL_MNI152_AFFINE, code=4)
    write_ukb_zip(source, "9000002", {MEMBER: brain.read_bytes()})
    for row in OK:  # as if they had been so when they were ingested
        stat = (source / ZIPS[row]).stat()
        column(store, "scans/source_size")[row] = stat.st_size
        column(store, "scans/source_mtime")[row] = stat.st_mtime
    report = verify(store, against=source, sample=0)
    assert found(report) == [("voxels_differ", 1)]
    assert "voxels differ" in report.findings[0].detail


@pytest.mark.parametrize(("name", "value"), [("scale", 1.0), ("participant", "9000009"), ("offset", 3.0)])
def test_what_only_the_source_tells_is_compared(store, made, name, value):
    assign(f"scans/{name}", 0, value)(store)
    assert verify(store).clean
    report = verify(store, against=made[0])
    assert found(report) == [("statistics_wrong", 0)]
    assert name in report.findings[0].detail


def test_another_folder_is_refused(store, tmp_path):
    write_ukb_zip(tmp_path / "other", "1234567", {MEMBER: b""})
    with pytest.raises(StoreError, match="none of the sources"):
        verify(store, against=tmp_path / "other")
    with pytest.raises(SourceError, match="nowhere"):
        verify(store, against=tmp_path / "nowhere")
    with pytest.raises(StoreError, match="--against"):
        verify(store, repair=True)
    with pytest.raises(FileNotFoundError, match="no store"):
        verify(tmp_path / "absent.zarr")


def test_repair_gives_the_undamaged_store_back(store, made):
    source, original = made
    shard(store, 0).write_bytes(shard(store, 0).read_bytes()[:-9])
    (shard(store, 0).parent / ".0.12.tmp").write_bytes(b"half")
    orphan(ABSENT)(store)
    assign("scans/mean", 1, 7.0)(store)
    report = verify(store, against=source, repair=True)
    assert sorted(found(report)) == [
        ("leftover", None), ("shard_damaged", 0), ("shard_orphan", ABSENT), ("statistics_wrong", 1),
    ]  # fmt: skip
    assert report.repaired == 4
    assert report.clean
    assert files(store) == files(original)
    assert not store.with_name("a.zarr.lock").exists()
    assert verify(store, against=source, sample=0).findings == []


def test_repair_follows_a_source_that_changed(store, source, tmp_path):
    brain = write_nifti(tmp_path / "other.nii.gz", mni_brain(seed=3), FSL_MNI152_AFFINE, code=4)
    write_ukb_zip(source, "9000001", {MEMBER: brain.read_bytes()})
    write_ukb_zip(source, "9000002", {"T1/unusable/T1.nii.gz": b""})
    report = verify(store, against=source, repair=True)
    assert found(report) == [("source_changed", 0), ("source_changed", 1)]
    assert report.clean
    assert list(open_store(store).scans["status"]) == ["ok", "unusable", "missing_member"]
    assert not shard(store, 1).exists()
    assert verify(store, against=source, sample=0).findings == []


def test_a_volume_is_lost_only_if_its_shard_is(store, source):
    (source / ZIPS[0]).write_bytes(b"PK not a zip")
    (source / ZIPS[1]).unlink()
    before = files(store)
    report = verify(store, against=source, repair=True)
    assert found(report) == [("source_changed", 0), ("source_missing", 1)]
    assert report.repaired == 0
    assert files(store) == before

    for row in OK:
        shard(store, row).write_bytes(b"")
    report = verify(store, against=source, repair=True)
    assert found(report) == [("shard_damaged", 0), ("shard_damaged", 1)]
    assert report.repaired == 0  # two scans are gone: that is no success
    assert list(open_store(store).scans["status"]) == ["bad_archive", "read_error", "missing_member"]
    assert not any(shard(store, row).exists() for row in OK)
    assert verify(store).clean


def test_nothing_is_repaired_by_damaged_tables(store, made):
    shutil.rmtree(store / "scans/mean")
    orphan(ABSENT)(store)
    shard(store, 0).unlink()
    before = files(store)
    report = verify(store, against=made[0], repair=True)
    assert not report.clean
    assert report.repaired == 0
    assert "nothing was repaired" in report.findings[-1].detail
    assert files(store) == before


def test_repair_waits_for_no_other_writer(store, made):
    with store_lock(store):
        assert verify(store).clean
        with pytest.raises(StoreError, match="being written"):
            verify(store, against=made[0], repair=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tables_never_crash(store, data):
    tables = sorted(f for f in store.rglob("*") if f.is_file() and "volumes/c" not in str(f))
    path = data.draw(st.sampled_from(tables))
    sound = path.read_bytes()
    content = bytearray(sound)
    content[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, 0, len(sound) // 2]))])
    try:
        report = verify(store)
        assert json.loads(json.dumps(report.to_json()))["findings"] is not None
    finally:
        path.write_bytes(sound)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(store, made, tmp_path):
    done = run(store)
    assert done.returncode == 0, done.stderr
    assert "3 scans, 2 volumes checked" in done.stdout
    assert "0 findings" in done.stdout

    shard(store, 1).unlink()
    done = call(main, "verify", store)
    assert done.returncode == 1
    assert "shard_missing" in done.stdout
    assert "9000002" in done.stdout
    assert f"{ZIPS[1]}/{MEMBER}" in done.stdout  # whole: it is no terminal
    done = call(main, "verify", store, "--json", "--workers", 2)
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["scans"], summary["checked"], summary["repaired"]) == (3, 2, 0)
    assert summary["seconds"] > 0
    assert summary["bytes"] == shard(store, 0).stat().st_size
    (finding,) = summary["findings"]
    assert finding["detail"]
    assert {key: finding[key] for key in ("row", "participant", "session", "source", "kind")} == {
        "row": 1,
        "participant": "9000002",
        "session": "2",
        "source": f"{ZIPS[1]}/{MEMBER}",
        "kind": "shard_missing",
    }
    done = call(main, "verify", store, "--against", made[0], "--repair", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["repaired"] == 1

    done = call(main, "verify", store, "--repair")
    assert done.returncode == 2
    assert "--against" in done.stderr
    done = call(main, "verify", tmp_path / "absent.zarr")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no store")
