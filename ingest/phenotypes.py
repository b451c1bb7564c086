"""Phenotype tables -> floats per scan: UK Biobank's many spellings and codes, or any table of participants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ingest.answers import agreed, coded
from ingest.dictionary import BY_FIELD, BY_NAME
from ingest.errors import TableError
from ingest.notes import Notes
from ingest.people import find_session_column, participant_key, rows_of_scans
from ingest.plain_tables import columns_to_store, plain_variables
from ingest.sidecar import parse_levels
from ingest.tables import open_table
from ingest.ukb_columns import ID_COLUMNS, UkbColumn, find_id_column, find_ukb_columns, parse_ukb_column

__all__ = ["ID_COLUMNS", "Phenotypes", "join_phenotypes", "parse_ukb_column", "participant_key"]

#: Instance 2 is the first visit at which UK Biobank makes images.
FIRST_IMAGING_VISIT = 2
_NO_VISIT = 1 << 31  # sessions such as 20190304123456789012 are no numbers of visits


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


def join_phenotypes(
    path: Path, participants: Iterable[str], sessions: Iterable[str], sidecar: str | None = None
) -> Phenotypes:
    """Read a table and look up each scan's participant in it.

    In a UK Biobank table the variables of `ingest.dictionary` are taken, each at the instance that is the scan's own
    session (the first imaging visit's for scans without one), or at instance 0 if the table has no other. In any other
    table all columns are taken, of the row of the scan's own session if there is a column of `SESSION_COLUMNS`; texts
    become codes. Nothing else of the table is kept in memory.

    Parameters
    ----------
    path
        ``.csv``, ``.tsv`` / ``.tab`` / ``.txt`` (tabs) or ``.parquet``; semicolons are recognised.
    participants, sessions
        Of the scans, in the order of the store's rows. A scan without a participant (one that was withdrawn) has no
        answers, and is not counted.
    sidecar
        The text of a JSON file that tells the ``Levels`` of columns, see `ingest.sidecar`.

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
    notes = Notes(path.name)
    session_column = None if ukb else find_session_column(names)
    wanted = list(ukb) if ukb else columns_to_store(names, [id_column, session_column], notes)
    scans = list(zip(participants, sessions, strict=True))
    rows = rows_of_scans(table, id_column, session_column, wanted, scans, notes)
    if ukb:
        values, variables = _ukb_variables(rows, ukb, names, [session for _, session in scans], notes)
        _note_names_left_out(names, ukb, notes)
    else:
        values, variables = plain_variables(rows, names, notes, parse_levels(sidecar, notes))
    found = pd.DataFrame({name: np.asarray(column) for name, column in values.items()}, range(len(scans)), copy=False)
    return Phenotypes(found, variables, notes.lines, notes.bad_values)


def _note_names_left_out(names: Sequence[str], ukb: dict[int, UkbColumn], notes: Notes) -> None:
    left_out = [name for place, name in enumerate(names) if place not in ukb and name.lower() in BY_NAME]
    if left_out:
        notes.add(
            f"columns left out: {', '.join(map(repr, left_out))}; beside UK Biobank's numbered fields only such are "
            "taken, so give these a field's number, or put them into a table of their own"
        )


def _ukb_variables(
    rows: pd.DataFrame, wanted: dict[int, UkbColumn], names: Sequence[str], sessions: Sequence[str], notes: Notes
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    somebody = rows.index != ""
    dated = np.array([session.isdecimal() for session in sessions], bool)
    visits = [min(int(s), _NO_VISIT) if s.isdecimal() else FIRST_IMAGING_VISIT for s in sessions]
    instance_of_scan = np.array(visits, np.int64)
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
        if once and len(variable.instances) > 1 and (instance_of_scan[somebody] > 0).any():
            notes.add(
                f"{variable.name} is there of instance 0 only, the first assessment, years before any scan; all scans "
                "get it"
            )
        values = np.full(len(rows), np.nan)
        for instance, places in columns.items():
            here = np.full(len(rows), True) if once else instance_of_scan == instance
            answers = [coded(rows[place][here], names[place], variable, notes) for place in places]
            values[here] = agreed(answers, [names[place] for place in places], notes)
        if len(values) and np.isnan(values).all():
            notes.add(f"{variable.name} is missing in every scan; its columns are of instances {sorted(columns)}")
        table[variable.name] = values
        source = f"UK Biobank field {variable.ukb_field}, {variable.title}: {variable.source}"
        visit = "0" if once else "that of the scan's session"
        variables[variable.name] = variable.attributes(visit, source, "negative codes are missing")
    return table, variables
