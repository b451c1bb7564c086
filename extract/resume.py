"""A store of any size -> an embedding file: by blocks, going on where a killed run was, embedding only what is new."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.assemble import OldFile, assemble, plain
from extract.blocks import (
    parts_path,
    read_finished,
    read_settings,
    remove_parts,
    same_scans,
    scans_per_block,
    start_parts,
    write_block,
)
from extract.distributed import Group
from extract.embeddings import check_replaceable, check_suffix, read_tables
from extract.encoder import Encoder, describe
from extract.run import encode, fitting_batch_size, provenance, scans_table, wanted_rows
from extract.timing import Timing, add_up
from ingest.errors import StoreError
from ingest.exchange import remove_unfinished
from ingest.lock import store_lock
from ingest.places import Place
from ingest.store import VolumeStore, open_store, unchanged
from ingest.writing import behind_link
from loaders.opening import choose_backend


@dataclass(frozen=True)
class ExtractSummary:
    """What a run did.

    Attributes
    ----------
    scans, features
        Of the file.
    embedded
        Scans that this run embedded; the others were finished before.
    skipped
        By row of the store, why scans were left out.
    attrs
        Of the file.
    timing
        Of all processes together.
    seconds
        From the beginning to the end.
    processes
        That shared the work.
    """

    scans: int
    features: int
    embedded: int
    skipped: dict[int, str]
    attrs: dict[str, Any]
    timing: Timing
    seconds: float
    processes: int


@dataclass(frozen=True)
class _Plan:
    """What is to be done.

    Attributes
    ----------
    rows
        int64, rows of the store that are to be embedded, cut into blocks in this order.
    batch_size
        Scans at a time; 0 if that is open.
    first_number
        Of the blocks.
    settings
        What the first process makes features with, see `_settings`.
    """

    rows: np.ndarray
    batch_size: int
    first_number: int
    settings: dict[str, Any]

    def share(self, group: Group) -> list[tuple[int, np.ndarray]]:
        """Return number and rows of the blocks of one process: the processes take turns."""
        step = scans_per_block(self.batch_size, -(-len(self.rows) // group.size))
        starts = range(0, len(self.rows), step)
        blocks = [(self.first_number + k, self.rows[start : start + step]) for k, start in enumerate(starts)]
        return blocks[group.rank :: group.size]


def extract_to(
    out: Path,
    store: str | Place,
    encoder: Encoder,
    *,
    backend: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    group: Group | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_batch: Callable[[Timing], None] | None = None,
) -> ExtractSummary | None:
    """Embed the scans of a store into a file.

    Memory is that of the network, the loader and the tables, whatever the number of scans. Until the file is finished
    blocks of features lie in ``OUT.parts``; a run that was killed goes on with them. A file that was made from the same
    store by the same encoder is brought up to date: scans that are new or have changed are embedded, those that the
    store has no more are left out, phenotypes are as they are now.

    Parameters
    ----------
    out
        The file; its ending is its kind.
    store, encoder, backend, batch_size, threads
        See `extract.run.extract`. The batch size of a run that goes on is by default that of the one before.
    overwrite
        Replace the file, if it is an embedding file, and unfinished work for another one.
    group
        The processes that share the work, see `extract.distributed`; each calls this. By default this one alone.
    on_plan
        Called with the number of scans that this process is to embed.
    on_batch
        Called after each batch with where its time went so far.

    Returns
    -------
    ExtractSummary
        None in all processes but the first.

    Raises
    ------
    StoreError
        If the file or the unfinished work is of another store or encoder, or another run writes it; if what is there
        is no embedding file, or is the store itself; if the processes have different stores or encoders.
    ValueError
        As `extract.run.extract` does; also if no scan at all can be read.
    """
    started = time.perf_counter()
    check_suffix(out)
    out = behind_link(out)
    choose_backend(backend, encoder.device)  # refused before anything is begun
    group = group or Group()
    parts = parts_path(out)
    timing = Timing()
    with contextlib.ExitStack() as held:
        had: OldFile | None = None
        plan: _Plan | None = None
        with group.first_here():
            volumes = open_store(store)
            _refuse_the_store(out, volumes)
            wanted = scans_table(volumes, wanted_rows(volumes))
            if group.rank == 0:
                held.enter_context(store_lock(out))
                encoder.check(volumes.grid.shape_zyx)
                had, plan = _prepare(out, volumes, wanted, encoder, batch_size, overwrite=overwrite)
        plan = group.tell(plan)
        assert plan is not None
        _refuse_others(
            _settings(volumes, encoder), plan.settings, f"process {group.rank} differs from process 0: it has",
            "give all processes of a run the same options and files",
        )  # fmt: skip
        if batch_size is None:
            plan = replace(plan, batch_size=_fitting_all(plan, volumes, encoder, backend, group))
        if group.rank == 0 and len(plan.rows):
            start_parts(parts, {**plan.settings, "batch_size": plan.batch_size})
        group.tell(None)  # the others write no block before
        _embed(plan, volumes, wanted, encoder, parts, group, backend, threads, timing, on_plan, on_batch)
        timings = group.gather(timing)
        if group.rank:
            return None
        begun = time.perf_counter()
        volumes, wanted = _still_there(volumes, wanted)
        if had is not None:
            had = replace(had, place=_old_places(wanted, had.tables.scans))
        attrs = provenance(volumes, encoder, backend)
        tables, width, skipped = assemble(out, volumes, wanted, had, parts, attrs)
        remove_parts(parts)
        writing = time.perf_counter() - begun
    total = add_up(timings)
    if len(plan.rows):
        total.write += writing
        total.elapsed += writing
    return ExtractSummary(
        scans=len(tables.scans),
        features=width,
        embedded=total.scans,
        skipped=skipped,
        attrs=tables.attrs,
        timing=total,
        seconds=time.perf_counter() - started,
        processes=group.size,
    )


def _settings(volumes: VolumeStore, encoder: Encoder) -> dict[str, Any]:
    """Return all that decides about the features of a scan, as it comes back from a file."""
    return plain({"store_id": volumes.attrs["store_id"], **describe(encoder)})


def _refuse_the_store(out: Path, volumes: VolumeStore) -> None:
    if isinstance(volumes.path, Path) and out.resolve().is_relative_to(volumes.path.resolve()):
        raise StoreError(f"{out} is the store {volumes.path}, or in it, and not replaced; choose another name")


def _prepare(
    out: Path,
    volumes: VolumeStore,
    wanted: pd.DataFrame,
    encoder: Encoder,
    batch_size: int | None,
    *,
    overwrite: bool,
) -> tuple[OldFile | None, _Plan]:
    """Look at what is there and find out what is to be done. Only for the process that holds the lock."""
    remove_unfinished(out)
    parts = parts_path(out)
    settings = _settings(volumes, encoder)
    had = None
    if overwrite:
        check_replaceable(out)
    elif out.exists():
        tables = read_tables(out)
        made_from = tables.attrs.get("store")
        made_with = {key: tables.attrs.get(key) for key in settings} | {
            "store_id": made_from.get("id") if isinstance(made_from, dict) else None
        }
        remedy = "add --overwrite to replace it, or choose another name"
        _refuse_others(made_with, settings, f"{out} exists and was made with", remedy)
        had = OldFile(out, tables, _old_places(wanted, tables.scans))
    unfinished = read_settings(parts)
    if unfinished is not None:
        made_with = {key: unfinished.get(key) for key in settings}
        if made_with != settings and overwrite:
            remove_parts(parts)
            unfinished = None
        else:
            remedy = "add --overwrite to give that up, or choose another name"
            if had is not None:  # which --overwrite would cost
                remedy = f"remove {parts} to go on with {out}, which is of this one"
            _refuse_others(made_with, settings, f"{parts} is of an unfinished run with", remedy)
    missing = np.ones(len(wanted), np.bool_) if had is None else had.place < 0
    finished = read_finished(parts) if unfinished is not None else None
    tried: list[int] = []
    if finished is not None:
        missing &= same_scans(wanted, finished.scans) < 0
        tried = list(finished.skipped)
    rows = wanted["row"].to_numpy()[missing]
    again = np.isin(rows, tried)
    rows = np.concatenate([rows[~again], rows[again]])  # so that the others have the batches that they had
    if batch_size is None:
        batch_size = int((unfinished or {}).get("batch_size", 0))
    return had, _Plan(rows, batch_size, 0 if finished is None else finished.next_number, settings)


def _fitting_all(plan: _Plan, volumes: VolumeStore, encoder: Encoder, backend: str, group: Group) -> int:
    """Return how many scans every process can encode at a time: GPUs differ, and others may be at work on them.

    A run that goes on does as many as before, if they still fit.
    """
    if not len(plan.rows) or (plan.batch_size and encoder.device.type != "cuda"):
        return plan.batch_size or 1
    share = -(-len(plan.rows) // group.size)
    fitting = fitting_batch_size(volumes, encoder, backend, max(share, plan.batch_size))
    fitting = min(group.gather_all(fitting))
    return min(fitting, plan.batch_size or fitting)


def _still_there(volumes: VolumeStore, wanted: pd.DataFrame) -> tuple[VolumeStore, pd.DataFrame]:
    """Look at the store again: people may have withdrawn from it while their scans were embedded."""
    now = open_store(volumes.path)
    same = unchanged(volumes, now, wanted["row"].to_numpy())
    if not same.any():
        raise StoreError(f"all scans have left {volumes.path} while they were embedded; run the same command again")
    return now, wanted[same].reset_index(drop=True)


def _old_places(wanted: pd.DataFrame, had: pd.DataFrame) -> np.ndarray:
    """Return where in a file each scan wanted is, or -1; nowhere if the file is not in the order of the store."""
    if len(had) and not (np.diff(had["row"].to_numpy()) > 0).all():  # it was made of chosen rows
        return np.full(len(wanted), -1, np.int64)
    return same_scans(wanted, had)


def _refuse_others(made_with: dict[str, Any], settings: dict[str, Any], what: str, remedy: str) -> None:
    differing = [key for key in settings if made_with[key] != settings[key]]
    if differing:
        words = "; ".join(f"{key} {json.dumps(made_with[key])}, not {json.dumps(settings[key])}" for key in differing)
        raise StoreError(f"{what} {words}; {remedy}")


def _embed(
    plan: _Plan,
    volumes: VolumeStore,
    wanted: pd.DataFrame,
    encoder: Encoder,
    parts: Path,
    group: Group,
    backend: str,
    threads: int | None,
    timing: Timing,
    on_plan: Callable[[int], None] | None,
    on_batch: Callable[[Timing], None] | None,
) -> None:
    """Embed the blocks of this process and write them. One loader goes over all: it never runs dry between blocks."""
    blocks = plan.share(group)
    rows = np.concatenate([rows for _, rows in blocks]) if blocks else np.empty(0, np.int64)
    if on_plan:
        on_plan(len(rows))
    if not blocks:
        return
    batches = encode(
        volumes, encoder, rows, batch_size=plan.batch_size, backend=backend, threads=threads, timing=timing,
        on_error="skip",
    )  # fmt: skip
    # A block may take as long to be on the disk as several batches take a GPU, which is to go on meanwhile.
    with ThreadPoolExecutor(1) as writer, contextlib.closing(batches):
        written: Future[None] | None = None
        for number, rows in blocks:
            done, features = [], []
            skipped: dict[int, str] = {}
            for batch in itertools.islice(batches, -(-len(rows) // plan.batch_size)):
                done.append(batch.rows)
                features.append(batch.features)
                skipped |= batch.skipped
                if on_batch:
                    on_batch(timing)
            scans = wanted.iloc[np.searchsorted(wanted["row"].to_numpy(), np.concatenate(done))]
            with timing.adding("write"):
                if written is not None:
                    written.result()
                written = writer.submit(write_block, parts, number, scans, np.concatenate(features), skipped)
        next(batches, None)  # so that it takes its last measurements
        assert written is not None
        with timing.adding("write"):
            written.result()
