"""What a run has to do: the scans that were found against the rows that the store has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ingest.convert import is_out_of_reach, pending_row
from ingest.errors import StoreError
from ingest.people import participant_key, session_key
from ingest.scan import EXPECTED_ABSENCES, ScanRow, ScanSource

_SETTLED = frozenset({"ok", "pending", "duplicate"}) | EXPECTED_ABSENCES


@dataclass
class Plan:
    """Rows of the store after the run, and which of them are to be read.

    Attributes
    ----------
    rows
        One per scan: first those that the store has, in their order, then new ones in the order of their names.
    todo
        Number of the row -> where its scan is.
    new, changed, retried, left
        How many rows are added; are read again because the file has another size or time, or is said to be of another
        scan; because they had failed; or because an earlier run was stopped before it came to them.
    found
        Rows of which this run has something to say: their scans were found, or are gone before they were ever read.
    kept
        Row -> what it was, and is unless it can be read now: those that hold a volume and are read again.
    out_of_reach
        Names of scans that hold a volume, and whose file cannot be looked at now.
    """

    rows: list[ScanRow]
    todo: dict[int, ScanSource] = field(default_factory=dict)
    new: int = 0
    changed: int = 0
    retried: int = 0
    left: int = 0
    found: set[int] = field(default_factory=set)
    kept: dict[int, ScanRow] = field(default_factory=dict)
    out_of_reach: list[str] = field(default_factory=list)


def make_plan(known: Sequence[ScanRow], found: Sequence[ScanSource], *, retry_failed: bool = False) -> Plan:
    """Compare what is there with what is stored.

    A scan is known by its source: the name below the source folder. Known scans are read again if their file has
    changed, if an earlier run was stopped before it came to them, or, with `retry_failed`, if they had failed. A scan
    of a participant, session and modality that another row has is a duplicate: it gets a row, and is not read (with
    `retry_failed` it is, once the other one has failed and is gone). Rows whose source is not found stay as they are,
    and so do volumes whose file cannot be looked at now.

    Raises
    ------
    StoreError
        If a name was one scan's and is now another's, in another file: two manifests, or one that was changed too much.
    """
    plan = Plan(list(known))
    number_of = {row.source: number for number, row in enumerate(known)}
    first = _owners(known, found)
    for source in found:
        now = pending_row(source)
        number = number_of.get(source.name)
        if number is None:
            number = len(plan.rows)
            plan.rows.append(now)
            plan.new += 1
        else:
            row = plan.rows[number]
            plan.found.add(number)
            if row.status == "ok" and is_out_of_reach(now):
                plan.out_of_reach.append(source.name)
                continue
            changed = (row.source_size, repr(row.source_mtime)) != (now.source_size, repr(now.source_mtime))
            moved = _key(row) != _key(now)
            if changed and moved and row.status == "ok":
                raise StoreError(
                    f"{source.name} is {_who(row)} in the store, and {_who(now)} in another file now; names are those "
                    "below the folder of a manifest: put all scans into one manifest, or use another store"
                )
            retried = retry_failed and row.status not in _SETTLED
            again = retry_failed and row.status == "duplicate" and _key(now) not in first
            if not (row.status == "pending" or moved or again or (row.status != "duplicate" and (changed or retried))):
                continue
            plan.changed += changed or moved
            plan.retried += (retried or again) and not (changed or moved)
            plan.left += row.status == "pending" and not (changed or moved)
            plan.rows[number] = now
            if row.status == "ok":
                plan.kept[number] = row
        plan.found.add(number)
        original = first.setdefault(_key(now), source.name)
        if original != source.name:
            reason = f"same participant, session and modality as {original}"
            plan.rows[number] = replace(now, status="duplicate", error=reason)
        else:
            plan.todo[number] = source
    for number, row in enumerate(known):
        if row.status == "pending" and number not in plan.found:
            plan.rows[number] = replace(row, status="read_error", error="the file is no longer there")
            plan.found.add(number)
    return plan


def _owners(known: Sequence[ScanRow], found: Sequence[ScanSource]) -> dict[tuple[str, str, str], str]:
    """Return which known source each participant, session and modality belongs to, by what is said of them now."""
    now = {source.name: source for source in found}
    owners = {}
    for row in reversed(known):
        gone = row.source not in now and row.status not in _SETTLED  # and has failed
        if row.status != "duplicate" and not gone:
            owners[_key(now.get(row.source, row))] = row.source
    return owners


def _key(scan: ScanRow | ScanSource) -> tuple[str, str, str]:
    """Return what tells scans apart, in all spellings."""
    return participant_key(scan.participant), session_key(scan.session), scan.modality


def _who(row: ScanRow) -> str:
    return " ".join(filter(None, (row.participant, row.session, row.modality)))
