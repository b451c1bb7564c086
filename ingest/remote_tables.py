"""Writing the metadata of a store that lies in an object store, where nothing can be renamed.

Files are made in a folder of this machine first and then put one by one. So that a run that is killed in between leaves
nothing half done, all of them are put together before, as one object ``STORE.staged``: whoever opens the store to write
puts them again, and only then is it removed.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ingest.places import ObjectPath

_PUTS_AT_ONCE = 8


def put_new_store(store: ObjectPath, make: Callable[[Path], None]) -> None:
    """Make a store in a folder and put it.

    Parameters
    ----------
    make
        Writes the store to the folder that it is given, which does not exist yet.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        make(folder)
        _put_at_once(store, _files(folder))


def replace_group(store: ObjectPath, name: str, make: Callable[[Path], None]) -> None:
    """Replace the group of columns `name`, at once for whoever opens the store by `finish`, else one by one.

    Parameters
    ----------
    make
        Writes the group to the folder that it is given, which does not exist yet.
    """
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / name)
        _put_at_once(store, _files(Path(scratch)))


def finish(store: ObjectPath) -> None:
    """Finish what a killed run was doing to the tables. Only for whoever holds the lock."""
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(io.BytesIO(staged(store).read_bytes())) as archive:
        _exchange(store, {name: archive.read(name) for name in archive.namelist()})


def remove_store(store: ObjectPath) -> None:
    """Remove a store with all that lies beside it; killed in between, it still is a store and can be removed again."""
    places = [place for place, _, _ in store.below() if place != store / "zarr.json"]
    store.remove(places)
    store.remove([store / "zarr.json", staged(store)])


def _put_at_once(store: ObjectPath, files: Mapping[str, bytes]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    staged(store).write_bytes(packed.getvalue())
    _exchange(store, files)


def _exchange(store: ObjectPath, files: Mapping[str, bytes]) -> None:
    """Put files, those last that tell a reader that all is there; remove what their groups had beside them."""
    last = {name: files[name] for name in files if name.startswith("scans/status/") or name == "zarr.json"}
    _put(store, {name: content for name, content in files.items() if name not in last})
    _put(store, last)
    for group in {name.partition("/")[0] for name in files} & {"scans", "phenotypes"}:
        there = [place for place, _, _ in (store / group).below()]
        store.remove([place for place in there if str(place.relative_to(store)) not in files])
    staged(store).unlink()


def staged(store: ObjectPath) -> ObjectPath:
    """Return where files lie that are about to be put."""
    return store.with_name(store.name + ".staged")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _put(store: ObjectPath, files: Mapping[str, bytes]) -> None:
    with ThreadPoolExecutor(_PUTS_AT_ONCE) as pool:
        list(pool.map(lambda item: (store / item[0]).write_bytes(item[1]), files.items()))
