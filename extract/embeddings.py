"""The embedding file: one row per scan, with who it is, what is known of them, and how it was made."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from extract.formats import KINDS, Features, Tables, flat_names
from ingest.errors import StoreError
from ingest.store import check_format

FORMAT = "brain-embeddings"
FORMAT_VERSION = 1

#: Columns of ``scans/`` after ``row``. If a scan's differ from those in the store, it was embedded from another image.
SCAN_COLUMNS = (
    "participant", "session", "modality", "brain_voxels", "head_scale", "source_size", "source_mtime",
)  # fmt: skip


class Samples(NamedTuple):
    """What scikit-learn takes.

    Attributes
    ----------
    X
        float32 (scan, feature).
    y
        float64 (scan,), values or codes; what codes mean is in `Embeddings.variables`.
    groups
        (scan,), who they are: to be split by people, never by scans (`sklearn.model_selection.GroupKFold`).
    """

    X: np.ndarray
    y: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Embeddings:
    """Frozen-encoder features of scans.

    Attributes
    ----------
    features : numpy.ndarray
        float32, (scan, feature).
    scans : pandas.DataFrame
        One row per scan in the same order: ``row`` (row of the scan in the volume store), ``participant``,
        ``session``, ``modality``, two numbers about the head (``brain_voxels``, ``head_scale``) and two about its
        file (``source_size``, ``source_mtime``).
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

    def frame(self) -> pd.DataFrame:
        """Return one table: who it is, phenotypes, features ``f0``, ``f1``, ...

        A phenotype that is called like another column is called ``phenotype_NAME``, as in a parquet file.
        """
        index = range(len(self.features))
        parts = [self.scans.set_axis(index), self.phenotypes.reindex(index), pd.DataFrame(self.features)]
        names = flat_names(self._tables(), self.features.shape[1])
        return pd.concat(parts, axis="columns").set_axis(names, axis="columns")

    def xy(self, target: str, *, known_only: bool = True) -> Samples:
        """Return features, a phenotype, and who it is: ``X, y, groups = embeddings.xy("age")``.

        Parameters
        ----------
        target
            A phenotype.
        known_only
            Leave out scans of which it is not known; else these have NaN.

        Raises
        ------
        ValueError
            If there is no such phenotype.
        """
        if target not in self.phenotypes.columns:
            there = ", ".join(map(str, self.phenotypes.columns)) or "none"
            raise ValueError(f"no phenotype {target!r} in the embeddings; there are: {there}")
        y = self.phenotypes[target].to_numpy(np.float64)
        chosen = ~np.isnan(y) if known_only else np.ones(len(y), np.bool_)
        return Samples(self.features[chosen], y[chosen], self.scans["participant"].to_numpy()[chosen])

    def _tables(self) -> Tables:
        return Tables(self.scans, self.phenotypes, self.variables, self.attrs)


def open_embeddings(path: str | Path, layer: str | None = None) -> Embeddings:
    """Read an embedding file, whatever its kind.

    Parameters
    ----------
    layer
        Only the features of this layer, where a file has those of several; by default all of them.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    StoreError
        If it is no embedding file, of an unknown version, damaged, or has no such layer.
    """
    path = Path(path)
    tables = read_tables(path)
    blocks = read_features(path)
    first = next(blocks)
    features = np.empty((len(tables.scans), first.shape[1]), np.float32)
    features[: len(first)] = first
    start = len(first)
    for block in blocks:
        features[start : start + len(block)] = block
        start += len(block)
    if start != len(features):
        raise StoreError(f"{path} has features of {start} scans and a table of {len(features)}; extract them again")
    embeddings = Embeddings(features, tables.scans, tables.phenotypes, tables.variables, tables.attrs)
    return embeddings if layer is None else _one_layer(embeddings, layer, path)


def read_tables(path: Path) -> Tables:
    """Read all but the features of an embedding file; errors are those of `open_embeddings`."""
    if not path.exists():
        raise FileNotFoundError(f"no embeddings at {path}; make them with: extract STORE {path}")
    check_suffix(path)
    try:
        tables = KINDS[path.suffix].read_tables(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    check_format(tables.attrs, path, name=FORMAT, known=FORMAT_VERSION)
    order = {name: place for place, name in enumerate(("row", *SCAN_COLUMNS))}
    columns = sorted(tables.scans.columns, key=lambda name: order.get(name, len(order)))  # zarr and HDF5 know no order
    scans = tables.scans[columns]
    return replace(tables, scans=scans, phenotypes=tables.phenotypes.reindex(range(len(scans))))


def read_features(path: Path) -> Iterator[np.ndarray]:
    """Yield the features of an embedding file block by block, float32 (scan, feature); at least one block."""
    try:
        yield from KINDS[path.suffix].read_features(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from None


#: What the libraries raise where a file is not what its name says.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, pa.ArrowException)


def _damaged(path: Path, error: BaseException) -> StoreError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return StoreError(f"{path} cannot be read as embeddings: {reason}; make it again with: extract STORE {path}")


def _one_layer(embeddings: Embeddings, layer: str, path: Path) -> Embeddings:
    width = embeddings.features.shape[1]
    only = [{"name": embeddings.attrs.get("layer"), "features": width, "start": 0}]
    layers: list[dict[str, Any]] = embeddings.attrs.get("layers") or only
    found = next((one for one in layers if one["name"] == layer), None)
    if found is None:
        raise StoreError(f"{path} has no layer {layer!r}; it has {', '.join(str(one['name']) for one in layers)}")
    start, stop = found["start"], found["start"] + found["features"]
    attrs = {**embeddings.attrs, "layer": layer, "layers": [{**found, "start": 0}]}
    return replace(embeddings, features=embeddings.features[:, start:stop].copy(), attrs=attrs)


def write_embeddings(path: str | Path, embeddings: Embeddings) -> None:
    """Write an embedding file of the kind that its name ends in; it appears whole or not at all, replacing another."""
    features = np.asarray(embeddings.features, np.float32)
    write_file(Path(path), embeddings._tables(), features.shape, lambda start, stop: features[start:stop])


def write_file(path: Path, tables: Tables, shape: tuple[int, ...], features: Features) -> None:
    """Write an embedding file block by block, see `extract.formats.Kind`; it appears whole or not at all."""
    check_suffix(path)
    tables = replace(tables, attrs={"format": FORMAT, "format_version": FORMAT_VERSION, **tables.attrs})
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        KINDS[path.suffix].write(temporary, tables, (shape[0], shape[1]), features)
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
    """Remove what a process that was killed in `write_file` has left. Only for whoever holds the lock."""
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
    if path.suffix not in KINDS:
        raise StoreError(f"{path.name} ends in {path.suffix!r}, expected one of {', '.join(KINDS)}")
