"""The version-1 store: what others read from it, what ingest says of bad files, and which side is left."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import google_crc32c
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from calling import call
from conftest import ellipsoid, mni_brain, write_nifti, write_ukb_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import mni_picture, native_picture

from ingest import IngestSettings, ingest, open_store
from ingest.cli import main
from ingest.decode import decode_shard, decode_shard_slowly
from ingest.encode import encode_shard
from ingest.errors import StoreError
from ingest.grid import FSL_MNI152_AFFINE
from ingest.inspection import summarise_store
from ingest.run import Space
from ingest.scan import STATUSES
from ingest.shard import index_bytes
from loaders.reader import VolumeReader

MEMBER = "T1/T1_brain_to_MNI.nii.gz"


@pytest.fixture(scope="module")
def ukb(tmp_path_factory) -> Path:
    """Return a UK Biobank tree with three good scans and one of each fault."""
    folder = tmp_path_factory.mktemp("ukb") / "Brain MRI" / "T1"
    scratch = tmp_path_factory.mktemp("scratch")
    good = []
    for seed in range(3):
        path = write_nifti(scratch / f"{seed}.nii.gz", mni_brain(seed=seed), FSL_MNI152_AFFINE, code=4)
        good.append(path.read_bytes())
    matrix = b"0.9 0 0 1  \n0 0.9 0 2  \n0 0 1.0 3  \n0 0 0 1  \n"
    write_ukb_zip(folder, "9000001", {MEMBER: good[0], "T1/transforms/T1_to_MNI_linear.mat": matrix})
    write_ukb_zip(folder, "9000001", {MEMBER: good[1]}, instance=3)
    write_ukb_zip(folder, "9100002", {MEMBER: good[2]})
    write_ukb_zip(folder, "9100003", {"T1/unusable/T1.nii.gz": good[0]})
    write_ukb_zip(folder, "9100004", {"T1/T1.nii.gz": good[0]})
    write_ukb_zip(folder, "9100005", {MEMBER: good[0][:-5000]})
    write_ukb_zip(folder, "9100006", {MEMBER: gzip.compress(b"no image" * 99)})
    (folder / "91" / "9100007_20252_2_0.zip").write_bytes(b"PK not a zip")
    write_ukb_zip(folder / "again", "9100002", {MEMBER: good[0]})
    write_ukb_zip(folder, "9100008", {"FreeSurfer/x": b"another field"}, field=20263)
    empty = write_nifti(scratch / "empty.nii.gz", np.zeros((182, 218, 182), np.uint8), FSL_MNI152_AFFINE)
    write_ukb_zip(folder, "9100009", {MEMBER: empty.read_bytes()})
    broken = write_ukb_zip(folder, "9100010", {MEMBER: good[0]})
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1  # the zip's own checksum finds it
    broken.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def stored(ukb, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "ukb.zarr"
    return out, ingest(ukb, out)


EXPECTED = {
    ("9000001", "2"): "ok",
    ("9000001", "3"): "ok",
    ("9100002", "2"): "ok",
    ("9100003", "2"): "unusable",
    ("9100004", "2"): "missing_member",
    ("9100005", "2"): "bad_nifti",
    ("9100006", "2"): "bad_nifti",
    ("9100007", "2"): "bad_archive",
    ("9100009", "2"): "bad_image",
    ("9100010", "2"): "bad_archive",
}


def test_every_scan_has_a_row_with_its_status(stored):
    path, summary = stored
    scans = open_store(path).scans
    assert summary.scans == len(scans) == len(EXPECTED) + 1
    first = scans[scans["status"] != "duplicate"]
    assert {
        (p, s): st for p, s, st in zip(first["participant"], first["session"], first["status"], strict=True)
    } == EXPECTED
    assert list(scans["participant"][scans["status"] == "duplicate"]) == ["9100002"]
    assert set(scans["status"]) <= set(STATUSES)
    assert (scans["error"][scans["status"] != "ok"] != "").all()
    assert (scans["error"][scans["status"] == "ok"] == "").all()
    assert len(summary.failures) == 6  # all but the two expected absences and the three good ones
    assert not summary.clean
    assert scans["source"].str.startswith(("90/", "91/", "again/")).all()
    row = scans[scans["participant"] == "9000001"].iloc[0]
    assert row["head_scale"] == pytest.approx(0.81)
    assert row["source_size"] > 0


def test_zarr_python_and_xarray_read_what_the_reference_says(stored, ukb, tmp_path):
    path, _ = stored
    row = open_store(path).ok_rows[0]
    with zipfile.ZipFile(next(ukb.rglob("9000001_20252_2_0.zip"))) as archive:
        (tmp_path / "source.nii.gz").write_bytes(archive.read(MEMBER))
    expected = mni_picture(tmp_path / "source.nii.gz")
    by_zarr = zarr.open_group(path, mode="r")["volumes"][row]
    assert np.abs(by_zarr.astype(int) - expected).max() <= 1
    dataset = xarray.open_zarr(path, consolidated=False)
    assert dataset["volumes"].dims == ("scan", "z", "y", "x")
    np.testing.assert_array_equal(dataset["volumes"][row].to_numpy(), by_zarr)
    with VolumeReader(path) as reader:
        np.testing.assert_array_equal(reader.read([row])[0], by_zarr)


def test_stored_times_scale_is_the_source(stored):
    path, _ = stored
    store = open_store(path)
    row = int(store.ok_rows[0])
    with VolumeReader(store) as reader:
        values = reader.read([row])[0] * store.scans["scale"][row] + store.scans["offset"][row]
    expected = mni_brain(seed=0)[::-1][11:171, 13:205, 11:171].transpose(2, 1, 0)
    unclipped = expected < np.percentile(expected[expected > 0], 99.9)
    assert np.abs(values - expected)[unclipped].max() <= store.scans["scale"][row] / 2 + 1e-6


def test_attributes(stored):
    path, _ = stored
    attrs = json.loads((path / "zarr.json").read_text())["attributes"]
    assert attrs["format"] == "brain-volumes"
    assert attrs["format_version"] == 1
    assert attrs["simulated"] is False
    assert attrs["grid"] == {
        "shape_zyx": [160, 192, 160],
        "voxel_mm": 1.0,
        "affine_ras": [[1, 0, 0, -80], [0, 1, 0, -113], [0, 0, 1, -61], [0, 0, 0, 1]],
        "space": "MNI152",
    }
    assert attrs["intensity"]["percentile"] == 99.9
    assert attrs["settings"]["layout"] == "ukb"


def test_dask_workers_store_the_same(stored, ukb, tmp_path):
    path, summary = stored
    other = ingest(ukb, tmp_path / "other.zarr", workers=2)
    assert other.status == summary.status
    a, b = open_store(path), open_store(tmp_path / "other.zarr")
    pd.testing.assert_frame_equal(a.scans, b.scans)
    for row in a.ok_rows:
        shard = Path("volumes/c") / str(row) / "0/0/0"
        assert (path / shard).read_bytes() == (tmp_path / "other.zarr" / shard).read_bytes()


def test_inspect(stored):
    summary = summarise_store(stored[0]).to_json()
    assert summary["status"]["ok"] == 3
    assert summary["stored_bytes"] == sum(
        f.stat().st_size for f in (stored[0] / "volumes" / "c").rglob("*") if f.is_file()
    )
    assert summary["ratio"] == pytest.approx(3 * 160 * 192 * 160 / summary["stored_bytes"], abs=1e-3)


def test_left_stays_left_from_ukb_and_from_bids(tmp_path):
    left = (-40.0, 10.0, 5.0)  # in mm to the right, so this is the patient's left
    scratch = write_nifti(tmp_path / "m.nii.gz", mni_brain(marker_mm=left), FSL_MNI152_AFFINE, code=4)
    write_ukb_zip(tmp_path / "ukb", "9000001", {MEMBER: scratch.read_bytes()})
    for name, sign in (("LAS", -1.0), ("RAS", 1.0)):
        affine = np.diag([sign, 1.0, 1.0, 1.0])
        affine[:3, 3] = [-sign * 80, -100, -70]
        data = ellipsoid(affine, (161, 200, 141), marker_mm=left).astype(np.float32)
        write_nifti(tmp_path / "bids" / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz", data, affine)
    for source in ("ukb", "bids"):
        summary = ingest(tmp_path / source, tmp_path / f"{source}.zarr")
        assert summary.clean
        with VolumeReader(tmp_path / f"{source}.zarr") as reader:
            for volume in reader.read(reader.store.ok_rows):
                z, y, x = np.nonzero(volume == 255)
                affine = reader.store.grid.affine
                found = nib.affines.apply_affine(affine, [np.median(x), np.median(y), np.median(z)])
                assert found == pytest.approx(left, abs=2)


def test_bids_picks_up_its_participants(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for number in (1, 2):
        for session in ("1", "2"):
            name = f"sub-0{number}/ses-{session}/anat/sub-0{number}_ses-{session}_acq-x_T1w.nii.gz"
            write_nifti(tmp_path / "bids" / name, ellipsoid(affine, (40, 50, 60), seed=number) + 1, affine)
    write_nifti(tmp_path / "bids/sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz", np.ones((4, 4, 4)), affine)
    write_nifti(tmp_path / "bids/derivatives/sub-01/anat/sub-01_T1w.nii.gz", np.ones((4, 4, 4)), affine)
    (tmp_path / "bids/participants.tsv").write_text(
        "participant_id\tage\tgender\tremark\nsub-01\t31.5\tm\tn/a\nsub-02\tn/a\tf\tn/a\n"
    )
    ingest(tmp_path / "bids", tmp_path / "out.zarr")
    store = open_store(tmp_path / "out.zarr")
    assert list(zip(store.scans["participant"], store.scans["session"], strict=True)) == [
        ("sub-01", "1"), ("sub-01", "2"), ("sub-02", "1"), ("sub-02", "2"),
    ]  # fmt: skip
    np.testing.assert_array_equal(store.phenotypes["age"], [31.5, 31.5, np.nan, np.nan])
    np.testing.assert_array_equal(store.phenotypes["gender"], [1, 1, 0, 0])
    assert store.variables["gender"]["labels"] == {"0": "f", "1": "m"}


def test_one_space_per_store(tmp_path):
    write_nifti(tmp_path / "src/a.nii.gz", mni_brain(), FSL_MNI152_AFFINE, code=4)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    write_nifti(tmp_path / "src/b.nii", ellipsoid(affine, (40, 50, 60)) + 1, affine)
    summary = ingest(tmp_path / "src", tmp_path / "mni.zarr")
    assert summary.status == {"ok": 1, "wrong_shape": 1}
    assert "native" in summary.failures[0][2]
    summary = ingest(tmp_path / "src", tmp_path / "native.zarr", IngestSettings(space=Space.native))
    assert open_store(tmp_path / "native.zarr").scans["status"].to_list() == ["wrong_shape", "ok"]


@pytest.mark.real_data
def test_real_brains_and_odd_files(real_data, tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for name in ("sub-01", "sub-30"):
        (source / f"{name}.nii.gz").symlink_to(real_data / "ds002748" / name / "anat" / f"{name}_T1w.nii.gz")
    for path in (real_data / "odd").glob("*.nii*"):
        (source / path.name).symlink_to(path)
    summary = ingest(source, tmp_path / "out.zarr")
    store = open_store(tmp_path / "out.zarr")
    status = dict(zip(store.scans["source"], store.scans["status"], strict=True))
    assert status["sub-01.nii.gz"] == status["sub-30.nii.gz"] == "ok"
    assert status["example4d.nii.gz"] == status["functional.nii"] == "unsupported"
    assert summary.scans == len(list(source.iterdir()))
    row = list(store.scans["source"]).index("sub-30.nii.gz")
    with VolumeReader(store) as reader:
        difference = reader.read([row])[0].astype(int) - native_picture(source / "sub-30.nii.gz")
    assert np.abs(difference).max() <= 1


def test_a_folder_that_is_no_store_is_never_deleted(ukb, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(StoreError, match="not a Zarr store"):
        ingest(ukb, tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").exists()


def test_unknown_versions_are_refused_by_name(stored, tmp_path):
    copy = tmp_path / "copy.zarr"
    copy.mkdir()
    meta = json.loads((stored[0] / "zarr.json").read_text())
    meta["attributes"]["format_version"] = 7
    (copy / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="version 7"):
        open_store(copy)
    with pytest.raises(FileNotFoundError, match="make one with"):
        open_store(tmp_path / "absent.zarr")


@settings(max_examples=30, deadline=None)
@given(
    volume=st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)).flatmap(
        lambda s: st.tuples(st.just(s[0]), arrays(np.uint8, (s[0] * s[1], s[2], s[3])))
    )
)
def test_shards_round_trip_through_our_decoder_and_zarr(volume, tmp_path_factory):
    slab, data = volume
    shard = encode_shard(data, slab)
    for decode in (decode_shard, decode_shard_slowly):
        out = np.empty_like(data)
        decode(np.frombuffer(shard, np.uint8), slab, out)
        np.testing.assert_array_equal(out, data)

    codecs = [{"name": "numcodecs.lz4", "configuration": {}}, {"name": "crc32c", "configuration": {}}]
    path = tmp_path_factory.mktemp("z")
    array = zarr.create_array(
        path,
        shape=(1, *data.shape),
        chunks=(1, slab, *data.shape[1:]),
        shards=(1, *data.shape),
        dtype="uint8",
        compressors=codecs,
    )
    file = path / "c/0/0/0/0"
    file.parent.mkdir(parents=True)
    file.write_bytes(shard)
    np.testing.assert_array_equal(array[0], data)


@settings(max_examples=200, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position, bit):
    data = np.random.default_rng(0).integers(0, 30, (8, 16, 16)).astype(np.uint8)
    shard = np.frombuffer(encode_shard(data, 2), np.uint8).copy()
    shard[int(position * len(shard))] ^= 1 << bit
    for decode in (decode_shard, decode_shard_slowly):
        with pytest.raises(ValueError, match=r"checksum|outside"):
            decode(shard, 2, np.empty_like(data))


@pytest.mark.parametrize("length", [0, 3, index_bytes(4) - 1, index_bytes(4), 200])
def test_a_shortened_shard_is_found(length):
    data = np.random.default_rng(0).integers(0, 30, (8, 16, 16)).astype(np.uint8)
    shard = np.frombuffer(encode_shard(data, 2), np.uint8)[:length]
    for decode in (decode_shard, decode_shard_slowly):
        with pytest.raises(ValueError, match=r"short|checksum"):
            decode(shard, 2, np.empty_like(data))


def with_right_checksums(shard: np.ndarray, slabs: int) -> np.ndarray:
    """Return a shard whose checksums are those of its bytes, as a faulty or hostile writer would leave it."""
    shard = shard.copy()
    tail = len(shard) - index_bytes(slabs)
    index = shard[tail:-4].view("<u8").reshape(slabs, 2).tolist()
    ends = [(offset, offset + nbytes - 4) for offset, nbytes in index if offset + nbytes <= tail and nbytes > 4]
    for start, end in [*ends, (tail, len(shard) - 4)]:
        checksum = google_crc32c.value(shard[start:end].tobytes())
        shard[end : end + 4] = np.frombuffer(checksum.to_bytes(4, "little"), np.uint8)
    return shard


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_both_decoders_say_the_same_of_shards_with_right_checksums(changes):
    data = np.random.default_rng(0).integers(0, 3, (8, 16, 16)).astype(np.uint8)
    shard = np.frombuffer(encode_shard(data, 2), np.uint8).copy()
    for position, value in changes:
        shard[int(position * (len(shard) - 4))] = value
    shard = with_right_checksums(shard, 4)
    found = []
    for decode in (decode_shard, decode_shard_slowly):
        out = np.zeros(data.size + 64, np.uint8)
        try:
            decode(shard, 2, out[: data.size].reshape(data.shape))
            found.append(out.tobytes())
        except ValueError as error:
            found.append(str(error))
        assert not out[data.size :].any()  # nothing is written beyond the end
    assert found[0] == found[1]


def test_the_compiled_decoder_is_the_one_in_use():
    assert decode_shard is not decode_shard_slowly


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the ingest command as a user does."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(ukb, tmp_path):
    out = tmp_path / "a.zarr"
    table = tmp_path / "p.csv"
    table.write_text("eid,31-0.0,21003-2.0,21003-3.0\n9000001,1,55,58\n9100002,0,,\n")
    done = run(ukb, out, "--phenotypes", table, "--json")
    assert done.returncode == 1, done.stderr  # there are bad files
    summary = json.loads(done.stdout)
    assert summary["scans"] == 11
    assert summary["status"]["ok"] == 3
    assert summary["volumes_per_second"] > 0

    done = call(main, "inspect", out, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["phenotypes"] == {"sex": {"missing": 0}, "age": {"missing": 1}}
    text = call(main, "inspect", out).stdout
    assert "160 x 192 x 160" in text
    assert "MNI152" in text

    done = call(main, ukb, out)
    assert done.returncode == 1  # the bad files are still bad
    assert "11 scans" in done.stdout
    assert "0 new, 0 changed, 0 tried again" in done.stdout
    done = call(main, ukb, out, "--slab", 8)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "--overwrite" in done.stderr
    done = call(main, tmp_path / "nowhere", tmp_path / "b.zarr")
    assert done.returncode == 1
    assert "no folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_expected_absences_leave_exit_code_0(ukb, tmp_path):
    for name in ("9000001_20252_2_0.zip", "9100003_20252_2_0.zip", "9100004_20252_2_0.zip"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).symlink_to(next(ukb.rglob(name)))
    done = call(main, tmp_path / "src", tmp_path / "out.zarr")
    assert done.returncode == 0, done.stderr
    assert "1 missing_member, 1 ok, 1 unusable" in done.stdout
