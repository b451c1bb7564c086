"""The embedding file: one row per scan, with who it is, what is known of them, and how it was made."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr

from ingest.errors import StoreError
from ingest.store import check_format, quiet_zarr, read_columns, write_column

FORMAT = "brain-embeddings"
FORMAT_VERSION = 1
SUFFIXES = (".zarr", ".h5")


@dataclass(frozen=True)
class Embeddings:
    """Frozen-encoder features of scans.

    Attributes
    ----------
    features : numpy.ndarray
        float32, (scan, feature).
    scans : pandas.DataFrame
        One row per scan in the same order: ``row`` (row of the scan in the volume store), ``participant``,
        ``session``, ``modality`` and two numbers about the head (``brain_voxels``,
        ``head_scale``).
    phenotypes : pandas.DataFrame
        float64, one column per variable, NaN where missing.
    variables : dict
        For each phenotype its attributes in the store: ``field``, ``instance``, ``coding``, ``units``, ``task``,
        ``labels`` (any of them may be None).
    attrs : dict
        Provenance: model, weights (name, sha256), layer, views, precision, store (path, id), ``simulated``, versions.
    """

    features: np.ndarray
    scans: pd.DataFrame
    phenotypes: pd.DataFrame
    variables: dict[str, dict[str, Any]] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


def open_embeddings(path: str | Path) -> Embeddings:
    """Read an embedding file, whatever its kind.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    StoreError
        If it is no embedding file, or of an unknown version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no embeddings at {path}; make them with: extract STORE {path}")
    check_suffix(path)
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            return _read_hdf5(file, path)
    with quiet_zarr():
        root = zarr.open_group(path, mode="r", zarr_format=3)
        attrs = dict(root.attrs)
        check_format(attrs, path, name=FORMAT, known=FORMAT_VERSION)
        features = root["embeddings"]
        assert isinstance(features, zarr.Array)
        scans, _ = read_columns(root, "scans")
        phenotypes, variables = read_columns(root, "phenotypes")
        return Embeddings(np.asarray(features[:]), scans, phenotypes, variables, attrs)


def write_embeddings(path: str | Path, embeddings: Embeddings) -> None:
    """Write an embedding file (``.zarr`` or ``.h5``); it appears whole or not at all, replacing what was there."""
    path = Path(path)
    check_suffix(path)
    attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, **embeddings.attrs}
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        if path.suffix == ".h5":
            _write_hdf5(temporary, embeddings, attrs)
        else:
            _write_zarr(temporary, embeddings, attrs)
        if path.is_dir():
            _exchange(temporary, path)  # and what was there is removed below
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed in `write_embeddings` has left. Only for whoever holds the lock."""
    for temporary in path.parent.glob(f".{glob.escape(path.stem)}.*.tmp{path.suffix}"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def _exchange(a: Path, b: Path) -> None:
    """Give two folders each other's names, at once where the system can (Linux's ``renameat2``)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = a.with_name(f"{a.name}.aside")
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


def check_suffix(path: Path) -> None:
    """Raise StoreError if the name's ending is no kind of embedding file."""
    if path.suffix not in SUFFIXES:
        raise StoreError(f"{path.name} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")


def _write_zarr(path: Path, embeddings: Embeddings, attrs: dict[str, Any]) -> None:
    root = zarr.open_group(path, mode="w-", zarr_format=3)
    features = root.create_array(
        "embeddings",
        shape=embeddings.features.shape,
        chunks=(min(4096, max(1, len(embeddings.features))), max(1, embeddings.features.shape[1])),
        dtype="float32",
        dimension_names=("scan", "feature"),
    )
    features[:] = embeddings.features
    for group, table in (("scans", embeddings.scans), ("phenotypes", embeddings.phenotypes)):
        columns = root.create_group(group)
        for name in table.columns:
            write_column(columns, str(name), table[name].to_numpy(), embeddings.variables.get(str(name)))
    root.attrs.update(attrs)


def _write_hdf5(path: Path, embeddings: Embeddings, attrs: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("embeddings", data=embeddings.features.astype(np.float32))
        for group, table in (("scans", embeddings.scans), ("phenotypes", embeddings.phenotypes)):
            columns = file.create_group(group)
            for name in table.columns:
                values = table[name].to_numpy()
                if values.dtype.kind in "OUT":
                    values = np.array([str(value) for value in values], dtype=h5py.string_dtype())
                column = columns.create_dataset(str(name), data=values)
                for key, value in embeddings.variables.get(str(name), {}).items():
                    column.attrs[key] = json.dumps(value)  # HDF5 has no null and no nesting
        for key, value in attrs.items():
            file.attrs[key] = json.dumps(value)


def _read_hdf5(file: h5py.File, path: Path) -> Embeddings:
    attrs = {key: json.loads(value) for key, value in file.attrs.items()}
    check_format(attrs, path, name=FORMAT, known=FORMAT_VERSION)
    tables: dict[str, pd.DataFrame] = {}
    variables: dict[str, dict[str, Any]] = {}
    for group in ("scans", "phenotypes"):
        columns = {}
        for name, column in file[group].items():
            text = h5py.check_string_dtype(column.dtype) is not None
            columns[name] = column.asstr()[:].astype(object) if text else column[:]
            if group == "phenotypes":
                variables[name] = {key: json.loads(value) for key, value in column.attrs.items()}
        tables[group] = pd.DataFrame(columns, index=range(len(file["embeddings"])))
    return Embeddings(file["embeddings"][:], tables["scans"], tables["phenotypes"], variables, attrs)
