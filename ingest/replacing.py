"""What a command may replace without being told to: files of its own kind."""

from __future__ import annotations

import re
from pathlib import Path

from ingest.errors import StoreError

PAGE_SUFFIX = ".html"

#: What files of ours begin with, within so many bytes.
_HEAD = 4096


def check_page_suffix(path: Path) -> None:
    """Raise StoreError if the name's ending is not that of a page."""
    if path.suffix != PAGE_SUFFIX:
        raise StoreError(f"{path} ends in {path.suffix!r}; a report is written as {PAGE_SUFFIX}")


def check_own_page(path: Path, command: str) -> None:
    """Raise StoreError if there is a file that is no page of a command, such as ``ingest report``."""
    generator = re.escape(f'<meta name="generator" content="brain-volumes {command}">'.encode())
    check_own(path, re.compile(b".*" + generator, re.DOTALL), f"a page of {command}")


def check_own(path: Path, beginning: re.Pattern[bytes], what: str) -> None:
    """Raise StoreError if there is a file that does not begin as those of a kind do."""
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
