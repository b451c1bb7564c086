"""`ingest report`: outliers first, pictures the right way round, nothing hidden, nobody's markup; and the command."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_nifti
from reported_store import EXPECTED, HOSTILE, MNI_2MM, QUALITY, brain, pictures_in, row_of, tables_in, written
from reported_store import own_store as own_store  # a fixture
from reported_store import source as source  # a fixture
from reported_store import store as store  # a fixture

from ingest import ingest, open_store
from ingest.cli import main
from ingest.errors import StoreError
from ingest.grid import MNI152_GRID
from ingest.outliers import OUTLIER_SCORE
from ingest.report import write_report
from ingest.scan import ScanRow
from ingest.shard import shard_path
from ingest.store import create_store, rows_of, set_attributes, write_phenotypes, write_scans
from ingest.withdraw import withdraw

#: Patient left, front, top: mm in MNI space, in the middle planes.
MARKERS = {"left": (-45.0, -17.0, 19.0), "front": (0.0, 45.0, 19.0), "top": (0.0, -17.0, 50.0)}


def test_outliers_come_first_with_the_measure_that_says_why(store, tmp_path):
    summary, page = written(store, tmp_path)
    tables = tables_in(page)
    assert summary.outlier_scans == 4
    assert {outlier.participant for outlier in summary.outliers} == set(EXPECTED)
    assert [outlier.score for outlier in summary.outliers] == sorted((o.score for o in summary.outliers), reverse=True)
    for participant, (measure, side) in EXPECTED.items():
        row = str(row_of(store, participant))
        assert tables["flags"][row][0] == measure
        title = next(m["title"].lower() for m in tables["measures"] if m["name"] == measure)
        assert re.match(rf"{title} [\d,.]+ robust SDs {side} the median", tables["why"][row])
    shifted = str(row_of(store, "9900002"))
    assert re.search(r"14\.\d up", tables["why"][shifted])
    assert list(pictures_in(page))[:4] == [outlier.row for outlier in summary.outliers]
    scores = [score for score in tables["score"] if score is not None]
    assert sum(score > OUTLIER_SCORE for score in scores) == 4


OLDER = '<!DOCTYPE html>\n<meta name="generator" content="brain-volumes ingest report">\nan older page'


def test_numbers_of_the_page_are_those_of_the_store(store, tmp_path):
    _, page = written(store, tmp_path)
    tables = tables_in(page)
    opened = open_store(store)
    for row, scan in opened.scans.iterrows():
        found = {name: tables["numbers"][name][row] for name in (*QUALITY, "centre")}
        if scan["status"] == "ok":
            assert found["intensity"] == pytest.approx(scan["mean"], abs=0.051)
            assert found["volume"] == pytest.approx(scan["brain_voxels"] / 1000, abs=0.51)
        else:
            assert set(found.values()) == {None}
            assert tables["reason"][str(row)] == scan["error"]
        assert tables["participant"][row] == scan["participant"]
        assert tables["source"][row] == scan["source"]


def test_failures_are_listed_with_their_reasons_and_in_groups(store, tmp_path):
    _, page = written(store, tmp_path)
    tables = tables_in(page)
    statuses = open_store(store).scans["status"]
    assert sorted(map(int, tables["reason"])) == np.flatnonzero(statuses != "ok").tolist()
    assert all(tables["reason"].values())
    assert {group["status"] for group in tables["groups"]} == {"bad_nifti"}
    assert len(tables["groups"]) == 2
    two = [row for row, group in tables["group"].items() if group == 0]
    assert {tables["participant"][int(row)] for row in two} == {"9910000", "9910001"}


def test_the_right_way_round(tmp_path):
    for name, place in MARKERS.items():
        write_nifti(tmp_path / "src" / f"{name}.nii.gz", brain(0, marker_mm=place).astype(np.int16), MNI_2MM, code=4)
    ingest(tmp_path / "src", tmp_path / "s.zarr")
    _, page = written(tmp_path / "s.zarr", tmp_path)
    pictures = pictures_in(page)
    depth, height, width = MNI152_GRID.shape_zyx
    starts = {"axial": 0, "coronal": width + 4, "sagittal": 2 * (width + 4)}
    for name, plane, side in (
        ("left", "axial", "left"), ("left", "coronal", "left"), ("front", "axial", "top"),
        ("front", "sagittal", "right"), ("top", "coronal", "top"), ("top", "sagittal", "top"),
    ):  # fmt: skip
        picture = pictures[row_of(tmp_path / "s.zarr", name)]
        assert picture.shape == (height, 2 * width + height + 8)
        part = picture[:, starts[plane] :][:, : height if plane == "sagittal" else width]
        rows, columns = part.shape[0] if plane == "axial" else depth, part.shape[1]
        y, x = (np.median(axis) for axis in np.nonzero(part > 200))
        y -= (part.shape[0] - rows) / 2
        where = {"left": x < 0.35 * columns, "right": x > 0.65 * columns, "top": y < 0.35 * rows}
        assert where[side], (name, plane, x, y)
    letters = [(letter["text"], letter["edge"]) for letter in tables_in(page)["letters"]]
    assert letters == [("L", "left"), ("R", "right"), ("L", "left"), ("R", "right"), ("P", "left"), ("A", "right")]
    at = [letter["percent"] * picture.shape[1] / 100 for letter in tables_in(page)["letters"]]
    assert at[::2] == pytest.approx(list(starts.values()), abs=0.1)
    assert at[5] == 0


def test_header_says_what_the_store_is(own_store, tmp_path):
    set_attributes(own_store, {"simulated": True, "settings": {"source": HOSTILE}})
    variables = {"age": {}, HOSTILE: {}}
    answers = pd.DataFrame({"age": np.arange(22.0), HOSTILE: [np.nan] * 22})
    answers.loc[:4, "age"] = np.nan
    write_phenotypes(own_store, answers.rename(columns={HOSTILE: "i<b>q"}), variables)
    _, page = written(own_store, tmp_path)
    attrs = open_store(own_store).attrs
    assert '<meta name="generator" content="brain-volumes ingest report">' in page
    assert f'<meta name="store-id" content="{attrs["store_id"]}">' in page
    assert "SIMULATED DATA" in page
    for text in ("160 × 192 × 160 voxels", "MNI152", attrs["created_by"]["zarr"], "99.9", "own.zarr"):
        assert text in page
    assert "alert(1)</script>" not in page
    assert "i&lt;b&gt;q" in page
    assert "i<b>q" not in page
    ok = open_store(own_store).ok_rows
    assert f"{int((ok < 5).sum()):,}</td>" in page[page.index('id="phenotypes"') :]


def test_page_needs_nothing_from_outside(store, tmp_path):
    _, page = written(store, tmp_path)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<object|<form|<base", page)
    assert "default-src 'none'" in page
    assert "SIMULATED" not in page
    assert not re.search(r"\son\w+=", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))


def test_a_damaged_shard_is_a_row_with_its_reason(own_store, tmp_path):
    shards = [shard_path(own_store, int(row)) for row in open_store(own_store).ok_rows]
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 2] ^= 1
    shards[0].write_bytes(content)
    shards[1].unlink()
    shards[2].write_bytes(b"short")
    shards[3].write_bytes(b"")
    shards[4].unlink()
    shards[4].mkdir()
    summary, page = written(own_store, tmp_path)
    assert summary.damaged == 5
    assert not summary.clean
    reasons = {row: reason for row, _, reason in summary.reasons}
    for row, words in enumerate(("wrong checksum", "is absent", "shorter than its index", "shorter", "cannot be read")):
        assert words in reasons[row], row
    tables = tables_in(page)
    assert [tables["statuses"][code] for code in tables["status"][:5]] == ["damaged"] * 5
    assert {int(row): tables["reason"][row] for row in tables["reason"]}.items() >= reasons.items()
    assert not set(range(5)) & set(pictures_in(page))
    assert str(tmp_path) not in page
    assert "5 stored scans cannot be read" in page


def test_nobody_who_withdrew_is_in_the_page_and_pending_scans_are(own_store, tmp_path):
    rows = rows_of(open_store(own_store).scans)
    pending = row_of(own_store, "9000137")
    rows[pending] = ScanRow("9000137", "", "", "9000137.nii.gz")
    write_scans(own_store, rows)
    gone = row_of(own_store, "9900001")
    (tmp_path / "list.csv").write_text("9900001\n")
    withdraw(tmp_path / "list.csv", [own_store])
    _, page = written(own_store, tmp_path)
    tables = tables_in(page)
    assert "9900001" not in page
    assert "9900001" not in json.dumps(tables)
    assert tables["statuses"][tables["status"][gone]] == "withdrawn"
    assert tables["statuses"][tables["status"][pending]] == "pending"
    assert gone not in pictures_in(page)
    assert "1 scan is pending" in page


def test_who_withdraws_while_the_page_is_made_is_not_in_it(own_store, tmp_path):
    (tmp_path / "list.csv").write_text("9900001\n")
    page = tmp_path / "r.html"
    page.write_text(OLDER)

    def withdraw_once(_: int) -> None:
        if open_store(own_store).scans["status"].isin(["withdrawn"]).sum() == 0:
            withdraw(tmp_path / "list.csv", [own_store])

    with pytest.raises(StoreError, match="changed while its report was made"):
        write_report(own_store, page, threads=1, on_scan=withdraw_once)
    assert not page.exists()


@pytest.mark.parametrize("rows", [0, 3])
def test_stores_without_volumes_have_a_page(rows, tmp_path):
    failed = [ScanRow("9000001", str(n), "T1", f"{n}.zip", status="bad_archive", error="torn") for n in range(rows)]
    create_store(tmp_path / "e.zarr", failed, MNI152_GRID)
    summary, page = written(tmp_path / "e.zarr", tmp_path)
    assert (summary.scans, summary.pictures, summary.outliers, summary.clean) == (rows, 0, [], True)
    assert tables_in(page)["score"] == [None] * rows
    assert "No scan has a volume" in page


def test_whole_heads_are_told_from_brains_by_the_store(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("9000001", "9000002", "9000003"):
        head = brain(int(name))
        head[head == 0] = rng.uniform(1, 4, (head == 0).sum())
        write_nifti(tmp_path / "src" / f"{name}.nii.gz", head.astype(np.int16), MNI_2MM, code=4)
    ingest(tmp_path / "src", tmp_path / "s.zarr")
    _, page = written(tmp_path / "s.zarr", tmp_path)
    tables = tables_in(page)
    assert tables["measures"][1]["title"] == "Head volume"
    assert 1000 < tables["numbers"]["volume"][0] < 1300  # of the ellipsoid, not of 4,915 ml of grid
    assert "Otsu" in page
    assert "Only 3 scans have a volume" in page


def test_pictures_fill_what_the_page_may_have(store, tmp_path):
    whole, _ = written(store, tmp_path)
    assert whole.pictures == len(open_store(store).ok_rows)
    wanted = row_of(store, "9000274")
    limit = whole.bytes - 20_000
    part, page = written(store, tmp_path, page_bytes=limit, rows=[wanted])
    assert 5 < part.pictures < whole.pictures
    assert part.bytes <= limit
    shown = list(pictures_in(page))
    assert shown[0] == wanted  # those asked for, then outliers
    assert {outlier.row for outlier in part.outliers} == set(shown[1:5])
    assert f"Only the first {part.pictures} pictures are embedded" in page
    none, page = written(store, tmp_path, page_bytes=1000)  # the tables are never cut
    assert none.pictures == 0
    assert len(tables_in(page)["source"]) == none.scans


# The command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the ingest command as a user does."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(own_store, tmp_path):
    page = tmp_path / "qc.html"
    page.write_text(OLDER)
    done = run("report", own_store, page, "--json", "--rows", "2,4-5")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["report"] == str(page)
    assert summary["bytes"] == page.stat().st_size
    assert (summary["scans"], summary["pictures"], summary["damaged"], summary["outlier_scans"]) == (22, 19, 0, 4)
    assert {outlier["participant"] for outlier in summary["outliers"]} == set(EXPECTED)
    assert summary["seconds"] > 0
    assert list(pictures_in(page.read_text()))[:3] == [2, 4, 5]
    shard_path(own_store, 0).unlink()
    done = run("report", own_store, tmp_path / "new" / "folder" / "qc.html")
    assert (tmp_path / "new" / "folder" / "qc.html").is_file()
    assert done.returncode == 1
    assert "22 scans, 4 outliers" in done.stdout
    assert "damaged: row 0" in done.stderr


def test_a_page_that_cannot_be_written_is_named_where_nothing_can_be_removed_either(own_store, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(StoreError, match=r"r\.html cannot be written: Read-only file system; choose another name"):
        write_report(own_store, tmp_path / "r.html")


def test_a_page_that_is_no_longer_true_goes_through_a_link_too(own_store, tmp_path, monkeypatch):
    (tmp_path / "real.html").write_text(OLDER)
    (tmp_path / "link.html").symlink_to("real.html")
    monkeypatch.setattr("ingest.report._is_still_true", lambda _: False)
    with pytest.raises(StoreError, match="changed while its report was made"):
        write_report(own_store, tmp_path / "link.html")
    assert not (tmp_path / "real.html").exists()


def test_errors_are_one_line(own_store, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.html"
    kept.write_text(OLDER)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "text").write_text("no store")
    for other in ("notes.html", "people.csv"):
        (tmp_path / other).write_text("mine")

    def refused(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ingest", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    failed = row_of(own_store, "9910000")
    for arguments, words in (
        ((own_store, tmp_path / "text" / "r.html"), ("text is a file", "r.html cannot be written", "choose another")),
        ((own_store, tmp_path / "folder.html"), ("is a folder", "choose another")),
        ((own_store, "/"), ("/ is a folder", "choose another")),
        (
            (own_store, tmp_path / "notes.html"),
            ("notes.html exists and is not a page of ingest report", "not replaced"),
        ),
        ((own_store, tmp_path / "people.csv"), ("people.csv ends in '.csv'; a report is written as .html",)),
        ((tmp_path / "text", kept), ("text is a file, expected a store",)),
        ((own_store, kept, "--rows", failed), (f"row {failed}", "bad_nifti")),
        ((own_store, kept, "--rows", "99"), ("row 99", "22 rows")),
    ):
        code, text = refused(*arguments)
        assert code == 1, arguments
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert all(word in text for word in words), text
    for rows in ("x", "5-", "9-3", "0-99999999", "-1"):
        assert refused(own_store, kept, f"--rows={rows}")[0] == 2
    set_attributes(own_store, {"format_version": 9})
    code, text = refused(own_store, kept)
    assert code == 1
    assert "format version 9" in text
    assert kept.read_text() == OLDER
    assert {(tmp_path / other).read_text() for other in ("notes.html", "people.csv")} == {"mine"}
    assert sorted(tmp_path.glob(".*")) == []
