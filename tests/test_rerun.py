"""What a run does to a store that is there: nothing is lost for want of a source, and nothing is replaced too soon."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from calling import call
from conftest import ellipsoid, write_nifti

from ingest import IngestSettings, ingest, open_store
from ingest.cli import main
from ingest.errors import SourceError, StoreError, TableError
from ingest.grid import FSL_MNI152_AFFINE, FSL_MNI152_SHAPE
from ingest.intensity import IntensityRule
from ingest.layouts import Layout
from ingest.lock import store_lock
from ingest.settings import Space
from ingest.shard import shard_path
from ingest.store import resize_store
from ingest.verify import verify
from ingest.withdraw import withdraw
from loaders import VolumeReader

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]


def add_scan(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_nifti(path, ellipsoid(AFFINE, (32, 42, 32), seed=seed).astype(np.int16), AFFINE)


@pytest.fixture
def source(tmp_path) -> Path:
    """Return a folder of three scans."""
    for number in range(3):
        add_scan(tmp_path / "src" / f"p{number}.nii.gz", number)
    return tmp_path / "src"


@pytest.fixture
def store(source, tmp_path) -> Path:
    out = tmp_path / "s.zarr"
    ingest(source, out)
    return out


def status(store: Path) -> dict[str, str]:
    scans = open_store(store).scans
    return dict(zip(scans["source"], scans["status"], strict=True))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def listed(path: Path, *people: str) -> Path:
    path.write_text("eid\n" + "\n".join(people) + "\n")
    return path


# ---- sources that are away


@pytest.mark.parametrize("how", ["broken link", "fifo", "cut off"])
def test_a_volume_is_kept_while_its_file_cannot_be_read(source, store, how):
    before = everything(store)
    file = source / "p1.nii.gz"
    file.rename(source.parent / "away.nii.gz")
    if how == "broken link":
        file.symlink_to(source / "nowhere")
    elif how == "cut off":
        file.write_bytes((source.parent / "away.nii.gz").read_bytes()[:-2000])
    else:
        os.mkfifo(file)
    for _ in range(2):
        summary = ingest(source, store)
        assert not summary.clean
        ((name, reason, why),) = summary.failures
        assert (name, reason) == ("p1.nii.gz", "bad_nifti" if how == "cut off" else "read_error")
        assert "its volume of before is kept" in why
        assert everything(store) == before
    file.unlink()
    (source.parent / "away.nii.gz").rename(file)
    summary = ingest(source, store)
    assert (summary.clean, summary.changed) == (True, 0)


def test_a_file_that_was_removed_is_no_failure_of_later_runs(source, store):
    (source / "p3.nii.gz").write_bytes(b"broken")
    assert [failure[1] for failure in ingest(source, store).failures] == ["bad_nifti"]
    assert not ingest(source, store).clean
    (source / "p3.nii.gz").unlink()
    summary = ingest(source, store)
    assert summary.clean
    assert summary.status == {"bad_nifti": 1, "ok": 3}


def test_a_duplicate_is_read_once_its_original_has_failed_and_is_gone(tmp_path):
    source, out = tmp_path / "src", tmp_path / "s.zarr"
    (source / "a").mkdir(parents=True)
    (source / "a" / "x.nii.gz").write_bytes(b"broken")
    add_scan(source / "b" / "x.nii.gz", 1)
    flat = IngestSettings(layout=Layout.flat)
    ingest(source, out, flat)
    assert status(out) == {"a/x.nii.gz": "bad_nifti", "b/x.nii.gz": "duplicate"}
    (source / "a" / "x.nii.gz").unlink()
    assert ingest(source, out, flat, retry_failed=True).retried == 1
    assert status(out) == {"a/x.nii.gz": "bad_nifti", "b/x.nii.gz": "ok"}


def test_scans_that_an_earlier_run_did_not_come_to_are_counted(source, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, tmp_path / "k.zarr", on_scan=stop)
    summary = ingest(source, tmp_path / "k.zarr")
    assert (summary.new, summary.changed, summary.retried) == (0, 0, 0)
    assert summary.left == 2


# ---- what a store is of


def test_a_space_is_chosen_by_the_first_scan_that_can_be_read(tmp_path):
    source, out = tmp_path / "src", tmp_path / "s.zarr"
    source.mkdir()
    (source / "a.nii.gz").write_bytes(b"broken")
    summary = ingest(source, out)
    assert not summary.clean
    assert summary.warnings[-1].startswith("no scan could be stored; a.nii.gz is bad_nifti: ")
    assert open_store(out).grid.space == "native"
    whole = ellipsoid(FSL_MNI152_AFFINE, FSL_MNI152_SHAPE).astype(np.uint8)
    write_nifti(source / "b.nii.gz", whole, FSL_MNI152_AFFINE)
    ingest(source, out)
    assert open_store(out).grid.space == "MNI152"
    with pytest.raises(StoreError, match=r"was made with space 'auto', this run asks for 'native'"):
        ingest(source, out, IngestSettings(space=Space.native))


def test_a_store_of_nothing_but_missing_members_is_no_success(tmp_path):
    assert call(main, "simulate", tmp_path / "sim", "--participants", 1, "--seed", 1).returncode == 0
    done = call(main, tmp_path / "sim", tmp_path / "s.zarr", "--image", "T1_brian_to_MNI")
    assert done.returncode == 1
    assert "no scan could be stored; " in done.stderr
    assert "the archive has no T1/T1_brian_to_MNI.nii.gz" in done.stderr


def manifest(path: Path, **people: str) -> Path:
    path.write_text("path,participant\n" + "".join(f"{name}.nii.gz,{person}\n" for name, person in people.items()))
    return path


def test_a_manifest_that_is_put_right_puts_the_store_right(source, tmp_path):
    table, out = tmp_path / "t.csv", tmp_path / "s.zarr"
    table.write_text("participant,age\na,50\nb,60\nc,70\n")
    ingest(manifest(source / "m.csv", p0="a", p1="b", p2="c"), out, IngestSettings(phenotypes=table))
    swapped = manifest(source / "m.csv", p0="b", p1="a", p2="c")
    summary = ingest(swapped, out)
    assert (summary.changed, summary.status) == (2, {"ok": 3})
    assert "2 new scans have no phenotypes" in summary.warnings[0]
    found = open_store(out)
    assert found.scans["participant"].tolist() == ["b", "a", "c"]
    assert found.phenotypes["age"].tolist()[2] == 70
    assert found.phenotypes["age"].isna().sum() == 2
    ingest(swapped, out, IngestSettings(phenotypes=table))
    assert open_store(out).phenotypes["age"].tolist() == [60, 50, 70]
    assert verify(out, against=swapped, sample=0).clean
    ingest(manifest(source / "m.csv", p0="b", p1="b", p2="c"), out)
    assert status(out) == {"p0.nii.gz": "ok", "p1.nii.gz": "duplicate", "p2.nii.gz": "ok"}
    assert not shard_path(out, 1).exists()


def test_one_scan_in_two_spellings_is_a_duplicate(tmp_path):
    for number in range(2):
        add_scan(tmp_path / f"{number}.nii.gz", number)
    text = "path,participant,session\n0.nii.gz,sub-9000001,ses-2\n1.nii.gz,9000001,2.0\n"
    (tmp_path / "m.csv").write_text(text)
    ingest(tmp_path / "m.csv", tmp_path / "s.zarr")
    assert status(tmp_path / "s.zarr") == {"0.nii.gz": "ok", "1.nii.gz": "duplicate"}


def test_scans_of_two_manifests_with_the_same_names_do_not_replace_each_other(tmp_path):
    out = tmp_path / "s.zarr"
    for site in ("1", "2"):
        add_scan(tmp_path / site / "x.nii.gz", int(site))
        manifest(tmp_path / site / "m.csv", x=f"p{site}")
    ingest(tmp_path / "1" / "m.csv", out)
    before = everything(out)
    with pytest.raises(StoreError, match=r"x\.nii\.gz is p1 .*in the store, and p2 .*in another file now"):
        ingest(tmp_path / "2" / "m.csv", out)
    assert everything(out) == before


def test_the_table_of_a_bids_tree_gives_way_to_one_that_was_given(tmp_path):
    source, out, other = tmp_path / "src", tmp_path / "s.zarr", tmp_path / "iq.csv"
    add_scan(source / "sub-1" / "anat" / "sub-1_T1w.nii.gz", 1)
    (source / "participants.tsv").write_text("participant_id\tage\nsub-1\t50\n")
    other.write_text("participant,iq\nsub-1,100\n")
    ingest(source, out)
    assert open_store(out).phenotypes.to_dict("list") == {"age": [50]}
    ingest(source, out, IngestSettings(phenotypes=str(other)))
    for _ in range(2):
        assert open_store(out).phenotypes.to_dict("list") == {"iq": [100]}
        assert ingest(source, out).warnings == []
    (source / "participants.tsv").write_text("participant_id\tage\n")
    summary = ingest(source, tmp_path / "other.zarr")  # nobody has asked for that table
    assert summary.status == {"ok": 1}
    assert summary.warnings[0].startswith("participants.tsv is left out: ")
    with pytest.raises(TableError):
        ingest(source, tmp_path / "given.zarr", IngestSettings(phenotypes=source / "participants.tsv"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "bidz"}, "layout is 'bidz', expected one of auto, ukb"),
        ({"space": "tal"}, "space is 'tal', expected one of auto, mni"),
        ({"slab": 7}, "slab is 7, expected a divisor of the grid's 160 planes"),
        ({"intensity": {"top_level": 300}}, "top_level is 300, expected a whole number from 1 to 255"),
        ({"intensity": {"percentile": 100.5}}, r"percentile is 100\.5, expected more than 0 and at most 100"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IngestSettings(**{k: IntensityRule(**v) if k == "intensity" else v for k, v in settings.items()})


def test_settings_may_be_names(tmp_path):
    add_scan(tmp_path / "src" / "sub-1" / "anat" / "sub-1_T1w.nii.gz", 1)
    (tmp_path / "src" / "participants.tsv").write_text("participant_id\tage\nsub-1\t50\n")
    ingest(tmp_path / "src", tmp_path / "s.zarr", IngestSettings(layout="bids", space="auto"))
    assert open_store(tmp_path / "s.zarr").phenotypes.to_dict("list") == {"age": [50]}
    assert IngestSettings(layout="bids").layout is Layout.bids


# ---- what is replaced, and when


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source": "typo"}, SourceError),
        ({"phenotypes": "nosuch.csv"}, TableError),
        ({"max_memory": 10}, ValueError),
    ],
)
def test_a_store_is_not_replaced_before_all_is_known_to_be_right(source, store, changes, error):
    before = everything(store)
    settings = IngestSettings(phenotypes=changes.pop("phenotypes", None))
    place = source.parent / changes.pop("source", source.name)
    with pytest.raises(error):
        ingest(place, store, settings, overwrite=True, **changes)
    assert everything(store) == before
    assert ingest(source, store, overwrite=True).new == 3
    assert open_store(store).attrs["store_id"] != json.loads(before["zarr.json"])["attributes"]["store_id"]


def test_another_zarr_group_is_not_replaced(source, tmp_path):
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_array("x", shape=(3,), dtype="uint8")
    with pytest.raises(StoreError, match="is not a brain-volumes store"):
        ingest(source, tmp_path / "other.zarr", overwrite=True)
    assert (tmp_path / "other.zarr" / "x").is_dir()


def test_the_withdrawn_are_not_brought_back_by_overwriting(source, store, tmp_path):
    theirs = listed(tmp_path / "w.csv", "p1")
    withdraw(theirs, [store])
    (damaged := tmp_path / "damaged.zarr").symlink_to(store)
    with pytest.raises(StoreError, match=r"people have been withdrawn from .*--withdrawn LIST"):
        ingest(source, store, overwrite=True)
    (store / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"is damaged .*Nobody knows whether people have been withdrawn"):
        ingest(source, damaged, overwrite=True)
    assert ingest(source, damaged, overwrite=True, withdrawn=theirs).status == {"ok": 2}
    assert damaged.is_symlink()
    assert "p1" not in open_store(store).scans["participant"].tolist()


def test_people_on_the_list_are_removed_before_others_are_added(source, store, tmp_path):
    theirs = listed(tmp_path / "w.csv", "p1")
    with pytest.raises(StoreError, match=r"1 people of the list .* remove them first: ingest withdraw LIST"):
        ingest(source, store, withdrawn=theirs)
    withdraw(theirs, [store])
    assert ingest(source, store, withdrawn=theirs).status == {"ok": 2, "withdrawn": 1}


def test_a_store_is_not_made_within_another_one(source, store):
    with pytest.raises(StoreError, match=r"would lie within the Zarr store .*s\.zarr; choose a place beside it"):
        ingest(source, store / "deeper" / "x.zarr")
    assert not (store / "deeper" / "x.zarr").exists()


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_store_has_a_name(source, name):
    with pytest.raises(StoreError, match="has no name of its own"):
        ingest(source, name)


def test_a_store_behind_a_link_has_one_writer_and_is_replaced_behind_it(source, store, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(store)
    with store_lock(store), pytest.raises(StoreError, match="is being written"):
        ingest(source, link)
    add_scan(source / "p9.nii.gz", 9)
    assert ingest(source, link).new == 1
    assert ingest(source, link, overwrite=True).new == 4
    assert link.is_symlink()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert verify(link, against=source, repair=True).clean


# ---- what is damaged


def test_an_array_that_a_killed_run_made_longer_is_put_right(source, store):
    resize_store(store, 4)  # as of a scan whose file is gone since
    assert not verify(store).clean
    ingest(source, store)
    assert verify(store).clean
    assert len(VolumeReader(store).read([0, 1, 2])) == 3


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("scans/participant/c", "column scans/participant of .* has lost chunks"),
        ("scans/scale", "column scans/scale of .* is absent"),
        ("phenotypes/age/c", "column phenotypes/age of .* has lost chunks"),
        ("volumes", "is damaged .*volumes"),
    ],
)
def test_a_store_that_has_lost_something_is_not_read_as_zeros(source, tmp_path, lost, message):
    table, out = tmp_path / "t.csv", tmp_path / "s.zarr"
    table.write_text("participant,age\np0,50\np1,60\np2,70\n")
    ingest(source, out, IngestSettings(phenotypes=table))
    shutil.rmtree(out / lost)
    with pytest.raises(StoreError, match=message):
        open_store(out)


def test_a_store_whose_attributes_are_damaged_is_named(store):
    (store / "zarr.json").write_text((store / "zarr.json").read_text()[:100])
    with pytest.raises(StoreError, match=r"s\.zarr is damaged \(JSONDecodeError: .*ingest with --overwrite"):
        open_store(store)
