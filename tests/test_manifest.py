"""Scans named by a table of paths and people."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ellipsoid, write_nifti, write_ukb_zip

from ingest import ingest, open_store
from ingest.errors import SourceError
from ingest.layouts import Layout, find_scans
from ingest.scan import ScanSource


def write_manifest(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_manifest_paths_and_members(tmp_path):
    outside = tmp_path / "elsewhere/z.nii"
    for path in (outside, tmp_path / "m/folder.zip/x.nii", tmp_path / "m/inside.nii"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    table = write_manifest(
        tmp_path / "m" / "scans.csv",
        "Path, participant ,SESSION,modality,remark\n"
        f'"{outside}",p1,1,T1,x\n'
        f"{tmp_path}/m/inside.nii,p2,,,\n"
        '"./a/../b, c.nii",p3\n'
        "\n"
        "arch.zip/T1/T1.nii.gz,p4,2,T1,\n"
        "arch.zip::T1/T1_brain.nii.gz,p5,2,T1,\n"
        "folder.zip/x.nii,p6,,,\n"
        "90/9000001_20252_3_0.zip,9000001,,,\n",
        encoding="utf-8-sig",
    )
    layout, scans = find_scans(table)
    assert layout is Layout.manifest
    assert find_scans(table, Layout.manifest)[1] == scans
    by_name = {s.name: s for s in scans}
    assert list(by_name) == sorted(by_name)
    root = str(tmp_path / "m")
    assert by_name[str(outside)] == ScanSource(str(outside), str(outside), "p1", "1", "T1")
    assert by_name["inside.nii"] == ScanSource(f"{root}/inside.nii", "inside.nii", "p2", "", "")
    assert by_name["b, c.nii"].path == f"{root}/b, c.nii"
    first, second = by_name["arch.zip/T1/T1.nii.gz"], by_name["arch.zip/T1/T1_brain.nii.gz"]
    assert (first.path, first.member, first.session) == (f"{root}/arch.zip", "T1/T1.nii.gz", "2")
    assert (second.path, second.member) == (f"{root}/arch.zip", "T1/T1_brain.nii.gz")
    assert by_name["folder.zip/x.nii"].member is None
    bulk = by_name["90/9000001_20252_3_0.zip/T1/T1_brain_to_MNI.nii.gz"]
    assert (bulk.participant, bulk.session, bulk.modality) == ("9000001", "3", "T1")


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_manifest_of_real_scans(tmp_path, delimiter):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    file = write_nifti(tmp_path / "x/scan.nii.gz", ellipsoid(affine, (40, 50, 60)) + 1, affine)
    write_ukb_zip(tmp_path, "9000001", {"T1/T1.nii.gz": file.read_bytes()})
    rows = [
        ("path", "participant"),
        ("x/scan.nii.gz", "a"),
        ("90/9000001_20252_2_0.zip/T1/T1.nii.gz", "b"),
        ("gone.nii.gz", "c"),
        ("x", "d"),
        (str(file.with_name("second.nii.gz")), "a"),
    ]
    shutil.copy(file, file.with_name("second.nii.gz"))
    table = write_manifest(tmp_path / "list.csv", "".join(delimiter.join(row) + "\r\n" for row in rows))
    summary = ingest(table, tmp_path / "s.zarr")
    assert summary.status == {"duplicate": 1, "ok": 2, "read_error": 2}
    scans = open_store(tmp_path / "s.zarr").scans.set_index("source")
    assert "No such file" in scans["error"]["gone.nii.gz"]
    assert "a folder" in scans["error"]["x"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no column path or participant; found: none; expected: path, participant"),
        (b"file,participant\na.nii,1\n", "no column path; found: file, participant"),
        (b"path,participant\n\n\n", "no rows"),
        (b"path,participant\na.nii,\n", "line 2: no participant"),
        (b"path,participant\na.nii,1\n,2\n", "line 3: no path"),
        (b"path,participant\na.nii\n", "line 2: no participant"),
        (b"path,participant\na.nii,1,2\n", "line 2: 3 cells under 2 columns"),
        (b"path,path,participant\na,b,c\n", "two columns path"),
        (b"path,participant\na.nii,1\n./a.nii,2\n", "line 3: a.nii is named in line 2 already"),
        (b"path,participant\n\xff\xfe,1\n", "not text in UTF-8"),
        (b"path,participant\na\0b.nii,1\n", "NUL"),
        (b'path,participant\n"' + b"a" * 200_000 + b'",1\n', "cannot be read as CSV"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, content, expected):
    table = tmp_path / "list.csv"
    table.write_bytes(content)
    with pytest.raises(SourceError, match=expected):
        find_scans(table)


def test_manifest_and_image(tmp_path):
    table = write_manifest(tmp_path / "list.tsv", "path\tparticipant\n9000001_20252_2_0.zip\t1\na.nii\t2\n")
    assert find_scans(table, image="T1_brain")[1][0].member == "T1/T1_brain.nii.gz"
    with pytest.raises(SourceError, match="--image swi chooses nothing"):
        find_scans(table, image="swi")


def test_command_line_takes_a_manifest(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    image = nib.Nifti1Image(ellipsoid(affine, (40, 50, 60)) + 1, affine)
    nib.save(image, tmp_path / "a.nii.gz")
    table = write_manifest(tmp_path / "scans.txt", "path,participant\na.nii.gz,p\n")
    command = [sys.executable, "-c", "from ingest.cli import main; main()", str(table), str(tmp_path / "s.zarr")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is not a folder" in refused.stderr
    done = subprocess.run([*command, "--layout", "manifest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(open_store(tmp_path / "s.zarr").scans["participant"]) == ["p"]
