"""What a run has to do: the scans that were found against the rows that the store has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ingest.convert import pending_row
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
    new, changed, retried
        How many rows are added; are read again because the file has another size or time; or because they had failed.
    """

    rows: list[ScanRow]
    todo: dict[int, ScanSource] = field(default_factory=dict)
    new: int = 0
    changed: int = 0
    retried: int = 0


def make_plan(known: Sequence[ScanRow], found: Sequence[ScanSource], *, retry_failed: bool = False) -> Plan:
    """Compare what is there with what is stored.

    A scan is known by its source: the name below the source folder. Known scans are read again if their file has
    changed, if an earlier run was stopped before it came to them, or, with `retry_failed`, if they had failed. A scan
    of a participant, session and modality that another row has is a duplicate: it gets a row, and is not read. Rows
    whose source is not found stay as they are.
    """
    plan = Plan(list(known))
    number_of = {row.source: number for number, row in enumerate(known)}
    first = {_key(row): row.source for row in reversed(known) if row.status != "duplicate"}
    seen: set[int] = set()
    for source in found:
        now = pending_row(source)
        number = number_of.get(source.name)
        if number is None:
            number = len(plan.rows)
            plan.rows.append(now)
            plan.new += 1
        else:
            seen.add(number)
            row = plan.rows[number]
            changed = (row.source_size, repr(row.source_mtime)) != (now.source_size, repr(now.source_mtime))
            retried = retry_failed and row.status not in _SETTLED
            if row.status == "duplicate" or not (row.status == "pending" or changed or retried):
                continue
            plan.changed += changed
            plan.retried += retried and not changed
            plan.rows[number] = now
        original = first.setdefault(_key(now), source.name)
        if original != source.name:
            reason = f"same participant, session and modality as {original}"
            plan.rows[number] = replace(now, status="duplicate", error=reason)
        else:
            plan.todo[number] = source
    for number, row in enumerate(known):
        if row.status == "pending" and number not in seen:
            plan.rows[number] = replace(row, status="read_error", error="the file is no longer there")
    return plan


def _key(row: ScanRow) -> tuple[str, str, str]:
    return row.participant, row.session, row.modality
