"""The coordinator of an ingest: find the scans, create the store, have the shards written, finalise the tables."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ingest.convert import ConvertedScan, convert_scan, load_volume, pending_row, volume_space
from ingest.errors import CANNOT_WRITE, ObjectStoreError, ScanError, StoreError
from ingest.existing import behind_links, check_people, check_same_settings, find_existing, grid_of, rank_of_store
from ingest.grid import GRIDS, NATIVE, Grid
from ingest.intensity import IntensityRule
from ingest.joined import choose_table, join, kept
from ingest.journal import open_journal, read_journal, remove_journal
from ingest.layouts import Layout, find_scans
from ingest.lock import store_lock
from ingest.memory import plan_memory
from ingest.phenotypes import participant_key
from ingest.places import Place, as_place, local_copy
from ingest.plan import make_plan
from ingest.scan import UNREADABLE_SOURCE, ScanRow, ScanSource
from ingest.settings import IngestSettings, IngestSummary, Space
from ingest.shard import remove_shard, shard_path
from ingest.store import (
    DEFAULT_SLAB,
    create_store,
    recover_store,
    remove_store,
    resize_store,
    rows_of,
    set_attributes,
    write_phenotypes,
    write_scans,
)
from ingest.summary import summarise
from ingest.withdraw import read_withdrawals
from ingest.workers import check_scheduler, run_in_processes, run_in_threads

_FILES = {".h5", ".npz", ".parquet", ".csv", ".tsv", ".html", ".nii", ".gz", ".zip"}  # what no store is called like
_GONE_AFTER = 8  # scans that cannot be fetched, one after the other; each has been tried for most of a minute


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
    source, out = as_place(source), behind_links(as_place(out))
    if out.suffix in _FILES:
        raise StoreError(f"{out} ends in {out.suffix!r} like a file, but a store is a folder; name it like t1.zarr")
    with _clear_write_errors(out), store_lock(out) as check_lock:
        recover_store(out)
        there = find_existing(out, overwrite=overwrite, people_named=bool(withdrawn) or allow_readd)
        store = None if overwrite else there
        rank = rank_of_store(store) if store and settings.image is None else None
        layout, sources = find_scans(source, settings.layout, settings.image, rank)
        known = rows_of(store.scans) if store else []
        done, simulated = read_journal(out, store.attrs["store_id"]) if store else ({}, False)
        for number, row in done.items():
            known[number] = row
        if withdrawn:
            with local_copy(as_place(withdrawn)) as list_file:
                people = read_withdrawals(list_file)
            check_people(out, known, people)
            sources = [scan for scan in sources if participant_key(scan.participant) not in people]
        empty = all(row.status != "ok" for row in known)
        if store:
            check_same_settings(store, settings, layout, empty=empty)
        plan = make_plan(known, sources, retry_failed=retry_failed)
        given = None if settings.phenotypes is None else as_place(settings.phenotypes)
        table = choose_table(source, layout, given, store)
        phenotypes = join(table, plan.rows, store, given=given is not None) if table else kept(plan.rows, store)
        sizes = [plan.rows[number].source_size for number in plan.todo]
        tables = ([phenotypes.table] if phenotypes else []) + ([store.phenotypes] if store else [])
        memory = plan_memory(
            max_memory, sizes, scans=len(plan.rows), workers=0 if scheduler else workers, remote=bool(scheduler),
            phenotypes=max((len(one.columns) for one in tables), default=0),
        )  # fmt: skip
        if scheduler and plan.todo:
            check_scheduler(scheduler)
        if on_plan:
            on_plan(len(plan.todo), sum(sizes))

        grid = None if store is None else store.grid
        if empty:
            grid = _choose_grid(settings.space, list(plan.todo.values()), memory.scan_bytes) or grid or GRIDS[NATIVE]
        assert grid is not None
        attrs = _attributes(source, layout, settings, table)
        if store:
            slab, store_id = store.slab, store.attrs["store_id"]
            simulated |= bool(store.attrs["simulated"])
            made_with = dict(store.attrs["settings"])
            if empty:
                made_with["space"] = str(settings.space)
            if table:
                made_with["phenotypes"] = table.name
            resize_store(out, len(plan.rows))
            set_attributes(out, {"simulated": simulated, "grid": grid.to_json(), "settings": made_with})
            write_scans(out, plan.rows)  # what is read again is pending from here on, whatever happens to this run
            remove_journal(out)  # all of it is in the table now
            for number in plan.kept.keys() - plan.todo.keys():
                remove_shard(shard_path(out, number))  # of what is a duplicate now
        else:
            slab, store_id = settings.slab or DEFAULT_SLAB, uuid.uuid4().hex
            if overwrite:  # now that nothing is left to be refused
                remove_store(out)
                remove_journal(out)
            attrs["settings"]["slab"] = slab
            create_store(out, plan.rows, grid, slab=slab, attrs=attrs | {"store_id": store_id})

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
            unread = []
            for number, converted in _while_reachable(results, source):
                row = converted.row
                if row.status in UNREADABLE_SOURCE and number in plan.kept:
                    unread.append((row.source, row.status, f"{row.error}; its volume of before is kept"))
                    row = plan.kept[number]
                elif row.status != "ok" and number < len(known):
                    remove_shard(shard_path(out, number))  # of what the file held before
                plan.rows[number] = row
                simulated |= converted.simulated
                check_lock()
                append(number, row, converted.simulated)
                if on_scan:
                    on_scan(converted.row)

        check_lock()
        write_scans(out, plan.rows)
        if phenotypes:
            write_phenotypes(out, phenotypes.table, phenotypes.variables)
        set_attributes(out, {"simulated": simulated})
        remove_journal(out)
        seconds = time.perf_counter() - started
        return summarise(plan, unread, sum(sizes), seconds, phenotypes, simulated=simulated)


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
        if error.errno not in CANNOT_WRITE:
            raise
        raise StoreError(
            f"{out} cannot be written: {error.strerror}; nothing that is done is lost: "
            "make room, and run the same command again"
        ) from error


def _attributes(source: Place, layout: Layout, settings: IngestSettings, table: Place | None) -> dict[str, Any]:
    return {
        "intensity": settings.intensity.to_json(),
        "settings": {
            "source": str(source),
            "layout": str(layout),
            "image": settings.image,
            "space": str(settings.space),
            "phenotypes": table.name if table else None,
            "slab": settings.slab,
        },
    }


def _convert(
    task: tuple[int, ScanSource], *, store: Place, grid: Grid, rule: IntensityRule, slab: int, memory: int | None
) -> tuple[int, ConvertedScan]:
    number, source = task
    return number, convert_scan(source, number, store, grid, rule, slab, memory)


def _lost(task: tuple[int, ScanSource]) -> tuple[int, ConvertedScan]:
    """Return the row of a scan whose workers died again and again: memory is short, or the file kills the decoder."""
    number, source = task
    reason = "the workers that read it died; give them more memory, or look at the file"
    return number, ConvertedScan(replace(pending_row(source), status="read_error", error=reason))


def _choose_grid(space: Space, sources: list[ScanSource], memory: int | None) -> Grid | None:
    """Return the grid of a store without volumes; None if it is to be that of the first scan, and none can be read."""
    if space is not Space.auto:
        return grid_of(space)
    for source in sources:
        try:
            volume, _ = load_volume(source, memory)
        except ScanError:
            continue
        return GRIDS[volume_space(source, volume)]
    return None
