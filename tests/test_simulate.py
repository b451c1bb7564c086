"""Simulated cohorts: files as a biobank has them, the same for the same seed, and the effects that they promise."""

from __future__ import annotations

import errno
import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from calling import call

from ingest import IngestSettings, ingest, open_store
from ingest.brains import Anatomy, Effects, mni_volume, native_volume
from ingest.cli import main
from ingest.cohort import bids_table, draw_people, ukb_table, visits_of
from ingest.errors import StoreError
from ingest.grid import FSL_MNI152_AFFINE, FSL_MNI152_SHAPE
from ingest.phenotypes import parse_ukb_column
from ingest.simulate import simulate_cohort
from ingest.template import load_template

STILL = Effects(individual_mm=0.0)


@pytest.fixture(scope="module")
def ukb(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "ukb"
    simulate_cohort(folder, 20, seed=3)
    return folder


@pytest.fixture(scope="module")
def ukb_store(ukb, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "ukb.zarr"
    return ingest(ukb, out, IngestSettings(phenotypes=ukb / "phenotypes.csv")), open_store(out)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def image_of(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_archives_look_like_uk_biobank(ukb):
    truth = pd.read_csv(ukb / "truth.csv", dtype={"participant": str, "session": str}, keep_default_na=False)
    archives = sorted((ukb / "Bulk" / "Brain MRI" / "T1").rglob("*.zip"))
    assert len(archives) == len(truth) == 21  # 20 people, one of them twice
    assert sorted(truth["file"]) == [str(a.relative_to(ukb)) for a in archives]
    assert set(truth["fault"]) == {"", "unusable"}
    for row in truth.itertuples():
        assert row.participant.startswith("9")
        assert Path(row.file).parent.name == row.participant[:2]
        assert Path(row.file).name == f"{row.participant}_20252_{row.session}_0.zip"
        with zipfile.ZipFile(ukb / row.file) as archive:
            members = set(archive.namelist())
            if row.fault:
                assert members == {"T1/unusable/T1_brain.nii.gz"}
                continue
            assert members == {"T1/T1_brain_to_MNI.nii.gz", "T1/transforms/T1_to_MNI_linear.mat"}
            image = image_of(archive.read("T1/T1_brain_to_MNI.nii.gz"))
            matrix = np.array(archive.read("T1/transforms/T1_to_MNI_linear.mat").split(), float).reshape(4, 4)
        assert image.shape == FSL_MNI152_SHAPE
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, FSL_MNI152_AFFINE)
        assert image.header["sform_code"] == image.header["qform_code"] == 4
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(row.head_scale, abs=1e-4)
        values = image.get_fdata()
        np.testing.assert_array_equal(values[::-1].T != 0, load_template().fsl_mask[:, :, ::-1])
        assert values.min() < 0
        assert 700 < np.percentile(values[values > 0], 99) < 2000


def test_the_store_says_that_it_is_simulated(ukb_store, ukb):
    summary, store = ukb_store
    assert store.attrs["simulated"] is True
    assert summary.clean, summary.failures
    assert summary.status == {"ok": 20, "unusable": 1}
    template = load_template().fsl_mask[:, :, ::-1]
    below = template.sum() - template[11:171, 13:205, 11:171].sum()  # of the brainstem
    assert (store.scans["cut_off_voxels"][store.ok_rows] <= below).all()
    assert (store.scans["cut_off_voxels"][store.ok_rows] > 0.5 * below).all()
    assert any("20 scans have positive voxels outside the grid" in warning for warning in summary.warnings)
    assert json.loads((ukb / "simulation.json").read_text())["simulated"] is True
    truth = pd.read_csv(ukb / "truth.csv", dtype={"participant": str, "session": str}).set_index(
        ["participant", "session"]
    )
    ok = store.ok_rows
    keys = list(zip(store.scans["participant"][ok], store.scans["session"][ok], strict=True))
    np.testing.assert_array_equal(store.phenotypes["age"][ok], truth.loc[keys, "age"])
    np.testing.assert_array_equal(store.phenotypes["sex"][ok] == 1, truth.loc[keys, "sex"] == "male")
    np.testing.assert_allclose(store.scans["head_scale"][ok], truth.loc[keys, "head_scale"], atol=1e-4)


def test_same_seed_same_bytes(tmp_path):
    for name, seed, threads in (("a", 5, 1), ("b", 5, 2), ("c", 6, 2)):
        simulate_cohort(tmp_path / name, 2, seed=seed, threads=threads)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) != set(c)


def test_bids_cohort(tmp_path):
    scans = simulate_cohort(tmp_path / "bids", 3, layout="bids", seed=2)
    assert scans == 4
    assert json.loads((tmp_path / "bids/dataset_description.json").read_text())["BIDSVersion"]
    summary = ingest(tmp_path / "bids", tmp_path / "bids.zarr")
    store = open_store(tmp_path / "bids.zarr")
    assert summary.clean
    assert summary.status == {"ok": 4}
    assert summary.warnings == []
    assert store.variables["income"]["task"] == "ordinal"
    assert store.attrs["simulated"] is True
    assert store.grid.space == "native"
    assert (store.scans["cut_off_voxels"] == 0).all()
    assert store.phenotypes["age"].between(45, 82).all()
    truth = pd.read_csv(tmp_path / "bids/truth.csv").set_index("file").loc[store.scans["source"]]
    # A larger scale means a smaller head: the volume times the scale is the same for all but for the deformations.
    volume_in_mni = store.scans["brain_voxels"].to_numpy() * truth["head_scale"].to_numpy()
    assert volume_in_mni.std() / volume_in_mni.mean() < 0.03
    image = nib.load(tmp_path / "bids" / truth.index[0])
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    assert image.get_data_dtype() == np.int16
    assert not np.allclose(image.affine[:3, :3], np.diag(np.diag(image.affine)[:3]))


def test_the_table_is_spelt_and_coded_as_in_uk_biobank():
    people = draw_people(2000, seed=0)
    table = ukb_table(people)
    assert table["eid"].is_unique
    assert len(table) == 2100  # people without a scan are in it too
    assert all(parse_ukb_column(column) for column in table.columns.drop("eid"))
    assert set(table["31-0.0"]) == {0, 1}
    assert table["21003-2.0"].dropna().between(45, 82).all()
    income = table["738-2.0"].dropna()
    assert set(income) == {-3, -1, 1, 2, 3, 4, 5}
    assert 0.02 < table["738-2.0"][people["scanned"].to_numpy()].isna().mean() < 0.12
    assert table["709-2.0"].max() > 20  # a heavy tail
    assert set(table["20116-2.0"].dropna()) == {-3, 0, 1, 2}
    both = table[["21003-2.0", "21003-3.0"]].dropna()
    assert (both["21003-3.0"] - both["21003-2.0"]).between(2, 3).all()
    assert len(both) == 100
    assert sum(session == "3" for _, session in visits_of(people)) == 100
    fluid = people["fluid_intelligence"].corr(people["intelligence"])
    assert fluid > 0.95
    for name in ("household_size", "income", "smoking"):
        answers = people[name].where(people[name] >= 0)
        for cause in ("age", "male", "intelligence", "head_scale"):
            assert abs(answers.corr(people[cause].astype(float), method="spearman")) < 0.08
    bids = bids_table(people)
    assert list(bids.columns[:3]) == ["participant_id", "sex", "age"]
    assert (bids["income"].dropna() > 0).all()


def test_age_widens_the_ventricles_and_lowers_the_contrast():
    sizes, contrasts = [], []
    for age in (45, 64, 82):
        shape_only = draw(age=age, effects=replace(STILL, contrast_per_decade=0.0))
        bodies = shape_only[78:100, 95:150, 60:122]  # there what is dark is ventricle
        sizes.append(int((bodies < 0.6 * np.percentile(bodies, 90)).sum()))
        volume = draw(age=age, effects=replace(STILL, ventricles_per_decade=0.0))
        deciles = np.percentile(volume[volume > 0], [20, 80])
        contrasts.append(deciles[1] / deciles[0])
    assert sizes[1] > 1.1 * sizes[0]
    assert sizes[2] > 1.1 * sizes[1]
    assert contrasts[0] > 1.01 * contrasts[1] > 1.01**2 * contrasts[2]


def test_sex_changes_shape_within_the_same_mask_and_nothing_else_does_so():
    women, men = draw(male=False), draw(male=True)
    np.testing.assert_array_equal(women != 0, men != 0)
    assert np.abs(women - men)[women != 0].mean() > 10
    temple, occiput = np.s_[35:65, 110:150, 20:60], np.s_[60:90, 25:50, 70:110]
    assert np.abs(women - men)[temple].mean() > 5 * np.abs(women - men)[occiput].mean()


def test_heads_of_men_are_larger():
    people = draw_people(3000, seed=1)
    volume = 1 / people["head_scale"]
    assert volume[people["male"]].mean() / volume[~people["male"]].mean() == pytest.approx(1.12, abs=0.01)
    small, _ = native_volume(person(head_scale=1.6), STILL, np.random.default_rng(0))
    large, _ = native_volume(person(head_scale=1.2), STILL, np.random.default_rng(0))
    assert (large > 0).sum() / (small > 0).sum() == pytest.approx(1.6 / 1.2, rel=0.02)


def person(*, age: float = 64, male: bool = True, head_scale: float = 1.3) -> Anatomy:
    return Anatomy(age=age, male=male, intelligence=0.0, head_scale=head_scale, seed=(0, 1))


def draw(*, age: float = 64, male: bool = True, scan: int = 0, effects: Effects = STILL) -> np.ndarray:
    """Draw a brain, (z, y, x) from left to right."""
    return mni_volume(person(age=age, male=male), effects, np.random.default_rng([7, scan]))[:, :, ::-1]


def test_a_folder_that_holds_anything_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        simulate_cohort(tmp_path, 2)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    done = call(main, "simulate", tmp_path / "file", "--participants", 2)
    assert done.returncode == 1
    assert "file is a file, expected a new or empty folder; choose another name\n" in done.stderr
    done = call(main, "simulate", tmp_path / "file" / "sim", "--participants", 2)
    assert done.returncode == 1
    assert "sim cannot be written: Not a directory; choose a folder where there is leave and room" in done.stderr

    def fill_the_disk(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ingest.simulate._write_ukb_scan", fill_the_disk)
    with pytest.raises(StoreError, match=r"full cannot be written: No space left on device; .* remove what was begun"):
        simulate_cohort(tmp_path / "full", 2)


def test_a_folder_may_have_any_name_and_the_layouts_are_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ingest.cli.simulate_cohort", lambda *_, **__: 3)
    done = call(main, "simulate", "[/x]", "--participants", 2)
    assert (done.returncode, done.stdout) == (0, "[/x]: 3 scans of 2 simulated participants\n"), done.stderr
    done = call(main, "simulate", "[/x]", "--participants", 2, "--json")
    assert json.loads(done.stdout) == {"directory": "[/x]", "scans": 3, "participants": 2, "seed": 0}
    assert "<ukb|bids>" in call(main, "simulate", "--help").stdout


@pytest.mark.parametrize(("participants", "layout"), [(0, "ukb"), (2, "dicom")])
def test_settings_that_make_no_sense_are_refused(tmp_path, participants, layout):
    with pytest.raises(ValueError, match="expected"):
        simulate_cohort(tmp_path / "x", participants, layout=layout)
    assert not (tmp_path / "x").exists()
