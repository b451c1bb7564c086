"""What ``finetune curve`` prints for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from extract.probing.numbers import SHORT_NAMES
from finetune.curves.results import CurveResult
from finetune.curves.tables import TITLES, CurveTable, Entry, curve_table
from finetune.curves.words import describe_state, describe_target
from finetune.curves.work import CurveProgress
from ingest.consoles import print_line

_WIDE = 200  # columns


def cell_lines(errors: Console) -> Callable[[CurveProgress], None]:
    """Return what prints a line about each cell that has ended, for logs, where no bar can be shown."""
    begun, ended = time.monotonic(), 0

    def tell(progress: CurveProgress) -> None:
        nonlocal ended
        result = progress.result
        if result is None:
            return
        ended += 1
        if result.status == "ok":
            what = ", ".join(f"{one.name} {one.scores[one.metric]:.3f}" for one in result.targets)
        else:
            what = f"{result.status}: {result.reason}"
        left = (time.monotonic() - begun) / ended * (progress.total - progress.done)
        until = f", {timedelta(seconds=round(left))} left" if progress.done < progress.total else ""
        print_line(f"{progress.done}/{progress.total} {result.cell}: {what}{until}", errors)

    return tell


def print_curve(result: CurveResult, console: Console | None = None) -> None:
    """Print for each target two tables and sentences, and what is not done.

    Parameters
    ----------
    console
        By default that of the standard output.
    """
    console = console or Console()
    if not console.is_terminal and console.width < _WIDE:  # a file, which may be as wide as the tables
        console = Console(file=console.file, width=_WIDE)
    plan = result.plan
    people = ", ".join(f"{count:,} people {_PARTS[part]}" for part, count in plan.people.items())
    simulated = ", simulated data" if plan.simulated else ""
    print_line(f"{result.run_dir}: {plan.settings.model}, {plan.weights} weights, {people}{simulated}", console)
    for curve in result.targets:
        found, metric = curve_table(curve), SHORT_NAMES.get(curve.metric, curve.metric)
        print_line(
            f"\n{curve.name}: {metric}, means over seeds with 95 % intervals; chance is {curve.chance:g}", console
        )
        console.print(_scores(found), highlight=False)
        if found.others:
            console.print()
            console.print(_gaps(found), highlight=False)
        console.print()
        for sentence in describe_target(curve):
            print_line(f"- {sentence}", console)
    if state := describe_state(result):
        console.print()
        for sentence in state:
            print_line(sentence, console)


_PARTS = {"train": "to train on", "validation": "to validate", "test": "tested"}


def _scores(found: CurveTable) -> Table:
    table = _table(["people", "seeds", *(TITLES[method] for method in found.methods)])
    for row in found.rows:
        table.add_row(f"{row.size:,}", row.seeds, *map(_entry, row.scores))
    return table


def _gaps(found: CurveTable) -> Table:
    ahead = [f"transfer - {TITLES[other]}" for other in found.others]
    table = _table(["people", *ahead, *(f"people {TITLES[other]} needs" for other in found.needing)])
    for row in found.rows:
        table.add_row(f"{row.size:,}", *map(_entry, [*row.gaps, *row.needed]))
    return table


def _table(headings: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(escape(heading), justify="right")
    return table


def _entry(entry: Entry) -> str:
    return f"{entry.score} ({entry.interval})" if entry.interval else entry.score
