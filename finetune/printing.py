"""What the command prints of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from extract.probing.numbers import SHORT_NAMES, finite, in_digits
from extract.probing.results import TargetResult
from finetune.predict import Predicted
from finetune.results import REPORT, RunResult
from finetune.run import Progress
from ingest.consoles import print_line

_SHOWN_SKIPPED = 20
_SHOWN_SCORES = 4
_WIDE = 120  # columns


def progress_words(progress: Progress) -> list[str]:
    """Return the loss of a run under way, and its last scores."""
    scores = list(progress.scores.items())[:_SHOWN_SCORES]
    named = [f"{'validation loss' if name == 'loss' else name} {score:.3f}" for name, score in scores]
    return [f"loss {progress.loss:.3f}", *named]


def epoch_lines(errors: Console) -> Callable[[Progress], None]:
    """Return what prints a line about each epoch that has ended, for logs, where no bar can be shown."""
    begun, first = time.monotonic(), 0

    def tell(progress: Progress) -> None:
        nonlocal first
        first = first or progress.step  # a run may have gone on
        if progress.ended is None:
            return
        epoch = f"epoch {progress.epoch}/{progress.epochs}"
        speed = f"{progress.ended['scans_per_second']:.1f} scans/s"
        seconds = (time.monotonic() - begun) / (progress.step - first + 1) * (progress.steps - progress.step)
        left = [f"{timedelta(seconds=round(seconds))} left"] if seconds else []
        line = ", ".join([epoch, *progress_words(progress), speed, *left])
        print_line(line, errors)

    return tell


def print_result(result: RunResult, console: Console, errors: Console, *, as_json: bool) -> None:
    """Print the scores of a run, or everything as JSON; scans that were left out go to stderr."""
    for warning in result.warnings:
        print_line(f"warning: {warning}", errors)
    _print_skipped(result.skipped, errors)
    if as_json:
        print(json.dumps(finite(result.to_json())))
        return
    if not console.is_terminal:  # a file, which may be as wide as the table
        console = Console(file=console.file, width=max(console.width, _WIDE))
    people = ", ".join(f"{count:,} for {part}" for part, count in result.people.items())
    print_line(f"{result.run_dir}: {people}", console)
    how = f"epoch {result.best_epoch} of {result.epochs}" + (", stopped early" if result.stopped == "early" else "")
    speed = f"{result.scans_per_second:.1f} scans/s, waiting for scans {result.starved:.0%} of the time"
    console.print(f"best {how}; {result.steps} steps in {result.seconds:.0f} s, {speed}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("target", "task", "n", "metric", "score", "95 % interval", "chance", "validation"):
        table.add_column(name, justify="left" if name in ("target", "task", "metric") else "right")
    for one, validation in zip(result.test, result.validation, strict=True):
        _add_rows(table, one, validation)
    console.print(table, highlight=False)
    print_line(f"report: {result.run_dir / REPORT}", console)


def print_predicted(done: Predicted, console: Console, errors: Console, *, as_json: bool) -> None:
    """Print what was predicted, or as JSON; warnings and scans that were left out go to stderr."""
    for warning in done.warnings:
        print_line(f"warning: {warning}", errors)
    _print_skipped(done.skipped, errors)
    if as_json:
        print(json.dumps(done.to_json()))
        return
    print_line(
        f"{done.path}: {done.scans:,} scans x {len(done.targets)} targets ({', '.join(done.targets)}), in "
        f"{done.seconds:.1f} s ({done.scans_per_second:.1f} scans/s)"
        + ("" if done.precision == "float32" else f", {done.precision}")
        + _simulated(done),
        console,
    )


def _simulated(done: Predicted) -> str:
    """Say whether the scans are simulated, or else those that the network was trained on."""
    if done.simulated:
        return ", simulated data"
    return ", network trained on simulated data" if done.trained_on_simulated else ""


def _print_skipped(skipped: dict[int, str], errors: Console) -> None:
    for row, reason in list(skipped.items())[:_SHOWN_SKIPPED]:
        print_line(f"skipped: row {row}: {reason}", errors)
    if len(skipped) > _SHOWN_SKIPPED:
        errors.print(f"skipped: {len(skipped) - _SHOWN_SKIPPED} more scans", highlight=False)


def _add_rows(table: Table, one: TargetResult, validation: TargetResult) -> None:
    if one.status != "ok":
        table.add_row(one.name, one.task, str(one.n), "", "", f"not defined: {one.reason}", "", "")
        return
    for place, (name, found) in enumerate(one.metrics.items()):
        first = (one.name, one.task, str(one.n)) if not place else ("", "", "")
        beside = validation.metrics.get(name)
        shown = "" if beside is None else in_digits(beside.score, name)
        ends = "" if np.isnan(found.low) else f"{in_digits(found.low, name)} to {in_digits(found.high, name)}"
        table.add_row(
            *first, SHORT_NAMES[name], in_digits(found.score, name), ends, in_digits(found.chance, name), shown
        )
