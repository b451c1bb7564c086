"""Damaged embedding files, of which a copy was cut short or a bit has flipped: an error, and never other values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr
from embedded import make_embeddings

from extract import Embeddings, open_embeddings, write_embeddings
from extract.embeddings import check_replaceable
from ingest.errors import StoreError

N, WIDTH = 20, 3


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    made = make_embeddings(
        np.random.default_rng(0).normal(size=(N, WIDTH)),
        {"age": np.arange(N) + 40.0, "nobody": np.zeros(N)},
        variables={"age": {"units": "years", "labels": {"0": "a", "1": "b"}}, "nobody": {}},
    )
    return replace(made, attrs={"format": "brain-embeddings", "format_version": 1, **made.attrs})


def same(found: Embeddings, expected: Embeddings) -> bool:
    return (
        np.array_equal(found.features, expected.features)
        and found.scans.equals(expected.scans)
        and list(found.phenotypes) == list(expected.phenotypes)
        and np.array_equal(found.phenotypes, expected.phenotypes)
        and (found.variables, found.attrs) == (expected.variables, expected.attrs)
    )


@pytest.mark.parametrize("kind", [".h5", ".parquet", ".npz"])
def test_a_bit_that_flipped_is_an_error_or_changes_nothing(embeddings, tmp_path, kind):
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    assert same(open_embeddings(path), embeddings)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert same(open_embeddings(path), embeddings)
        except StoreError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (".h5", "features"),
        (".h5", "participants"),
        (".h5", "labels"),
        (".parquet", "features"),
        (".parquet", "participants"),
    ],
)
def test_a_bit_that_flipped_in_values_is_noticed(embeddings, tmp_path, kind, what):
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    values = {
        "features": embeddings.features[0, :1].tobytes(),
        "participants": embeddings.scans["participant"][N - 1].encode(),
        "labels": b': "b"',
    }
    content = bytearray(path.read_bytes())
    place = content.find(values[what])
    assert place >= 0
    content[place + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot be read as embeddings: .*; .*remove it, and make it again"):
        open_embeddings(path)


def test_hdf5_is_read_in_blocks_and_has_no_more_than_it_needs(tmp_path):
    n = 1100  # two chunks of equal rows
    many = make_embeddings(np.random.default_rng(0).normal(size=(n, 64)), {})
    many.attrs["skipped"] = [{"row": k, "reason": "x" * 80} for k in range(1000)]  # more than the 64 KB of old HDF5
    write_embeddings(tmp_path / "e.h5", many)
    found = open_embeddings(tmp_path / "e.h5")
    np.testing.assert_array_equal(found.features, many.features)
    assert found.attrs["skipped"] == many.attrs["skipped"]
    with h5py.File(tmp_path / "e.h5") as file:
        assert file["embeddings"].chunks == (550, 64)
        assert all(file[name].fletcher32 for name in ("embeddings", "scans/row", "scans/participant"))
        assert json.loads(file.attrs["model"]) == "resnet18"
    assert (tmp_path / "e.h5").stat().st_size < many.features.nbytes + 300_000


def test_hdf5_of_older_versions_is_read(embeddings, tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["embeddings"] = embeddings.features
        for name in embeddings.scans:
            column = embeddings.scans[name].to_numpy()
            file[f"scans/{name}"] = column.astype(h5py.string_dtype()) if column.dtype.kind == "O" else column
        for name in embeddings.phenotypes:
            file[f"phenotypes/{name}"] = embeddings.phenotypes[name].to_numpy()
            for key, value in embeddings.variables[name].items():
                file[f"phenotypes/{name}"].attrs[key] = json.dumps(value)
        for key, value in embeddings.attrs.items():
            file.attrs[key] = json.dumps(value)
    assert same(open_embeddings(tmp_path / "e.h5"), embeddings)


def test_parquet_without_checksums_is_read(embeddings, tmp_path):
    write_embeddings(tmp_path / "e.parquet", embeddings)
    table = pq.read_table(tmp_path / "e.parquet")
    about = {b"brain-embeddings": table.schema.metadata[b"brain-embeddings"]}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "e.parquet")
    assert same(open_embeddings(tmp_path / "e.parquet"), embeddings)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("scans/participant/c", "scans/participant .* has lost chunks"),
        ("scans/row/c", "scans/row .* has lost chunks"),
        ("phenotypes/age/c", "phenotypes/age .* has lost chunks"),
        ("phenotypes/nobody/c", "phenotypes/nobody .* has lost chunks"),  # which are zeros
        ("scans/session/zarr.json", "scans/session .* is absent"),
        ("phenotypes/age/zarr.json", "phenotypes/age .* is absent"),
        ("phenotypes/zarr.json", "it has no group phenotypes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Object at")  # a folder without zarr.json
def test_zarr_of_which_a_copy_lacks_something(embeddings, tmp_path, lost, words):
    path = tmp_path / "e.zarr"
    write_embeddings(path, embeddings)
    assert same(open_embeddings(path), embeddings)
    remove(path / lost)
    with pytest.raises(StoreError, match=words):
        open_embeddings(path)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_zarr_of_older_versions_does_not_list_its_columns(embeddings, tmp_path):
    path = tmp_path / "e.zarr"
    write_embeddings(path, embeddings)
    for group in ("scans", "phenotypes"):
        del zarr.open_group(path)[group].attrs["columns"]
    shutil.rmtree(path / "phenotypes/nobody/c")  # as zarr wrote zeros
    assert same(open_embeddings(path), embeddings)


def test_a_text_is_no_npz_and_numpys_advice_to_unpickle_it_is_not_passed_on(tmp_path):
    path = tmp_path / "e.npz"
    path.write_text("hello\n")
    for use in (open_embeddings, check_replaceable):
        with pytest.raises(StoreError, match="it is no whole zip archive, as npz files are") as found:
            use(path)
        assert "pickle" not in str(found.value)


def test_others_may_add_columns(embeddings, tmp_path):
    """With zarr and h5py, without this package."""
    more = pd.Series(np.arange(N) * 2.0)
    for kind in (".zarr", ".h5"):
        write_embeddings(tmp_path / f"e{kind}", embeddings)
    zarr.open_group(tmp_path / "e.zarr")["phenotypes"].create_array("more", data=more.to_numpy())
    with h5py.File(tmp_path / "e.h5", "r+") as file:
        file["phenotypes/more"] = more
    for kind in (".zarr", ".h5"):
        assert open_embeddings(tmp_path / f"e{kind}").phenotypes["more"].tolist() == more.tolist()
