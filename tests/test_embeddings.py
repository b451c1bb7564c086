"""Embedding files of all four kinds: they keep everything, open without this package, and forget who withdraws."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr
from extracting import SETTINGS
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from small_store import make_store

import extract.embeddings
from extract import Embeddings, build_encoder, open_embeddings, write_embeddings
from extract.blocks import parts_path, start_parts, write_block
from extract.probing.doubts import doubts
from extract.probing.settings import ProbeSettings
from extract.resume import extract_to
from ingest.errors import StoreError
from ingest.lock import store_lock
from ingest.people import participant_key
from ingest.withdraw import withdraw

KINDS = (".zarr", ".h5", ".parquet", ".npz")
GONE = "sub-9000005"


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    """Return more scans than go into a block, of people with two scans each; sex shows in a feature."""
    n = 2500
    rng = np.random.default_rng(0)
    sex = np.where(np.arange(n) % 50 == 7, np.nan, np.arange(n) // 2 % 2)
    features = rng.normal(size=(n, 12)).astype(np.float32)
    features[:, 3] += np.nan_to_num(sex)
    scans = pd.DataFrame(
        {
            "row": np.arange(n) * 2,
            "participant": np.array([f"sub-{9000000 + k // 2}" for k in range(n)], dtype=object),
            "session": np.array(["äé" if k % 2 else "" for k in range(n)], dtype=object),
            "modality": np.full(n, "T1", dtype=object),
            "brain_voxels": rng.integers(0, 1 << 21, n),
            "head_scale": np.where(np.arange(n) % 3, 1.5, np.nan),
            "source_size": rng.integers(0, 1 << 40, n),
            "source_mtime": rng.uniform(1e9, 2e9, n),
        }
    )
    return Embeddings(
        features,
        scans,
        pd.DataFrame({"sex": sex, "f3": rng.normal(size=n), "session": np.ones(n)}),
        {"sex": {"task": "binary", "labels": {"0": "female", "1": "male"}, "units": None}, "f3": {}, "session": {}},
        {
            "model": "resnet18",
            "layers": [{"name": "layer3", "features": 8, "start": 0}, {"name": "avgpool", "features": 4, "start": 8}],
            "skipped": [{"row": 1, "reason": f"{GONE}.nii.gz cannot be read"}],
            "store": {"path": f"/data/{GONE}/s.zarr", "id": "x"},
        },
    )


@pytest.fixture(scope="module")
def files(embeddings, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        write_embeddings(folder / f"e{kind}", embeddings)
    return {kind: folder / f"e{kind}" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_everything(embeddings, tmp_path, kind):
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    write_embeddings(path, embeddings)  # replaces it
    found = open_embeddings(path)
    np.testing.assert_array_equal(found.features, embeddings.features)
    assert found.features.dtype == np.float32
    pd.testing.assert_frame_equal(found.scans, embeddings.scans)  # with its order of columns
    columns = list(embeddings.phenotypes)
    pd.testing.assert_frame_equal(found.phenotypes[columns], embeddings.phenotypes)
    assert found.variables == embeddings.variables
    assert found.attrs == {"format": "brain-embeddings", "format_version": 1, **embeddings.attrs}
    assert list(tmp_path.iterdir()) == [path]  # no temporary left


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_while_it_is_read_it_is_read_again(embeddings, tmp_path, kind, monkeypatch):
    """Tables of one file never come with features of another."""
    path = tmp_path / f"e{kind}"
    backwards = np.arange(len(embeddings.features))[::-1]
    other = replace(
        embeddings,
        features=embeddings.features[backwards],
        scans=embeddings.scans.iloc[backwards].reset_index(drop=True),
        phenotypes=embeddings.phenotypes.iloc[backwards].reset_index(drop=True),
    )
    fewer = replace(other, features=other.features[:3], scans=other.scans[:3], phenotypes=other.phenotypes[:3])
    write_embeddings(path, fewer)
    read_features, often = extract.embeddings.read_features, 1

    def replaced(read: Path) -> Iterator[np.ndarray]:
        nonlocal often
        if often:
            often -= 1
            write_embeddings(path, other)
        return read_features(read)

    monkeypatch.setattr(extract.embeddings, "read_features", replaced)
    found = open_embeddings(path)
    np.testing.assert_array_equal(found.features, other.features)
    pd.testing.assert_frame_equal(found.scans, other.scans)
    often = 99
    with pytest.raises(StoreError, match="is replaced again and again while it is read"):
        open_embeddings(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_stays_and_leads_to_what_is_written(embeddings, tmp_path, kind):
    (tmp_path / "big").mkdir()
    for existing in (False, True):
        link = tmp_path / f"{existing}{kind}"
        link.symlink_to(Path("big") / link.name)
        if existing:
            write_embeddings(tmp_path / "big" / link.name, embeddings)
        write_embeddings(link, embeddings)
        assert link.is_symlink()
        assert len(open_embeddings(tmp_path / "big" / link.name).scans) == len(embeddings.scans)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scans", [0, 1])
def test_few_scans(embeddings, tmp_path, kind, scans):
    few = replace(
        embeddings,
        features=embeddings.features[:scans],
        scans=embeddings.scans[:scans],
        phenotypes=embeddings.phenotypes[:scans][[]],
        variables={},
    )
    write_embeddings(tmp_path / f"e{kind}", few)
    found = open_embeddings(tmp_path / f"e{kind}")
    assert found.features.shape == (scans, 12)
    assert found.phenotypes.shape == (scans, 0)
    assert list(found.scans) == list(few.scans)


def test_files_open_without_this_package(embeddings, files):
    features = embeddings.features
    np.testing.assert_array_equal(zarr.open_group(files[".zarr"], mode="r")["embeddings"][:], features)
    with h5py.File(files[".h5"]) as file:
        np.testing.assert_array_equal(file["embeddings"][:], features)
        assert list(file["scans/participant"].asstr()[:]) == list(embeddings.scans["participant"])
    table = pd.read_parquet(files[".parquet"])
    np.testing.assert_array_equal(table[[f"f{k}" for k in range(12)]].to_numpy(), features)
    assert list(table.columns[:3]) == ["row", "participant", "session"]
    assert table["participant"].tolist() == embeddings.scans["participant"].tolist()
    nulls = pq.read_table(files[".parquet"], columns=["sex"]).column("sex").null_count
    assert nulls == embeddings.phenotypes["sex"].isna().sum()
    with np.load(files[".npz"], allow_pickle=False) as file:
        np.testing.assert_array_equal(file["embeddings"], features)
        assert file["scans/participant"].tolist() == embeddings.scans["participant"].tolist()
        assert json.loads(str(file["variables"]))["sex"]["labels"] == {"0": "female", "1": "male"}


def test_equal_contents_are_equal_bytes(embeddings, files, tmp_path):
    for kind in (".npz", ".parquet"):
        write_embeddings(tmp_path / f"other{kind}", embeddings)
        assert (tmp_path / f"other{kind}").read_bytes() == files[kind].read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_one_table(embeddings, files, kind):
    table = open_embeddings(files[kind]).frame()
    assert len(table) == len(embeddings.features)
    assert table.columns.is_unique
    np.testing.assert_array_equal(table["f3"], embeddings.features[:, 3])
    np.testing.assert_array_equal(table["phenotype_f3"], embeddings.phenotypes["f3"])
    np.testing.assert_array_equal(table["phenotype_session"], 1)
    assert table["session"].tolist() == embeddings.scans["session"].tolist()
    if kind == ".parquet":
        assert sorted(table.columns) == sorted(pd.read_parquet(files[kind]).columns)


def test_for_scikit_learn(embeddings, files):
    X, y, groups = open_embeddings(files[".npz"]).xy("sex")
    known = embeddings.phenotypes["sex"].notna().to_numpy()
    np.testing.assert_array_equal(X, embeddings.features[known])
    np.testing.assert_array_equal(y, embeddings.phenotypes["sex"][known])
    people = embeddings.scans["participant"].map(participant_key)
    assert list(groups) == list(people[known])
    scores = cross_val_score(LogisticRegression(), X, y, groups=groups, cv=GroupKFold(3), scoring="roc_auc")
    assert scores.mean() > 0.7
    everybody = embeddings.xy("sex", known_only=False)
    assert np.isnan(everybody.y).sum() == (~known).sum()
    spelt = replace(embeddings, scans=embeddings.scans.assign(participant=people))
    assert list(spelt.xy("sex").groups) == list(groups), "one person in all spellings"
    with pytest.raises(ValueError, match="no phenotype 'age' in the embeddings; there are: sex, f3, session"):
        embeddings.xy("age")


def test_notes_of_others_are_no_warnings(embeddings, tmp_path):
    for notes, told in (("made by hand", []), (["trained on them", 7], ["e: trained on them"])):
        write_embeddings(tmp_path / "e.npz", replace(embeddings, attrs={**embeddings.attrs, "notes": notes}))
        found = open_embeddings(tmp_path / "e.npz")
        assert doubts({"e": found}, [], tasks={}, settings=ProbeSettings()) == told


def test_a_phenotype_is_found_whatever_its_capitals(embeddings):
    name = str(embeddings.phenotypes.columns[0])
    np.testing.assert_array_equal(embeddings.xy(name.upper()).y, embeddings.xy(name).y)
    with pytest.raises(TypeError, match=r"target is \['sex', 'age'\], expected the name of one phenotype"):
        embeddings.xy(["sex", "age"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer(embeddings, files, kind):
    found = open_embeddings(files[kind], layer="avgpool")
    np.testing.assert_array_equal(found.features, embeddings.features[:, 8:])
    assert found.attrs["layers"] == [{"name": "avgpool", "features": 4, "start": 0}]
    with pytest.raises(StoreError, match="no layer 'layer9'; it has layer3, avgpool"):
        open_embeddings(files[kind], layer="layer9")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_embedding_file_is_refused(embeddings, files, tmp_path, kind):
    path = tmp_path / f"e{kind}"
    with pytest.raises(FileNotFoundError, match="extract STORE"):
        open_embeddings(path)
    path.write_bytes(b"something else")
    with pytest.raises(StoreError, match=f"e{kind} cannot be read as embeddings"):
        open_embeddings(path)
    path.unlink()
    write_embeddings(path, replace(embeddings, attrs={"format_version": 2}))
    with pytest.raises(StoreError, match="format version 2, this package reads version 1"):
        open_embeddings(path)
    if kind != ".zarr":
        content = files[kind].read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(StoreError, match="cannot be read as embeddings"):
            open_embeddings(path)


def test_files_of_others_are_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", a=1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = 1
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    for kind in KINDS:
        with pytest.raises(StoreError, match=r"a\.\w+ (is not a brain-embeddings store|cannot be read)"):
            open_embeddings(tmp_path / f"a{kind}")
    with pytest.raises(StoreError, match=r"expected one of \.zarr, \.h5, \.parquet, \.npz"):
        write_embeddings(tmp_path / "e.csv", Embeddings(np.zeros((0, 1)), pd.DataFrame(), pd.DataFrame()))


@pytest.mark.parametrize("kind", KINDS)
def test_people_withdraw_from_files_and_unfinished_work(embeddings, tmp_path, kind):
    path, people = tmp_path / f"e{kind}", tmp_path / "w.csv"
    write_embeddings(path, embeddings)
    people.write_text(f"{GONE}\n")
    parts = parts_path(path)
    start_parts(parts, {"batch_size": 1})
    write_block(parts, 0, embeddings.scans[8:12], embeddings.features[8:12], {})
    with store_lock(path), pytest.raises(StoreError, match="is being written"):
        withdraw(people, [path])
    record = withdraw(people, [path])
    assert [(r.kind, r.people, r.scans) for r in record.removals] == [
        ("unfinished embeddings", 0, 0),
        ("embeddings", 1, 2),
    ]
    assert all(removal.bytes_deleted > 0 for removal in record.removals)
    assert sorted(f.name for f in tmp_path.iterdir()) == [path.name, "w.csv"]
    found = open_embeddings(path)
    others = np.delete(np.arange(len(embeddings.features)), [10, 11])
    np.testing.assert_array_equal(found.features, embeddings.features[others])
    assert found.scans["row"].tolist() == embeddings.scans["row"][others].tolist()
    everything = found.frame().drop(columns=[f"f{k}" for k in range(12)]).to_csv() + json.dumps(found.attrs)
    assert GONE.removeprefix("sub-") not in everything
    if kind == ".npz":
        assert not any(GONE in name for name in zipfile.ZipFile(path).namelist())


def test_people_withdraw_from_work_that_was_never_finished(embeddings, tmp_path):
    (tmp_path / "w.csv").write_text(GONE)
    parts = parts_path(tmp_path / "e.h5")
    start_parts(parts, {"batch_size": 1})
    write_block(parts, 0, embeddings.scans[8:12], embeddings.features[8:12], {})
    record = withdraw(tmp_path / "w.csv", [tmp_path / "e.h5"])
    assert [removal.store for removal in record.removals] == ["e.h5.parts"]
    assert [f.name for f in tmp_path.iterdir()] == ["w.csv"]


def test_a_file_where_unfinished_work_goes_stays_and_is_named(embeddings, tmp_path):
    make_store(tmp_path / "s.zarr", 2)
    out, encoder = tmp_path / "e.h5", build_encoder(**SETTINGS)
    parts_path(out).write_text("mine")
    words = r"e\.h5\.parts is a file, but unfinished work goes into a folder of that name; remove or rename it"
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=words):
            extract_to(out, tmp_path / "s.zarr", encoder, overwrite=overwrite)
    write_embeddings(out, embeddings)
    (tmp_path / "w.csv").write_text(GONE)
    with pytest.raises(StoreError, match=words):
        withdraw(tmp_path / "w.csv", [out])
    assert parts_path(out).read_text() == "mine"
