"""What lies where an embedding file goes: damage and malice are errors of one line, nothing of others is destroyed."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from embedded import make_embeddings
from full_disk import full_disk
from typer.testing import CliRunner

import extract.embeddings
import ingest.exchange
from extract import Embeddings, open_embeddings, write_embeddings
from extract.blocks import read_finished, start_parts, write_block
from extract.cli import app
from extract.embeddings import check_replaceable
from ingest.errors import StoreError
from ingest.exchange import remove_unfinished

N, WIDTH = 30, 4
KINDS = (".zarr", ".h5", ".parquet", ".npz")


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    features = np.random.default_rng(0).normal(size=(N, WIDTH))
    return make_embeddings(features, {"age": np.arange(N) + 40.0})


# --- damage and malice


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def anew(path: Path, name: str, shape: tuple[int, ...], **settings: object) -> None:
    """Replace an array of a zarr file by one that was never written."""
    zarr.open_group(path).create_array(name, shape=shape, dtype="float32", overwrite=True, **settings)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def in_zarr_embeddings_are_a_group(path: Path) -> None:
    zarr.open_group(path).create_group("embeddings", overwrite=True)


ZARR: dict[str, Callable[[Path], object]] = {
    "1 of 1 chunks of embeddings are missing": lambda path: (path / "embeddings/c/0/0").unlink(),
    "cannot be read": lambda path: flip(path / "embeddings/c/0/0"),
    r"expected float32 \(scan, feature\)": lambda path: anew(path, "embeddings", (N,), chunks=(N,)),
    "is a group": in_zarr_embeddings_are_a_group,
    "1048576 of 1048576 chunks": lambda path: anew(path, "embeddings", (N, 1 << 40), chunks=(N, 1 << 20)),
    r"chunks of 1099511627776 scans": lambda path: anew(path, "embeddings", (1 << 44, 4), chunks=(1 << 40, 4)),
    "scans/row has shape": lambda path: edit_json(path / "scans/row/zarr.json", shape=[1 << 44]),
    "no JSON object|cannot be read": lambda path: (path / "zarr.json").write_text("[" * 100_000),
    "scans/row .* is absent": lambda path: shutil.rmtree(path / "scans/row"),
}  # fmt: skip


def in_hdf5(change: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path.parent / "secret").write_bytes(bytes(4 * N * WIDTH))
        with h5py.File(path.parent / "other.h5", "w") as other:
            other["x"] = np.zeros((N, WIDTH), np.float32)
        with h5py.File(path, "r+") as file:
            change(file)

    return edit


def replace_features(file: h5py.File, **settings: object) -> None:
    del file["embeddings"]
    file.create_dataset("embeddings", **{"shape": (N, WIDTH), "dtype": "float32"} | settings)


def features_elsewhere(file: h5py.File, what: str) -> None:
    del file["embeddings"]
    if what == "link":
        file["embeddings"] = h5py.ExternalLink("other.h5", "x")
    else:
        layout = h5py.VirtualLayout((N, WIDTH), "float32")
        layout[:] = h5py.VirtualSource("other.h5", "x", (N, WIDTH))
        file.create_virtual_dataset("embeddings", layout)


def instead(file: h5py.File, name: str, value: object) -> None:
    del file[name]
    file[name] = value


HDF5 = {
    "scans is a dataset": in_hdf5(lambda file: instead(file, "scans", 1)),
    "more is a group": in_hdf5(lambda file: file.create_group("scans/more")),
    "scans is a link": in_hdf5(lambda file: instead(file, "scans", h5py.ExternalLink("other.h5", "/"))),
    "embeddings is a link": in_hdf5(lambda file: features_elsewhere(file, "link")),
    "in other files": in_hdf5(lambda file: features_elsewhere(file, "virtual")),
    "embeddings has its values in other files": in_hdf5(
        lambda file: replace_features(file, external=[(os.path.join(os.path.dirname(file.filename), "secret"), 0, 480)])
    ),
    "not all of its values were written": in_hdf5(lambda file: replace_features(file, shape=(N, 1 << 39))),
    "has shape": in_hdf5(lambda file: replace_features(file, shape=(N, 1 << 39), chunks=(N, 1 << 20))),
    r"expected float32 \(scan, feature\)": in_hdf5(lambda file: instead(file, "embeddings", np.zeros(N, np.float32))),
    "features of 31 scans and a table of 30": in_hdf5(
        lambda file: instead(file, "embeddings", np.zeros((N + 1, WIDTH), np.float32))
    ),
    "phenotypes of 31 scans and a table of 30": in_hdf5(lambda file: instead(file, "phenotypes/age", np.zeros(N + 1))),
    "scans 0 to 29 are no finite numbers": in_hdf5(
        lambda file: instead(file, "embeddings", np.full((N, WIDTH), np.nan, np.float32))
    ),
    "scans/row is": in_hdf5(lambda file: instead(file, "scans/row", ["a"] * N)),
}


def in_npz(**arrays: np.ndarray) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        np.savez(path, **content | arrays)

    return edit


def with_header(member: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    """Let an array of an npz file say that it is larger than it is."""

    def edit(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            content = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, data in content.items():
                if name == member:
                    with new.open(name, "w") as file:
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                        file.write(bytes(100))
                else:
                    new.writestr(name, data)

    return edit


def deflated_badly(path: Path) -> None:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez_compressed(path, **content)
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("scans/participant.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 70 : info.header_offset + 110] = b"\xff" * 40
    path.write_bytes(data)


NPZ = {
    "attributes are no JSON objects": in_npz(attrs=np.array("[]")),
    "cannot be read": in_npz(attrs=np.array("[" * 100_000)),
    "has 100 bytes of values": with_header("embeddings.npy", (N, 1 << 42)),
    "e.npz cannot be read": with_header("scans/row.npy", (1 << 44,)),
    "features of 31 scans": in_npz(embeddings=np.zeros((N + 1, WIDTH), np.float32)),
    r"e\.npz cannot be read": deflated_badly,
    "Fortran": in_npz(embeddings=np.asfortranarray(np.zeros((N, WIDTH), np.float32))),
}


def parquet_about(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"brain-embeddings"]) | changes
        pq.write_table(table.replace_schema_metadata({"brain-embeddings": json.dumps(about)}), path)

    return edit


def parquet_text(path: Path) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index("f1")
    texts = pa.chunked_array([["x"] * N])
    pq.write_table(table.set_column(place, "f1", texts), path)


PARQUET = {
    "attributes are no JSON objects": parquet_about(attrs=[]),
    "cannot be read": parquet_about(scans=5),
    r"e\.parquet cannot be read": parquet_text,
}

CASES = [
    pytest.param(kind, words, edit, id=f"{kind[1:]}: {words}")
    for kind, cases in zip(KINDS, (ZARR, HDF5, PARQUET, NPZ), strict=True)
    for words, edit in cases.items()
]


@pytest.mark.parametrize(("kind", "words", "edit"), CASES)
def test_damage_and_malice_are_named(embeddings, tmp_path, kind, words, edit):
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    edit(path)
    with pytest.raises(StoreError, match=words) as found:
        open_embeddings(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_features_that_are_no_numbers_are_not_written(tmp_path):
    bad = make_embeddings(np.full((2, 2), np.inf), {})
    with pytest.raises(ValueError, match="no finite numbers"):
        write_embeddings(tmp_path / "e.h5", bad)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", ""])
def test_names_that_are_paths_are_not_written(tmp_path, name):
    with pytest.raises(ValueError, match="expected a name without slashes"):
        write_embeddings(tmp_path / "e.h5", make_embeddings(np.zeros((2, 2)), {name: np.zeros(2)}))
    assert not list(tmp_path.iterdir())


def test_layers_that_make_no_sense(tmp_path):
    some = make_embeddings(np.zeros((2, 2)), {})
    some.attrs["layers"] = [{"name": "a"}]
    write_embeddings(tmp_path / "e.npz", some)
    with pytest.raises(StoreError, match="cannot be read"):
        open_embeddings(tmp_path / "e.npz", layer="a")


def test_addresses_are_no_files(embeddings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (open_embeddings, lambda place: write_embeddings(place, embeddings)):
        with pytest.raises(ValueError, match=r"s3://b/e\.zarr is an address, but embeddings are files on a local disk"):
            use("s3://b/e.zarr")
    done = CliRunner().invoke(app, ["s.zarr", "s3://b/e.zarr"])
    assert "s3://b/e.zarr is an address" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_block_stays_if_the_system_does_not_give_it(embeddings, tmp_path, monkeypatch):
    parts = tmp_path / "e.h5.parts"
    start_parts(parts, {})
    write_block(parts, 0, embeddings.scans, embeddings.features, {})

    def no_more_files(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", no_more_files)
        with pytest.raises(OSError, match="Too many open files"):
            read_finished(parts)
    assert len(read_finished(parts).scans) == N


# --- writing


@pytest.mark.parametrize("kind", KINDS)
def test_only_embeddings_are_replaced(embeddings, tmp_path, kind):
    path = tmp_path / f"e{kind}"
    check_replaceable(path)
    write_embeddings(path, embeddings)
    check_replaceable(path)
    path = tmp_path / f"other{kind}"
    path.mkdir()
    (path / "precious").write_text("x")
    with pytest.raises(StoreError, match=r"is not known to be an embedding file, so it is not replaced .* yourself"):
        check_replaceable(path)
    with pytest.raises(StoreError, match="is not replaced"):
        write_embeddings(path, embeddings)
    assert [file.name for file in path.iterdir()] == ["precious"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_write_at_this_moment_is_not_removed(tmp_path, kind):
    left = f".e{kind}.0123abcd.tmp{kind}"
    of_others = {f".e.v2{kind}.0123abcd.tmp{kind}", f".e{kind}.v2{kind}.0123abcd.tmp{kind}", f"e.v2{kind}"}
    for name in (left, *of_others):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path / f"e{kind}")
    assert {file.name for file in tmp_path.iterdir()} == of_others


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_what_is_being_written_is_that_which_is_removed(embeddings, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(extract.embeddings, "remove", lambda _: None)  # killed: nothing is tidied up
    monkeypatch.setattr(extract.embeddings, "sync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_embeddings(tmp_path / f"e{kind}", embeddings)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    remove_unfinished(tmp_path / f"e{kind}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 2, 3, None])
def test_folders_are_exchanged_where_the_system_cannot(embeddings, tmp_path, monkeypatch, step):
    path = tmp_path / "e.zarr"
    write_embeddings(path, embeddings)
    newer = make_embeddings(embeddings.features + 1, {})
    renames = 0
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == step:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(ingest.exchange.ctypes, "CDLL", lambda _: SimpleNamespace())
        patched.setattr(Path, "rename", dying)
        if step is None:
            write_embeddings(path, newer)
            assert renames == 3
        else:
            patched.setattr(extract.embeddings, "remove", lambda _: None)
            with pytest.raises(KeyboardInterrupt):
                write_embeddings(path, newer)
    remove_unfinished(path)
    assert [file.name for file in tmp_path.iterdir()] == ["e.zarr"]
    expected = newer if step in (3, None) else embeddings
    np.testing.assert_array_equal(open_embeddings(path).features, expected.features)


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_on_the_disk_before_it_has_its_name(embeddings, tmp_path, monkeypatch, kind):
    synced: list[Path] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    *written, folder = synced
    assert folder == tmp_path
    temporary = written[0]
    expected = {one.relative_to(path) for one in [path, *path.rglob("*")]}
    assert {one.relative_to(temporary) for one in written} == expected


@pytest.mark.parametrize("largest", [0, 5000, 1 << 18])
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_is_named_and_what_was_there_stays(embeddings, tmp_path, kind, largest):
    path = tmp_path / f"e{kind}"
    write_embeddings(path, embeddings)
    larger = make_embeddings(np.random.default_rng(0).normal(size=(600, 500)).astype(np.float32), {})
    with full_disk(largest), pytest.raises(StoreError) as caught:
        write_embeddings(path, larger)
    assert str(caught.value) == f"{path} cannot be written: File too large; make room, and run the same command again"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(open_embeddings(path).features, embeddings.features)


def test_a_disk_that_is_full_meanwhile_is_named(tmp_path):
    parts = tmp_path / "e.h5.parts"
    start_parts(parts, {})
    scans, features = pd.DataFrame({"row": np.arange(600)}), np.ones((600, 500), np.float32)
    with full_disk(), pytest.raises(StoreError, match=r"00000000\.npz cannot be written: File too large; make room"):
        write_block(parts, 0, scans, features, {})
    assert [file.name for file in parts.iterdir()] == ["settings.json"]
