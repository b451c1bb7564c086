"""A file or folder is written under another name and takes its place at once; what a kill leaves behind is found."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import uuid
from pathlib import Path

#: What the end of a folder's name is while two folders exchange theirs.
_ASIDE = ".aside"


def temporary_name(path: Path) -> Path:
    """Return the name under which to write what is to be at `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")


def take_place(temporary: Path, path: Path) -> None:
    """Put what was written in its place; a folder that was there has the temporary name after that."""
    if path.is_dir():
        _exchange(temporary, path)
    else:
        temporary.replace(path)


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed in writing a file has left, or put back what it had moved aside.

    Only for whoever holds the lock.
    """
    temporary = re.compile(rf"{re.escape(f'.{path.name}.')}[0-9a-f]{{8}}\.tmp{re.escape(path.suffix)}({_ASIDE})?")
    for left in list(path.parent.iterdir()):
        if not temporary.fullmatch(left.name):
            continue
        if left.name.endswith(_ASIDE) and not path.exists():
            left.rename(path)
        else:
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> None:
    """Give two folders each other's names, at once where the system can (Linux's ``renameat2``)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = a.with_name(a.name + _ASIDE)
    b.rename(aside)  # killed from here on, `remove_unfinished` finds it
    a.rename(b)
    aside.rename(a)
