"""The four kinds of embedding file: written and read by blocks. `docs/embeddings.md` is their specification."""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import zarr
from zarr.codecs import ZstdCodec

from extract.hdf5 import read_hdf5_features, read_hdf5_tables, write_hdf5
from extract.tables import CHUNK_ROWS, Features, Tables, all_columns, check_features, flat_names, is_text, ranges
from ingest.columns import read_columns, write_column
from ingest.store import quiet_zarr

_ROW_GROUP_BYTES = 8 << 20
_METADATA, _CHECKSUM = b"brain-embeddings", b"brain-embeddings-crc32"  # keys of a parquet file's metadata

#: What the libraries raise, besides OSError, where the content of a file is not what its name says.
DAMAGE = (
    LookupError, ValueError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, pa.ArrowException,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How one kind of file is written and read.

    Attributes
    ----------
    write
        ``write(path, tables, shape, features)``, where nothing is yet; `shape` is (scans, features).
    read_tables
        Reads all but the features.
    read_features
        Yields them block by block, float32 (scan, feature); of a file without scans one block of none.
    """

    write: Callable[[Path, Tables, tuple[int, int], Features], None]
    read_tables: Callable[[Path], Tables]
    read_features: Callable[[Path], Iterator[np.ndarray]]


# --- zarr: a group that xarray opens, too


def _write_zarr(path: Path, tables: Tables, shape: tuple[int, int], features: Features) -> None:
    root = zarr.open_group(path, mode="w-", zarr_format=3)
    array = root.create_array(
        "embeddings",
        shape=shape,
        chunks=(max(1, min(CHUNK_ROWS, shape[0])), max(1, shape[1])),
        dtype="float32",
        fill_value=np.nan,  # a chunk that is lost is found, not believed; a damaged one, too
        compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=("scan", "feature"),
    )
    for start, stop in ranges(shape[0], CHUNK_ROWS):
        array[start:stop] = features(start, stop)
    for group in ("scans", "phenotypes"):
        root.create_group(group)
    names: dict[str, list[str]] = {"scans": [], "phenotypes": []}
    for group, name, values in all_columns(tables):
        columns = root[group]
        assert isinstance(columns, zarr.Group)
        write_column(columns, name, values, tables.variables.get(name) if group == "phenotypes" else None)
        names[group].append(name)
    for group in names:
        root[group].attrs["columns"] = sorted(names[group])  # by which `read_columns` knows that none was lost
    root.attrs.update(tables.attrs)


def _read_zarr_tables(path: Path) -> Tables:
    with quiet_zarr():
        root = zarr.open_group(path, mode="r", zarr_format=3)
        attrs = dict(root.attrs)
        if "embeddings" not in root:
            return Tables(pd.DataFrame(), pd.DataFrame(), {}, attrs)
        rows = _zarr_features(root).shape[0]
        for group in ("scans", "phenotypes"):  # before anything is read: what was never written is zeros, of any size
            if group not in root:
                raise ValueError(f"it has no group {group}")
            for name, column in _zarr_columns(root, group):
                if column.shape != (rows,):
                    raise ValueError(f"{group}/{name} has shape {column.shape}, embeddings is of {rows} scans")
        scans, _ = read_columns(root, "scans")
        phenotypes, variables = read_columns(root, "phenotypes")
        return Tables(scans, phenotypes, variables, attrs)


def _zarr_features(root: zarr.Group) -> zarr.Array:
    array = root["embeddings"]
    if not isinstance(array, zarr.Array):
        raise ValueError("embeddings is a group, expected an array")
    check_features(array.shape, array.dtype)
    if array.chunks[0] > CHUNK_ROWS:
        raise ValueError(f"embeddings has chunks of {array.chunks[0]} scans, expected at most {CHUNK_ROWS}")
    return array


def _zarr_columns(root: zarr.Group, name: str) -> Iterator[tuple[str, zarr.Array]]:
    group = root.get(name)
    yield from group.arrays() if isinstance(group, zarr.Group) else ()


def _read_zarr_features(path: Path) -> Iterator[np.ndarray]:
    with quiet_zarr():
        array = _zarr_features(zarr.open_group(path, mode="r", zarr_format=3))
        there = sum(file.is_file() for file in (path / "embeddings" / "c").rglob("*"))
        if there < array.nchunks and array.shape[0]:
            raise ValueError(f"{array.nchunks - there} of {array.nchunks} chunks of embeddings are missing")
        for start, stop in ranges(max(1, array.shape[0]), array.chunks[0]):
            yield np.asarray(array[start:stop])


# --- parquet: one table, whose metadata say which columns are what


def _write_parquet(path: Path, tables: Tables, shape: tuple[int, int], features: Features) -> None:
    rows, width = shape
    arrays = [_arrow(values) for _, _, values in all_columns(tables)]
    names = flat_names(tables, width)
    about = {
        "attrs": tables.attrs,
        "variables": tables.variables,
        "scans": [str(name) for name in tables.scans.columns],
        "phenotypes": [str(name) for name in tables.phenotypes.columns],
    }
    types = [array.type for array in arrays] + [pa.float32()] * width
    text = json.dumps(about).encode()
    metadata = {_METADATA: text, _CHECKSUM: _checksum(text)}  # parquet itself has checksums of its pages alone
    schema = pa.schema(list(zip(names, types, strict=True)), metadata=metadata)
    step = max(CHUNK_ROWS, _ROW_GROUP_BYTES // max(1, 4 * width))
    dictionary = names[: len(arrays)]
    with pa.parquet.ParquetWriter(
        path, schema, use_dictionary=dictionary, write_statistics=dictionary, write_page_checksum=True
    ) as file:
        for start, stop in ranges(rows, step):
            columns = [array[start:stop] for array in arrays] + _arrow_columns(features(start, stop))
            file.write_table(pa.table(columns, schema=schema), row_group_size=step)
            del columns  # before the next ones are made


def _arrow_columns(block: np.ndarray) -> list[pa.Array]:
    columns = np.asfortranarray(block)
    return [pa.array(columns[:, k]) for k in range(block.shape[1])]


def _arrow(values: np.ndarray) -> pa.Array:
    if is_text(values):
        return pa.array([str(value) for value in values], pa.string())
    return pa.array(values, from_pandas=True)  # NaN becomes null, which is what R and Julia call missing


def _read_parquet_tables(path: Path) -> Tables:
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        about = _about(file)
        if not about:
            return Tables(pd.DataFrame(), pd.DataFrame(), {}, {})
        names = file.schema_arrow.names
        scans, phenotypes = about["scans"], about["phenotypes"]
        found = file.read(columns=names[: len(scans) + len(phenotypes)])
        columns = [_from_arrow(found.column(name)) for name in names[: len(scans) + len(phenotypes)]]
    return Tables(
        pd.DataFrame(dict(zip(scans, columns[: len(scans)], strict=True))),
        pd.DataFrame(dict(zip(phenotypes, columns[len(scans) :], strict=True))),
        about["variables"],
        about["attrs"],
    )


def _from_arrow(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    values = column.fill_null(np.nan) if pa.types.is_floating(column.type) else column
    return np.array(values.to_numpy())  # arrow's own memory is read-only


def _about(file: pa.parquet.ParquetFile) -> dict[str, Any]:
    metadata = file.schema_arrow.metadata or {}
    text = metadata.get(_METADATA, b"{}")
    if metadata.get(_CHECKSUM, _checksum(text)) != _checksum(text):
        raise ValueError("its attributes are not those that were written")
    found: dict[str, Any] = json.loads(text)
    return found


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _read_parquet_features(path: Path) -> Iterator[np.ndarray]:
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        about = _about(file)
        names = file.schema_arrow.names[len(about["scans"]) + len(about["phenotypes"]) :]
        if not file.num_row_groups:
            yield np.empty((0, len(names)), np.float32)
        for number in range(file.num_row_groups):
            found = file.read_row_group(number, columns=names)
            block = np.empty((found.num_rows, len(names)), np.float32)
            for place, name in enumerate(names):
                block[:, place] = found.column(name).to_numpy()
            yield block


# --- npz: numpy alone, nothing pickled


def _write_npz(path: Path, tables: Tables, shape: tuple[int, int], features: Features) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        blocks = (features(start, stop) for start, stop in ranges(shape[0], CHUNK_ROWS))
        _write_npy(archive, "embeddings", np.dtype(np.float32), shape, blocks)
        arrays = {f"{group}/{name}": values for group, name, values in all_columns(tables)}
        arrays["attrs"] = np.array(json.dumps(tables.attrs))
        arrays["variables"] = np.array(json.dumps(tables.variables))
        for name, values in arrays.items():
            if is_text(values) and values.ndim:
                values = np.array([str(value) for value in values], dtype=np.str_)
            _write_npy(archive, name, values.dtype, values.shape, [values])


def _write_npy(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # else equal contents would not be equal
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).tobytes())


def _read_npz_tables(path: Path) -> Tables:
    groups: dict[str, dict[str, np.ndarray]] = {"scans": {}, "phenotypes": {}}
    if not zipfile.is_zipfile(path):  # else numpy's advice would be to unpickle it
        raise ValueError("it is no whole zip archive, as npz files are")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()  # has its name twice: a damaged one would be that of nothing, and left out
    with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:  # numpy leaves a bad one open
        if not {"attrs", "variables", "embeddings"} <= set(file.files):
            return Tables(pd.DataFrame(), pd.DataFrame(), {}, {})
        for key in file.files:
            group, _, name = key.partition("/")
            if group in groups:
                values = file[key]
                groups[group][name] = values.astype(object) if is_text(values) else values
        attrs, variables = (json.loads(str(file[name])) for name in ("attrs", "variables"))
    return Tables(pd.DataFrame(groups["scans"]), pd.DataFrame(groups["phenotypes"]), variables, attrs)


def _read_npz_features(path: Path) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open("embeddings.npy") as file:
        rows, width = _read_npy_shape(file)
        expected, there = 4 * rows * width, archive.getinfo("embeddings.npy").file_size - file.tell()
        if there != expected:
            raise ValueError(f"embeddings.npy has {there} bytes of values, its shape {(rows, width)} needs {expected}")
        for start, stop in ranges(max(1, rows), CHUNK_ROWS):
            count = min(stop, rows) - start
            yield np.frombuffer(file.read(4 * count * width), np.float32).reshape(count, width)


def _read_npy_shape(file: IO[bytes]) -> tuple[int, int]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"embeddings.npy has version {version} of numpy's format, expected (1, 0)")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    check_features(shape, dtype)
    if fortran_order:
        raise ValueError("embeddings.npy is in Fortran's order, expected C's")
    rows, width = shape
    return rows, width


#: By the ending of the file's name.
KINDS = {
    ".zarr": Kind(_write_zarr, _read_zarr_tables, _read_zarr_features),
    ".h5": Kind(write_hdf5, read_hdf5_tables, read_hdf5_features),
    ".parquet": Kind(_write_parquet, _read_parquet_tables, _read_parquet_features),
    ".npz": Kind(_write_npz, _read_npz_tables, _read_npz_features),
}
