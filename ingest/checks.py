"""What a version-1 store must be: its attributes, columns, files and shards. Each check returns what it finds."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import zarr

from ingest.decode import decode_shard, read_index
from ingest.grid import Grid
from ingest.journal import journal_path
from ingest.places import Place, files_below, zarr_store
from ingest.scan import STATUSES, ScanRow
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes, shard_name, shard_path
from ingest.store import FORMAT, FORMAT_VERSION, leftovers, quiet_zarr

#: What JSON, zarr and its codecs raise over files that are not what was written.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_TEMPORARY = re.compile(r"^\..*\.tmp$|\.partial$")  # ours, and zarr's
_CODECS = (["bytes", "numcodecs.lz4", "crc32c"], ["bytes", "crc32c"], "end")
_KINDS = {"str": "OUT", "int": "iu", "float": "f"}  # of the fields of a row
_ABSENT = 2**64 - 1


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes
    ----------
    kind
        Of the store: ``attributes_wrong``, ``layout_wrong``, ``column_missing``, ``column_damaged``, ``column_length``,
        ``unfinished``, ``leftover``. Of a scan: ``status_unknown``, ``shard_missing``, ``shard_damaged``,
        ``shard_orphan``, ``statistics_wrong``, ``source_missing``, ``source_changed``, ``voxels_differ``.
    detail
        What is wrong, and after a repair what became of it.
    row
        None if it is of no single scan.
    file
        What is in the way, relative to the store; set for ``shard_orphan`` and ``leftover``.
    """

    kind: str
    detail: str
    row: int | None = None
    participant: str = ""
    session: str = ""
    source: str = ""
    file: str = ""
    repaired: bool = False


@dataclass(frozen=True)
class StoreTables:
    """What of a store's metadata could be read.

    Attributes
    ----------
    known
        The columns that `rows` has from the store; the others are at their defaults.
    """

    path: Place
    attrs: dict[str, Any]
    shape_zyx: tuple[int, int, int]
    slab: int
    rows: list[ScanRow]
    known: frozenset[str]

    def finding(self, number: int, kind: str, detail: str, file: str = "") -> Finding:
        """Return a finding about the scan of a row."""
        row = self.rows[number]
        return Finding(kind, detail, number, row.participant, row.session, row.source, file)


def check_tables(path: Place) -> tuple[StoreTables | None, list[Finding]]:
    """Check attributes, layout and columns; without a readable ``status`` column there are no tables."""
    try:
        attrs = json.loads((path / "zarr.json").read_text())["attributes"]
        found = (attrs["format"], attrs["format_version"])
    except UNREADABLE as error:
        return None, [Finding("attributes_wrong", f"zarr.json cannot be read: {error_text(error)}")]
    if found != (FORMAT, FORMAT_VERSION):
        expected = f"expected {FORMAT!r}, version {FORMAT_VERSION}"
        return None, [Finding("attributes_wrong", f"format is {found[0]!r}, version {found[1]!r}; {expected}")]
    try:
        scans, shape_zyx, slab, findings = _check_layout(path, attrs)
    except UNREADABLE as error:
        return None, [Finding("layout_wrong", f"volumes/zarr.json cannot be read: {error_text(error)}")]
    kinds = {column.name: _KINDS[str(column.type)] for column in fields(ScanRow)}
    columns, damaged = _check_columns(path, "scans", kinds, scans)
    variables = sorted({file.partition("/")[0] for file in files_below(path / "phenotypes") if "/" in file})
    findings += damaged + _check_columns(path, "phenotypes", dict.fromkeys(variables, "f"), scans)[1]
    if "status" not in columns or any(finding.kind == "layout_wrong" for finding in findings):
        return None, findings
    blank = ScanRow(participant="", session="", modality="", source="")
    rows = [replace(blank, **dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    return StoreTables(path, attrs, shape_zyx, slab, rows, frozenset(columns)), findings


def _check_layout(path: Place, attrs: dict[str, Any]) -> tuple[int, tuple[int, int, int], int, list[Finding]]:
    """Return rows, shape and slab of the array, and where they disagree with the format or the attribute ``grid``."""
    meta = json.loads((path / "volumes" / "zarr.json").read_text())
    scans, *shape = (int(n) for n in meta["shape"])
    sharding = meta["codecs"][0]["configuration"]
    slab = int(sharding["chunk_shape"][1])
    findings = []
    codecs = tuple([codec["name"] for codec in sharding[key]] for key in ("codecs", "index_codecs"))
    found = (*codecs, sharding.get("index_location", "end"), meta["data_type"])
    if found != (*_CODECS, "uint8"):
        findings.append(Finding("layout_wrong", f"volumes have {found}, expected {(*_CODECS, 'uint8')}"))
    chunks = (meta["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"])
    expected = ([1, *shape], [1, slab, *shape[1:]])
    if chunks != expected or slab < 1 or shape[0] % slab:
        findings.append(Finding("layout_wrong", f"volumes have shards and slabs of {chunks}, expected {expected}"))
    try:
        grid = Grid.from_json(attrs["grid"])
        if list(grid.shape_zyx) != shape:
            detail = f"the grid has {list(grid.shape_zyx)} voxels, the array volumes {shape}"
            findings.append(Finding("layout_wrong", detail))
        if grid.affine.shape != (4, 4) or not np.allclose(np.diag(grid.affine), [grid.voxel_mm] * 3 + [1]):
            findings.append(
                Finding("attributes_wrong", f"affine_ras {grid.affine_ras} is not RAS of {grid.voxel_mm} mm")
            )
    except UNREADABLE as error:
        findings.append(Finding("attributes_wrong", f"the grid cannot be read: {error_text(error)}"))
    depth, height, width = shape
    return scans, (depth, height, width), slab, findings


def _check_columns(path: Place, group: str, kinds: dict[str, str], scans: int) -> tuple[dict[str, Any], list[Finding]]:
    """Read columns as lists; those that are absent, unreadable, of another type or length are findings.

    `kinds` has the kinds of NumPy type that each may have.
    """
    columns: dict[str, Any] = {}
    findings = []
    for name, kind in kinds.items():
        label = f"{group}/{name}"
        if not (path / group / name).is_dir():
            findings.append(Finding("column_missing", f"{label} is absent"))
            continue
        try:
            with quiet_zarr():
                values = np.asarray(zarr.open_array(zarr_store(path / group / name), mode="r", zarr_format=3)[:])
        except UNREADABLE as error:
            findings.append(Finding("column_damaged", f"{label} cannot be read: {error_text(error)}"))
            continue
        if values.shape != (scans,):
            detail = f"{label} has the shape {list(values.shape)}, the array volumes has {scans} scans"
            findings.append(Finding("column_length", detail))
        elif values.dtype.kind not in kind:
            findings.append(Finding("column_damaged", f"{label} has the type {values.dtype}"))
        else:
            columns[name] = values.tolist()
    return columns, findings


def check_rows(tables: StoreTables) -> list[Finding]:
    """Check what a row says by itself."""
    findings = []
    for number, row in enumerate(tables.rows):
        if row.status not in STATUSES:
            findings.append(tables.finding(number, "status_unknown", f"status is {row.status!r}"))
        if row.status == "ok" and "scale" in tables.known and not (0 < row.scale < math.inf):
            detail = f"scale is {row.scale}, expected a positive number"
            findings.append(tables.finding(number, "statistics_wrong", detail))
    pending = sum(row.status == "pending" for row in tables.rows)
    if pending or journal_path(tables.path).exists():
        detail = f"an ingest has not ended ({pending} scans are pending); run the same ingest again"
        findings.append(Finding("unfinished", detail))
    return findings


def check_files(tables: StoreTables) -> list[Finding]:
    """Find files that belong to no scan, and what a killed writer left."""
    findings = []
    for file in files_below(tables.path):
        if _TEMPORARY.search(file.rpartition("/")[2]):
            findings.append(Finding("leftover", f"{file} was left by a writer that was stopped", file=file))
        elif file.startswith("volumes/c/"):
            findings += _check_place(tables, file)
    for beside in leftovers(tables.path):
        findings.append(Finding("leftover", f"{beside} was left by a writer that was stopped"))
    return findings


def _check_place(tables: StoreTables, file: str) -> list[Finding]:
    text = file.split("/")[2]
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number < len(tables.rows) or str(number) != text:
        return [Finding("shard_orphan", f"{file} belongs to no row", file=file)]
    if file != shard_name(number):
        return [tables.finding(number, "shard_orphan", f"{file} is no shard of this store", file)]
    status = tables.rows[number].status
    if status in STATUSES and status not in ("ok", "pending"):
        return [tables.finding(number, "shard_orphan", f"the status is {status}, yet there is a shard", file)]
    return []


def check_shard(tables: StoreTables, number: int, volume: np.ndarray) -> tuple[Finding | None, np.ndarray]:
    """Read, check and decode the shard of a row, and check its statistics.

    Parameters
    ----------
    volume
        uint8 (z, y, x), written; defined if the shard is sound.

    Returns
    -------
    finding : Finding or None
        What is wrong.
    content : numpy.ndarray
        uint8, the bytes of the shard; none if it cannot be read.
    """
    path = shard_path(tables.path, number)
    content = np.empty(0, np.uint8)
    try:
        content = _read_shard(path, tables.shape_zyx, tables.slab)
        _check_contiguous(content, tables.shape_zyx[0] // tables.slab)
        decode_shard(content, tables.slab, volume)
    except FileNotFoundError:
        return tables.finding(number, "shard_missing", f"there is no {shard_name(number)}"), content
    except (OSError, ValueError) as error:
        return tables.finding(number, "shard_damaged", error_text(error)), content
    wrong = _check_statistics(tables.rows[number], tables.known, volume)
    return (tables.finding(number, "statistics_wrong", wrong) if wrong else None), content


def _read_shard(path: Place, shape_zyx: tuple[int, int, int], slab: int) -> np.ndarray:
    """Read a shard, but no more than one can have."""
    slabs = shape_zyx[0] // slab
    raw = math.prod(shape_zyx) // slabs
    most = slabs * (SLAB_HEADER + raw + raw // 255 + 16 + CRC_BYTES) + index_bytes(slabs)  # LZ4's own bound
    size = path.stat().st_size if isinstance(path, Path) else path.size() or 0
    if size > most:
        raise ValueError(f"shard of {size} bytes, a shard of this store has at most {most}")
    return np.frombuffer(path.read_bytes(), np.uint8)


def _check_contiguous(content: np.ndarray, slabs: int) -> None:
    """Check what version 1 asks beyond Zarr: every slab present, one after the other, and nothing else."""
    end = 0
    for number, (offset, nbytes) in enumerate(read_index(content, slabs).tolist()):
        if _ABSENT in (offset, nbytes):
            raise ValueError(f"slab {number} is absent")
        if offset != end:
            raise ValueError(f"slab {number} begins at byte {offset}, expected {end}: right after the one before it")
        end += nbytes
    if end != len(content) - index_bytes(slabs):
        raise ValueError(f"the slabs end at byte {end}, the index begins at {len(content) - index_bytes(slabs)}")


def _check_statistics(row: ScanRow, known: frozenset[str], volume: np.ndarray) -> str:
    brain_voxels, total = _count_and_sum(volume.reshape(len(volume), -1))
    mean = total / max(brain_voxels, 1)
    if "brain_voxels" in known and row.brain_voxels != brain_voxels:
        return f"brain_voxels is {row.brain_voxels}, the volume has {brain_voxels}"
    if "mean" in known and not math.isclose(row.mean, mean, rel_tol=1e-9):
        return f"mean is {row.mean}, that of the volume {mean}"
    return ""


@numba.njit(cache=True, nogil=True)
def _count_and_sum(planes: np.ndarray) -> tuple[int, int]:
    """Count the voxels that are not zero, and sum all, of uint8 (z, voxel)."""
    count = 0
    total = 0
    for plane in planes:
        inside = np.uint32(0)  # 32 bits, which a plane cannot overflow, go twice as fast as 64
        levels = np.uint32(0)
        for value in plane:
            inside = np.uint32(inside + np.uint32(value != 0))
            levels = np.uint32(levels + np.uint32(value))
        count += int(inside)
        total += int(levels)
    return count, total


def error_text(error: BaseException) -> str:
    """Return an error's message, or its name if it has none."""
    return str(error) or type(error).__name__
