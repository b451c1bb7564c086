"""What is written can be read, and means the same: everything else is refused by name, of others' files as well."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embedded import make_embeddings

from extract import Embeddings, open_embeddings, write_embeddings
from extract.probing.probe import probe
from ingest.errors import StoreError

N = 6
KINDS = (".zarr", ".h5", ".parquet", ".npz")


def some(**phenotypes: object) -> Embeddings:
    made = make_embeddings(np.arange(N * 2.0).reshape(N, 2), {})
    return replace(made, phenotypes=pd.DataFrame(phenotypes, index=range(N)))


def with_scans(**columns: object) -> Embeddings:
    made = some(age=np.arange(N) * 1.0)
    return replace(made, scans=made.scans.assign(**columns))


def test_chosen_rows_keep_their_phenotypes(tmp_path):
    whole = some(age=np.arange(N) * 10.0)
    for chosen in (np.arange(0, N, 2), np.array([5, 0, 3])):
        few = replace(
            whole,
            features=whole.features[chosen],
            scans=whole.scans.iloc[chosen],
            phenotypes=whole.phenotypes.iloc[chosen],
        )
        table = few.frame()
        assert table["age"].tolist() == (chosen * 10.0).tolist()
        assert table["row"].tolist() == chosen.tolist()
        assert table["f0"].tolist() == (chosen * 2.0).tolist()
        write_embeddings(tmp_path / "e.npz", few)
        pd.testing.assert_frame_equal(open_embeddings(tmp_path / "e.npz").frame(), table)
    assert some().frame().shape == (N, 6)


# --- what is written


def test_tables_that_do_not_fit_are_not_written(tmp_path):
    made = some(age=np.zeros(N))
    twice = pd.concat([made.phenotypes, made.phenotypes], axis="columns")
    bad = {
        "features are of 4 scans and the table of 6": replace(made, features=made.features[:4]),
        "phenotypes of 4 scans and a table of 6": replace(made, phenotypes=made.phenotypes[:4]),
        r"features are float32 of shape \(6,\), expected numbers \(scan, feature\)": replace(
            made, features=made.features[:, 0]
        ),
        "features are complex64": replace(made, features=made.features * 1j),
        "no column scans/row": replace(made, scans=made.scans.drop(columns="row")),
        "no column scans/participant": replace(made, scans=made.scans.drop(columns="participant")),
        "scans/row is float64, expected whole": with_scans(row=np.arange(N) / 2),
        "scans/participant is missing in scan 2": with_scans(participant=["a", "b", None, "", "d", "e"]),
        "scans/when is datetime64": with_scans(when=pd.Timestamp("2020-01-01")),
        "scans/session is 3 in scan 1, expected a text": with_scans(session=pd.Series(["1", 3] * 3, dtype=object)),
        "scans/f1 is called like a feature": with_scans(f1=np.zeros(N)),
        "2 columns are called 'age', expected each name once": replace(made, phenotypes=twice),
        "a column is called 'zarr.json'": some(**{"zarr.json": np.zeros(N)}),
    }
    for kind in KINDS:
        for words, embeddings in bad.items():
            with pytest.raises(ValueError, match=words):
                write_embeddings(tmp_path / f"e{kind}", embeddings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_phenotypes_become_numbers_of_the_same_meaning(tmp_path, kind):
    made = some(
        truth=np.array([True, False] * 3),
        maybe=np.array([True, False, None] * 2, dtype=object),
        nullable=pd.array([1, 2, None] * 2, dtype="Int64"),
        whole=np.arange(N),
        unknown=np.array([None] * N, dtype=object),
    )
    made = replace(made, scans=made.scans.assign(session=["a", None] * 3, visit=pd.array([1, None] * 3, dtype="Int64")))
    write_embeddings(tmp_path / f"e{kind}", made)
    found = open_embeddings(tmp_path / f"e{kind}")
    assert set(found.phenotypes.dtypes) == {np.dtype(np.float64)}
    expected = {"truth": [1, 0, 1], "maybe": [1, 0, np.nan], "nullable": [1, 2, np.nan], "whole": [0, 1, 2]}
    for name, values in {**expected, "unknown": [np.nan] * 3}.items():
        np.testing.assert_array_equal(found.phenotypes[name][:3], values)
    assert found.scans["session"].tolist() == ["a", ""] * 3
    np.testing.assert_array_equal(found.scans["visit"], [1, np.nan] * 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["m", "f"] * 3, "phenotype it is 'm' in scan 0; give numbers"),
        (["1", "2"] * 3, "phenotype it is '1' in scan 0"),
        ([None, 1.5, "f"] * 2, "phenotype it is 'f' in scan 2"),
        (pd.Categorical(["a", "b", "c"] * 2), "phenotype it is 'a' in scan 0"),
        (pd.date_range("2015-01-01", periods=N), "phenotype it is datetime64"),
        (pd.Series([datetime.date(2020, 1, 1)] * N, dtype=object), "phenotype it is datetime.date"),
        (np.arange(N) * 1j, "phenotype it is complex128"),
    ],
)
def test_phenotypes_that_are_no_numbers_are_refused_by_name(tmp_path, values, words):
    made = some(age=np.arange(N) * 1.0, it=values)
    with pytest.raises(ValueError, match=words):
        write_embeddings(tmp_path / "e.h5", made)
    with pytest.raises(ValueError, match=words):
        made.xy("it")
    assert len(made.xy("age").y) == N


# --- attributes, in memory and in files of others

BAD_ATTRIBUTES = {
    r"attribute weights is 'my\.pth', expected an object such as \{\"name\"": {"weights": "my.pth"},
    "attribute store is '/data/x.zarr', expected an object": {"store": "/data/x.zarr"},
    "attribute store.grid is 'native', expected an object": {"store": {"grid": "native"}},
    "attribute input is 'x', expected an object": {"input": "x"},
    "attribute created_by is 'me', expected an object": {"created_by": "me"},
    r"attribute layers is \['avgpool'\], expected a list such as": {"layers": ["avgpool"]},
    "attribute skipped is 3, expected a list": {"skipped": 3},
    "attribute it is nan, which JSON cannot keep": {"it": float("nan")},
    "attribute it is .*inf.*, which JSON cannot keep": {"it": {"a": [1, float("inf")]}},
}
BAD_VARIABLES = {
    "variables age is None, expected an object": {"age": None},
    r"variables age\.labels is \['f', 'm'\], expected an object": {"age": {"labels": ["f", "m"]}},
    r"variables age\.task is 5, expected a name": {"age": {"task": 5}},
    r"variables age is \{'units': nan\}, which JSON cannot keep": {"age": {"units": float("nan")}},
}


def in_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write embeddings as somebody else might, and would not be stopped."""
    write_embeddings(path, some(age=np.arange(N) * 1.0))
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez(path, **content | arrays)


@pytest.mark.parametrize("words", [*BAD_ATTRIBUTES, *BAD_VARIABLES])
def test_attributes_of_another_kind_are_refused_by_name(tmp_path, words):
    attrs, variables = BAD_ATTRIBUTES.get(words, {}), BAD_VARIABLES.get(words, {})
    made = replace(some(age=np.arange(N) * 1.0), attrs=attrs, variables=variables)
    for kind in KINDS:
        with pytest.raises(ValueError, match=words):
            write_embeddings(tmp_path / f"e{kind}", made)
    assert list(tmp_path.iterdir()) == []
    format_ = {"format": "brain-embeddings", "format_version": 1}
    in_npz(tmp_path / "e.npz", attrs=np.array(json.dumps(format_ | attrs)), variables=np.array(json.dumps(variables)))
    with pytest.raises(StoreError, match=f"cannot be read as embeddings: {words}.*; correct that in the file, or"):
        open_embeddings(tmp_path / "e.npz")


@pytest.mark.parametrize("values", [np.array(["a"] * N), np.arange(N).astype("datetime64[D]")])
def test_phenotypes_of_others_that_are_no_numbers_are_named(tmp_path, values):
    in_npz(tmp_path / "e.npz", **{"phenotypes/who": values})
    with pytest.raises(StoreError, match=r"phenotype who is .*; give numbers.*correct that in the file"):
        open_embeddings(tmp_path / "e.npz")


def test_numbers_that_json_does_not_know_are_named(tmp_path):
    made = replace(some(), attrs={"model": "m", "n": np.int64(4)})
    with pytest.raises(ValueError, match=r"attribute n is np\.int64\(4\), which JSON cannot keep"):
        write_embeddings(tmp_path / "e.h5", made)


def test_only_what_is_relied_on_is_checked(tmp_path):
    attrs = {"model": "m", "weights": None, "layers": None, "mine": ["x", {"y": None}], "layer": "pool"}
    made = replace(some(sex=np.arange(N) % 2), attrs=attrs, variables={"sex": {"labels": {0: "f"}, "source": [1]}})
    for kind in KINDS:
        write_embeddings(tmp_path / f"e{kind}", made)
        found = open_embeddings(tmp_path / f"e{kind}")
        assert {key: found.attrs[key] for key in attrs} == attrs
        assert found.variables == {"sex": {"labels": {"0": "f"}, "source": [1]}}


def test_a_probe_takes_no_texts_or_dates_for_numbers():
    for name, values in (("scanned", pd.date_range("2020-01-01", periods=N)), ("handed", ["left"] * N)):
        with pytest.raises(ValueError, match=f"phenotype {name} is .*; give numbers, NaN where missing"):
            probe(some(age=np.arange(N) * 1.0, **{name: values}), ["age"])
        with pytest.raises(ValueError, match=f"phenotype {name} is .*; give numbers, NaN where missing"):
            probe(some(**{name: values}))


def test_a_file_that_names_no_layers_says_so(tmp_path):
    write_embeddings(tmp_path / "emb.h5", some(age=np.arange(N) * 1.0))
    with pytest.raises(StoreError, match=r"emb\.h5 does not say which layers it has, so 'avgpool' is not known; leave"):
        open_embeddings(tmp_path / "emb.h5", layer="avgpool")


def test_embeddings_are_shown_in_one_line():
    shown = repr(some(age=np.arange(N) * 1.0, sex=np.arange(N) % 2))
    assert shown == "Embeddings(6 scans x 2 features, resnet18, random weights, simulated data; 2 phenotypes)"
    assert repr(Embeddings(np.zeros((3, 2)), pd.DataFrame(index=range(3)), pd.DataFrame())).startswith("Embeddings(3 ")
