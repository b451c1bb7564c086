"""Files that appear whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from ingest.errors import StoreError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name beside it and rename it; its folder is made.

    Parameters
    ----------
    path
        Replaced if it exists.
    write
        Called with the name to write to.

    Raises
    ------
    StoreError
        If the system does not let it be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}; choose another name") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
