"""Columns of a Zarr group: one array per column of a table, all of one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import zarr
from zarr.codecs import ZstdCodec

from ingest.errors import StoreError


def write_column(group: zarr.Group, name: str, values: Any, attrs: Mapping[str, Any] | None = None) -> None:
    """Write one column: text as Zarr strings, the rest as float64 or int64."""
    array = np.asarray(values)
    if array.dtype.kind in "OUT":
        array = np.array([str(value) for value in array], dtype=np.dtypes.StringDType())
    elif array.dtype.kind in "iub":
        array = array.astype(np.int64)
    else:
        array = array.astype(np.float64)
    column = group.create_array(
        name,
        shape=array.shape,
        chunks=(max(1, min(len(array), 1 << 16)),),
        dtype="string" if array.dtype.kind == "T" else array.dtype,
        compressors=[ZstdCodec(level=3, checksum=True)],  # a damaged column is found, not believed
        dimension_names=("scan",),
        overwrite=True,
        config={"write_empty_chunks": True},  # so that a chunk that is not there is one that was lost
    )
    if len(array):
        column[:] = array
    if attrs:
        column.attrs.update(attrs)


def check_columns(group: zarr.Group) -> None:
    """Check that nothing of a group of columns was lost, say by a copy that was cut short: zarr would read zeros.

    Raises
    ------
    StoreError
        Naming the column that is absent, or lacks chunks. (Groups that do not list their columns, as those of older
        versions, cannot tell.)
    """
    listed = group.attrs.get("columns")
    if not isinstance(listed, list):
        return
    found = dict(group.arrays())
    for name in listed:
        column = found.get(name)
        if column is None or column.nchunks_initialized < column.nchunks:
            what = "is absent" if column is None else "has lost chunks"
            raise StoreError(f"column {group.name.strip('/')}/{name} of {group.store_path.store} {what}; copy it again")


def read_columns(root: zarr.Group, name: str) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Read every column of the group `name`, and the attributes of each; an absent group has no columns.

    Raises
    ------
    StoreError
        See `check_columns`.
    """
    columns: dict[str, np.ndarray] = {}
    attrs: dict[str, dict[str, Any]] = {}
    group = root.get(name)
    if isinstance(group, zarr.Group):
        check_columns(group)
        for column, array in sorted(group.arrays()):
            values = np.asarray(array[:])
            columns[column] = values.astype(object) if values.dtype.kind in "OUT" else values
            attrs[column] = dict(array.attrs)
    return pd.DataFrame(columns, copy=False), attrs  # of a thousand columns a copy is as much memory again
