"""What a command may replace: files of its own kind, and all others only where it is told to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ingest.errors import StoreError
from ingest.replacing import check_own, check_own_page

_SAVED_PROBE = re.compile(rb'\s*\{\s*"format":\s*"brain-probe"')


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
    check_own(path, _SAVED_PROBE, "a saved probe")


def check_report_replaceable(path: Path) -> None:
    """Raise StoreError if there is a file that is no report of a probe."""
    check_own_page(path, "probe")
