"""What embeddings must be for every kind of file to keep them, and for whoever reads them to take them as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from extract.tables import Tables, feature_names, is_text

#: Attributes in which there are others, each with an example; what is not named here may be of any kind.
_OBJECTS = {
    "weights": '{"name": "imagenet"}',
    "store": '{"path": "/data/t1.zarr"}',
    "input": '{"rule": "stored / 255"}',
    "created_by": '{"torch": "2.12.0"}',
    "updated_by": '{"torch": "2.12.0"}',
}
_LISTS_OF_OBJECTS = {
    "layers": '[{"name": "avgpool", "features": 512, "start": 0}]',
    "skipped": '[{"row": 1, "reason": "it cannot be read"}]',
}


def check_features_to_write(features: np.ndarray) -> np.ndarray:
    """Return features as they are written, float32 (scan, feature).

    Raises
    ------
    ValueError
        If they are something else, or no finite numbers.
    """
    found = np.asarray(features)
    if found.ndim != 2 or found.dtype.kind not in "iuf":
        raise ValueError(f"features are {found.dtype} of shape {found.shape}, expected numbers (scan, feature)")
    with np.errstate(over="ignore"):
        found = found.astype(np.float32, copy=False)
    if not np.isfinite(found).all():
        raise ValueError("features are no finite numbers; expected a number of each scan and feature")
    return found


def check_tables_to_write(tables: Tables, shape: tuple[int, ...]) -> Tables:
    """Return tables as they are written beside features of a shape: with columns of numbers and texts alone.

    Raises
    ------
    ValueError
        Naming what no file can keep, or nobody could read.
    """
    _check_names(tables, shape[1])
    if len(tables.scans) != shape[0]:
        raise ValueError(f"features are of {shape[0]} scans and the table of {len(tables.scans)}, expected as many")
    scans = {str(name): _scan_column(column, str(name)) for name, column in tables.scans.items()}
    return check_tables(replace(tables, scans=pd.DataFrame(scans)))


def check_tables(tables: Tables) -> Tables:
    """Return the tables of embeddings, whoever wrote them, with phenotypes as float64.

    Raises
    ------
    ValueError
        If a column that must be there is not, tables differ in length, a phenotype is no number, or an attribute is of
        another kind than `docs/embeddings.md` says.
    """
    scans, phenotypes = tables.scans, tables.phenotypes
    for name, what in (("row", "the row of each scan in its store"), ("participant", "whose scan each is")):
        if name not in scans:
            raise ValueError(f"there is no column scans/{name}, expected one that tells {what}")
    if scans["row"].dtype.kind not in "iu":
        raise ValueError(f"scans/row is {scans['row'].dtype}, expected whole numbers")
    if len(phenotypes.columns) and len(phenotypes) != len(scans):
        raise ValueError(
            f"there are phenotypes of {len(phenotypes)} scans and a table of {len(scans)}, expected as many"
        )
    _check_attributes(tables.attrs, tables.variables)
    numbers = {str(name): as_numbers(column, str(name)) for name, column in phenotypes.items()}
    return replace(tables, phenotypes=pd.DataFrame(numbers, index=range(len(scans))))


def as_numbers(column: pd.Series, name: str) -> np.ndarray:
    """Return the values of a phenotype as float64, NaN where missing; truth is 1 and 0.

    Raises
    ------
    ValueError
        Naming the phenotype, if it has texts, dates or other things.
    """
    values, missing = column.to_numpy(), column.isna().to_numpy()
    if values.dtype.kind in "iufb":
        return values.astype(np.float64)
    remedy = "give numbers, NaN where missing: codes for texts, with their labels among the variables, years for dates"
    if values.dtype.kind not in "OUT":
        raise ValueError(f"phenotype {name} is {values.dtype}; {remedy}")
    for place in np.flatnonzero(~missing):
        if not isinstance(values[place], Real | np.bool_):
            raise ValueError(f"phenotype {name} is {_shown(values[place])} in scan {place}; {remedy}")
    return np.array([np.nan if gone else float(value) for value, gone in zip(values, missing, strict=True)], np.float64)


def _scan_column(column: pd.Series, name: str) -> np.ndarray:
    """Return a column of the scans as numbers, or as texts, "" where missing."""
    values, missing = column.to_numpy(), column.isna().to_numpy()
    if name == "participant" and missing.any():
        raise ValueError(f"scans/participant is missing in scan {missing.argmax()}, expected whose scan it is")
    if values.dtype.kind in "iufb":
        return values
    if pd.api.types.is_numeric_dtype(column.dtype) and is_text(values):  # numbers of pandas, some of them missing
        return column.to_numpy(np.float64, na_value=np.nan)
    if not is_text(values):
        raise ValueError(f"scans/{name} is {values.dtype}, expected numbers or texts")
    texts = np.where(missing, "", values.astype(object))
    for place, text in enumerate(texts):
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"scans/{name} is {_shown(text)} in scan {place}, expected a text in all scans")
    return texts


def _check_names(tables: Tables, width: int) -> None:
    """Refuse names that two columns have, and those that Zarr and HDF5 take for folders, or Zarr for its own file.

    Of variables ingest has made underscores of slashes.
    """
    for table in (tables.scans, tables.phenotypes):
        names = list(map(str, table.columns))
        for name in names:
            if name in ("", ".", "..", "zarr.json") or re.search(r"[/\\\0]", name):
                raise ValueError(
                    f"a column is called {name!r}, expected a name without slashes that is no path; rename it"
                )
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} columns are called {name!r}, expected each name once; rename them"
                )
    taken = set(feature_names(width)).intersection(map(str, tables.scans.columns))
    if taken:
        raise ValueError(f"scans/{min(taken)} is called like a feature; rename it")


def _check_attributes(attrs: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Refuse attributes that are no JSON, and those of another kind than whoever reads them relies on."""
    for name, value in attrs.items():
        what = f"attribute {name}"
        _check_json(what, value)
        if name in _OBJECTS:
            _check_object(what, value, _OBJECTS[name])
        if name in _LISTS_OF_OBJECTS and not _is_list_of_objects(value):
            raise ValueError(f"{what} is {_shown(value)}, expected a list such as {_LISTS_OF_OBJECTS[name]}")
    _check_object("attribute store.grid", (attrs.get("store") or {}).get("grid"), '{"space": "mni152"}')
    for name, about in variables.items():
        _check_json(f"variables {name}", about)
        if not isinstance(about, Mapping):
            raise ValueError(f'variables {name} is {_shown(about)}, expected an object such as {{"units": "years"}}')
        _check_object(f"variables {name}.labels", about.get("labels"), '{"0": "female", "1": "male"}')
        if not isinstance(about.get("task"), str | None):
            raise ValueError(f"variables {name}.task is {_shown(about['task'])}, expected a name such as binary")


def _check_object(what: str, value: object, example: str) -> None:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{what} is {_shown(value)}, expected an object such as {example}")


def _is_list_of_objects(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value))


def _check_json(what: str, value: object) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} is {_shown(value)}, which JSON cannot keep ({error}); expected finite numbers, texts, lists, "
            "dicts, None"
        ) from None


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
