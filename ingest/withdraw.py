"""Removing people who withdrew from volume and embedding stores, for good and without losing the others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ingest.errors import StoreError
from ingest.exchange import remove_unfinished
from ingest.journal import read_journal, remove_journal
from ingest.lock import store_lock
from ingest.people import participant_key
from ingest.places import Place, as_place
from ingest.scan import ScanRow
from ingest.shard import remove_shard, shard_path
from ingest.store import (
    FORMAT,
    FORMAT_VERSION,
    check_format,
    open_store,
    recover_store,
    rows_of,
    set_attributes,
    write_phenotypes,
    write_scans,
)
from ingest.withdraw_tables import (
    RUN_EMBEDDINGS,
    RUN_LOCK,
    is_run,
    is_table,
    remove_from_run,
    remove_from_table,
    remove_temporaries,
)
from ingest.withdrawal_list import read_withdrawals

#: What every page that this package writes begins with.
_REPORT_MARK = b'<meta name="generator" content="brain-volumes'

_CHECKSUM = re.compile("[0-9a-f]{32,}")  # or the random id of a store
_LONG_ID, _SHORT_ID = 6, 3  # characters

#: What is removed whole, whoever is in it.
_WHOLE = frozenset({"report", "unfinished embeddings"})

#: What is left of a scan: its row, so that all others keep their numbers. No identity, no numbers.
TOMBSTONE = ScanRow(participant="", session="", modality="", source="", status="withdrawn")


@dataclass(frozen=True)
class Removal:
    """What was removed from one store.

    Attributes
    ----------
    kind
        ``volumes``, ``embeddings``, ``unfinished embeddings``, ``predictions``, ``run`` or ``report``.
    people, scans
        How many people of the list were in it, and how many scans of theirs; of a report nobody knows, nor of
        unfinished embeddings, which are removed whole.
    bytes_deleted
        Of voxels, features, or the page.
    withdrawn_before
        Scans of volumes that were withdrawn by an earlier call; nobody knows any more whose.
    """

    store: str
    kind: str
    people: int
    scans: int
    bytes_deleted: int
    withdrawn_before: int = 0


@dataclass(frozen=True)
class AuditRecord:
    """What was asked for and done; it names nobody.

    Attributes
    ----------
    list_sha256
        Of the file, so that the record can be matched with the list.
    people_not_found
        How many people of the list were in no store; None if nothing was searched but what is removed whole.
    """

    date: str
    list_name: str
    list_sha256: str
    people_on_list: int
    removals: list[Removal]
    people_not_found: int | None = None

    @property
    def clean(self) -> bool:
        """Whether somebody was found, or may have been withdrawn before."""
        nobody = self.people_not_found == self.people_on_list
        return not nobody or any(removal.withdrawn_before for removal in self.removals)

    @property
    def warnings(self) -> list[str]:
        """Say how many people of the list were in no store."""
        if not self.people_not_found:
            return []
        if self.people_not_found < self.people_on_list:
            whom = f"{self.people_not_found} of {self.people_on_list} people on {self.list_name}"
            return [f"{whom} are in none of these stores"]
        nobody = f"none of the {self.people_on_list} people on {self.list_name} is in any of these stores"
        before = sum(removal.withdrawn_before for removal in self.removals)
        if before:
            return [f"{nobody}; {before} scans were withdrawn before, of whom is not kept"]
        return [f"{nobody}; are the ids those of another project, or were they removed before?"]

    def to_json(self) -> dict[str, Any]:
        """Return the record as printed by ``--json``."""
        return asdict(self) | {"warnings": self.warnings}


_Done = tuple[Removal, set[str]]  # with who was found, which no record keeps


def withdraw(list_file: Path, stores: Sequence[str | Place]) -> AuditRecord:
    """Remove people from stores.

    In a store of volumes their shards, answers and identity go; rows stay as tombstones. In embeddings and tables of
    predictions their rows go, and what an unfinished `extract` has left beside them goes whole. Of the folders of
    fine-tuning runs see `ingest.withdraw_tables.remove_from_run`.
    Report pages (.html), which show brains, are removed whole, after everything else. It may be killed at any moment
    and called again: voxels go first and the names last, so nothing of a person can be left behind that a second call
    would not find, or that a later `ingest` would bring back.

    Raises
    ------
    TableError
        If the list cannot be used.
    StoreError, FileNotFoundError
        If a store is none, or another process writes to it. All are looked at before the first is touched.
    """
    people = read_withdrawals(list_file)
    kinds = {place: _kind(place) for place in map(_followed, stores)}
    removals: list[Removal] = []
    found: set[str] = set()
    with ExitStack() as held:  # all, before the first is touched: no writer of one brings back who has left another
        for store in _to_lock(kinds):
            held.enter_context(store_lock(store))
        # Reports last: one that is being made looks at its store when it is written.
        for store, kind in sorted(kinds.items(), key=lambda pair: pair[1] == "report"):
            if kind == "volumes":
                done = [_from_volumes(store, people)]
            else:
                assert isinstance(store, Path)
                done = _OF_FILES[kind](store, people)
            removals += [removal for removal, _ in done]
            found.update(*(theirs for _, theirs in done))
    searched = any(removal.kind not in _WHOLE for removal in removals)
    return AuditRecord(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        list_name=list_file.name,
        list_sha256=hashlib.sha256(list_file.read_bytes()).hexdigest(),
        people_on_list=len(people),
        removals=removals,
        people_not_found=len(people - found) if searched else None,
    )


def _to_lock(kinds: dict[Place, str]) -> Iterable[Place]:
    """Return what others must not write to, each once; pages are locked by nobody."""
    places: dict[Place, None] = {}
    for store, kind in kinds.items():
        if kind != "report":
            places[store] = None
        if kind == "run":
            assert isinstance(store, Path)
            places |= dict.fromkeys([store / RUN_LOCK, *_embeddings_in(store)])
    return places


def _embeddings_in(run: Path) -> list[Path]:
    """Return the embeddings in the folder of a run or curve, finished or not, and where those of a curve would be."""
    from extract.formats import KINDS

    names = {RUN_EMBEDDINGS, *(path.name.removesuffix(".parts") for path in run.glob("embeddings.*"))}
    found = [run / name for name in sorted(names) if Path(name).suffix in KINDS]
    return [path.resolve() if path.is_symlink() else path for path in found]


def _followed(store: str | Place) -> Place:
    """Return where a store is, behind all links: what they lead to is what must lose people."""
    place = as_place(store)
    return place.resolve() if isinstance(place, Path) else place


def _kind(store: Place) -> str:
    from extract.blocks import parts_path  # the one place where ingest looks ahead: people must go everywhere

    if isinstance(store, Path) and not store.exists() and store.parent.is_dir():
        with store_lock(store):
            remove_unfinished(store)  # or it is put back, if an extract was killed when it had moved it aside
        if parts_path(store).exists():
            return "embeddings"  # that an extract which was killed has not finished
    if not store.exists():
        raise FileNotFoundError(f"no store at {store}")
    if isinstance(store, Path) and store.suffix == ".html":
        if _REPORT_MARK not in store.read_bytes():
            raise StoreError(f"{store} is no report of this package, so it is not touched; remove it yourself")
        return "report"
    meta = store / "zarr.json"
    if meta.is_file():
        try:
            attrs = json.loads(meta.read_text())["attributes"]
        except (ValueError, LookupError, TypeError):
            raise StoreError(f"{meta} is damaged, so nobody can be removed; put it back, or delete {store}") from None
        if attrs.get("format") == FORMAT:
            check_format(attrs, store, name=FORMAT, known=FORMAT_VERSION)
            return "volumes"
    if not isinstance(store, Path):
        raise StoreError(f"{store} holds no volumes; withdraw people from embeddings and reports on a local disk")
    if is_run(store):
        return "run"
    if is_table(store):
        return "predictions"
    from extract.embeddings import read_tables

    read_tables(store)
    return "embeddings"


def _from_volumes(store: Place, people: frozenset[str]) -> _Done:
    recover_store(store)
    opened = open_store(store)
    rows = rows_of(opened.scans)
    finished, simulated = read_journal(store, opened.attrs["store_id"])  # of a run that was killed
    simulated |= bool(opened.attrs["simulated"])
    if finished:  # into the table, before anybody is removed: whatever a journal says, the next run takes over
        for number, row in finished.items():
            rows[number] = row
        set_attributes(store, {"simulated": simulated})
        write_scans(store, rows)
    remove_journal(store)
    theirs = [number for number, row in enumerate(rows) if participant_key(row.participant) in people]
    found = {participant_key(rows[number].participant) for number in theirs}
    tombstones = [number for number, row in enumerate(rows) if row.status == TOMBSTONE.status]
    deleted = sum(_remove_voxels(store, number) for number in [*theirs, *tombstones])
    if theirs:
        phenotypes = opened.phenotypes.copy()
        phenotypes.iloc[theirs] = np.nan
        if len(phenotypes.columns):
            write_phenotypes(store, phenotypes, opened.variables)
        set_attributes(store, _without(opened.attrs, found) | {"simulated": simulated})
        for number in theirs:
            rows[number] = replace(TOMBSTONE)
        write_scans(store, rows)  # the names, last
    return Removal(store.name, "volumes", len(found), len(theirs), deleted, len(tombstones)), found


def _remove_voxels(store: Place, number: int) -> int:
    path = shard_path(store, number)
    size = path.size() or 0 if not isinstance(path, Path) else path.stat().st_size if path.is_file() else 0
    remove_shard(path)
    return size


def _remove_report(page: Path, _: frozenset[str]) -> list[_Done]:
    size = page.stat().st_size if page.exists() else 0  # it may have gone with the run that it is in
    page.unlink(missing_ok=True)
    return [(Removal(page.name, "report", 0, 0, size), set())]


def _from_predictions(path: Path, people: frozenset[str]) -> list[_Done]:
    remove_temporaries(path.parent, path.name)
    found, rows = remove_from_table(path, people)
    return [(Removal(path.name, "predictions", len(found), rows, 0), found)]


def _from_run(folder: Path, people: frozenset[str]) -> list[_Done]:
    inside = [done for path in _embeddings_in(folder) for done in _from_embeddings(path, people)]
    found, rows, deleted = remove_from_run(folder, people, lambda document: _without(document, people))
    return [*inside, (Removal(folder.name, "run", len(found), rows, deleted), found)]


def _without(attrs: dict[str, Any], people: Iterable[str]) -> dict[str, Any]:
    """Return attributes in whose texts no id occurs: a source folder may have been named after one person.

    Numbers, keys and checksums stay as they are. Of ids of few characters only whole words are meant, or those after
    ``sub-``, for they occur in version numbers, too.
    """
    patterns = []
    for person in sorted(people, key=len, reverse=True):
        name = re.escape(person)
        if len(person) >= _LONG_ID:
            patterns.append(f"(?<![0-9]){name}(?![0-9])")
        elif len(person) > _SHORT_ID:
            patterns.append(f"(?<![0-9A-Za-z.]){name}(?![0-9A-Za-z]|[.][0-9])")
        else:
            patterns.append(f"(?<=sub-){name}(?![0-9A-Za-z])")
    ids = re.compile("|".join(patterns)) if patterns else None

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if ids is None or not isinstance(value, str) or _CHECKSUM.fullmatch(value):
            return value
        return ids.sub("withdrawn", value)

    return {key: clean(item) for key, item in attrs.items()}


def _from_embeddings(path: Path, people: frozenset[str]) -> list[_Done]:
    from extract.blocks import parts_path, remove_parts
    from extract.embeddings import open_embeddings, write_embeddings

    done: list[_Done] = []
    remove_unfinished(path)
    parts = parts_path(path)
    if parts.exists():
        done.append((Removal(parts.name, "unfinished embeddings", 0, 0, remove_parts(parts)), set()))
    if not path.exists():
        return done
    embeddings = open_embeddings(path)
    ids = embeddings.scans["participant"].map(participant_key)
    theirs = ids.isin(people).to_numpy()
    attrs = _without(embeddings.attrs, set(ids[theirs]))
    attrs |= _without({"skipped": attrs.get("skipped", [])}, people)  # reasons why scans were left out name files
    if theirs.any() or attrs["skipped"] != embeddings.attrs.get("skipped", []):
        kept = replace(
            embeddings,
            features=embeddings.features[~theirs],
            scans=embeddings.scans[~theirs].reset_index(drop=True),
            phenotypes=embeddings.phenotypes[~theirs].reset_index(drop=True),
            attrs=attrs,
        )
        write_embeddings(path, kept)
    found = set(ids[theirs])
    size = int(theirs.sum()) * embeddings.features[:1].nbytes
    return [*done, (Removal(path.name, "embeddings", len(found), int(theirs.sum()), size), found)]


_OF_FILES: dict[str, Callable[[Path, frozenset[str]], list[_Done]]] = {
    "embeddings": _from_embeddings,
    "predictions": _from_predictions,
    "run": _from_run,
    "report": _remove_report,
}
