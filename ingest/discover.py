"""Listing the files below a folder, safe with links and loud about what cannot be read; and objects like files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ingest.errors import SourceError
from ingest.places import ObjectPath
from ingest.scan import ScanSource

#: Left out everywhere, beside names that begin with a dot: what file systems put at the top of a disk.
_SYSTEM_FOLDERS = frozenset({"lost+found"})


def walk_files(folder: Path, skip: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder below `folder`, with the names of its files.

    Hidden files and folders (and so macOS' ``._*``) are left out. Links to folders are followed after everything else,
    in the order of their names; a folder that was listed before is not listed again, nor one that holds `folder`, so
    loops end. Links to files, broken ones too, count as files.

    Parameters
    ----------
    skip
        Names of folders to leave out.

    Yields
    ------
    relative : str
        The folder relative to `folder`, ``""`` for itself.
    names : list of str
        Its files, in no particular order.

    Raises
    ------
    SourceError
        If a folder cannot be listed: its scans would be missing without a trace.
    """
    top = os.path.realpath(folder)
    skip = frozenset(skip) | _SYSTEM_FOLDERS
    linked: set[str] = set()  # folders that only links lead to and that were listed already
    links: list[tuple[str, str]] = []
    stack = [("", top)]
    while stack or links:
        if not stack:
            links.sort()
            relative, real = links.pop(0)
            holds_top = os.path.join(top, "").startswith(os.path.join(real, ""))
            if not holds_top and not _in_tree(real, top, skip):
                stack.append((relative, real))
            continue
        relative, real = stack.pop()
        if not _in_tree(real, top, skip):
            if real in linked:
                continue
            linked.add(real)
        names = []
        for entry in _list(folder, relative):
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                names.append(entry.name)
            elif entry.name not in skip:
                below = os.path.join(relative, entry.name)
                if entry.is_symlink():
                    links.append((below, os.path.realpath(entry.path)))
                else:
                    stack.append((below, os.path.join(real, entry.name)))
        yield relative, names


def _list(folder: Path, relative: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(os.path.join(folder, relative)) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(
            f"the folder {relative or folder} cannot be listed ({error.strerror}), so its scans would be missing; "
            "make it readable, or move it out of the source folder"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where we may not look: the read reports it
        return False


def _in_tree(real: str, top: str, skip: Collection[str]) -> bool:
    """Tell whether a folder (without links in its path) is listed because it lies below the top."""
    if real == top:
        return True
    prefix = os.path.join(top, "")
    if not real.startswith(prefix):
        return False
    return not any(part.startswith(".") or part in skip for part in real[len(prefix) :].split(os.sep))


def list_objects(prefix: ObjectPath, skip: Collection[str] = ()) -> dict[str, tuple[int, float]]:
    """Return bytes and seconds since 1970 of every object below a prefix, by its name relative to that.

    What `walk_files` leaves out is left out here too.

    Raises
    ------
    ObjectStoreError
        If the objects cannot be listed.
    """
    skip = frozenset(skip) | _SYSTEM_FOLDERS
    start = len(prefix.key) + 1 if prefix.key else 0
    found = {}
    for place, size, mtime in prefix.below():
        file = place.key[start:]
        *folders, name = file.split("/")
        hidden = any(part.startswith(".") for part in (*folders, name))
        if not hidden and skip.isdisjoint(folders):
            found[file] = (size, mtime)
    return found


def folders_of(files: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder of relative file names, with the names of its files, as `walk_files` does."""
    folders: dict[str, list[str]] = defaultdict(list)
    for file in files:
        folder, _, name = file.rpartition("/")
        folders[folder].append(name)
    yield from folders.items()


def with_listing(scan: ScanSource, listed: tuple[int, float] | None) -> ScanSource:
    """Return a scan with the size and time that a listing has told."""
    return scan if listed is None else replace(scan, size=listed[0], mtime=listed[1])
