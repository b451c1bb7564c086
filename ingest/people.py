"""Rows of a table of participants -> one row per scan: that of its person, or of its visit where rows are of visits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ingest.answers import MISSING, normal
from ingest.errors import TableError
from ingest.notes import Notes
from ingest.tables import Table, read_columns

#: Names of the column of visits, the first that a table has; capitals do not matter. The first is that of BIDS.
SESSION_COLUMNS = ("session_id", "session", "ses", "visit")

_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)", re.ASCII)
_WHOLE_NUMBER = re.compile(r"(\d+)\.0*", re.ASCII)


def participant_key(value: object) -> str:
    """Make ``sub-01`` and ``01`` the same person, and ``1234567.0``, as spreadsheets write it, and ``1234567``."""
    return _key(value, "sub-")


def session_key(value: object) -> str:
    """Make ``ses-3``, ``3`` and ``3.0`` the same visit, and all that means nothing none: ``""``."""
    key = _key(value, "ses-")
    return "" if key.lower() in MISSING else key


def _key(value: object, prefix: str) -> str:
    text = str(value).strip().removeprefix(prefix)
    number = _WHOLE_NUMBER.fullmatch(text)
    return number[1] if number else text


def find_session_column(names: Sequence[str]) -> int | None:
    """Return where the visits are, None if nowhere."""
    lower = [name.lower() for name in names]
    return next((lower.index(known) for known in SESSION_COLUMNS if known in lower), None)


def rows_of_scans(
    table: Table,
    id_column: int,
    session_column: int | None,
    wanted: Sequence[int],
    scans: Sequence[tuple[str, str]],
    notes: Notes,
) -> pd.DataFrame:
    """Return the wanted columns with one row per scan, and the scans' people as index.

    Parameters
    ----------
    session_column
        The visit that a row is of; without one a row is of its person, whatever the visit.
    scans
        Participant and session of each. One without a participant (it was withdrawn) has no answers.
    notes
        Are told of rows that cannot be used, and of scans without a row.
    """
    people = pd.Index([participant_key(participant) for participant, _ in scans], dtype=object)
    cells, visits = _read_people(table, id_column, session_column, wanted, people, notes)
    if session_column is None:
        places = cells.index.get_indexer(people)
        found: dict[Any, Any] = {}
        for name in list(cells):  # one by one: none is there twice
            found[name] = cells.pop(name).array.take(places, allow_fill=True)  # type: ignore[arg-type]
        return pd.DataFrame(found, people, copy=False)
    sessions = np.array([session_key(session) for _, session in scans], object)
    return _rows_of_visits(cells, visits, people, sessions, table.columns[session_column], notes)


def _read_people(
    table: Table, id_column: int, session_column: int | None, wanted: Sequence[int], people: pd.Index, notes: Notes
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return one row per person and visit, and the visits; tell of rows that cannot be used."""
    visit_column = [] if session_column is None else [session_column]
    found = read_columns(table, [id_column, *visit_column, *wanted])
    lines = ""
    if found.odd_rows:
        rows = f"row {found.odd_rows[0]}" if len(found.odd_rows) == 1 else f"rows such as {found.odd_rows[0]}"
        lines = (
            f"{len(found.odd_rows)} rows have more or fewer fields than the {len(table.columns)} of the header "
            f"({rows}) and are left out: is a text with a comma in it not quoted?"
        )
        notes.bad(len(found.odd_rows), lines)
    if not len(found.cells):
        raise TableError(f"{table.path} has a header and no rows" + (f" that fit it: {lines}" if lines else ""))
    cells = found.cells[list(wanted)]  # of a thousand columns each copy is large: none below is made without need
    ids = found.cells[id_column].map(participant_key)
    visits = np.full(len(cells), "", object)
    if session_column is not None:
        visits = found.cells[session_column].map(session_key).to_numpy(object)
    cells.index = pd.Index(ids, dtype=object)  # looked up by hash
    nobody = ids.str.lower().isin(MISSING).to_numpy()
    answers = int((nobody & (cells != "").any(axis=1)).sum())
    if answers:  # rows that are empty altogether are what spreadsheets leave behind
        notes.bad(answers, f"{answers} rows have no participant id and are left out")
    _compare(people, cells.index[~nobody].unique(), notes)
    scanned = ~nobody & cells.index.isin(people)  # half a million people answered, and a tenth of them were scanned
    if not scanned.all():
        cells, visits = cells[scanned], visits[scanned]
    del found
    again = _visit_index(cells.index, visits).duplicated()
    if again.any():
        same = cells.assign(visit=visits).reset_index().duplicated().to_numpy()
        of = "participants" if session_column is None else "participants and visits"
        if (again & same).any():
            notes.add(f"{(again & same).sum()} duplicate rows of {of} say what an earlier row says")
        differing = int((again & ~same).sum())
        if differing:
            notes.bad(
                differing,
                f"{differing} duplicate rows of {of} have other values than an earlier row; "
                "the first row of each is used",
            )
        cells, visits = cells[~again], visits[~again]
    return cells, visits


def _compare(keys: pd.Index, people: pd.Index, notes: Notes) -> None:
    """Tell of scans without a row and of rows without a scan; TableError if nobody has both."""
    scans = keys[keys != ""]
    unknown, more = scans[~scans.isin(people)], people[~people.isin(scans)]
    alike = _alike(unknown, more)
    if len(unknown) and len(unknown) == len(scans):
        raise TableError(
            f"{notes.table}: none of the {len(scans)} scans has a row; the scans are of people {_some(scans)}, the "
            f"rows {_some(people)}; "
            + (alike or "are the table's ids those of another project? A manifest can say who is who")
        )
    if len(unknown):
        missing = f"{len(unknown)} of {len(scans)} scans have no row, {_some(unknown)}; their phenotypes are missing"
        notes.add(f"{missing}; {alike}" if alike else missing)
    if len(more):
        notes.add(f"{len(more)} of {len(people)} people in the table have no scan, {_some(more)}")


def _alike(scans: pd.Index, people: pd.Index) -> str:
    """Say if ids without a match would have one but for capitals, or for zeros as spreadsheets lose them."""
    in_table = {_loose(who): who for who in people}
    pair = next(((in_table[_loose(who)], who) for who in scans if _loose(who) in in_table), None)
    if pair is None:
        return ""
    return (
        f"{pair[0]!r} in the table looks like {pair[1]!r} of the scans: write the ids alike, with capitals and leading "
        "zeros (Excel loses them: format the column as text)"
    )


def _loose(who: str) -> str:
    return _LEADING_ZEROS.sub("", who.lower())


def _some(people: pd.Index) -> str:
    """Return the first few people, in words."""
    names = people.unique()
    return ("such as " if len(names) > 3 else "") + ", ".join(map(str, names[:3]))


def _rows_of_visits(
    cells: pd.DataFrame, visits: np.ndarray, people: pd.Index, sessions: np.ndarray, column: str, notes: Notes
) -> pd.DataFrame:
    """Return the row of each scan's visit; what that does not answer, its person's row without a visit does."""
    dated = visits != ""
    of_visits, of_people = cells[dated], cells[~dated]
    only = pd.Series(visits[dated], of_visits.index)
    only = only[~only.index.duplicated(keep=False)]  # of people with one visit
    undated = (sessions == "") & people.isin(of_visits.index)
    asked = np.where(undated, only.reindex(people).fillna("").to_numpy(object), sessions)
    wanted, there = _visit_index(people, asked), _visit_index(of_visits.index, visits[dated])
    own = of_visits.set_axis(there).reindex(wanted).set_axis(people)
    rows = own.where(own.apply(lambda answers: ~normal(answers).isin(MISSING)), of_people.reindex(people))

    given = int((undated & (asked != "")).sum())
    if given:
        notes.add(f"{given} scans have no session; they get the answers of the one visit of their person")
    unclear = int((undated & (asked == "")).sum())
    if unclear:
        notes.bad(unclear, f"{unclear} scans have no session, and {column!r} has several of their person; "
                  "what differs between visits is missing")  # fmt: skip
    known = (sessions != "") & people.isin(cells.index)
    unmatched = known & ~wanted.isin(there) & ~people.isin(of_people.index)
    if unmatched.any() and unmatched.sum() == known.sum():
        notes.bad(
            int(unmatched.sum()),
            f"none of the {unmatched.sum()} scans with a session has a row of it: the scans are of sessions such as "
            f"{sessions[unmatched][0]!r}, column {column!r} has such as {visits[dated][0]!r}; name them alike, or "
            "rename the column if it tells something else",
        )
    elif unmatched.any():
        notes.add(f"{unmatched.sum()} scans are of a session that has no row; their phenotypes are missing")
    return rows


def _visit_index(people: Iterable[str], visits: np.ndarray) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([pd.Index(people, dtype=object), pd.Index(visits, dtype=object)])
