"""What a run has finished, line by line beside the store, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from ingest.scan import ScanRow

_NAMES = {field.name for field in fields(ScanRow)}


@contextlib.contextmanager
def open_journal(store: Path, store_id: str) -> Iterator[Callable[[int, ScanRow, bool], None]]:
    """Give a function that appends a finished row to ``STORE.journal``: (number, row, whether it is simulated).

    The store's own tables are written once, at the end. A line goes to the operating system at once, so it outlives
    the process; it may be lost in a power cut, and then its scan is done again.

    Parameters
    ----------
    store
        The store.
    store_id
        Its identity: lines of another store at the same place do not count.
    """
    path = journal_path(store)
    _end_the_last_line(path)
    with open(path, "a", encoding="utf-8") as file:

        def append(number: int, row: ScanRow, simulated: bool) -> None:
            line = {"store_id": store_id, "number": number, "simulated": simulated, **asdict(row)}
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield append


def read_journal(store: Path, store_id: str) -> tuple[dict[int, ScanRow], bool]:
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
    path = journal_path(store)
    if not path.is_file():
        return rows, simulated
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # was being written when the run was killed
            if isinstance(line, dict) and line.get("store_id") == store_id and line.keys() >= _NAMES:
                rows[int(line["number"])] = ScanRow(**{name: line[name] for name in _NAMES})
                simulated |= bool(line["simulated"])
    return rows, simulated


def journal_path(store: Path) -> Path:
    """Return where the journal of a store lies."""
    return store.with_name(store.name + ".journal")


def _end_the_last_line(path: Path) -> None:
    """End a line that a killed run left unfinished, so that the next one is not lost with it."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
