"""What a run says of itself in the end."""

from __future__ import annotations

from collections import Counter

from ingest.phenotypes import Phenotypes
from ingest.plan import Plan
from ingest.scan import EXPECTED_ABSENCES
from ingest.settings import IngestSummary

_AWAY = "the file cannot be looked at (a broken link, or its disk is away); its volume of before is kept"


def summarise(
    plan: Plan,
    unread: list[tuple[str, str, str]],
    read: int,
    seconds: float,
    phenotypes: Phenotypes | None,
    *,
    simulated: bool,
) -> IngestSummary:
    """Sum up a run that has come to its end.

    Parameters
    ----------
    unread
        (source, status, reason) of scans that were to be read again and could not, and keep their volume.
    read
        Bytes of the files that were read.
    """
    rows = plan.rows
    warnings = list(phenotypes.warnings) if phenotypes else []
    cut = [row for row in rows if row.cut_off_voxels]
    if cut:
        worst = max(cut, key=lambda row: row.cut_off_voxels)
        warnings.append(
            f"{len(cut)} scans have positive voxels outside the grid: at most {worst.cut_off_voxels}, "
            f"{worst.cut_off_voxels / (worst.cut_off_voxels + worst.brain_voxels):.1%} of the scan, in {worst.source}"
        )
    status = Counter(row.status for row in rows)
    if plan.found and not status["ok"]:
        example = next(row for number, row in enumerate(rows) if number in plan.found)
        warnings.append(f"no scan could be stored; {example.source} is {example.status}: {example.error}")
    failed = [rows[n] for n in sorted(plan.found) if rows[n].status not in {"ok"} | EXPECTED_ABSENCES]
    away = [(name, "read_error", _AWAY) for name in plan.out_of_reach]
    return IngestSummary(
        scans=len(rows),
        status=dict(sorted(status.items())),
        seconds=round(seconds, 3),
        bytes=read,
        volumes_per_second=round(sum(rows[number].status == "ok" for number in plan.todo) / seconds, 3),
        new=plan.new,
        changed=plan.changed,
        retried=plan.retried,
        simulated=simulated,
        left=plan.left,
        failures=[
            *((row.source, row.status, row.error) for row in failed),
            *unread,
            *away,
        ],
        warnings=warnings,
        bad_values=phenotypes.bad_values if phenotypes else 0,
    )
