"""The version-1 store on disk: creating it, its columns, opening it. `docs/store-format.md` is its specification."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from ingest import remote_tables
from ingest.columns import read_columns, write_column
from ingest.encode import LZ4_ACCELERATION
from ingest.errors import StoreError
from ingest.grid import Grid
from ingest.places import Place, as_place, zarr_store
from ingest.scan import ScanRow
from ingest.writing import sync

FORMAT = "brain-volumes"
FORMAT_VERSION = 1

#: Planes per slab: 61 KB each, enough for a CPU and small enough for a GPU to have thousands in flight.
DEFAULT_SLAB = 2


@dataclass(frozen=True)
class VolumeStore:
    """An open store.

    Attributes
    ----------
    path
        Where the store is.
    attrs
        Its attributes: format, grid, intensity rule, ``simulated``, settings, versions, ``store_id``.
    grid
        The grid of every volume.
    slab
        Planes per slab.
    scans
        One row per scan found (see `ingest.scan.ScanRow`), good or not.
    phenotypes
        float64, one row per scan, one column per variable, NaN = missing.
    variables
        Attributes of each phenotype: field, instance, coding, units, task, labels.
    """

    path: Place
    attrs: dict[str, Any]
    grid: Grid
    slab: int
    scans: pd.DataFrame
    phenotypes: pd.DataFrame
    variables: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        """Say what is in it, in a line."""
        voxels = " x ".join(map(str, self.grid.shape_zyx))
        return (
            f"VolumeStore({self.path}: {len(self.ok_rows)} volumes of {len(self.scans)} scans, {voxels} in "
            f"{self.grid.space} space, {len(self.phenotypes.columns)} phenotypes)"
        )

    @property
    def ok_rows(self) -> np.ndarray:
        """Rows (int64) that hold a volume."""
        return np.flatnonzero(self.scans["status"].to_numpy() == "ok")


@contextlib.contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence zarr's warning that numcodecs' LZ4 is no core codec of Zarr v3: the format is chosen, and documented."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        yield


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed distributions, for provenance; those not installed are left out."""
    found = {}
    for name in ("brain-volumes", *names):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def create_store(
    path: Place,
    rows: Sequence[ScanRow],
    grid: Grid,
    *,
    slab: int = DEFAULT_SLAB,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Create a store without shards; it appears at once when its tables and attributes are there.

    Parameters
    ----------
    path
        A place where nothing is yet.
    rows
        One per scan, ``pending`` or settled.
    attrs
        More attributes (intensity, settings, ...).
    """
    if not isinstance(path, Path):
        remote_tables.put_new_store(path, lambda folder: _make_store(folder, rows, grid, slab, attrs or {}))
        return
    staged = _staged(path)
    shutil.rmtree(staged, ignore_errors=True)
    _make_store(staged, rows, grid, slab, attrs or {})
    staged.rename(path)


def _make_store(folder: Path, rows: Sequence[ScanRow], grid: Grid, slab: int, attrs: Mapping[str, Any]) -> None:
    depth, height, width = grid.shape_zyx
    with quiet_zarr():
        root = zarr.open_group(folder, mode="w-", zarr_format=3)
        root.create_array(
            "volumes",
            shape=(len(rows), depth, height, width),
            chunks=(1, slab, height, width),
            shards=(1, depth, height, width),
            dtype="uint8",
            compressors=[
                {"name": "numcodecs.lz4", "configuration": {"acceleration": LZ4_ACCELERATION}},
                {"name": "crc32c", "configuration": {}},
            ],
            fill_value=0,
            dimension_names=("scan", "z", "y", "x"),
        )
    root.attrs.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "store_id": uuid.uuid4().hex,
            "grid": grid.to_json(),
            "simulated": False,
            "created_by": package_versions("zarr", "numcodecs", "nibabel", "numpy"),
            **attrs,
        }
    )
    _write_rows(root.create_group("scans"), rows)


def resize_store(path: Place, scans: int) -> None:
    """Give the ``volumes`` array of a store as many rows as there are scans; shards stay as they are."""
    file = path / "volumes" / "zarr.json"
    meta = json.loads(file.read_text())
    if meta["shape"][0] != scans:  # more, or fewer if a run was killed before it wrote the table
        meta["shape"][0] = scans
        _replace_file(file, json.dumps(meta, indent=2))


def remove_store(path: Place) -> None:
    """Remove a store; killed in between, it is still there, or gone. Only for whoever holds the lock."""
    if not isinstance(path, Path):
        remote_tables.remove_store(path)
    elif path.exists():
        path.rename(_removed(path))
        shutil.rmtree(_removed(path))


def recover_store(path: Place) -> None:
    """Finish or undo what a killed run was doing to the tables. Only for whoever holds the lock."""
    if not isinstance(path, Path):
        remote_tables.finish(path)
        return
    shutil.rmtree(_removed(path), ignore_errors=True)
    staged, old = _staged(path), _old(path)
    for name in ("scans", "phenotypes"):
        if (old / name).is_dir() and not (path / name).is_dir():
            source = staged / name if (staged / name).is_dir() else old / name
            source.rename(path / name)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.staged")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _removed(path: Path) -> Path:
    return path.with_name(f".{path.name}.removed")


def leftovers(path: Place) -> list[Place]:
    """Return what a writer that was killed has left beside a store. Hidden, for users keep a ``t1.zarr.old``."""
    if isinstance(path, Path):
        return [place for place in (_staged(path), _old(path), _removed(path)) if place.exists()]
    return [place for place in (remote_tables.staged(path),) if place.exists()]


def _replace_group(path: Place, name: str, write: Callable[[zarr.Group], None]) -> None:
    """Write a group of columns beside the store, then exchange it for the one that is there."""
    if not isinstance(path, Path):
        remote_tables.replace_group(path, name, lambda folder: write(zarr.open_group(folder, mode="w-", zarr_format=3)))
        return
    staged, old = _staged(path), _old(path)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    write(zarr.open_group(staged, mode="w-", zarr_format=3).create_group(name))
    old.mkdir()
    if (path / name).is_dir():
        (path / name).rename(old / name)
    (staged / name).rename(path / name)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _replace_file(path: Place, text: str) -> None:
    if not isinstance(path, Path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)  # or a power failure could leave the name without the text
    temporary.replace(path)


def write_scans(path: Place, rows: Sequence[ScanRow]) -> None:
    """Replace the ``scans/`` columns; a reader finds the old ones or the new ones."""
    _replace_group(path, "scans", lambda group: _write_rows(group, rows))


def _write_rows(group: zarr.Group, rows: Sequence[ScanRow]) -> None:
    """Write a column per field, ``status`` last: a store without it is unfinished."""
    names = [field.name for field in fields(ScanRow)]
    names.sort(key=lambda name: name == "status")
    for name in names:
        write_column(group, name, [getattr(row, name) for row in rows])
    group.attrs["columns"] = sorted(names)


def rows_of(scans: pd.DataFrame) -> list[ScanRow]:
    """Return the rows of an open store's ``scans`` table."""
    columns = [scans[field.name].tolist() for field in fields(ScanRow)]
    return [ScanRow(*values) for values in zip(*columns, strict=True)]


def unchanged(then: VolumeStore, now: VolumeStore, rows: np.ndarray) -> np.ndarray:
    """Tell of rows, bool (row,), whether they are of the same scans as before: people may have withdrawn since."""
    if then.attrs["store_id"] != now.attrs["store_id"]:
        return np.zeros(len(rows), np.bool_)
    there = rows < len(now.scans)
    same = there.copy()
    for name in ("participant", "session", "source", "status"):
        was, became = then.scans[name].to_numpy(), now.scans[name].to_numpy()
        same[there] &= was[rows[there]] == became[rows[there]]
    return same


def write_phenotypes(path: Place, table: pd.DataFrame, variables: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the ``phenotypes/`` columns and their attributes; `table` has one row per scan."""

    def write(group: zarr.Group) -> None:
        for name in table.columns:
            write_column(group, str(name), table[name].to_numpy(np.float64), variables.get(str(name)))
        group.attrs["columns"] = sorted(map(str, table.columns))

    _replace_group(path, "phenotypes", write)


def set_attributes(path: Place, attrs: Mapping[str, Any]) -> None:
    """Add attributes to a store, at once or not at all."""
    file = path / "zarr.json"
    meta = json.loads(file.read_text())
    meta["attributes"] = {**meta.get("attributes", {}), **attrs}
    _replace_file(file, json.dumps(meta, indent=2))


def check_format(attrs: Mapping[str, Any], path: Place, *, name: str, known: int) -> None:
    """Refuse what this version of the package cannot read.

    Raises
    ------
    StoreError
        With the version found and what to do.
    """
    if attrs.get("format") != name:
        raise StoreError(f"{path} is not a {name} store (format is {attrs.get('format')!r}, expected {name!r})")
    if attrs.get("format_version") != known:
        raise StoreError(
            f"{path} has {name} format version {attrs.get('format_version')!r}, this package reads version {known}; "
            "install the package version named in its 'created_by' attribute, or make it again"
        )


def open_store(path: str | Place) -> VolumeStore:
    """Open a store and read its tables (not its voxels).

    Raises
    ------
    FileNotFoundError
        If there is no Zarr group.
    StoreError
        If it is something else, of an unknown version, unfinished, or being changed at this moment.
    ObjectStoreError
        If the object store cannot be used.
    """
    path = as_place(path)
    if not (path / "zarr.json").is_file():
        if path.is_file():
            raise StoreError(f"{path} is a file, expected a store of ingest, which is a folder")
        raise FileNotFoundError(f"no store at {path}; make one with: ingest SRC {path}")
    with quiet_zarr():
        try:
            root = zarr.open_group(zarr_store(path), mode="r", zarr_format=3)
            attrs = json.loads(json.dumps(dict(root.attrs)))
            check_format(attrs, path, name=FORMAT, known=FORMAT_VERSION)
            grid, slab = Grid.from_json(attrs["grid"]), int(root["volumes"].chunks[1])  # type: ignore[union-attr]
            scans, _ = read_columns(root, "scans")
            phenotypes, variables = read_columns(root, "phenotypes")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            if "must be of the same length" in str(error):
                raise StoreError(
                    f"the columns of {path} differ in length: another process is writing them, or was killed at it; "
                    "wait for it, or run the same ingest again"
                ) from None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise StoreError(f"{path} is damaged ({reason}); copy it again, or ingest with --overwrite") from error
    absent = {field.name for field in fields(ScanRow)} - set(scans.columns)
    if absent:
        name = f"scans/{min(absent)}"
        raise StoreError(f"{path} is damaged: its column {name} is absent; copy it again, or ingest with --overwrite")
    return VolumeStore(
        path=path,
        attrs=attrs,
        grid=grid,
        slab=slab,
        scans=scans,
        phenotypes=phenotypes if len(phenotypes) == len(scans) else phenotypes.reindex(range(len(scans))),
        variables=variables,
    )
