"""The coordinator of an ingest: find the scans, create the store, have the shards written, finalise the tables."""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ingest.convert import ConvertedScan, convert_scan, load_volume, pending_row, volume_space
from ingest.errors import ObjectStoreError, ScanError, StoreError
from ingest.grid import GRIDS, MNI152, NATIVE, Grid
from ingest.intensity import IntensityRule
from ingest.journal import open_journal, read_journal, remove_journal
from ingest.layouts import Layout, find_scans
from ingest.lock import store_lock
from ingest.memory import plan_memory
from ingest.names import rank_of
from ingest.phenotypes import Phenotypes, join_phenotypes, participant_key
from ingest.places import Place, as_place, local_copy
from ingest.plan import Plan, make_plan
from ingest.scan import EXPECTED_ABSENCES, ScanRow, ScanSource
from ingest.settings import IngestSettings, IngestSummary, Space
from ingest.shard import remove_shard, shard_path
from ingest.store import (
    DEFAULT_SLAB,
    VolumeStore,
    create_store,
    grow_store,
    open_store,
    recover_store,
    remove_store,
    rows_of,
    set_attributes,
    write_phenotypes,
    write_scans,
)
from ingest.withdraw import read_withdrawals
from ingest.workers import run_in_processes, run_in_threads

_GONE_AFTER = 8  # scans that cannot be fetched, one after the other; each has been tried for most of a minute

#: The disk is full, over quota, read-only, or not ours.
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


_SPACES = {Space.mni: MNI152, Space.native: NATIVE}


def ingest(
    source: str | Place,
    out: str | Place,
    settings: IngestSettings | None = None,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    withdrawn: str | Place | None = None,
    allow_readd: bool = False,
    on_plan: Callable[[int, int], None] | None = None,
    on_scan: Callable[[ScanRow], None] | None = None,
) -> IngestSummary:
    """Turn a folder of scans into a store, or bring a store up to date with it.

    A run may be killed at any moment: the same call again goes on where it was, and the store ends up as if nothing had
    happened. On a finished store it reads only scans that are new, or whose file has changed; they get new rows at the
    end, or their old ones, and no other shard is touched.

    Parameters
    ----------
    source
        Folder of UK Biobank zips, BIDS tree or folder of NIfTI files, or ``s3://bucket/prefix``.
    out
        The store, conventionally ``*.zarr``; may be ``s3://bucket/name.zarr``. While a run lasts there are
        ``OUT.lock`` and ``OUT.journal`` beside it.
    workers
        Processes of a local dask cluster; 0 works in threads of this process, one per core and one more.
    scheduler
        Address of a dask cluster to use instead; its workers must see both folders.
    max_memory
        Bytes that this process and its workers may take together; on a cluster of `scheduler`, each worker. Fewer
        threads work if that is little; a scan that needs more than is left for it becomes a row with that reason.
    overwrite
        Replace a store that exists.
    retry_failed
        Read again what an earlier run failed to read.
    withdrawn
        List of people who withdrew (`ingest.withdraw.read_withdrawals`); their scans are passed over.
    allow_readd
        Take scans of anybody, though people have been withdrawn from this store.
    on_plan, on_scan
        Called with the number of scans to read and the bytes of their files, and with each finished row.

    Raises
    ------
    SourceError
        If no scans are found.
    StoreError
        If `out` is no store, has other settings, is being written by another process, or cannot be written.
    TableError
        If the phenotype table cannot be used.
    MemoryBudgetError
        If `max_memory` is too little.
    """
    settings = settings or IngestSettings()
    started = time.perf_counter()
    source, out = as_place(source), as_place(out)
    with _clear_write_errors(out), store_lock(out) as check_lock:
        recover_store(out)
        _check_is_store(out)
        if overwrite:
            remove_store(out)
            remove_journal(out)
        store = open_store(out) if out.exists() else None
        rank = _rank(store) if store and settings.image is None else None
        layout, sources = find_scans(source, settings.layout, settings.image, rank)
        if withdrawn:
            with local_copy(as_place(withdrawn)) as list_file:
                people = read_withdrawals(list_file)
            sources = [scan for scan in sources if participant_key(scan.participant) not in people]
        if store:
            _check_same_settings(store, settings, layout)
            if not (withdrawn or allow_readd) and (store.scans["status"] == "withdrawn").any():
                raise StoreError(
                    f"people have been withdrawn from {out}, and it no longer knows who; give their list with "
                    "--withdrawn LIST so that they are not brought back, or --allow-readd"
                )
        known = rows_of(store.scans) if store else []
        done, simulated = read_journal(out, store.attrs["store_id"]) if store else ({}, False)
        for number, row in done.items():
            known[number] = row
        plan = make_plan(known, sources, retry_failed=retry_failed)
        phenotypes = _phenotypes(source, layout, settings.phenotypes, plan.rows, store)
        sizes = [plan.rows[number].source_size for number in plan.todo]
        memory = plan_memory(
            max_memory, sizes, scans=len(plan.rows), workers=0 if scheduler else workers, remote=bool(scheduler)
        )
        if on_plan:
            on_plan(len(plan.todo), sum(sizes))

        if store:
            if len(plan.rows) > len(store.scans):
                grow_store(out, len(plan.rows))
            grid, slab, store_id = store.grid, store.slab, store.attrs["store_id"]
            simulated |= bool(store.attrs["simulated"])
            set_attributes(out, {"simulated": simulated})
            write_scans(out, plan.rows)  # what is read again is pending from here on, whatever happens to this run
            remove_journal(out)  # all of it is in the table now
        else:
            grid = _choose_grid(settings.space, list(plan.todo.values()), memory.scan_bytes)
            slab, store_id = settings.slab or DEFAULT_SLAB, uuid.uuid4().hex
            attrs = _attributes(source, layout, settings, slab) | {"store_id": store_id}
            create_store(out, plan.rows, grid, slab=slab, attrs=attrs)

        work = partial(
            _convert, store=out.absolute(), grid=grid, rule=settings.intensity, slab=slab, memory=memory.scan_bytes
        )
        todo = list(plan.todo.items())
        if workers or scheduler:
            limit = memory.process_bytes
            results = run_in_processes(work, todo, workers=workers, scheduler=scheduler, memory_limit=limit, lost=_lost)
        else:
            results = run_in_threads(work, todo, memory.threads)
        with open_journal(out, store_id) as append, contextlib.closing(results):
            for number, converted in _while_reachable(results, source):
                plan.rows[number] = converted.row
                simulated |= converted.simulated
                check_lock()
                append(number, converted.row, converted.simulated)
                if on_scan:
                    on_scan(converted.row)

        check_lock()
        write_scans(out, plan.rows)
        if phenotypes:
            write_phenotypes(out, phenotypes.table, phenotypes.variables)
        set_attributes(out, {"simulated": simulated})
        remove_journal(out)
        return _summarise(plan, sum(sizes), time.perf_counter() - started, phenotypes, simulated=simulated)


def _while_reachable(
    results: Iterator[tuple[int, ConvertedScan]], source: Place
) -> Iterator[tuple[int, ConvertedScan]]:
    """Pass results on, but end the run when the sources' object store is gone, rather than fail scan after scan.

    Scans that could not be fetched are held back until another could be; else the next run does them again.
    """
    held: list[tuple[int, ConvertedScan]] = []
    for number, converted in results:
        held.append((number, converted))
        if not converted.row.error.startswith(ObjectStoreError.__name__):
            yield from held
            held.clear()
        elif len(held) == _GONE_AFTER:
            raise StoreError(
                f"{source} is gone: {len(held)} scans one after the other could not be fetched "
                f"({converted.row.error}); nothing that is done is lost: run the same command again, "
                "with --retry-failed"
            )
    yield from held


@contextlib.contextmanager
def _clear_write_errors(out: Place) -> Iterator[None]:
    try:
        yield
    except ObjectStoreError as error:
        raise StoreError(f"{error}; nothing that is done is lost: run the same command again") from error
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise StoreError(
            f"{out} cannot be written: {error.strerror}; nothing that is done is lost: "
            "make room, and run the same command again"
        ) from error


def _attributes(source: Place, layout: Layout, settings: IngestSettings, slab: int) -> dict[str, Any]:
    return {
        "intensity": settings.intensity.to_json(),
        "settings": {
            "source": str(source),
            "layout": str(layout),
            "image": settings.image,
            "space": str(settings.space),
            "phenotypes": settings.phenotypes.name if settings.phenotypes else None,
            "slab": slab,
        },
    }


def _convert(
    task: tuple[int, ScanSource], *, store: Place, grid: Grid, rule: IntensityRule, slab: int, memory: int | None
) -> tuple[int, ConvertedScan]:
    number, source = task
    converted = convert_scan(source, number, store, grid, rule, slab, memory)
    if converted.row.status != "ok":
        remove_shard(shard_path(store, number))  # of what the file held before
    return number, converted


def _lost(task: tuple[int, ScanSource]) -> tuple[int, ConvertedScan]:
    """Return the row of a scan whose workers died again and again: memory is short, or the file kills the decoder."""
    number, source = task
    reason = "the workers that read it died; give them more memory, or look at the file"
    return number, ConvertedScan(replace(pending_row(source), status="read_error", error=reason))


def _check_is_store(out: Place) -> None:
    if out.exists() and not (out / "zarr.json").is_file():
        raise StoreError(f"{out} is not a Zarr store; choose another name")


def _check_same_settings(store: VolumeStore, settings: IngestSettings, layout: Layout) -> None:
    """Refuse to add scans to a store in another way than those that it has."""
    made_with = store.attrs["settings"]
    asked: dict[str, Any] = {"layout": str(layout), "image": settings.image}
    if settings.slab is not None:
        asked["slab"] = settings.slab
    if settings.space is not Space.auto and GRIDS[_SPACES[settings.space]] != store.grid:
        asked["space"] = str(settings.space)
    for name, value in asked.items():
        if value != made_with[name]:
            raise StoreError(
                f"{store.path} was made with {name} {made_with[name]!r}, this run asks for {value!r}; use the same, "
                "another store, or --overwrite"
            )
    if settings.intensity.to_json() != store.attrs["intensity"]:
        raise StoreError(f"{store.path} was made with the intensity rule {store.attrs['intensity']}; use the same")


def _rank(store: VolumeStore) -> int | None:
    """Return the rank of the scans of a store, so that those of another image that came later are passed over."""
    modalities = [modality for modality in store.scans["modality"] if modality]  # the withdrawn have none
    return rank_of(store.attrs["settings"]["layout"], modalities[0]) if modalities else None


def _choose_grid(space: Space, sources: list[ScanSource], memory: int | None) -> Grid:
    if space is not Space.auto:
        return GRIDS[_SPACES[space]]
    for source in sources:
        try:
            volume, _ = load_volume(source, memory)
        except ScanError:
            continue
        return GRIDS[volume_space(source, volume)]
    return GRIDS[NATIVE]


def _phenotypes(
    source: Place, layout: Layout, table: Place | None, rows: list[ScanRow], store: VolumeStore | None
) -> Phenotypes | None:
    """Join the table that is given; without one a store that has phenotypes keeps them, and new rows have none."""
    if table is None and layout is Layout.bids and (source / "participants.tsv").is_file():
        table = source / "participants.tsv"
    if table is not None:
        with local_copy(table) as copy:
            joined = join_phenotypes(copy, [row.participant for row in rows], [row.session for row in rows])
        dropped = sorted(set(store.phenotypes.columns) - set(joined.table.columns)) if store else []
        if dropped:
            warning = f"{table.name} lacks {', '.join(dropped)}, which the store had from an older table, and loses now"
            joined = replace(joined, warnings=[*joined.warnings, warning])
        return joined
    if store is None or not len(store.phenotypes.columns) or len(store.scans) == len(rows):
        return None
    added = len(rows) - len(store.scans)
    warning = f"{added} new scans have no phenotypes; give the table again with --phenotypes"
    return Phenotypes(store.phenotypes.reindex(range(len(rows))), store.variables, [warning])


def _summarise(
    plan: Plan, read: int, seconds: float, phenotypes: Phenotypes | None, *, simulated: bool
) -> IngestSummary:
    rows = plan.rows
    warnings = list(phenotypes.warnings) if phenotypes else []
    cut = [row for row in rows if row.cut_off_voxels]
    if cut:
        worst = max(cut, key=lambda row: row.cut_off_voxels)
        warnings.append(
            f"{len(cut)} scans have positive voxels outside the grid: at most {worst.cut_off_voxels}, "
            f"{worst.cut_off_voxels / (worst.cut_off_voxels + worst.brain_voxels):.1%} of the scan, in {worst.source}"
        )
    status = Counter(row.status for row in rows)
    return IngestSummary(
        scans=len(rows),
        status=dict(sorted(status.items())),
        seconds=round(seconds, 3),
        bytes=read,
        volumes_per_second=round(sum(rows[number].status == "ok" for number in plan.todo) / seconds, 3),
        new=plan.new,
        changed=plan.changed,
        retried=plan.retried,
        simulated=simulated,
        failures=[
            (row.source, row.status, row.error)
            for row in rows
            if row.status != "ok" and row.status not in EXPECTED_ABSENCES
        ],
        warnings=warnings,
        bad_values=phenotypes.bad_values if phenotypes else 0,
    )
