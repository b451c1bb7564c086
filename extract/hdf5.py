"""Embeddings as HDF5: the groups and names of the Zarr kind, with checksums, so that damage is an error, not data."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from extract.hdf5_inside import dataset_inside, group_inside
from extract.tables import CHUNK_ROWS, Features, Tables, all_columns, check_features, is_text, ranges

_COLUMN_ROWS = 1 << 16

#: Of HDF5 1.10: the first format whose groups, attributes and indices all have checksums of their own.
_VERSION = ("v110", "v110")


def write_hdf5(path: Path, tables: Tables, shape: tuple[int, int], features: Features) -> None:
    """Write a file; see `extract.formats.Kind`."""
    with _Written(path) as written:
        with h5py.File(written, "w", libver=_VERSION) as file:
            array = file.create_dataset("embeddings", shape=shape, dtype="float32", **_checksums(shape, CHUNK_ROWS))
            for start, stop in ranges(shape[0], array.chunks[0] if array.chunks else CHUNK_ROWS):
                array[start:stop] = features(start, stop)
                written.check()
            for group in ("scans", "phenotypes"):
                file.create_group(group)
            for group, name, values in all_columns(tables):
                values = _fixed_length(values) if is_text(values) else values
                column = file[group].create_dataset(name, data=values, **_checksums(values.shape, _COLUMN_ROWS))
                if group == "phenotypes":
                    _write_attributes(column, tables.variables.get(name, {}))
            _write_attributes(file, tables.attrs)
        written.check()


class _Written(io.FileIO):
    """A file for h5py to write, which keeps the first error to itself until it is asked.

    HDF5 does not survive that closing a file fails, as it does on a full disk: the process dies of a segmentation
    fault, at once or at its end (h5py issues 914 and 1642).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        with self._keeping_errors():
            while left and self._error is None:
                left = left[super().write(left) :]  # a disk that is nearly full takes a part
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        with self._keeping_errors():
            return super().truncate(size)
        return size or 0

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # Ctrl-C, too
            self._error = self._error or error

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error


def _checksums(shape: tuple[int, ...], most_rows: int) -> dict[str, Any]:
    """Return how a dataset is stored: in chunks of equal rows, for HDF5 has a whole one at the end, too."""
    if 0 in shape:
        return {}  # nothing is stored
    chunks = -(-shape[0] // most_rows)
    return {"chunks": (-(-shape[0] // chunks), *shape[1:]), "fletcher32": True}


def _fixed_length(texts: np.ndarray) -> np.ndarray:
    """Return texts as UTF-8 of one length: those of variable length lie where HDF5 has no checksums."""
    encoded = [str(text).encode() for text in texts]
    return np.array(encoded, h5py.string_dtype("utf-8", max([1, *map(len, encoded)])))


def _write_attributes(of: h5py.File | h5py.Dataset, attrs: dict[str, Any]) -> None:
    for key, value in attrs.items():
        of.attrs[key] = np.bytes_(json.dumps(value))  # HDF5 has no null and no nesting; bytes are of fixed length


def read_hdf5_tables(path: Path) -> Tables:
    """Read all but the features."""
    with h5py.File(path, "r") as file:
        attrs = _read_attributes(file)
        tables: dict[str, pd.DataFrame] = {}
        variables: dict[str, dict[str, Any]] = {}
        for group in ("scans", "phenotypes"):
            columns = {}
            inside = group_inside(file, group)
            for name in inside:
                column = dataset_inside(inside, name)
                text = h5py.check_string_dtype(column.dtype) is not None
                columns[name] = column.asstr()[:].astype(object) if text else column[:]
                if group == "phenotypes":
                    variables[name] = _read_attributes(column)
            tables[group] = pd.DataFrame(columns)
        return Tables(tables["scans"], tables["phenotypes"], variables, attrs)


def _read_attributes(of: h5py.File | h5py.Dataset) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in of.attrs.items()}


def read_hdf5_features(path: Path) -> Iterator[np.ndarray]:
    """Yield the features block by block."""
    with h5py.File(path, "r") as file:
        array = dataset_inside(file, "embeddings")
        check_features(array.shape, array.dtype)
        step = min(array.chunks[0], CHUNK_ROWS) if array.chunks else CHUNK_ROWS
        for start, stop in ranges(max(1, len(array)), step):
            yield array[start:stop]
