"""Phenotype tables -> floats per scan: UK Biobank's many spellings and codes, or any table of participants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ingest.dictionary import BY_FIELD, BY_NAME, Variable
from ingest.errors import TableError
from ingest.tables import Table, open_table, read_columns
from ingest.ukb_columns import ID_COLUMNS, UkbColumn, find_id_column, find_ukb_columns, parse_ukb_column

__all__ = ["ID_COLUMNS", "Phenotypes", "join_phenotypes", "parse_ukb_column", "participant_key"]

#: Instance 2 is the first visit at which UK Biobank makes images.
FIRST_IMAGING_VISIT = 2

_MISSING = {"", "na", "n/a", "nan", "none", "null", "."}
_NO_ANSWER = {"do not know", "prefer not to answer", "not known"}
_MAX_CATEGORIES = 20  # more different texts than this are names or remarks, not categories
_WHOLE_NUMBER = re.compile(r"(\d+)\.0*", re.ASCII)


@dataclass(frozen=True)
class Phenotypes:
    """Phenotypes of the scans of a store.

    Attributes
    ----------
    table
        float64, one row per scan, one column per variable, NaN = missing.
    variables
        Attributes of each column: field, instance, coding, units, task, labels, confound, source.
    warnings
        What a user should know: values that were not understood, duplicate rows, scans without a row.
    bad_values
        How many values were not understood, contradict each other, or stand in rows that cannot be used.
    """

    table: pd.DataFrame
    variables: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    bad_values: int = 0


def join_phenotypes(path: Path, participants: Iterable[str], sessions: Iterable[str]) -> Phenotypes:
    """Read a table and look up each scan's participant in it.

    In a UK Biobank table the variables of `ingest.dictionary` are taken, each at the instance that is the scan's own
    session (the first imaging visit's for scans without one), or at instance 0 if the table has no other. In any other
    table all columns are taken; texts become codes. Nothing else of the table is kept in memory.

    Parameters
    ----------
    path
        ``.csv``, ``.tsv`` / ``.tab`` / ``.txt`` (tabs) or ``.parquet``; semicolons are recognised.
    participants, sessions
        Of the scans, in the order of the store's rows. A scan without a participant (one that was withdrawn) has no
        answers, and is not counted.

    Raises
    ------
    TableError
        If the table cannot be read, or has no column of participant ids, no known column or no rows.
    """
    table = open_table(path, lambda names: find_id_column(names) is not None)
    names = table.columns
    id_column = find_id_column(names)
    if id_column is None:
        raise TableError(f"{path} has no participant column: found {names[:8]}, expected one of {list(ID_COLUMNS)}")
    ukb = find_ukb_columns(names)
    if ukb == {}:
        fields = ", ".join(f"{v.ukb_field} ({v.name})" for v in BY_FIELD.values())
        raise TableError(f"{path} holds none of the known UK Biobank fields; expected some of {fields}")
    # A nameless column of a plain table numbers the rows of whatever program wrote it.
    wanted = list(ukb) if ukb else [place for place, name in enumerate(names) if name and place != id_column]

    notes = _Notes(path.name)
    keys = pd.Index([participant_key(p) for p in participants], dtype=object)
    rows = _people(table, id_column, wanted, keys, notes).reindex(keys)
    if ukb:
        values, variables = _ukb_variables(rows, ukb, names, list(sessions), notes)
        _note_names_left_out(names, ukb, notes)
    else:
        values, variables = _plain_variables(rows, names, notes)
    return Phenotypes(pd.DataFrame(values).reset_index(drop=True), variables, notes.lines, notes.bad_values)


@dataclass
class _Notes:
    """Warnings about one table."""

    table: str
    lines: list[str] = field(default_factory=list)
    bad_values: int = 0

    def add(self, line: str) -> None:
        self.lines.append(f"{self.table}: {line}")

    def bad(self, count: int, line: str) -> None:
        self.bad_values += count
        self.add(line)


def participant_key(value: object) -> str:
    """Make ``sub-01`` and ``01`` the same person, and ``1234567.0``, as spreadsheets write it, and ``1234567``."""
    text = str(value).strip().removeprefix("sub-")
    number = _WHOLE_NUMBER.fullmatch(text)
    return number[1] if number else text


def _people(table: Table, id_column: int, wanted: Sequence[int], keys: pd.Index, notes: _Notes) -> pd.DataFrame:
    """Return the wanted columns of the people in `keys`, one row each; tell of rows that cannot be used."""
    found = read_columns(table, [id_column, *wanted])
    if found.odd_rows:
        rows = f"row {found.odd_rows[0]}" if len(found.odd_rows) == 1 else f"rows such as {found.odd_rows[0]}"
        notes.bad(
            len(found.odd_rows),
            f"{len(found.odd_rows)} rows have more or fewer fields than the {len(table.columns)} of the header "
            f"({rows}) and are left out: is a text with a comma in it not quoted?",
        )
    elif not len(found.cells):
        raise TableError(f"{table.path} has a header and no rows")
    cells = found.cells.drop(columns=id_column)
    ids = found.cells[id_column].map(participant_key)
    cells.index = pd.Index(ids, dtype=object)  # looked up by hash
    nobody = ids.str.lower().isin(_MISSING).to_numpy()
    answers = int((nobody & (cells != "").any(axis=1)).sum())
    if answers:  # rows that are empty altogether are what spreadsheets leave behind
        notes.bad(answers, f"{answers} rows have no participant id and are left out")
    cells = cells[~nobody]
    _compare(keys, cells.index.unique(), notes)
    cells = cells[cells.index.isin(keys)]  # half a million people answered, and a tenth of them were scanned
    again = cells.index.duplicated()
    if again.any():
        same = cells.reset_index().duplicated().to_numpy()
        if (again & same).any():
            notes.add(f"{(again & same).sum()} duplicate rows of participants say what an earlier row says")
        differing = int((again & ~same).sum())
        if differing:
            notes.bad(
                differing,
                f"{differing} duplicate rows of participants have other values than an earlier row; "
                "the first row of each is used",
            )
    return cells[~again]


def _compare(keys: pd.Index, people: pd.Index, notes: _Notes) -> None:
    """Tell of scans without a row and of rows without a scan."""
    scans = keys[keys != ""]
    unknown = int((~scans.isin(people)).sum())
    if unknown and unknown == len(scans):
        notes.bad(unknown, f"none of the {len(scans)} scans has a row; are the table's ids those of another project?")
    elif unknown:
        notes.add(f"{unknown} of {len(scans)} scans have no row; their phenotypes are missing")
    more = int((~people.isin(scans)).sum())
    if more:
        notes.add(f"{more} of {len(people)} people in the table have no scan")


def _note_names_left_out(names: Sequence[str], ukb: dict[int, UkbColumn], notes: _Notes) -> None:
    left_out = [name for place, name in enumerate(names) if place not in ukb and name.lower() in BY_NAME]
    if left_out:
        notes.add(
            f"columns left out: {', '.join(map(repr, left_out))}; beside UK Biobank's numbered fields only such are "
            "taken, so give these a field's number, or put them into a table of their own"
        )


def _ukb_variables(
    rows: pd.DataFrame, wanted: dict[int, UkbColumn], names: Sequence[str], sessions: Sequence[str], notes: _Notes
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    somebody = rows.index != ""
    dated = np.array([session.isdecimal() for session in sessions], bool)
    instance_of_scan = np.array([int(s) if s.isdecimal() else FIRST_IMAGING_VISIT for s in sessions], np.int64)
    without = int((~dated & somebody).sum())
    if without:
        notes.add(f"{without} scans have no session; they get the answers of instance {FIRST_IMAGING_VISIT}")
    known = {parsed.instance for parsed in wanted.values()}
    unmatched = int((~np.isin(instance_of_scan, list(known)) & somebody).sum()) if known - {0} else 0
    if unmatched:
        notes.add(f"{unmatched} scans are of a session that no column is of (instances {sorted(known)})")
    table: dict[str, Any] = {}
    variables: dict[str, dict[str, Any]] = {}
    for field_number, variable in BY_FIELD.items():
        columns: dict[int, list[int]] = {}
        for place, parsed in wanted.items():
            if parsed.field == field_number:
                columns.setdefault(parsed.instance, []).append(place)
        if not columns:
            continue
        once = set(columns) == {0}
        values = np.full(len(rows), np.nan)
        for instance, places in columns.items():
            here = np.full(len(rows), True) if once else instance_of_scan == instance
            answers = [_coded(rows[place][here], names[place], variable, notes) for place in places]
            values[here] = _agreed(answers, [names[place] for place in places], notes)
        if len(values) and np.isnan(values).all():
            notes.add(f"{variable.name} is missing in every scan; its columns are of instances {sorted(columns)}")
        table[variable.name] = values
        source = f"UK Biobank field {variable.ukb_field}, {variable.title}: {variable.source}"
        variables[variable.name] = _attributes(variable, "0" if once else "that of the scan's session", source)
    return table, variables


def _plain_variables(
    rows: pd.DataFrame, names: Sequence[str], notes: _Notes
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    columns: dict[str, list[int]] = {}
    for place in map(int, rows.columns):
        columns.setdefault(re.sub(r"[/\\]", "_", names[place]), []).append(place)  # a slash would make a folder
    table: dict[str, Any] = {}
    variables: dict[str, dict[str, Any]] = {}
    for name, places in columns.items():
        known = BY_NAME.get(name.lower())
        source = f"column {name!r} of {notes.table}"
        texts = [_normal(rows[place]) for place in places]
        text = _agreed([t.mask(t.isin(_MISSING | _NO_ANSWER)) for t in texts], [names[p] for p in places], notes)
        answers = text.dropna()
        numeric = pd.to_numeric(answers, errors="coerce").notna()
        if known and (numeric | answers.isin(_codes(known))).all():
            table[name], variables[name] = _coded(text, name, known, notes), _attributes(known, None, source)
        elif numeric.all():
            values = pd.to_numeric(text, errors="coerce").astype(np.float64)
            if np.isinf(values).any():
                notes.bad(int(np.isinf(values).sum()), f"infinite values of {name!r} are taken as missing")
            table[name], variables[name] = values.mask(np.isinf(values)), _plain_attributes(None, source)
        elif answers.nunique() > _MAX_CATEGORIES:
            notes.add(f"column {name!r} left out: {answers.nunique()} different texts are no categories")
        else:
            codes = {label: float(code) for code, label in enumerate(sorted(answers.unique()))}
            table[name], variables[name] = text.map(codes), _category_attributes(codes, known, source)
    return table, variables


def _attributes(variable: Variable, instance: str | None, source: str) -> dict[str, Any]:
    coding = "UK Biobank" if variable.coding is None else f"UK Biobank data-coding {variable.coding}"
    return {
        "field": variable.ukb_field,
        "instance": instance,
        "coding": f"{coding}; negative codes are missing",
        "units": variable.units,
        "task": variable.task,
        "labels": {str(code): label for code, label in variable.labels.items()} or None,
        "confound": variable.confound,
        "source": source,
    }


def _plain_attributes(known: Variable | None, source: str) -> dict[str, Any]:
    return {
        "field": known.ukb_field if known else None,
        "instance": None,
        "coding": None,
        "units": None,
        "task": None,
        "labels": None,
        "confound": bool(known and known.confound),
        "source": source,
    }


def _category_attributes(codes: dict[str, float], known: Variable | None, source: str) -> dict[str, Any]:
    return _plain_attributes(known, source) | {
        "coding": "texts in alphabetical order",
        "task": "binary" if len(codes) == 2 else "multiclass",
        "labels": {str(int(code)): label for label, code in codes.items()},
    }


def _normal(column: pd.Series) -> pd.Series:
    """Return texts in lower case, with single blanks, "" where there is nothing."""
    texts = column.fillna("").astype(str)
    return texts.map({text: " ".join(text.lower().split()) for text in texts.unique()})  # there are few different ones


def _codes(variable: Variable) -> dict[str, float]:
    return {label.lower(): float(code) for code, label in variable.labels.items()}


def _coded(column: pd.Series, name: str, variable: Variable, notes: _Notes) -> pd.Series:
    """Turn codes or decoded labels into numbers; negative codes and refusals are missing."""
    text = _normal(column)
    numbers = text.map(_codes(variable)).fillna(pd.to_numeric(text, errors="coerce")).astype(np.float64)
    strange = (numbers.isna() & ~text.isin(_MISSING | _NO_ANSWER)) | np.isinf(numbers)
    if variable.labels and not variable.more_codes:
        strange |= (numbers >= 0) & ~numbers.isin(list(variable.labels))
    if strange.any():
        notes.bad(
            int(strange.sum()),
            f"{strange.sum()} values of {variable.name} (column {name!r}) are not understood and taken as missing, "
            f"for example {text[strange].iloc[0]!r}",
        )
    return numbers.where((numbers >= 0) & ~strange)


def _agreed(columns: Sequence[pd.Series], names: Sequence[str], notes: _Notes) -> pd.Series:
    """Return what columns of one and the same thing say; where they contradict each other, nothing."""
    values = columns[0]
    for other in columns[1:]:
        values = values.where(values.notna(), other)
    if len(columns) == 1:
        return values
    differ = np.any([column.notna() & (column != values) for column in columns], axis=0)
    which = f"columns {' and '.join(map(repr, names))} are of one field and instance"
    if differ.any():
        notes.bad(int(differ.sum()), f"{which} and differ in {differ.sum()} scans, where the value is taken as missing")
    else:
        notes.add(f"{which}, and agree")
    return values.mask(differ)
