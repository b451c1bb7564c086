"""Every layout in which scans come, on real trees."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ellipsoid, write_nifti, write_ukb_zip

from ingest import IngestSettings, ingest, open_store
from ingest.errors import SourceError
from ingest.layouts import Layout, find_scans


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def names(folder: Path, layout: Layout = Layout.auto, image: str | None = None) -> list[str]:
    return [scan.name for scan in find_scans(folder, layout, image)[1]]


@pytest.fixture
def ukb(tmp_path) -> Path:
    folder = tmp_path / "Bulk" / "Brain MRI"
    return touch(
        folder,
        "T1/90/9000001_20252_2_0.zip",
        "T1/90/9000001_20252_3_0.zip",
        "T1/90/9000001_20263_2_0.zip",
        "T1/90/9000001_20216_2_0.zip",
        "T1/91/9100002_20252_2_0.zip",
        "T2 FLAIR/90/9000001_20253_2_0.zip",
        "fMRI/90/9000001_20227_2_0.zip",
        "T1/1111111_20252_2_0/9100003_20252_2_0.zip",  # the folder's name must not become the id
        "T1/90/.9000009_20252_2_0.zip",
    )


def test_ukb_takes_one_image_type(ukb):
    layout, scans = find_scans(ukb)
    assert layout is Layout.ukb
    assert [(s.participant, s.session) for s in scans] == [
        ("9100003", "2"), ("9000001", "2"), ("9000001", "3"), ("9100002", "2"),
    ]  # fmt: skip
    assert {(s.modality, s.member) for s in scans} == {("T1", "T1/T1_brain_to_MNI.nii.gz")}
    assert scans[1].name == "T1/90/9000001_20252_2_0.zip/T1/T1_brain_to_MNI.nii.gz"
    assert all(Path(s.path).is_file() for s in scans)
    assert find_scans(ukb, image="T1_brain_to_MNI")[1] == scans
    flair = find_scans(ukb, image="T2_FLAIR_brain_to_MNI")[1]
    assert [(s.participant, s.modality, s.member) for s in flair] == [
        ("9000001", "FLAIR", "T2_FLAIR/T2_FLAIR_brain_to_MNI.nii.gz")
    ]
    shutil.rmtree(ukb / "T1")
    assert find_scans(ukb)[1] == flair


def test_a_store_of_one_image_stays_one_when_others_come_later(tmp_path):
    def brain(seed: int) -> bytes:
        data = ellipsoid(np.diag([4.0, 4, 4, 1]), (32, 42, 32), seed=seed)
        return write_nifti(tmp_path / "scratch.nii.gz", data.astype(np.int16), np.diag([4.0, 4, 4, 1])).read_bytes()

    ukb, bids = tmp_path / "ukb", tmp_path / "bids"
    write_ukb_zip(ukb, "9000001", {"T2_FLAIR/T2_FLAIR_brain_to_MNI.nii.gz": brain(1)}, field=20253)
    (bids / "sub-1").mkdir(parents=True)
    (bids / "sub-1" / "sub-1_space-MNI152_T1w.nii.gz").write_bytes(brain(1))
    for folder in (ukb, bids):
        ingest(folder, folder.with_suffix(".zarr"), IngestSettings(space="native"))
    write_ukb_zip(ukb, "9000001", {"T1/T1_brain_to_MNI.nii.gz": brain(2)})
    write_ukb_zip(ukb, "9000002", {"T2_FLAIR/T2_FLAIR_brain_to_MNI.nii.gz": brain(3)}, field=20253)
    (bids / "sub-1" / "sub-1_T1w.nii.gz").write_bytes(brain(2))
    (bids / "sub-2_space-MNI152_T1w.nii.gz").write_bytes(brain(3))
    for folder, modality in ((ukb, "FLAIR"), (bids, "space-MNI152_T1w")):
        summary = ingest(folder, folder.with_suffix(".zarr"))
        assert (summary.new, summary.scans) == (1, 2)
        assert set(open_store(folder.with_suffix(".zarr")).scans["modality"]) == {modality}


@pytest.mark.parametrize("image", ["T1_fast/T1_brain_pve_1", "T1/T1_fast/T1_brain_pve_1.nii.gz"])
def test_ukb_member_in_a_folder_of_the_archive(ukb, image):
    assert {s.member for s in find_scans(ukb, image=image)[1]} == {"T1/T1_fast/T1_brain_pve_1.nii.gz"}


def test_ukb_image_of_no_field_is_refused(ukb):
    with pytest.raises(SourceError, match=r"begins with T1 or T2_FLAIR"):
        find_scans(ukb, Layout.ukb, "swi")


def test_bids_sessions_runs_and_pairs(tmp_path):
    bids = touch(
        tmp_path,
        "dataset_description.json",
        "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.json",
        "sub-01/ses-a/anat/._sub-01_ses-a_run-1_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-x_T1w.nii",
        "sub-03/anat/sub-03_T1w.img.gz",
        "sub-03/anat/sub-03_T1w.hdr.gz",
        "sub-CON_04/anat/sub-CON_04_T1w.nii.gz",
        "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/.git/sub-01_T1w.nii.gz",
    )
    layout, scans = find_scans(bids)
    assert layout is Layout.bids
    assert [(s.participant, s.session, s.modality) for s in scans] == [
        ("sub-01", "a", "run-1_T1w"),
        ("sub-01", "a", "run-2_T1w"),
        ("sub-02", "", "acq-x_T1w"),
        ("sub-03", "", "T1w"),
        ("sub-CON_04", "", "T1w"),
    ]
    assert scans[3].name == "sub-03/anat/sub-03_T1w.img.gz"
    assert names(bids, image="T2w") == ["sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz"]
    assert names(bids, image="run-2_T1w") == ["sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz"]
    (bids / "dataset_description.json").unlink()
    assert find_scans(bids)[1] == scans == find_scans(bids, Layout.bids)[1]
    with pytest.raises(SourceError, match=r"--image PDw.*expected files named like sub-01_PDw.nii.gz"):
        find_scans(bids, Layout.bids, "PDw")


def test_bids_derivatives_as_the_source(tmp_path):
    template = "space-MNI152NLin2009cAsym"
    anat = touch(
        tmp_path / "derivatives" / "fmriprep" / "sub-01" / "anat",
        f"sub-01_{template}_desc-preproc_T1w.nii.gz",
        "sub-01_desc-preproc_T1w.nii.gz",
        "sub-01_desc-brain_mask.nii.gz",
    )
    source = anat.parents[1]
    assert [s.modality for s in find_scans(source)[1]] == ["desc-preproc_T1w"]
    for image in (f"{template}_desc-preproc_T1w", f"{template}_T1w"):
        assert [s.modality for s in find_scans(source, image=image)[1]] == [f"{template}_desc-preproc_T1w"]
    (anat / "sub-01_desc-preproc_T1w.nii.gz").unlink()
    assert [s.modality for s in find_scans(source)[1]] == [f"{template}_desc-preproc_T1w"]
    with pytest.raises(SourceError):
        find_scans(tmp_path, Layout.bids)


def test_flat_takes_every_volume_once(tmp_path):
    folder = touch(
        tmp_path, "b.nii", "a.nii.gz", "c.hdr", "c.img", "d.hdr", "e.img", "sub folder/f.NII.GZ", "._a.nii.gz",
        "notes.txt", "derivatives/g.nii", ".hidden/h.nii", "lost+found/i.nii", ".nii.gz",
    )  # fmt: skip
    layout, scans = find_scans(folder)
    assert layout is Layout.flat
    assert [s.name for s in scans] == [
        "a.nii.gz", "b.nii", "c.img", "d.hdr", "derivatives/g.nii", "e.img", "sub folder/f.NII.GZ",
    ]  # fmt: skip
    assert [s.participant for s in scans] == ["a", "b", "c", "d", "g", "e", "f"]
    assert names(folder, image="f.") == ["sub folder/f.NII.GZ"]


def test_one_stem_twice_is_a_duplicate(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name in ("a.nii", "a.nii.gz", "b.nii"):
        write_nifti(tmp_path / "src" / name, ellipsoid(affine, (40, 50, 60)) + 1, affine)
    assert ingest(tmp_path / "src", tmp_path / "s.zarr").status == {"duplicate": 1, "ok": 2}
    scans = open_store(tmp_path / "s.zarr").scans
    assert list(scans["status"]) == ["ok", "duplicate", "ok"]
    assert "a.nii" in scans["error"][1]


def test_pairs_and_single_files_store_the_same(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    data = ellipsoid(affine, (40, 50, 60)).astype(np.int16) + 1
    write_nifti(tmp_path / "src" / "a.nii.gz", data, affine)
    nib.save(nib.Nifti1Pair(data, affine), tmp_path / "src" / "b.img")
    nib.save(nib.Nifti1Pair(data, affine), tmp_path / "src" / "c.img.gz")
    (tmp_path / "src" / "d.hdr").write_bytes((tmp_path / "src" / "b.hdr").read_bytes())
    ingest(tmp_path / "src", tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert list(store.scans["source"]) == ["a.nii.gz", "b.img", "c.img.gz", "d.hdr"]
    assert list(store.scans["status"]) == ["ok", "ok", "ok", "read_error"]
    assert list(store.scans["source_size"][:3]) == [
        (tmp_path / "src" / name).stat().st_size for name in ("a.nii.gz", "b.img", "c.img.gz")
    ]
    shards = [(tmp_path / f"s.zarr/volumes/c/{row}/0/0/0").read_bytes() for row in range(3)]
    assert shards[0] == shards[1] == shards[2]


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.nii")).write_bytes(b"x")
    scan = find_scans(tmp_path)[1][0]
    assert scan.name == r"caf\xe9.nii"
    assert scan.participant == r"caf\xe9"
    assert Path(scan.path).read_bytes() == b"x"
    assert pickle.loads(pickle.dumps(scan)) == scan
    ingest(tmp_path, tmp_path / "s.zarr")
    scans = open_store(tmp_path / "s.zarr").scans
    assert list(scans["source"]) == [r"caf\xe9.nii"]
    assert list(scans["status"]) == ["bad_nifti"]


def test_links_to_folders_end(tmp_path):
    touch(tmp_path, "src/a/1.nii", "src/b/2.nii", "outside/c/3.nii", "src/.data/4.nii", "src/lost+found/x")
    (tmp_path / "src/a/again").symlink_to("../b")
    (tmp_path / "src/b/loop").symlink_to("../a")
    (tmp_path / "src/b/up").symlink_to("../..")
    (tmp_path / "src/self").symlink_to("self")
    (tmp_path / "src/self.nii").symlink_to("self.nii")
    (tmp_path / "src/gone.nii").symlink_to("nowhere.nii")
    (tmp_path / "src/file.nii").symlink_to("../outside/c/3.nii")
    (tmp_path / "src/out").symlink_to("../outside")
    (tmp_path / "src/out_again").symlink_to("../outside/c")
    (tmp_path / "src/visible").symlink_to(".data")
    (tmp_path / "outside/back").symlink_to("../src")
    (tmp_path / "outside/round").symlink_to(".")
    assert names(tmp_path / "src") == [
        "a/1.nii", "b/2.nii", "file.nii", "gone.nii", "out/c/3.nii", "self.nii", "visible/4.nii",
    ]  # fmt: skip
    (tmp_path / "link").symlink_to("src")
    assert names(tmp_path / "link") == names(tmp_path / "src")


def test_links_between_many_folders_end(tmp_path):
    for a in range(30):
        touch(tmp_path, f"out/{a}/{a}.nii")
        for b in range(30):
            (tmp_path / f"out/{a}/to{b}").symlink_to(f"../{b}")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/first").symlink_to("../out/0")
    assert len(names(tmp_path / "src")) == 30


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path):
    """A path of more than 4096 bytes cannot be listed by anyone, not even by root."""
    touch(tmp_path, "a.nii")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    with pytest.raises(SourceError, match=r"cannot be listed \(File name too long\).*source folder"):
        find_scans(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_reported(tmp_path):
    touch(tmp_path, "a.nii", "closed/b.nii")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(SourceError, match="closed cannot be listed"):
            find_scans(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_files_of_other_kinds_are_named(tmp_path):
    touch(tmp_path, "a/1.dcm", "a/2.IMA", "b.mgz", "notes")
    with pytest.raises(SourceError, match=r"found: 2 DICOM, 1 FreeSurfer, 1 other\).*dcm2niix; .*mri_convert"):
        find_scans(tmp_path)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout.auto, "20252.*sub-01_T1w.*ending in .nii"),
        (Layout.ukb, "1234567_20252_2_0.zip"),
        (Layout.bids, "sub-01_T1w"),
        (Layout.flat, r"\.nii\.gz"),
        (Layout.manifest, "CSV or TSV"),
    ],
)
def test_nothing_found_says_what_was_expected(tmp_path, layout, expected):
    touch(tmp_path, "9000001_20263_2_0.zip", "notes.txt")
    with pytest.raises(SourceError, match=expected) as caught:
        find_scans(tmp_path, layout)
    assert layout is Layout.manifest or "found: 1 other, 1 zip" in str(caught.value)
    with pytest.raises(SourceError, match="nowhere"):
        find_scans(tmp_path / "nowhere", layout)
    with pytest.raises(SourceError, match=r"notes.txt"):
        find_scans(tmp_path / "notes.txt", layout)


def test_thousands_of_scans_are_small_and_sorted(tmp_path):
    for number in range(5000):
        touch(tmp_path, f"{number % 50:02d}/{9000000 + number * 7919 % 100003}_20252_2_0.zip")
    scans = find_scans(tmp_path)[1]
    assert len(scans) == 5000
    assert [s.name for s in scans] == sorted(s.name for s in scans)
    assert not hasattr(scans[0], "__dict__")
    assert sum(sys.getsizeof(value) for value in (scans[0], scans[0].path, scans[0].name)) < 700
