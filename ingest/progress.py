"""The progress bar of the commands: what is done, rate, bytes, failures, time left; silent when not on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


class _NotesColumn(ProgressColumn):
    """Bytes read, failures, share of time that a network computes, of tasks that tell (same names, and ``busy``).

    ``notes`` are shown as they are.
    """

    def render(self, task: Task) -> Text:
        read, failures = task.fields.get("bytes"), task.fields.get("failures")
        busy = task.fields.get("busy")
        notes = [] if read is None else [decimal(read)]
        notes += [] if busy is None else [f"network busy {busy:.0%}"]
        notes += [task.fields["notes"]] if "notes" in task.fields else []
        return Text(" ".join(notes)) + Text(f" {failures} failed" if failures else "", style="red")


def progress_bar(name: str, console: Console) -> Progress:
    """Return a bar that is shown while it is entered."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        _NotesColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
