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
    """Bytes read and failures so far, of tasks that count them (fields ``bytes`` and ``failures``)."""

    def render(self, task: Task) -> Text:
        read, failures = task.fields.get("bytes"), task.fields.get("failures")
        size = "" if read is None else decimal(read)
        return Text(size) + Text(f" {failures} failed" if failures else "", style="red")


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
