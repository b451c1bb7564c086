"""Tables in files -> some of their columns as text: CSV, TSV, semicolons, parquet. The other columns are not kept.

A table of a biobank has 30,000 columns, of which a handful are wanted. Text is read by pyarrow in blocks of 2 MiB. It
tells of every row whether it has as many fields as the header: a comma that nobody quoted shifts all that follow.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ingest.errors import TableError

_TABS = (".tsv", ".tab", ".txt")
_BLOCK_BYTES = (2 << 20, 256 << 20)  # a row must fit; nearly all do in the first, which takes little memory
_MOST_BLANK_LINES = 100
_DECIMAL_COMMA = r"^([+-]?[0-9]+),([0-9]+)$"  # where it is the decimal mark, semicolons separate the columns


@dataclass(frozen=True)
class Table:
    """A table whose header was read.

    Attributes
    ----------
    columns
        Names, without blanks around them.
    separator
        Between the fields; None for parquet.
    header_rows
        Rows up to the header, with it.
    """

    path: Path
    columns: list[str]
    separator: str | None
    header_rows: int = 1


@dataclass(frozen=True)
class Columns:
    """Columns of a table.

    Attributes
    ----------
    cells
        Text without blanks around it, "" where there is nothing; a column is called by its position in the table.
        Decimal commas, of tables with semicolons, are decimal points.
    odd_rows
        Numbers of the rows that have more or fewer fields than the header (which is row 1). They are left out.
    """

    cells: pd.DataFrame
    odd_rows: list[int] = field(default_factory=list)


def open_table(path: Path, usable: Callable[[list[str]], bool]) -> Table:
    """Read the header of a table.

    Parameters
    ----------
    path
        ``.parquet``; ``.tsv``, ``.tab``, ``.txt`` (tabs); all else is taken for CSV.
    usable
        Tells of the columns' names whether they are those of a usable table. If they are not, the other separators
        (comma, tab, semicolon) are tried.

    Raises
    ------
    TableError
        If there is no such file, it is empty, or no text in UTF-8.
    """
    if not path.is_file():
        raise TableError(f"no phenotype table at {path}")
    if path.suffix.lower() == ".parquet":
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{path} cannot be read as parquet: {error}") from None
        return Table(path, [name.strip() for name in names], None)
    separators = "\t,;" if path.suffix.lower() in _TABS else ",\t;"
    for separator in separators:
        table = _text_header(path, separator)
        if usable(table.columns):
            return table
    return _text_header(path, separators[0])


def read_columns(table: Table, positions: Sequence[int]) -> Columns:
    """Read some columns of a table.

    Memory is that of these columns and of a block of 2 MiB (of rows that are longer: 256 MiB), not of the file.

    Raises
    ------
    TableError
        If the table cannot be read.
    """
    if table.separator is None:
        return _read_parquet(table, positions)
    odd: list[int] = []
    problem = ""
    for block_bytes in _BLOCK_BYTES:
        odd.clear()
        try:
            cells = _read_text(table, positions, block_bytes, odd)
        except pa.ArrowException as error:  # also for a row that is longer than a block
            problem = str(error)
            continue
        columns: dict[int, pd.Series] = {}
        for position in positions:  # one by one: of many columns not all are there twice at any time
            text = cells.column(0).to_pandas().str.strip()
            cells = cells.remove_column(0)
            if table.separator == ";":
                text = text.replace(_DECIMAL_COMMA, r"\1.\2", regex=True)
            columns[position] = text
        return Columns(pd.DataFrame(columns, copy=False), odd)
    raise TableError(f"{table.path} cannot be read as a table in UTF-8: {problem}")


def _text_header(path: Path, separator: str) -> Table:
    # Only names must be UTF-8: what stands in columns that nobody wants does no harm.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file, delimiter=separator)
        try:
            number, row = next((n, row) for n, row in enumerate(islice(rows, _MOST_BLANK_LINES), start=1) if row)
            "".join(row).encode()
        except StopIteration:
            raise TableError(f"{path} is empty") from None
        except UnicodeEncodeError:
            raise TableError(
                f'{path} is not a text table in UTF-8; expected .csv, .tsv or .parquet: save it as "CSV UTF-8"'
            ) from None
        except csv.Error:  # a field of more than 128 KB: 30,000 columns with another separator
            return Table(path, [], separator)
        if not file.read(1):
            raise TableError(f"{path} has a header and no rows")
        return Table(path, [name.strip() for name in row], separator, number)


def _read_text(table: Table, positions: Sequence[int], block_bytes: int, odd: list[int]) -> pa.Table:
    def leave_out(row: pyarrow.csv.InvalidRow) -> str:
        odd.append(row.number)
        return "skip"

    names = [str(position) for position in positions]  # those of the header may not be unique
    try:
        return pyarrow.csv.read_csv(
            table.path,
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(position) for position in range(len(table.columns))],
                skip_rows_after_names=table.header_rows,
                block_size=block_bytes,
                use_threads=False,  # rows have no number otherwise
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=table.separator, newlines_in_values=True, invalid_row_handler=leave_out
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except OSError as error:
        raise TableError(f"{table.path} cannot be read: {error}") from None


def _read_parquet(table: Table, positions: Sequence[int]) -> Columns:
    try:
        with pyarrow.parquet.ParquetFile(table.path) as file:
            names = list(file.schema_arrow.names)
            found = file.read(columns=sorted({names[position] for position in positions}))
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{table.path} cannot be read as parquet: {error}") from None
    columns: dict[str, list[pa.ChunkedArray]] = {}
    for name, column in zip(found.column_names, found.columns, strict=True):
        columns.setdefault(name, []).append(column)
    seen: Counter[str] = Counter()
    place = []  # of each column among those of its name
    for name in names:
        place.append(seen[name])
        seen[name] += 1
    return Columns(pd.DataFrame({p: _as_text(columns[names[p]][place[p]]) for p in positions}))


def _as_text(column: pa.ChunkedArray) -> pd.Series:
    values = column.to_pandas().astype(object)
    return values.where(values.notna(), "").map(lambda value: str(value).strip())
