"""The embedding file: one row per scan, with who it is, what is known of them, and how it was made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from extract.checks import as_numbers, check_features_to_write, check_tables, check_tables_to_write
from extract.formats import DAMAGE, KINDS
from extract.tables import Features, Tables, flat_names
from ingest.errors import StoreError
from ingest.exchange import remove, take_place, temporary_name
from ingest.people import participant_key
from ingest.store import check_format
from ingest.writing import behind_link, is_full, not_written, sync

FORMAT = "brain-embeddings"
FORMAT_VERSION = 1

#: How often a file is read that others replace meanwhile.
_TRIES = 3

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
        (scan,), who they are, in one spelling (``01`` for ``sub-01``): to be split by people, never by scans
        (`sklearn.model_selection.GroupKFold`).
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

    def __repr__(self) -> str:
        """Return one line: a table of every scan, or all that is known of each phenotype, fills the screen."""
        return f"Embeddings({self.in_words()}; {len(self.phenotypes.columns)} phenotypes)"

    def in_words(self) -> str:
        """Return in one line what this is: ``204 scans x 512 features, resnet18, imagenet weights``."""
        size = f"{len(self.scans)} scans x {self.features.shape[-1]} features"
        weights = (self.attrs.get("weights") or {}).get("name", "unknown")
        return (
            f"{size}, {self.attrs.get('model', 'unknown model')}, {weights} weights"
            + (f", layer {self.attrs['layer']}" if self.attrs.get("layer") else "")
            + (", simulated data" if self.attrs.get("simulated") else "")
        )

    def frame(self) -> pd.DataFrame:
        """Return one table: who it is, phenotypes, features ``f0``, ``f1``, ...

        A phenotype that is called like another column is called ``phenotype_NAME``, as in a parquet file.
        """
        index = range(len(self.features))  # by place: those of chosen rows have the labels that they had
        phenotypes = self.phenotypes if len(self.phenotypes.columns) else pd.DataFrame(index=index)
        parts = [self.scans.set_axis(index), phenotypes.set_axis(index), pd.DataFrame(self.features)]
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
            If there is no such phenotype, or it has texts or dates.
        """
        if not isinstance(target, str):
            raise TypeError(f"target is {target!r}, expected the name of one phenotype, such as 'age'")
        alike = [name for name in self.phenotypes.columns if str(name).lower() == target.lower()]
        if target not in self.phenotypes.columns and len(alike) == 1:  # as --targets takes them
            target = alike[0]
        if target not in self.phenotypes.columns:
            there = ", ".join(map(str, self.phenotypes.columns)) or "none"
            raise ValueError(f"no phenotype {target!r} in the embeddings; there are: {there}")
        y = as_numbers(self.phenotypes[target], target)
        chosen = ~np.isnan(y) if known_only else np.ones(len(y), np.bool_)
        people = self.scans["participant"].map(participant_key).to_numpy()
        return Samples(self.features[chosen], y[chosen], people[chosen])

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
    path = local_path(path)
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            embeddings = _read_all(path)
        except (StoreError, FileNotFoundError):  # as tables of one file and features of another are
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return embeddings if layer is None else _one_layer(embeddings, layer, path)
    raise StoreError(f"{path} is replaced again and again while it is read; wait until extract has ended")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what is another when a file, or a folder, was put in its place: tables and features are of one."""
    try:
        found = path.stat()
    except OSError:  # reading it says why
        return None
    return found.st_dev, found.st_ino


def _read_all(path: Path) -> Embeddings:
    tables = read_tables(path)
    blocks = read_features(path)
    first = next(blocks)
    features = np.empty((len(tables.scans), first.shape[1]), np.float32)
    start = 0
    for block in itertools.chain([first], blocks):
        if start + len(block) <= len(features):
            features[start : start + len(block)] = block
        start += len(block)
    if start != len(features):
        raise StoreError(f"{path} has features of {start} scans and a table of {len(features)}; extract them again")
    return Embeddings(features, tables.scans, tables.phenotypes, tables.variables, tables.attrs)


def read_tables(path: Path) -> Tables:
    """Read all but the features of an embedding file; errors are those of `open_embeddings`."""
    if not path.exists():
        raise FileNotFoundError(f"no embeddings at {path}; make them with: extract STORE {path}")
    tables = _read_any_tables(path)
    check_format(tables.attrs, path, name=FORMAT, known=FORMAT_VERSION)
    try:
        tables = check_tables(tables)
    except DAMAGE as error:
        raise _damaged(path, error, "correct that in the file, or ") from None
    order = {name: place for place, name in enumerate(("row", *SCAN_COLUMNS))}
    columns = sorted(tables.scans.columns, key=lambda name: order.get(name, len(order)))  # zarr and HDF5 know no order
    return replace(tables, scans=tables.scans[columns])


def _read_any_tables(path: Path) -> Tables:
    """Read the tables of a file that may be somebody else's."""
    check_suffix(path)
    try:
        tables = KINDS[path.suffix].read_tables(path)
        if not (isinstance(tables.attrs, dict) and isinstance(tables.variables, dict)):
            raise ValueError("its attributes are no JSON objects")
    except (OSError, *DAMAGE) as error:
        raise _damaged(path, error) from None
    return tables


def check_replaceable(path: Path) -> None:
    """Raise StoreError if there is something at `path` that is no embedding file: it is never replaced."""
    if not path.exists():
        return
    try:
        found = _read_any_tables(path).attrs.get("format")
        reason = "" if found == FORMAT else f"its format is {found!r}"
    except StoreError as error:
        reason = str(error)
    if reason:
        raise StoreError(
            f"{path} exists and is not known to be an embedding file, so it is not replaced ({reason}); remove it "
            "yourself, or choose another name"
        )


def read_features(path: Path) -> Iterator[np.ndarray]:
    """Yield the features of an embedding file block by block, float32 (scan, feature); at least one block."""
    start = 0
    try:
        for block in KINDS[path.suffix].read_features(path):
            if not np.isfinite(block).all():
                raise ValueError(f"features of scans {start} to {start + len(block) - 1} are no finite numbers")
            start += len(block)
            yield block
    except (OSError, *DAMAGE) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException, other_remedy: str = "") -> StoreError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    remedy = f"{other_remedy}remove it, and make it again: extract STORE {path}"
    return StoreError(f"{path} cannot be read as embeddings: {reason}; {remedy}")


def _one_layer(embeddings: Embeddings, layer: str, path: Path) -> Embeddings:
    width = embeddings.features.shape[1]
    only = [{"name": embeddings.attrs.get("layer"), "features": width, "start": 0}]
    layers: list[dict[str, Any]] = embeddings.attrs.get("layers") or only
    if layers == only and only[0]["name"] is None:
        raise StoreError(f"{path} does not say which layers it has, so {layer!r} is not known; leave the layer out")
    try:
        found = {one["name"]: one for one in layers}.get(layer)
        if found is None:
            raise StoreError(f"{path} has no layer {layer!r}; it has {', '.join(str(one['name']) for one in layers)}")
        start, stop = int(found["start"]), int(found["start"] + found["features"])
    except (LookupError, TypeError) as error:
        raise _damaged(path, error) from None
    attrs = {**embeddings.attrs, "layer": layer, "layers": [{**found, "start": 0}]}
    return replace(embeddings, features=embeddings.features[:, start:stop].copy(), attrs=attrs)


def write_embeddings(path: str | Path, embeddings: Embeddings) -> None:
    """Write an embedding file of the kind that its name ends in; it appears whole or not at all, replacing another.

    Raises
    ------
    StoreError
        If the name has another ending, or a folder that is no embeddings is there.
    ValueError
        If features are no finite numbers, tables do not fit them, or something in them is nothing that every kind of
        file keeps: a name that is a path, or that two columns have; a phenotype that is no number; an attribute of
        another kind than `docs/embeddings.md` says.
    """
    path = local_path(path)
    check_suffix(path)
    features = check_features_to_write(embeddings.features)
    tables = check_tables_to_write(embeddings._tables(), features.shape)
    write_file(path, tables, features.shape, lambda start, stop: features[start:stop])


def write_file(path: Path, tables: Tables, shape: tuple[int, ...], features: Features) -> None:
    """Write an embedding file block by block, see `extract.formats.Kind`; it appears whole or not at all.

    It is on the disk when this returns: what it was made from may go.

    Raises
    ------
    StoreError
        If the disk is full, or a folder that is no embeddings is there.
    """
    check_suffix(path)
    path = behind_link(path)
    if path.is_dir():
        check_replaceable(path)
    tables = replace(tables, attrs={"format": FORMAT, "format_version": FORMAT_VERSION, **tables.attrs})
    temporary = temporary_name(path)
    try:
        KINDS[path.suffix].write(temporary, tables, (shape[0], shape[1]), features)
        for written in [temporary, *temporary.rglob("*")]:
            sync(written)
        take_place(temporary, path)
        sync(path.parent)
    except OSError as error:
        if is_full(error):  # others may be of what features are read from
            raise not_written(path, temporary, error) from error
        raise
    finally:
        remove(temporary)


def local_path(path: str | Path) -> Path:
    """Return where an embedding file is; ValueError for addresses of object stores."""
    if "://" in str(path):
        raise ValueError(
            f"{path} is an address, but embeddings are files on a local disk; give a path there, and copy them yourself"
        )
    return Path(path)


def check_suffix(path: Path) -> None:
    """Raise StoreError if the name's ending is no kind of embedding file."""
    if path.suffix not in KINDS:
        raise StoreError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(KINDS)}")
