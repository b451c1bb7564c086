"""What a command may replace: files of its own kind, and all others only where it is told to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ingest.errors import StoreError

#: What files of ours begin with, within so many bytes.
_HEAD = 4096
_SAVED_PROBE = re.compile(rb'\s*\{\s*"format":\s*"brain-probe"')
_REPORT = re.compile(rb'.*<meta name="generator" content="brain-volumes probe">', re.DOTALL)


def check_absent(path: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that nothing is lost by writing a file that may have any name.

    Parameters
    ----------
    overwrite
        Whether what is there may be replaced.
    inputs
        Files that are read: they are never replaced.

    Raises
    ------
    StoreError
        If a file is there that is to stay.
    """
    if not path.exists():
        return
    if any(one.exists() and one.samefile(path) for one in inputs):
        raise StoreError(f"{path} is what is read, so it is not replaced; choose another name")
    if not overwrite:
        raise StoreError(f"{path} exists; add --overwrite to replace it, or choose another name")


def check_saved_probe_replaceable(path: Path) -> None:
    """Raise StoreError if there is a file that is no saved probe."""
    _check_own(path, _SAVED_PROBE, "a saved probe")


def check_report_replaceable(path: Path) -> None:
    """Raise StoreError if there is a file that is no report of a probe."""
    _check_own(path, _REPORT, "a report of probe")


def _check_own(path: Path, beginning: re.Pattern[bytes], what: str) -> None:
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            ours = beginning.match(file.read(_HEAD))
    except OSError:  # what cannot be looked at is not known to be ours
        ours = None
    if not ours:
        raise StoreError(
            f"{path} exists and is not {what}, so it is not replaced; remove it yourself, or choose another name"
        )
