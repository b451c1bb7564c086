"""Phenotype tables -> floats per scan: UK Biobank's many spellings and codes, or any table of participants."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ingest.dictionary import BY_FIELD, BY_NAME, Variable
from ingest.errors import TableError

ID_COLUMNS = (
    "eid",
    "f.eid",
    "participant.eid",
    "n_eid",
    "participant id",
    "participant_id",
    "participant",
    "subject_id",
    "subject",
    "id",
)

#: Instance 2 is the first visit at which UK Biobank makes images.
FIRST_IMAGING_VISIT = 2

_MISSING = {"", "na", "n/a", "nan", "none", "null", "."}
_NO_ANSWER = {"do not know", "prefer not to answer", "not known"}
_MAX_CATEGORIES = 20  # more different texts than this are names or remarks, not categories

# 31-0.0 | f.31.0.0 | p31, p21003_i2, p399_i2_a1, participant.p20016_i2 | n_31_0_0
_UKB_COLUMN = re.compile(
    r"^(?:(?P<f1>\d+)-(?P<i1>\d+)\.(?P<a1>\d+)"
    r"|f\.(?P<f2>\d+)\.(?P<i2>\d+)\.(?P<a2>\d+)"
    r"|(?:participant\.)?p(?P<f3>\d+)(?:_i(?P<i3>\d+))?(?:_a(?P<a3>\d+))?"
    r"|[a-z]{1,2}_(?P<f4>\d+)_(?P<i4>\d+)_(?P<a4>\d+))$"
)


@dataclass(frozen=True)
class Phenotypes:
    """Phenotypes of the scans of a store.

    Attributes
    ----------
    table
        float64, one row per scan, one column per variable, NaN = missing.
    variables
        Attributes of each column: field, instance, coding, units, task, labels, confound.
    warnings
        What a user should know: values that were not understood, duplicate rows, scans without a row.
    bad_values
        How many values were not understood or stand in duplicate rows.
    """

    table: pd.DataFrame
    variables: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    bad_values: int = 0


@dataclass(frozen=True)
class UkbColumn:
    """A UK Biobank column name, taken apart."""

    field: int
    instance: int
    array: int


def parse_ukb_column(name: str) -> UkbColumn | None:
    """Take a UK Biobank column name apart, in any of its spellings; None if it is no such name."""
    match = _UKB_COLUMN.match(name)
    if match is None:
        return None
    parts = {key[0]: int(value) for key, value in match.groupdict().items() if value is not None}
    return UkbColumn(parts["f"], parts.get("i", 0), parts.get("a", 0))


def join_phenotypes(path: Path, participants: Iterable[str], sessions: Iterable[str]) -> Phenotypes:
    """Read a table and look up each scan's participant in it.

    In a UK Biobank table the variables of `ingest.dictionary` are taken, each at the instance that is the scan's own
    session (the first imaging visit's for scans without one), or at instance 0 if the table has no other. In any other
    table all columns are taken; texts become codes.

    Parameters
    ----------
    path
        ``.csv``, ``.tsv`` / ``.tab`` / ``.txt`` (tabs) or ``.parquet``.
    participants, sessions
        Of the scans, in the order of the store's rows.

    Raises
    ------
    TableError
        If the table cannot be read, or has no column of participant ids.
    """
    columns = _header(path)
    id_column = next((c for name in ID_COLUMNS for c in columns if c.strip().lower() == name), None)
    if id_column is None:
        raise TableError(f"{path} has no participant column: found {columns[:8]}, expected one of {list(ID_COLUMNS)}")
    ukb = {c: parsed for c in columns if (parsed := parse_ukb_column(c)) is not None}
    wanted = {c: parsed for c, parsed in ukb.items() if parsed.field in BY_FIELD and parsed.array == 0}
    plain = [] if ukb else [c for c in columns if c != id_column]
    raw = _read(path, [id_column, *wanted, *plain])

    notes = _Notes(path.name)
    ids = raw[id_column].map(participant_key)
    duplicates = int(ids.duplicated().sum())
    if duplicates:
        notes.bad(duplicates, f"{duplicates} duplicate rows of participants; the first of each is used")
    raw = raw.set_axis(ids, axis="index")[~ids.duplicated().to_numpy()].drop(columns=id_column)
    keys = pd.Index([participant_key(p) for p in participants])
    unknown = int((~keys.isin(raw.index)).sum())
    if unknown:
        notes.add(f"{unknown} of {len(keys)} scans have no row; their phenotypes are missing")
    rows = raw.reindex(keys)

    if ukb:
        table, variables = _ukb_variables(rows, wanted, list(sessions), path, notes)
    else:
        table, variables = _plain_variables(rows, notes)
    return Phenotypes(pd.DataFrame(table).reset_index(drop=True), variables, notes.lines, notes.bad_values)


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
    """Make ``sub-01`` and ``01`` the same person."""
    return str(value).strip().removeprefix("sub-")


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab", ".txt") else ","


def _header(path: Path) -> list[str]:
    if not path.is_file():
        raise TableError(f"no phenotype table at {path}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            return next(csv.reader(file, delimiter=_separator(path)))
        except StopIteration:
            raise TableError(f"{path} is empty") from None
        except UnicodeDecodeError:
            raise TableError(f"{path} is not a text table in UTF-8; expected .csv, .tsv or .parquet") from None


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read some columns as text."""
    if path.suffix.lower() == ".parquet":
        return pd.read_parquet(path, columns=columns).astype(object).map(lambda v: "" if pd.isna(v) else str(v))
    try:
        return pd.read_csv(
            path, sep=_separator(path), usecols=columns, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )[columns]
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise TableError(f"{path} cannot be read as a table: {error}") from None


def _ukb_variables(
    rows: pd.DataFrame, wanted: dict[str, UkbColumn], sessions: list[str], path: Path, notes: _Notes
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    instance_of_scan = np.array([int(s) if s.isdigit() else FIRST_IMAGING_VISIT for s in sessions], dtype=np.int64)
    without = sum(not s.isdigit() for s in sessions)
    if without:
        notes.add(f"{without} scans have no session; they get the answers of instance {FIRST_IMAGING_VISIT}")
    known = {parsed.instance for parsed in wanted.values()}
    unmatched = int((~np.isin(instance_of_scan, list(known))).sum()) if known - {0} else 0
    if unmatched:
        notes.add(f"{unmatched} scans are of a session that no column is of (instances {sorted(known)})")
    table: dict[str, np.ndarray] = {}
    variables: dict[str, dict[str, Any]] = {}
    for field_number, variable in BY_FIELD.items():
        by_instance = {parsed.instance: column for column, parsed in wanted.items() if parsed.field == field_number}
        if not by_instance:
            continue
        values = np.full(len(rows), np.nan)
        if set(by_instance) == {0}:
            values = _coded(rows[by_instance[0]], variable, notes)
        else:
            for instance, column in by_instance.items():
                here = instance_of_scan == instance
                values[here] = _coded(rows[column], variable, notes)[here]
        table[variable.name] = values
        variables[variable.name] = _attributes(
            variable, "0" if set(by_instance) == {0} else "that of the scan's session"
        )
    if not table:
        fields = ", ".join(f"{v.ukb_field} ({v.name})" for v in BY_FIELD.values())
        raise TableError(f"{path} holds none of the known UK Biobank fields; expected some of {fields}")
    return table, variables


def _plain_variables(rows: pd.DataFrame, notes: _Notes) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    table: dict[str, np.ndarray] = {}
    variables: dict[str, dict[str, Any]] = {}
    for name in rows.columns:
        known = BY_NAME.get(str(name).lower())
        text = _stripped(rows[name])
        present = text[~text.str.lower().isin(_MISSING | _NO_ANSWER)]
        numbers = pd.to_numeric(present, errors="coerce")
        if numbers.notna().all():
            values = (
                _coded(rows[name], known, notes) if known else pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
            )
            attributes = (
                _attributes(known, None)
                if known
                else {
                    "field": None,
                    "instance": None,
                    "coding": None,
                    "units": None,
                    "task": None,
                    "labels": None,
                    "confound": False,
                }
            )
        else:
            categories = sorted(present.str.lower().unique())
            if len(categories) > _MAX_CATEGORIES:
                notes.add(f"column {name!r} left out: {len(categories)} different texts are no categories")
                continue
            codes = {text: float(code) for code, text in enumerate(categories)}
            values = text.str.lower().map(codes).to_numpy(np.float64)
            attributes = {
                "field": known.ukb_field if known else None,
                "instance": None,
                "coding": "texts in alphabetical order",
                "units": None,
                "task": "binary" if len(categories) == 2 else "multiclass",
                "labels": {str(int(code)): text for text, code in codes.items()},
                "confound": bool(known and known.confound),
            }
        table[str(name)] = values
        variables[str(name)] = attributes
    return table, variables


def _attributes(variable: Variable, instance: str | None) -> dict[str, Any]:
    return {
        "field": variable.ukb_field,
        "instance": instance,
        "coding": "UK Biobank; negative codes are missing",
        "units": variable.units,
        "task": variable.task,
        "labels": {str(code): label for code, label in variable.labels.items()} or None,
        "confound": variable.confound,
    }


def _stripped(column: pd.Series) -> pd.Series:
    return column.fillna("").astype(str).str.strip()


def _coded(column: pd.Series, variable: Variable, notes: _Notes) -> np.ndarray:
    """Turn codes or decoded labels into numbers; negative codes and refusals are missing."""
    text = _stripped(column).str.lower()
    codes = {label.lower(): float(code) for code, label in variable.labels.items()}
    numbers = text.map(codes).fillna(pd.to_numeric(text, errors="coerce"))
    strange = text[numbers.isna() & ~text.isin(_MISSING | _NO_ANSWER)]
    values = numbers.where(numbers >= 0).to_numpy(np.float64, copy=True)
    if variable.labels:
        outside = ~np.isnan(values) & ~np.isin(values, list(variable.labels))
        strange = pd.concat([strange, text[outside]])
        if variable.task != "multiclass":
            values[outside] = np.nan
        else:
            strange = strange[pd.to_numeric(strange, errors="coerce").isna()]  # a new site or class is a class
    if len(strange):
        notes.bad(
            len(strange),
            f"{len(strange)} values of {variable.name} are not understood and taken as missing, "
            f"for example {strange.iloc[0]!r}",
        )
    return values
