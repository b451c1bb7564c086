"""The benchmark of large tables does what it says it measures, and writes what it promises. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import tables
from ingest import open_store
from ingest.inspection import summarise_store
from ingest.layouts import Layout, find_scans


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tables") / "bench"


def test_command(directory, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "tables", "--rows", "1000", "--repeats", "2"]
    command += ["--directory", str(directory), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "withdraw 100 people: " in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["benchmark"] == "tables"
    assert report["settings"]["rows"] == 1000
    assert report["settings"]["targets_s"] == tables.TARGETS
    speeds = {result["name"]: result for result in report["results"]}
    assert set(speeds) == {
        *(tables.READ, tables.WRITE, tables.LIST),
        *(tables.INSPECT, tables.OPEN, tables.WITHDRAW, tables.DISCOVER, tables.JOIN),
    }
    for name, result in speeds.items():
        assert 0 < result["low"] <= result["value"] <= result["high"]
        assert result["unit"] == "rows/s"
        assert report["settings"]["seconds"][name] == pytest.approx(1000 / result["value"], rel=0.01, abs=1e-3)
    ratio = speeds[tables.INSPECT]["value"] / speeds[tables.READ]["value"]
    assert report["ratios"][f"{tables.INSPECT}/{tables.READ}"] == pytest.approx(ratio, rel=0.01, abs=1e-4)
    assert speeds[tables.INSPECT]["limit_share"] == pytest.approx(ratio, rel=0.01, abs=1e-4)
    assert str(directory) not in json.dumps(report["machine"])


def test_the_store_is_one_of_that_many_people(directory, tmp_path):
    if not (directory / "ukb").exists():
        tables.run_tables(directory, rows=1000, repeats=1)
    before = (directory / "done.json").stat().st_mtime_ns
    assert len(find_scans(directory / "ukb", Layout.ukb)[1]) == 1000
    tables.make_store(tmp_path / "s.zarr", directory / "ukb", directory / "phenotypes.csv")
    summary = summarise_store(tmp_path / "s.zarr")
    assert summary.status == {"ok": 1000}
    assert summary.participants == 1000
    assert summary.stored_bytes == 1000
    assert {counts["missing"] for counts in summary.phenotypes.values()} == {0}
    assert len(summary.phenotypes) == 8
    assert open_store(tmp_path / "s.zarr").scans["participant"].str.fullmatch(r"9\d{6}").all()
    tables.run_tables(directory, rows=1000, repeats=1)  # with what is there
    assert (directory / "done.json").stat().st_mtime_ns == before


def test_work_that_is_not_done_is_not_measured(directory, monkeypatch):
    monkeypatch.setattr(tables, "_withdraw", lambda *_: 99)
    with pytest.raises(ValueError, match="withdraw 100 people was of 99 rows, expected 100"):
        tables.run_tables(directory, rows=1000, repeats=1)
    with pytest.raises(ValueError, match="too few"):
        tables.run_tables(directory, rows=150, repeats=2)
