"""What a run has finished, line by line beside the store, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from ingest.places import ObjectPath, Place
from ingest.scan import ScanRow

#: In an object store nothing can be appended: lines are gathered for that long, or that many, and written together.
_PART_S = 5.0
_PART_LINES = 256
_NAMES = {field.name for field in fields(ScanRow)}


@contextlib.contextmanager
def open_journal(store: Place, store_id: str) -> Iterator[Callable[[int, ScanRow, bool], None]]:
    """Give a function that appends a finished row to ``STORE.journal``: (number, row, whether it is simulated).

    The store's own tables are written once, at the end. A line goes to the operating system at once, so it outlives
    the process; it may be lost in a power cut, and then its scan is done again. So are the scans of the last seconds if
    the journal is in an object store, where it is a few objects with some lines each.

    Parameters
    ----------
    store
        The store.
    store_id
        Its identity: lines of another store at the same place do not count.
    """

    def line(number: int, row: ScanRow, simulated: bool) -> str:
        return json.dumps({"store_id": store_id, "number": number, "simulated": simulated, **asdict(row)}) + "\n"

    path = journal_path(store)
    if not isinstance(path, Path):
        with _gathered(path) as gather:
            yield lambda number, row, simulated: gather(line(number, row, simulated))
        return
    _end_the_last_line(path)
    with open(path, "a", encoding="utf-8") as file:

        def append(number: int, row: ScanRow, simulated: bool) -> None:
            file.write(line(number, row, simulated))
            file.flush()

        yield append


@contextlib.contextmanager
def _gathered(journal: ObjectPath) -> Iterator[Callable[[str], None]]:
    """Give a function that takes lines and writes an object of them now and then, and of the rest at the end."""
    lines: list[str] = []
    run, parts, written = f"{time.time():.6f}-{uuid.uuid4().hex[:8]}", 0, time.monotonic()

    def write() -> None:
        nonlocal parts, written
        if lines:
            (journal / f"{run}-{parts:06d}.jsonl").write_text("".join(lines))
            lines.clear()
            parts += 1
        written = time.monotonic()

    def gather(line: str) -> None:
        lines.append(line)
        if len(lines) >= _PART_LINES or time.monotonic() > written + _PART_S:
            write()

    try:
        yield gather
    finally:
        write()


def read_journal(store: Place, store_id: str) -> tuple[dict[int, ScanRow], bool]:
    """Read what earlier runs have finished since the tables were last written.

    Returns
    -------
    rows : dict
        Number of the row -> the row; of several lines the last.
    simulated : bool
        Whether one of the scans is simulated.
    """
    rows: dict[int, ScanRow] = {}
    simulated = False
    for text in _lines(journal_path(store)):
        try:
            line = json.loads(text)
        except ValueError:
            continue  # was being written when the run was killed
        if isinstance(line, dict) and line.get("store_id") == store_id and line.keys() >= _NAMES:
            rows[int(line["number"])] = ScanRow(**{name: line[name] for name in _NAMES})
            simulated |= bool(line["simulated"])
    return rows, simulated


def _lines(journal: Place) -> Iterator[str]:
    if not isinstance(journal, Path):
        for part in sorted(place for place, _, _ in journal.below()):
            yield from part.read_text().splitlines()
    elif journal.is_file():
        with open(journal, encoding="utf-8", errors="replace") as file:
            yield from file


def journal_path(store: Place) -> Place:
    """Return where the journal of a store lies."""
    return store.with_name(store.name + ".journal")


def remove_journal(store: Place) -> None:
    """Remove the journal of a store, if there is one."""
    journal = journal_path(store)
    if isinstance(journal, Path):
        journal.unlink(missing_ok=True)
    else:
        journal.remove([place for place, _, _ in journal.below()])


def _end_the_last_line(path: Path) -> None:
    """End a line that a killed run left unfinished, so that the next one is not lost with it."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
