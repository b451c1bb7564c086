"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from ingest.errors import StoreError

#: Of a disk, or of what one may write there.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "make room, and run the same command again"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name beside it, wait until it is on the disk, and rename it; its folder is made.

    Parameters
    ----------
    path
        Replaced if it exists; of a link, what it leads to.
    write
        Called with the name to write to.

    Raises
    ------
    StoreError
        If the system does not let it be written.
    """
    path = behind_link(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)  # or a power failure could leave the name without the bytes
        temporary.replace(path)
    except OSError as error:
        raise not_written(path, temporary, error) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_text_whole(path: Path, text: str) -> None:
    """Write text in UTF-8 as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def behind_link(path: Path) -> Path:
    """Return where a file itself is: a link to it is not to be replaced, for others lead there, too.

    A link to what has another ending, as caches name files by their contents, is replaced: that is no such file.
    """
    real = path.resolve() if path.is_symlink() else path
    return real if real.suffix == path.suffix else path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(path: Path, temporary: Path, error: OSError) -> StoreError:
    """Return what to say of a file that the system did not let be written under its temporary name."""
    remedy = MAKE_ROOM if is_full(error) else "choose another name"
    # The system's own words: libraries put more beside them, such as the temporary name
    reason = os.strerror(error.errno) if error.errno else str(error).replace(str(temporary), str(path))
    return StoreError(f"{path} cannot be written: {reason}; {remedy}")


def is_full(error: BaseException) -> bool:
    """Tell whether an error is that a disk, or what one may write there, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def check_writable(path: Path) -> None:
    """Check, before anything is computed, that `write_whole` can write a file, as far as can be told without trying.

    Raises
    ------
    StoreError
        If a folder has that name, or the system does not let anything be written beside it.
    """
    if os.path.isdir(path):  # unlike pathlib's, it does not fail where nothing can be looked at
        raise StoreError(f"{path} is a folder, expected the name of a file; choose another name")
    parents = behind_link(path).absolute().parents
    folder = next(parent for parent in parents if os.path.exists(parent))  # the rest is made
    if not os.path.isdir(folder):
        raise StoreError(f"{path} cannot be written: {folder} is a file, expected a folder; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{path} cannot be written: there is no leave to write in {folder}; choose another name")
