"""Withdrawal: nothing of a person is left, nobody else is touched, and they do not come back by themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from conftest import ellipsoid, write_nifti
from killed import DIED, die_at, withdraw_in
from small_store import make_store

from extract import Embeddings, open_embeddings, write_embeddings
from finetune.split import Split, read_split, write_split
from ingest import IngestSettings, ingest, open_store
from ingest.errors import StoreBusyError, StoreError, TableError
from ingest.journal import open_journal, read_journal
from ingest.lock import store_lock
from ingest.report import write_report
from ingest.store import recover_store, rows_of
from ingest.withdraw import _without, withdraw
from loaders import VolumeReader, open_loader

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]
PEOPLE = [str(9000000 + number) for number in range(6)]
GONE = PEOPLE[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with a source, a table, a list, a store and two embedding files."""
    folder = tmp_path_factory.mktemp("withdraw")
    for number, person in enumerate(PEOPLE):
        data = ellipsoid(AFFINE, (32, 42, 32), seed=number).astype(np.int16)
        write_nifti(folder / "src" / f"{person}.nii.gz", data, AFFINE)
    rows = [f"{person},{k % 2},{50 + k}" for k, person in enumerate(PEOPLE)]
    (folder / "p.csv").write_text("\n".join(["eid,31-0.0,21003-2.0", *rows]))
    (folder / "w1234_20261124.csv").write_text(f"{GONE}\n9999999\n")
    ingest(folder / "src", folder / "s.zarr", IngestSettings(phenotypes=folder / "p.csv"))
    store = open_store(folder / "s.zarr")
    embeddings = Embeddings(
        features=np.arange(6 * 4, dtype=np.float32).reshape(6, 4),
        scans=store.scans[["participant", "session", "modality", "brain_voxels", "head_scale"]].assign(row=range(6)),
        phenotypes=store.phenotypes,
        variables=store.variables,
        attrs={"simulated": False, "store": {"path": f"/data/{GONE}/s.zarr", "id": store.attrs["store_id"]}},
    )
    for name in ("e.zarr", "e.h5"):
        write_embeddings(folder / name, embeddings)
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "w")
    return tmp_path / "w"


def decoded(store: Path) -> str:
    """Return everything that a Zarr store or HDF5 file says but for its voxels, as text."""
    if store.suffix == ".h5":
        found = open_embeddings(store)
        return found.scans.to_csv() + found.phenotypes.to_csv() + json.dumps(found.attrs)
    root = zarr.open_group(store, mode="r")
    parts = [json.dumps(dict(root.attrs))]
    for _, group in sorted(root.groups()):
        parts += [f"{name} {dict(array.attrs)} {list(array[:])}" for name, array in sorted(group.arrays())]
    return "\n".join(parts)


def test_nothing_of_a_person_is_left_and_others_are_untouched(place):
    stores = [place / "s.zarr", place / "e.zarr", place / "e.h5"]
    assert all(GONE in decoded(store) for store in stores)
    before = {f: f.read_bytes() for f in (place / "s.zarr" / "volumes").rglob("*") if f.is_file()}
    with VolumeReader(stores[0]) as reader:
        others = reader.read([0, 2, 3, 4, 5])
    record = withdraw(place / "w1234_20261124.csv", stores)

    assert record.people_on_list == 2
    assert [(r.store, r.kind, r.people, r.scans) for r in record.removals] == [
        ("s.zarr", "volumes", 1, 1), ("e.zarr", "embeddings", 1, 1), ("e.h5", "embeddings", 1, 1),
    ]  # fmt: skip
    assert GONE not in json.dumps(record.to_json())
    for store in stores:
        assert GONE not in decoded(store)
        files = [store] if store.is_file() else [f for f in store.rglob("*") if f.is_file()]
        assert not any(GONE.encode() in f.read_bytes() for f in files)
    beside = {f.name for f in place.iterdir()}
    assert beside == {"src", "p.csv", "w1234_20261124.csv", "s.zarr", "e.zarr", "e.h5"}

    after = {f: f.read_bytes() for f in (place / "s.zarr" / "volumes").rglob("*") if f.is_file()}
    assert before.keys() - after.keys() == {place / "s.zarr/volumes/c/1/0/0/0"}
    assert all(before[f] == content for f, content in after.items())
    store = open_store(stores[0])
    assert list(store.scans["status"]) == ["ok", "withdrawn", "ok", "ok", "ok", "ok"]
    assert store.phenotypes.iloc[1].isna().all()
    assert list(store.phenotypes["age"].dropna()) == [50, 52, 53, 54, 55]
    tombstone = store.scans.iloc[1]
    assert (tombstone["participant"], tombstone["source"], tombstone["source_size"]) == ("", "", 0)
    with open_loader(stores[0], batch_size=8, backend="torch") as loader:
        (batch,) = list(loader)
    np.testing.assert_array_equal(batch.images.numpy(), others)
    for name in ("e.zarr", "e.h5"):
        found = open_embeddings(place / name)
        assert list(found.scans["row"]) == [0, 2, 3, 4, 5]
        np.testing.assert_array_equal(found.features[:, 0], [0, 8, 12, 16, 20])
        assert list(found.phenotypes["age"]) == [50, 52, 53, 54, 55]

    again = withdraw(place / "w1234_20261124.csv", stores)
    assert [removal.scans for removal in again.removals] == [0, 0, 0]


def test_the_next_ingest_does_not_bring_them_back(place):
    out, people = place / "s.zarr", place / "w1234_20261124.csv"
    withdraw(people, [out])
    with pytest.raises(StoreError, match="--withdrawn LIST"):
        ingest(place / "src", out)
    summary = ingest(place / "src", out, withdrawn=people)
    assert (summary.new, summary.status) == (0, {"ok": 5, "withdrawn": 1})
    assert summary.clean
    table = IngestSettings(phenotypes=place / "p.csv")
    ingest(place / "src", out, table, withdrawn=people)
    assert open_store(out).phenotypes.iloc[1].isna().all()
    assert GONE not in decoded(out)
    summary = ingest(place / "src", out, allow_readd=True)
    assert (summary.new, summary.status) == (1, {"ok": 6, "withdrawn": 1})


def test_killed_before_every_seventh_step(made, tmp_path):
    died = 0
    for step in range(1, 60, 7):
        folder = tmp_path / str(step)
        shutil.copytree(made, folder)
        code = die_at(step, withdraw_in, folder)
        assert code in (0, DIED)
        died += code == DIED
        withdraw_in(folder)
        assert GONE not in decoded(folder / "s.zarr") + decoded(folder / "e.h5") + decoded(folder / "e.zarr")
        assert len(open_embeddings(folder / "e.zarr").features) == 5
        assert [f.name for f in folder.iterdir() if f.name.startswith(".") or f.name.endswith(".lock")] == []
        assert not (folder / "s.zarr/volumes/c/1/0/0/0").exists()
        assert list(open_store(folder / "s.zarr").scans["status"]).count("ok") == 5
        shutil.rmtree(folder)
        if code == 0:
            break
    assert died >= 5


def test_killed_at_any_step_a_journal_brings_nobody_back(tmp_path):
    """What a killed ingest had finished is in its journal, which the next one believes rather than the table."""
    (tmp_path / "w.csv").write_text("p1\n")
    died = 0
    for step in range(1, 30):
        store = tmp_path / f"{step}.zarr"
        make_store(store, 3)
        store_id = open_store(store).attrs["store_id"]
        with open_journal(store, store_id) as append:
            for number, row in enumerate(rows_of(open_store(store).scans)):
                append(number, row, True)
        code = die_at(step, withdraw, tmp_path / "w.csv", [store])
        assert code in (0, DIED)
        died += code == DIED
        recover_store(store)
        gone = open_store(store).scans["participant"][1] == ""
        assert not (gone and 1 in read_journal(store, store_id)[0])
        if code == 0:
            break
    assert died >= 6
    assert list(open_store(store).scans["participant"]) == ["p0", "", "p2"]
    assert open_store(store).attrs["simulated"]


def test_reports_are_removed_and_other_pages_are_not(place):
    write_report(place / "s.zarr", place / "qc.html")
    (place / "mine.html").write_text("<html>my own page</html>")
    with pytest.raises(StoreError, match="no report of this package"):
        withdraw(place / "w1234_20261124.csv", [place / "s.zarr", place / "mine.html"])
    assert open_store(place / "s.zarr").scans["status"][1] == "ok"  # all are looked at before the first is touched
    record = withdraw(place / "w1234_20261124.csv", [place / "qc.html", place / "s.zarr"])
    assert [removal.kind for removal in record.removals] == ["volumes", "report"]
    assert not (place / "qc.html").exists()
    assert (place / "mine.html").exists()


def test_copies_that_users_keep_beside_a_store_are_left_alone(place):
    for suffix in (".old", ".staged", ".removed", ".journal.old"):
        shutil.copytree(place / "s.zarr", place / f"s.zarr{suffix}")
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file() and "s.zarr." in str(f)}
    ingest(place / "src", place / "s.zarr", IngestSettings(phenotypes=place / "p.csv"))
    ingest(place / "src", place / "s.zarr", overwrite=True)
    assert before == {f: f.read_bytes() for f in before}


def test_everybody_withdraws(place):
    (place / "all.csv").write_text("eid\n" + "\n".join(PEOPLE))
    withdraw(place / "all.csv", [place / "s.zarr", place / "e.zarr", place / "e.h5"])
    assert len(open_store(place / "s.zarr").ok_rows) == 0
    for name in ("e.zarr", "e.h5"):
        assert open_embeddings(place / name).features.shape == (0, 4)


def test_lists_and_stores_that_cannot_be_used(place):
    before = decoded(place / "s.zarr")
    (place / "empty.csv").write_text("eid\n\n")
    for name in ("empty.csv", "absent.csv"):
        with pytest.raises(TableError, match="expected"):
            withdraw(place / name, [place / "s.zarr"])
    people = place / "w1234_20261124.csv"
    with pytest.raises(FileNotFoundError):
        withdraw(people, [place / "s.zarr", place / "absent.zarr"])
    with pytest.raises(StoreError, match="expected one of"):
        withdraw(people, [place / "s.zarr", place / "p.csv"])
    assert decoded(place / "s.zarr") == before  # all stores are looked at before one is touched
    (place / "link.h5").symlink_to("e.h5")
    for held in ("s.zarr", "e.h5", "link.h5"):  # also if it is another of them that is being written
        with store_lock(place / held), pytest.raises(StoreBusyError, match="is being written"):
            withdraw(people, [place / "s.zarr", place / "e.h5"])
    assert decoded(place / "s.zarr") == before
    record = withdraw(people, [place / "s.zarr", place / "s.zarr", place / "e.h5", place / "link.h5"])
    assert [removal.store for removal in record.removals] == ["s.zarr", "e.h5"]  # each once


def test_people_who_are_in_no_store_are_counted(place):
    """Nobody is not what was asked for, unless it was done before: then there are tombstones, or nobody can tell."""
    people, others = place / "w1234_20261124.csv", place / "others.csv"
    others.write_text("8000001\n8000002\n")
    nobody = withdraw(others, [place / "s.zarr", place / "e.h5"])
    assert (nobody.people_not_found, nobody.clean) == (2, False)
    assert "none of the 2 people" in nobody.warnings[0]
    assert nobody.to_json()["warnings"] == nobody.warnings
    first = withdraw(people, [place / "s.zarr", place / "e.h5"])
    assert (first.people_not_found, first.clean) == (1, True)
    assert first.warnings == ["1 of 2 people on w1234_20261124.csv are in none of these stores"]
    again = withdraw(people, [place / "s.zarr", place / "e.h5"])
    assert (again.people_not_found, again.clean) == (2, True)
    assert "1 scans were withdrawn before" in again.warnings[0]
    assert not withdraw(people, [place / "e.h5"]).clean  # which keeps no tombstones
    write_report(place / "s.zarr", place / "qc.html")
    page = withdraw(people, [place / "qc.html"])  # nobody knows whom it shows
    assert (page.people_not_found, page.clean, page.warnings) == (None, True, [])


def test_command_line(place):
    command = [sys.executable, "-c", "from ingest.cli import main; main()"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=place, capture_output=True, text=True, timeout=120)

    done = run("withdraw", "w1234_20261124.csv", "s.zarr", "e.h5", "--json")
    assert done.returncode == 0, done.stderr
    assert [removal["scans"] for removal in json.loads(done.stdout)["removals"]] == [1, 1]
    done = run("withdraw", "w1234_20261124.csv", "s.zarr")
    assert "removed 0 people" in done.stdout
    assert done.returncode == 0  # done before: there are tombstones
    done = run("withdraw", "w1234_20261124.csv", "e.h5")
    assert done.returncode == 1
    assert "none of the 2 people" in done.stderr
    done = run("src", "s.zarr")
    assert done.returncode == 1
    assert "--withdrawn LIST" in done.stderr
    done = run("src", "s.zarr", "--withdrawn", "w1234_20261124.csv")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("person", "text", "left"),
    [
        ("2145", "std 0.22145, 2145 and ab2145cd", "std 0.22145, withdrawn and ab2145cd"),
        ("2145", "sub-2145/anat/sub-2145_T1w.nii.gz", "sub-withdrawn/anat/sub-withdrawn_T1w.nii.gz"),
        ("01", "torch 2.01.01, sub-01/anat/sub-012", "torch 2.01.01, sub-withdrawn/anat/sub-012"),
        ("9118946", "UKB9118946b.zip, 91189467", "UKBwithdrawnb.zip, 91189467"),
    ],
)
def test_ids_leave_texts_but_no_number_or_checksum(person, text, left):
    """Ids of BIDS are short, and occur amid the digits of what has nothing to do with them."""
    checksum = f"0a{person}" + "b" * 60
    attrs = {
        "text": [text, {"deep": text}],
        "sha256": checksum,
        "std": float(f"0.2{person}5"),
        "row": int(f"1{person}"),
    }
    cleaned = _without(attrs, [person, "someone else"])
    assert cleaned == {**attrs, "text": [left, {"deep": left}]}
    assert _without(attrs, []) == attrs


def test_links_are_followed_and_what_was_moved_aside_is_found(place):
    """A person is not gone as long as the folder behind a link, or one that a killed run has moved, still has them."""
    (place / "link.zarr").symlink_to(place / "e.zarr")
    withdraw(place / "w1234_20261124.csv", [place / "link.zarr"])
    assert GONE not in decoded(place / "e.zarr")
    assert (place / "link.zarr").is_symlink()

    shutil.move(place / "e.h5", place / "f.h5")
    (place / "f.h5").rename(place / ".f.h5.0123abcd.tmp.h5.aside")
    removal = withdraw(place / "w1234_20261124.csv", [place / "f.h5"]).removals[0]
    assert (removal.people, removal.scans) == (1, 1)
    assert GONE not in decoded(place / "f.h5")
    assert not list(place.glob(".f.h5*"))
    with pytest.raises(FileNotFoundError, match="no store at"):
        withdraw(place / "w1234_20261124.csv", [place / "never.h5"])
    assert not list(place.glob("*never*"))


def test_tables_of_predictions_lose_their_rows(place):
    table = pd.DataFrame({"row": [0, 1, 2], "participant": PEOPLE[:3], "age": [50.25, 51.0, 52.0]})
    table.to_parquet(place / "p.parquet")
    table.to_csv(place / "out.csv", index=False)
    (place / ".out.csv.0123abcd.tmp").write_text(GONE)  # of a process that was killed
    (place / ".other.csv.0123abcd.tmp").write_text(GONE)
    record = withdraw(place / "w1234_20261124.csv", [place / "p.parquet", place / "out.csv"])
    assert [(one.kind, one.people, one.scans) for one in record.removals] == [("predictions", 1, 1)] * 2
    kept = table[table["participant"] != GONE].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(place / "p.parquet").reset_index(drop=True), kept)
    assert (place / "out.csv").read_text() == kept.to_csv(index=False)
    assert [path.name for path in place.glob(".*")] == [".other.csv.0123abcd.tmp"]


def test_the_folder_of_a_run_loses_them_with_its_pages_and_a_checkpoint_to_go_on_from(place):
    runs = [place / "curve", place / "curve" / "scratch" / "n2" / "seed0"]
    for run in runs:
        run.mkdir(parents=True)
        write_split(run / "split.csv", Split(dict(zip(PEOPLE, ["train", "test"] * 3, strict=True))))
        pd.DataFrame({"row": [0, 1], "participant": PEOPLE[:2]}).to_parquet(run / "predictions.parquet")
        (run / "report.html").write_text('<meta name="generator" content="brain-volumes finetune"> brains')
        (run / "best.pt").write_bytes(b"weights")
    pd.DataFrame({"row": [0, 1], "participant": PEOPLE[:2]}).to_csv(runs[0] / "all.csv")
    arrays = {"0_rows": np.arange(3), "0_truth": np.arange(3.0), "0_participants": np.array(PEOPLE[:3])}
    np.savez(runs[1] / "test.npz", **arrays)
    older = place / "curve" / "probe" / "n2" / "seed0"
    older.mkdir(parents=True)
    np.savez(older / "test.npz", **{"0_rows": np.arange(3)})  # does not say of whom it is
    (older / "cell.json").write_text("{}")
    (runs[0] / "last.pt").write_bytes(b"weights")
    (runs[1] / "last.pt").write_bytes(b"skipped: " + GONE.encode())  # of a run that is not finished
    (runs[0] / "results.json").write_text(json.dumps({"skipped": {"1": f"row 1 ({GONE}.nii.gz) is damaged"}}))
    (place / "curve" / "embeddings.zarr").symlink_to(place / "e.zarr")
    shutil.copy(place / "e.h5", place / "curve" / "embeddings.h5")
    record = withdraw(place / "w1234_20261124.csv", [place / "curve", runs[0] / "report.html", place / "e.zarr"])
    assert [(one.store, one.people, one.scans) for one in record.removals] == [
        ("embeddings.h5", 1, 1), ("e.zarr", 1, 1), ("curve", 1, 4), ("e.zarr", 0, 0), ("report.html", 0, 0),
    ]  # fmt: skip
    with np.load(runs[1] / "test.npz") as cell:
        kept = np.array([who != GONE for who in PEOPLE[:3]])
        assert {name: cell[name].tolist() for name in cell.files} == {
            name: values[kept].tolist() for name, values in arrays.items()
        }
    left = [path for path in (place / "curve").rglob("*") if path.is_file()]
    assert not any(GONE.encode() in path.read_bytes() for path in left)
    names = {str(path.relative_to(place / "curve")) for path in left if "embeddings" not in str(path)}
    own = {"split.csv", "predictions.parquet", "best.pt"}
    of_cell = {f"scratch/n2/seed0/{name}" for name in own | {"test.npz"}}
    assert names == own | {"results.json", "last.pt", "all.csv"} | of_cell
    assert read_split(runs[1] / "split.csv").part_of.keys() == set(PEOPLE) - {GONE}


def test_other_tables_are_not_touched(place):
    (place / "other.csv").write_text("eid,age\n1,2\n")
    with pytest.raises(StoreError):
        withdraw(place / "w1234_20261124.csv", [place / "other.csv"])
