"""`ingest report`: the right numbers, outliers first, pictures the right way round, nothing hidden, nobody's markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_nifti
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ingest import ingest, open_store
from ingest.cli import main
from ingest.errors import StoreError
from ingest.failures import group_failures, reason_pattern
from ingest.grid import MNI152_GRID
from ingest.histograms import draw_histogram
from ingest.outliers import OUTLIER_SCORE, compare_scans
from ingest.pictures import fit_pictures, picture_order
from ingest.quality import ScanQuality, measure_volume, measures_of, otsu_level
from ingest.report import write_report
from ingest.report_page import PAGE_BYTES, render_page
from ingest.scan import ScanRow
from ingest.shard import shard_path
from ingest.store import VolumeStore, create_store, rows_of, set_attributes, write_phenotypes, write_scans
from ingest.withdraw import withdraw

#: FSL's MNI152 grid at 2 mm: an eighth of the voxels, resampled onto the store's grid.
MNI_2MM = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
SHAPE = (91, 109, 91)

#: Patient left, front, top: mm in MNI space, in the middle planes.
MARKERS = {"left": (-45.0, -17.0, 19.0), "front": (0.0, 45.0, 19.0), "top": (0.0, -17.0, 50.0)}

HOSTILE = "<script>alert(1)</script>'\"&amp;\u2028 \x01</script><!--"
QUALITY = ["intensity", "volume", "x", "y", "z", "noise"]


def brain(seed: int, *, size: float = 1.0, noise: float = 1.0, marker_mm: Sequence[float] | None = None) -> np.ndarray:
    """Return a smooth ellipsoid on the 2 mm grid, float64 (x, y, z), with noise of that SD and a bright ball."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    mm = index @ MNI_2MM[:3, :3].T + MNI_2MM[:3, 3]
    inside = ((mm / (np.array([62.0, 80.0, 55.0]) * size)) ** 2).sum(axis=-1) < 1
    rng = np.random.default_rng(seed)
    grey = 100 + 10 * np.sin(mm / 15).sum(axis=-1) + rng.normal(0, noise, SHAPE)
    data = np.where(inside, np.clip(grey, 1, 132), 0.0)  # so that noise does not move the top
    if marker_mm is not None:
        data[np.linalg.norm(mm - np.array(marker_mm), axis=-1) < 10] = 400.0
    return data


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a folder of 14 usual scans, four that stand out by one measure each, three broken files, and one name."""
    folder = tmp_path_factory.mktemp("source")
    usual = 14
    scans = {f"{9000000 + 137 * number}": brain(number) for number in range(usual)}
    scans["9900001"] = brain(31, noise=8.0)
    scans["9900002"] = np.roll(brain(32), 7, axis=2)
    scans["9900003"] = brain(33, size=0.6)
    scans["9900004"] = brain(34, marker_mm=(0.0, 0.0, 0.0))
    scans["<img src=x onerror=alert(1)> '\"&amp;"] = brain(35)
    for name, data in scans.items():
        write_nifti(folder / f"{name}.nii.gz", data.astype(np.int16), MNI_2MM, code=4)
    for number in range(2):
        (folder / f"991000{number}.nii.gz").write_bytes(b"no image")
    (folder / "9920000.nii.gz").write_bytes((folder / "9000000.nii.gz").read_bytes()[:-900])
    return folder


EXPECTED = {
    "9900001": ("noise", "above"),
    "9900002": ("centre", "above"),
    "9900003": ("volume", "below"),
    "9900004": ("intensity", "below"),
}


@pytest.fixture(scope="module")
def store(source, tmp_path_factory) -> Path:
    """Return the store of `source`."""
    path = tmp_path_factory.mktemp("stores") / "study.zarr"
    ingest(source, path)
    return path


@pytest.fixture
def own_store(store, tmp_path) -> Path:
    """Return a copy of the store that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "own.zarr"))


def written(store: Path, folder: Path, **settings: Any) -> tuple[Any, str]:
    """Write a report; return its summary and its text, and see that nothing else was written."""
    page = folder / "qc" / "report.html"
    page.parent.mkdir(exist_ok=True)
    summary = write_report(store, page, **settings)
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]
    return summary, page.read_text(encoding="utf-8")


def tables_in(page: str) -> dict[str, Any]:
    """Return the tables of a page."""
    packed = re.search(r'<script type="application/octet-stream" id="data">(.*?)</script>', page, re.DOTALL)
    assert packed
    return json.loads(zlib.decompress(base64.b64decode(packed[1], validate=True)))


def pictures_in(page: str) -> dict[int, np.ndarray]:
    """Return the pictures of a page, uint8 (height, width), in their order."""
    found = re.search(r'<script type="application/json" id="pictures">(.*?)</script>', page, re.DOTALL)
    assert found
    files = {int(row): base64.b64decode(text, validate=True) for row, text in json.loads(found[1]).items()}
    return {row: np.asarray(Image.open(io.BytesIO(content)).convert("L")) for row, content in files.items()}


def row_of(store: Path, participant: str) -> int:
    return open_store(store).scans["participant"].tolist().index(participant)


# Numbers


def reference(volume: np.ndarray, threshold: int) -> ScanQuality:
    """Measure a volume of 1 mm voxels in plain numpy."""
    inside = volume > threshold
    grey = np.where(inside, volume, 0).astype(np.float64)
    z, y, x = (
        (grey * np.arange(n).reshape([-1 if i == axis else 1 for i in range(3)])).sum() / grey.sum() - (n - 1) / 2
        for axis, n in enumerate(volume.shape)
    )
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = (sliding_window_view(volume.astype(np.int64), (1, 3, 3))[:, :, :, 0] * kernel).sum(axis=(-2, -1))
    whole = sliding_window_view(inside, (1, 3, 3)).all(axis=(-3, -2, -1))
    noise = np.sqrt(np.pi / 2) / 6 * np.abs(response[whole]).mean()
    return ScanQuality(volume[inside].mean(), inside.sum() / 1000, x, y, z, noise)


@pytest.mark.parametrize("shape", [(12, 30, 26), (40, 17, 33)])
@pytest.mark.parametrize("zeros", [0.0, 0.05])
def test_numbers_are_those_of_numpy(shape, zeros):
    rng = np.random.default_rng(shape[0])
    volume = rng.integers(1, 256, shape).astype(np.uint8)
    volume[rng.random(shape) < zeros] = 0
    volume[:3] = 0
    found, expected = measure_volume(volume, 1.0), reference(volume, 0)
    for name in QUALITY:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
    doubled = measure_volume(volume, 2.0)
    assert doubled.volume == pytest.approx(8 * found.volume)
    assert doubled.x == pytest.approx(2 * found.x)


def test_numbers_of_whole_heads_leave_the_air_out():
    rng = np.random.default_rng(0)
    volume = rng.integers(1, 12, (20, 40, 40)).astype(np.uint8)  # air is not zero
    volume[4:16, 8:32, 10:30] = rng.integers(90, 200, (12, 24, 20))
    level = otsu_level(np.bincount(volume.ravel(), minlength=256))
    assert 11 <= level < 90
    found = measure_volume(volume, 1.0, whole_heads=True)
    expected = reference(volume, level)
    assert found.volume == expected.volume == 12 * 24 * 20 / 1000
    assert found.noise == pytest.approx(expected.noise, rel=1e-12)


@pytest.mark.parametrize("sd", [2.0, 6.0, 15.0])
def test_noise_of_known_size_is_found_whatever_the_slope_and_the_mask(sd):
    rng = np.random.default_rng(1)
    volume = np.linspace(90, 150, 80) + rng.normal(0, sd, (30, 90, 80))
    volume[:, :20] = 0  # the edge of a mask is no noise
    found = measure_volume(np.clip(np.rint(volume), 0, 255).astype(np.uint8), 1.0)
    assert found.noise == pytest.approx(np.sqrt(sd**2 + 1 / 12), rel=0.02)  # rounding adds 1/12


def test_nothing_inside_gives_no_numbers():
    empty = measure_volume(np.zeros((8, 8, 8), np.uint8), 1.0)
    assert all(np.isnan(getattr(empty, name)) for name in QUALITY)
    dot = np.zeros((8, 8, 8), np.uint8)
    dot[3, 3, 3] = 9
    found = measure_volume(dot, 1.0, whole_heads=False)
    assert (found.intensity, found.volume, found.x) == (9, 0.001, -0.5)
    assert np.isnan(found.noise)
    assert otsu_level(np.zeros(256, np.int64)) == 0


def numbers(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    scales = {"intensity": (130, 4), "volume": (1500, 40), "x": (0, 1), "y": (-3, 1), "z": (-5, 1), "noise": (5, 0.4)}
    return pd.DataFrame({name: rng.normal(mean, sd, n) for name, (mean, sd) in scales.items()})


def test_scores_are_robust_sds():
    table = numbers(2000)
    table.loc[7, "noise"] = 9.0
    table.loc[8, "z"] += 40.0
    table.loc[9] = np.nan
    cohort = compare_scans(table, measures_of(whole_heads=False))
    noise = table["noise"]
    mad = (noise - noise.median()).abs().median()
    assert cohort.deviations["noise"][7] == pytest.approx((9.0 - noise.median()) / (1.4826 * mad))
    assert cohort.deviations["intensity"].std() == pytest.approx(1, abs=0.07)  # of normal numbers robust SDs are SDs
    assert cohort.outliers[:2].tolist() == [8, 7]
    assert np.isnan(cohort.score[9])
    assert cohort.explain(9) == cohort.explain(np.argmin(cohort.score)) == ""
    assert re.fullmatch(
        r"noise \d+\.\d robust SDs above the median \(9\.00 against 5\.0\d grey levels\)", cohort.explain(7)
    )
    assert "centre of mass" in cohort.explain(8)
    assert re.search(r"\(\d+\.\d mm off, usual 1\.\d: (39|40|41)\.\d up", cohort.explain(8))
    assert (cohort.deviations["centre"].dropna() >= 0).all()  # nobody is too near


def test_equal_scans_are_no_outliers_and_one_that_differs_is():
    table = pd.DataFrame(dict.fromkeys(QUALITY, [5.0] * 9))
    measures = measures_of(whole_heads=False)
    assert compare_scans(table, measures).score.tolist() == [0.0] * 9  # the MAD is 0
    table.loc[3, "volume"] += 1  # a millilitre does not matter
    assert len(compare_scans(table, measures).outliers) == 0
    table.loc[3, "volume"] += 30
    cohort = compare_scans(table, measures)
    assert cohort.outliers.tolist() == [3]
    assert cohort.standing_out(3)[0].name == "volume"
    assert len(compare_scans(table[:0], measures).score) == 0


# The page of a real store


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


def test_reasons_are_grouped_without_what_is_of_one_scan():
    same = [
        ("truncated: the gzip data end after 13,527,288 bytes", "truncated: the gzip data end after 12 bytes"),
        ("not a NIfTI file: it starts with 6e6f2069", "not a NIfTI file: it starts with 00000000"),
        ("same scan as 90/9000001_20252_2_0.zip/T1/T1.nii.gz", "same scan as a b/9000002.nii.gz".replace("a b", "ab")),
        ("no member 'T1.nii'", "no member 'x y (3).nii'"),
    ]
    for first, second in same:
        assert reason_pattern(first) == reason_pattern(second)
    assert reason_pattern("the scan's type float32 isn't known") == "the scan's type float32 isn't known"
    groups = group_failures({4: ("bad", "a 1"), 2: ("bad", "a 2"), 3: ("worse", "a 3"), 9: ("withdrawn", "")})
    assert [(g.status, g.pattern, g.rows) for g in groups] == [
        ("bad", "a #", [2, 4]), ("worse", "a #", [3]), ("withdrawn", "", [9]),
    ]  # fmt: skip


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
    page.write_text("an older page")

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


# Limits


def synthetic(n: int, **columns: Any) -> tuple[VolumeStore, pd.DataFrame]:
    """Return a store that lies nowhere, and quality numbers of its scans; one in 32 failed."""
    rng = np.random.default_rng(0)
    ids = (9_000_000 + 17 * np.arange(n)).astype(str)
    ok = np.arange(n) % 32 != 5
    scans = pd.DataFrame(
        {
            "participant": ids,
            "session": np.where(np.arange(n) % 20 == 0, "3", "2"),
            "modality": "T1",
            "source": [f"Bulk/Brain MRI/T1/{i[:2]}/{i}_20252_2_0.zip/T1/T1_brain_to_MNI.nii.gz" for i in ids],
            "source_size": rng.integers(2 * 10**7, 4 * 10**7, n),
            "status": np.where(ok, "ok", rng.choice(["unusable", "bad_nifti", "missing_member"], n)),
            "error": [
                "" if fine else f"truncated: the gzip data end after {nbytes} bytes"
                for fine, nbytes in zip(ok, rng.integers(0, 10**7, n), strict=True)
            ],
            "head_scale": rng.normal(1.3, 0.1, n),
            **columns,
        }
    )
    measured = numbers(n)
    measured["noise"] = 5 + rng.standard_t(5, n)
    measured[scans["status"] != "ok"] = np.nan
    phenotypes = pd.DataFrame({"age": np.where(rng.random(n) < 0.1, np.nan, 60.0)})
    attrs = {"store_id": "0" * 32, "simulated": False}
    return VolumeStore(Path("big.zarr"), attrs, MNI152_GRID, 4, scans, phenotypes, {}), measured


def a_picture(nbytes: int = 5200) -> bytes:
    """Return a WebP file of about the size of a brain's."""
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(520) % 256, (192, 1)).astype(np.uint8)).save(buffer, "WEBP", quality=50)
    assert buffer.tell() < nbytes
    return buffer.getvalue().ljust(nbytes, b"\0")


@pytest.fixture(scope="module")
def large_page(tmp_path_factory) -> Path:
    """Return the page of 40,000 scans."""
    store, measured = synthetic(40_000)
    cohort = compare_scans(measured, measures_of(whole_heads=False))
    order = picture_order(store.ok_rows, cohort.outliers)
    content = a_picture()
    page, count = render_page(store, cohort, {}, ((row, content) for row in order))
    assert 1500 < count < 5000
    path = tmp_path_factory.mktemp("large") / "large.html"
    path.write_text(page, encoding="utf-8")
    return path


def test_40000_scans_weigh_less_than_20_mb(large_page):
    assert 0.9 * PAGE_BYTES < large_page.stat().st_size <= PAGE_BYTES < 20_000_000
    page = large_page.read_text(encoding="utf-8")
    assert len(tables_in(page)["participant"]) == 40_000
    assert re.search(r"Only the first [\d,]+ pictures are embedded", page)


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


def test_no_more_pictures_are_drawn_than_fit():
    drawn = []

    def draw():
        for row in range(1000):
            drawn.append(row)
            yield row, b"x" * 300

    taken = fit_pictures(draw(), 4200)
    assert list(taken) == list(range(10))
    assert len(drawn) == 11


def test_pictures_are_spread_however_many_fit():
    present = np.arange(10, 3010)
    order = picture_order(present, np.array([500, 20]), first=[77, 500])
    assert order[:3] == [77, 500, 20]
    assert sorted(order) == present.tolist()
    for count in (30, 100, 700):
        gaps = np.diff(np.sort(order[3 : 3 + count]))
        assert gaps.max() <= 3 * 3000 / count
    assert picture_order(present[:0], present[:0]) == []


def test_histograms_count_every_scan():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(5, 1, 5000), [5000.0, -300.0, np.nan]])
    outlying = np.abs(values - 5) > 3
    series = [("usual", values[~outlying]), ("outlying", values[outlying])]
    drawn = draw_histogram("Noise", "grey levels", "", series, lines=[(5.0, "median"), (900.0, "limit")])
    assert drawn is not None
    counted = sum(int(bar.label.split(": ")[1].split()[0].replace(",", "")) for bar in drawn.bars)
    assert counted == 5000
    assert drawn.beyond == "1 below the axis, 1 above the axis"
    assert [kind for _, kind in drawn.lines] == ["median"]
    assert {text for _, text in drawn.ticks} >= {"0", "5", "10"}
    assert all(bar.height > 0 and bar.y >= 10 for bar in drawn.bars)
    same = draw_histogram("Size", "MB", "", [("usual", np.full(4, 7.0))])
    assert same is not None
    assert same.tallest == 4
    assert draw_histogram("Size", "MB", "", [("usual", np.full(4, np.nan))]) is None


# The command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the ingest command as a user does."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(own_store, tmp_path):
    page = tmp_path / "qc.html"
    page.write_text("an older page")
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
    done = run("report", own_store, page)
    assert done.returncode == 1
    assert "22 scans, 4 outliers" in done.stdout
    assert "damaged: row 0" in done.stderr


def test_errors_are_one_line(own_store, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.html"
    kept.write_text("an older page")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "text").write_text("no store")

    def refused(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ingest", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    failed = row_of(own_store, "9910000")
    for arguments, words in (
        ((own_store, tmp_path / "nowhere" / "r.html"), ("no folder", "nowhere", "make it")),
        ((own_store, tmp_path / "folder.html"), ("is a folder", "choose another")),
        ((tmp_path / "text", kept), ("no store at",)),
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
    assert kept.read_text() == "an older page"
    assert sorted(tmp_path.glob(".*")) == []


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium with a user of its own."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium here; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=executable,
            headless=True,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)],
            viewport={"width": 1100, "height": 900},
        )
        yield context
        context.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page and waits until it is filled; at the end nothing may have gone wrong."""
    tab = browser.new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: None if re.match("data:|file:", request.url) else wrong.append(request.url))

    def open_page(path: Path):
        tab.goto(path.as_uri())
        tab.wait_for_selector("#state:not(:empty)")
        return tab

    yield open_page
    tab.close()
    assert wrong == []


@pytest.fixture(scope="module")
def study_page(store, tmp_path_factory) -> Path:
    """Return the report of the store."""
    page = tmp_path_factory.mktemp("page") / "study.html"
    write_report(store, page)
    return page


def cards(tab) -> list[str]:
    return tab.locator("#gallery .card h3").all_text_contents()


def search(tab, words: str) -> None:
    """Type into the search box and wait for its answer."""
    tab.evaluate("document.getElementById('state').textContent = ''")
    tab.fill("#search", words)
    tab.wait_for_selector("#state:not(:empty)")


def test_browser_outliers_come_first_and_search_narrows(opened, study_page):
    tab = opened(study_page)
    assert set(cards(tab)[:4]) == set(EXPECTED)
    first = tab.locator(".card").first
    assert "robust SDs" in first.locator(".why").inner_text()
    assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 520)")
    search(tab, "9900002")
    assert cards(tab) == ["9900002"]
    assert tab.inner_text("#failure-state") == "0 scans of 3 without a volume"
    search(tab, "BAD_nifti truncated")  # status and reason, in any case
    assert cards(tab) == ["9920000"]
    assert tab.locator("#failure-rows tr").count() == 1
    assert "truncated" in tab.inner_text("#failure-rows")
    search(tab, "9000274.nii.gz")
    assert cards(tab) == ["9000274"]
    search(tab, "no such scan")
    assert cards(tab) == []
    assert "nothing matches" in tab.inner_text("#state")
    tab.click("#clear")
    assert len(cards(tab)) == 22


def test_browser_filters_sorts_and_groups(opened, study_page):
    tab = opened(study_page)
    tab.select_option("#status", "bad_nifti")
    assert sorted(cards(tab)) == ["9910000", "9910001", "9920000"]
    assert "No volume" in tab.locator(".card").first.inner_text()
    tab.click("#groups button >> nth=0")
    assert sorted(cards(tab)) == ["9910000", "9910001"]
    assert tab.get_attribute("#groups button >> nth=0", "aria-pressed") == "true"
    tab.click("#groups button >> nth=0")
    assert len(cards(tab)) == 3
    tab.click("#clear")
    assert tab.input_value("#status") == ""
    tab.click("#outliers")
    assert set(cards(tab)) == set(EXPECTED)
    tab.click("#outliers")
    tab.select_option("#sort", "participant")
    names = cards(tab)
    assert [name for name in names if name.isdigit()] == sorted(name for name in names if name.isdigit())
    tab.click("#direction")
    assert cards(tab) == names[::-1]
    for measure, participant in (("volume", "9900003"), ("intensity", "9900004")):
        tab.select_option("#sort", measure)
        tab.click("#direction")  # the lowest first
        assert cards(tab)[0] == participant
        assert set(cards(tab)[-3:]) == {"9910000", "9910001", "9920000"}  # without numbers: last either way
    tab.select_option("#sort", "noise")
    assert cards(tab)[0] == "9900001"


def test_browser_pages_by_keyboard_and_searches_40000_scans(opened, large_page):
    tab = opened(large_page)
    assert tab.locator(".card").count() == 24  # only what is shown exists
    first = cards(tab)
    tab.focus("#pager button[aria-label^=Next]")
    tab.keyboard.press("Enter")
    second = cards(tab)
    assert not set(first) & set(second)
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Next page of scans"
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.type("1")
    tab.keyboard.press("Enter")
    assert cards(tab) == first
    tab.fill("#pager input", "99999")
    tab.keyboard.press("Enter")
    assert tab.input_value("#pager input") == tab.get_attribute("#pager input", "max") == "1667"
    assert tab.is_disabled("#pager button[aria-label^=Next]")
    assert len(cards(tab)) == 16
    search(tab, "9170000")
    assert cards(tab) == ["9170000 · session 3"]
    search(tab, "truncated unusable")
    found = int(tab.inner_text("#state").split()[0].replace(",", ""))
    assert 300 < found < 600
    assert tab.inner_text("#failure-state").startswith(f"{found} scans of 1,250 ")
    assert tab.locator("#failure-rows tr").count() == 50
    tab.click("#failure-pager button[aria-label^=Next]")
    assert tab.input_value("#failure-pager input") == "2"
    tab.click("#clear")
    tab.select_option("#sort", "row")
    tab.fill("#pager input", "3")
    tab.keyboard.press("Enter")
    rows = tab.locator("#gallery .card").evaluate_all("(all) => all.map((card) => Number(card.dataset.row))")
    assert rows == list(range(48, 72))
    assert "Picture not embedded" in tab.inner_text("#gallery")
    assert "--rows 48" in tab.inner_text("#gallery")


def test_browser_shows_hostile_names_as_they_are(opened, tmp_path):
    names = [HOSTILE, "a\0b", "\u202egnp", "</textarea><svg onload=alert(1)>", "{{ 7 * 7 }}", "${alert(1)}", "脳 é"]
    columns = {
        name: [f"{text}-{name}" for text in names] for name in ("participant", "session", "modality", "source", "error")
    }
    store, measured = synthetic(len(names), **columns, status=["ok", "bad_nifti", *["ok"] * 5])
    store.attrs["settings"] = {HOSTILE: HOSTILE}
    cohort = compare_scans(measured, measures_of(whole_heads=False))
    page, _ = render_page(store, cohort, {2: HOSTILE}, [])
    assert "alert(1)" not in page.replace(HOSTILE, "").replace("&lt;script&gt;alert(1)", "")
    path = tmp_path / "hostile.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    tab = opened(path)
    for row, text in enumerate(names):
        card = tab.locator(f".card[data-row='{row}']")
        expected = f"{text}-participant · session {text}-session"
        assert card.locator("h3").text_content() == expected
        source = f"row {row} · {text}-modality · {text}-source"
        assert card.locator(".source").text_content() == source
    assert tab.locator("#failure-rows tr[data-row='2'] td").last.text_content() == HOSTILE
    search(tab, "<script>alert(1)</script>'\"&amp;")
    assert len(cards(tab)) == 2  # by name, and by reason
    assert tab.locator("svg[onload], img[onerror]").count() == 0


def test_browser_shows_a_hostile_file_of_a_real_store(opened, study_page):
    tab = opened(study_page)
    search(tab, "onerror")
    assert cards(tab) == ["<img src=x onerror=alert(1)> '\"&amp;"]


def test_browser_runs_no_other_script(browser, study_page):
    tab = browser.new_page()
    tab.goto(study_page.as_uri())
    tab.evaluate(
        "() => { const added = document.createElement('script'); added.textContent = 'window.ran = true';"
        "document.body.append(added); const box = document.createElement('div');"
        "box.innerHTML = '<img src=x onerror=\"window.ran = true\">'; document.body.append(box); }"
    )
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.ran") is None
    tab.close()


@pytest.mark.parametrize("width", [1100, 420])
def test_browser_fits_the_screen(opened, study_page, large_page, tmp_path, width):
    for path in (study_page, large_page):
        tab = opened(path)
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        picture = tmp_path / f"{path.stem}-{width}.png"
        tab.screenshot(path=picture)
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.shape == (900, width)
        assert pixels.min() < 60 < 200 < pixels.max()
        overflowing = "(all) => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
        assert tab.locator(".card .body").evaluate_all(overflowing) == []
