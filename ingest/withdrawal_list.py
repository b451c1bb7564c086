"""Lists of people who withdrew: UK Biobank's column of ids, and what spreadsheets and R make of one.

A list that is misread leaves people in the stores. So what does not say plainly which of its cells are ids is refused.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from ingest.errors import TableError
from ingest.people import participant_key
from ingest.ukb_columns import ID_COLUMNS, find_id_column

_SEPARATORS = "\t;,"
_REMARK = "#"
_EXPECTED = f"expected one participant id a line, or a header with a column called {', '.join(ID_COLUMNS[:5])} ..."


def read_withdrawals(path: Path) -> frozenset[str]:
    """Read a list of participants.

    With a header that names a column of ids (`ingest.ukb_columns.ID_COLUMNS`) that column is taken. Without one, lines
    hold one id each, or several, all different and of as many letters and digits. Tabs, semicolons, commas or blanks
    separate cells. What follows a ``#`` is a remark.

    Raises
    ------
    TableError
        If there is no file, no text, nobody in it, or a line of which cannot be told who is meant.
    """
    if not path.is_file():
        raise TableError(f"no list of withdrawals at {path}; expected a file with one participant id a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TableError(f"{path} is not a text in UTF-8; {_EXPECTED}") from None
    if "\0" in text:
        raise TableError(f"{path} is not a text in UTF-8 (UTF-16, perhaps); {_EXPECTED}")
    rows = _read_rows(path, text)
    column = find_id_column(rows[0][1]) if rows else None
    ids = _of_all_cells(path, rows) if column is None else _of_column(path, rows, column)
    ids = {one for one in ids if one.lower() not in ID_COLUMNS}  # a header amid lists that were joined
    if not ids:
        raise TableError(f"{path} names nobody; {_EXPECTED}")
    return frozenset(ids)


def _read_rows(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return number and cells of each line that has any; empty cells at its end do not count."""
    lines = [(number, line.partition(_REMARK)[0].strip(" ")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip(f'{_SEPARATORS} "')]
    separator = _separator([line for _, line in lines])
    rows = []
    for number, line in lines:
        if line.count('"') % 2:
            raise TableError(f"{path}, line {number}: a quote that does not end; {_EXPECTED}")
        if separator == " " and line.lower() in ID_COLUMNS:  # "Participant ID" is one name
            cells = [line]
        else:
            one_blank = " ".join(line.split()) if separator == " " else line
            cells = [cell.strip() for cell in next(csv.reader([one_blank], delimiter=separator))]
        while not cells[-1]:
            cells.pop()
        rows.append((number, cells))
    return rows


def _separator(lines: list[str]) -> str:
    """Return what separates cells: what the first line has, or else what any line has, or else blanks."""
    for text in (lines[0] if lines else "", "\n".join(lines)):
        for separator in _SEPARATORS:
            if separator in text:
                return separator
    return " "


def _of_column(path: Path, rows: list[tuple[int, list[str]]], column: int) -> set[str]:
    """Return the ids below a header."""
    (_, header), *rest = rows
    ids = set()
    for number, cells in rest:
        if len(cells) > len(header):
            raise TableError(
                f"{path}, line {number}: {len(cells)} cells below a header of {len(header)}; give each column a name"
            )
        if column >= len(cells) or not cells[column]:
            raise TableError(
                f"{path}, line {number}: nothing below {header[column]!r}; write the id, or remove the line"
            )
        ids.add(participant_key(cells[column]))
    return ids


def _of_all_cells(path: Path, rows: list[tuple[int, list[str]]]) -> set[str]:
    """Return all cells of a list without a header: one a line, or all of one shape, as ids are."""
    if all(len(cells) == 1 for _, cells in rows):
        return {participant_key(cells[0]) for _, cells in rows}
    first = rows[0][1][0]
    ids: set[str] = set()
    for number, cells in rows:
        for cell in cells:
            if _shape(cell) != _shape(first) or participant_key(cell) in ids:
                problem = "occurs twice" if _shape(cell) == _shape(first) else f"does not look like the id {first!r}"
                raise TableError(
                    f"{path}, line {number}: {cell!r} {problem}, and of several cells a line nobody can tell which are "
                    f"ids; {_EXPECTED}"
                )
            ids.add(participant_key(cell))
    return ids


def _shape(cell: str) -> str:
    """Return an id with ``0`` for every digit and ``a`` for every letter."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "0", participant_key(cell)))
