"""A table of scans: for trees that follow no convention, and for choosing scans one by one."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ingest.errors import SourceError
from ingest.names import ukb_scan
from ingest.places import Place, local_copy
from ingest.scan import ScanSource

REQUIRED = ("path", "participant")
OPTIONAL = ("session", "modality")

_MEMBER = re.compile(r"(?P<archive>.+?\.zip)(?:::|/)(?P<member>.+)", re.IGNORECASE)


def read_manifest(table: Place, image: str | None = None) -> list[ScanSource]:
    """Read a CSV or TSV file with a row per scan.

    Columns are ``path``, ``participant`` and, optionally, ``session`` and ``modality``; others are ignored. A path is
    absolute or relative to the table's folder. It may name a member of a zip, ``scans.zip/T1/T1.nii.gz`` or
    ``scans.zip::T1/T1.nii.gz``; a UK Biobank archive without a member stands for the field's image. Files need not
    exist: those that do not become rows with the status ``read_error``.

    Parameters
    ----------
    image
        The member to take from UK Biobank archives that are named without one.

    Returns
    -------
    list of ScanSource
        In the order of the table. Names are unique: the path relative to the table's folder if the scan is below it,
        else the path as it is given.

    Raises
    ------
    SourceError
        If the table cannot be read, lacks a column or a value, or names a scan twice.
    """
    root = os.path.abspath(table.parent) if isinstance(table, Path) else str(table.parent)
    lines: dict[str, int] = {}
    scans = []
    for line, row in _rows(table):
        scan = _scan(root, row, image)
        if scan.name in lines:
            raise SourceError(f"{table}, line {line}: {scan.name} is named in line {lines[scan.name]} already")
        lines[scan.name] = line
        scans.append(scan)
    if not scans:
        raise SourceError(f"{table} has no rows below its header")
    if image and not any(scan.member and image in scan.member for scan in scans):
        raise SourceError(f"--image {image} chooses nothing in {table}: name the member in its column path")
    return scans


def _scan(root: str, row: dict[str, str], image: str | None) -> ScanSource:
    path = row["path"]
    absolute = os.path.isabs(path) or path.startswith("s3://")
    if absolute and path.startswith(os.path.join(root, "")):
        path = path.removeprefix(os.path.join(root, ""))
    elif not absolute and "::" not in path:
        path = os.path.normpath(path)
    match = _MEMBER.fullmatch(path)
    if match and ("::" in path or not os.path.isdir(os.path.join(root, match["archive"]))):
        archive, member = match["archive"], match["member"]
        scan = ScanSource(_join(root, archive), f"{archive}/{member}", "", "", "", member)
    else:
        ranked = ukb_scan(root, path, image)
        scan = ranked[1] if ranked else ScanSource(_join(root, path), path, "", "", "")
    return replace(
        scan,
        participant=row["participant"],
        session=row.get("session") or scan.session,
        modality=row.get("modality") or scan.modality,
    )


def _join(root: str, path: str) -> str:
    return path if path.startswith("s3://") else os.path.join(root, path)


def _rows(table: Place) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a table whose columns have been checked."""
    try:
        with local_copy(table) as copy, open(copy, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(",\t;", key=header.count)
            columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
            _check_columns(table, columns)
            reader = csv.reader(file, delimiter=delimiter)
            for cells in reader:
                line = reader.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) > len(columns):
                    raise SourceError(f"{table}, line {line}: {len(cells)} cells under {len(columns)} columns")
                row = {name: cell.strip() for name, cell in zip(columns, cells, strict=False)}
                for name in REQUIRED:
                    if not row.get(name):
                        raise SourceError(f"{table}, line {line}: no {name}")
                if "\0" in row["path"]:
                    raise SourceError(f"{table}, line {line}: the path holds a NUL character")
                yield line, row
    except UnicodeDecodeError as error:
        raise SourceError(f"{table} is not text in UTF-8 (byte {error.start}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise SourceError(f"{table} cannot be read as CSV: {error}") from None
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{table} cannot be read: {error.strerror}") from None


def _check_columns(table: Place, columns: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    twice = [name for name in (*REQUIRED, *OPTIONAL) if columns.count(name) > 1]
    if missing or twice:
        what = f"no column {' or '.join(missing)}" if missing else f"two columns {twice[0]}"
        found = ", ".join(columns[:20]) if any(columns) else "none"
        raise SourceError(
            f"{table} has {what}; found: {found}; expected: {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}"
        )
