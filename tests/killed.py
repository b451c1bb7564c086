"""Runs that die in the middle, in processes that start at once: the server they are forked from has imported this."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

from ingest import IngestSettings, ingest
from ingest.withdraw import withdraw

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["killed", "extract.embeddings"])  # which `withdraw` imports late

DIED = 77


def run(source: Path, out: Path) -> None:
    """Ingest a folder with the table beside it."""
    ingest(source, out, IngestSettings(phenotypes=source.parent / "p.csv"))


def kill_after(seconds: float, source: Path, out: Path) -> int | None:
    """Start `run` and kill it after some time; return its exit code, negative if it was killed."""
    child = PROCESSES.Process(target=run, args=(source, out))
    child.start()
    child.join(seconds)
    if child.is_alive() and child.pid:
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return child.exitcode


def die_at(step: int, what: Callable[..., None], *arguments: Path) -> int | None:
    """Call a function in a process that dies before its `step`-th change of the file system; return its exit code."""
    child = PROCESSES.Process(target=_dying, args=(step, what, arguments))
    child.start()
    child.join(60)
    return child.exitcode


def withdraw_in(folder: Path) -> None:
    """Withdraw the people on the list in a folder from the stores in it."""
    withdraw(folder / "w1234_20261124.csv", [folder / "s.zarr", folder / "e.h5", folder / "e.zarr"])


def _dying(step: int, what: Callable[..., None], arguments: tuple[Path, ...]) -> None:
    count = 0

    def wrapped(function: Callable, place_of: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += _matters(str(place_of(args)))
            if count == step:
                os._exit(DIED)
            return function(*args, **kwargs)

        return call

    os.rename = wrapped(os.rename, lambda args: args[1])
    os.replace = wrapped(os.replace, lambda args: args[1])
    os.unlink = wrapped(os.unlink, lambda args: args[0])
    what(*arguments)


def _matters(place: str) -> bool:
    """Tell whether a change is one of the steps: a column written aside, or removed after its exchange, is none."""
    aside = not os.path.isabs(place) or ".staged/" in place or ".old/" in place  # rmtree's names are relative
    return not aside or place.endswith(("/scans", "/phenotypes"))
