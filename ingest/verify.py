"""Is a store what was written, and what its sources say? Every damaged scan is named, and can be made again."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ingest.checks import (
    UNREADABLE,
    Finding,
    StoreTables,
    check_files,
    check_rows,
    check_shard,
    check_tables,
    error_text,
)
from ingest.convert import convert_scan, pending_row
from ingest.decode import VolumePerThread, decode_shard
from ingest.errors import CANNOT_WRITE, StoreError
from ingest.existing import behind_links
from ingest.grid import Grid
from ingest.intensity import IntensityRule
from ingest.layouts import Layout, find_scans
from ingest.lock import store_lock
from ingest.names import rank_of
from ingest.places import Place, as_place
from ingest.scan import EXPECTED_ABSENCES, UNREADABLE_SOURCE, ScanRow, ScanSource
from ingest.shard import remove_shard, shard_path
from ingest.store import recover_store, set_attributes, write_scans

_BATCH = 1024  # scans handed to the threads at once: their results stay few
_SAMPLE_SEED = 0

#: Scans that are compared with their sources.
SAMPLE = 20

#: Columns that must come out of the source again. Quality numbers are left out: later versions may count otherwise.
_FROM_SOURCE = ("participant", "session", "modality", "scale", "offset", "head_scale")

#: A row with one of these has no volume worth keeping.
_SHARD_LOST = frozenset({"shard_missing", "shard_damaged"})
_REINGESTED = _SHARD_LOST | {"statistics_wrong", "source_changed", "voxels_differ"}
_REMOVED = frozenset({"shard_orphan", "leftover"})


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found.

    Attributes
    ----------
    scans, checked, compared
        Rows of the store, shards that were read, scans whose source was read again.
    bytes
        Of the shards that were read.
    """

    scans: int
    checked: int
    compared: int
    findings: list[Finding]
    seconds: float
    bytes: int

    @property
    def repaired(self) -> int:
        """How many of the findings are no longer true."""
        return sum(finding.repaired for finding in self.findings)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, or no longer."""
        return self.repaired == len(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as printed by ``--json``."""
        return asdict(self) | {"repaired": self.repaired}


@dataclass(frozen=True)
class _Sources:
    """Where the scans of a store are, and how they became volumes."""

    folder: Place
    by_name: dict[str, ScanSource]
    grid: Grid
    rule: IntensityRule
    compared: frozenset[int] = field(default_factory=frozenset)


def verify(
    store: str | Place,
    *,
    against: str | Place | None = None,
    sample: int = SAMPLE,
    repair: bool = False,
    threads: int | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_scan: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check every shard and every column of a store.

    Of each shard: that it is there, its length, the checksum and order of its index, the checksum of each slab, that it
    decodes, and that the voxels give the statistics in the table. One decoded volume per thread is in memory.

    Parameters
    ----------
    store
        A version-1 store.
    against
        The folder that was ingested: scans are made again from it and must come out the same.
    sample
        How many, drawn at random but always the same; 0 takes all.
    repair
        Make damaged scans again from `against`, and remove files that belong to no scan. A scan whose source gives no
        volume any more gets its new status, and loses its shard; but a sound volume is kept if the source cannot be
        read.
    threads
        By default one per core, at most 8.
    on_plan, on_scan
        Called with the number of scans to check, and with the row of each when it is done.

    Raises
    ------
    FileNotFoundError
        If there is no store, or no folder `against`.
    StoreError
        If `repair` is asked for without `against`, another process writes the store, or `against` has none of its
        sources.
    """
    started = time.perf_counter()
    store, against = behind_links(as_place(store)), None if against is None else as_place(against)
    if not (store / "zarr.json").is_file():
        raise FileNotFoundError(f"no store at {store}; make one with: ingest SRC {store}")
    if repair and against is None:
        raise StoreError("a repair reads the sources again; name their folder with --against")
    threads = threads or min(8, len(os.sched_getaffinity(0)))
    with _only_writer(store) if repair else contextlib.nullcontext():
        tables, findings = check_tables(store)
        if tables is None:
            return VerifyReport(0, 0, 0, findings, round(time.perf_counter() - started, 3), 0)
        sound_tables = not findings
        findings += check_rows(tables)
        findings += check_files(tables)
        ok = [number for number, row in enumerate(tables.rows) if row.status == "ok"]
        sources = _find_sources(tables, against, sample, ok) if against else None
        if on_plan:
            on_plan(len(ok))
        nbytes = 0
        # The folder outlives the threads: interrupted, they still write there for a moment
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(threads) as pool:
            buffers = VolumePerThread(tables.shape_zyx)
            for start in range(0, len(ok), _BATCH):
                batch = ok[start : start + _BATCH]
                results = pool.map(lambda number: _check_scan(tables, number, buffers, sources, Path(scratch)), batch)
                for number, (found, size) in zip(batch, results, strict=True):
                    findings += found
                    nbytes += size
                    if on_scan:
                        on_scan(number)
            if repair and sources and findings:
                if sound_tables:
                    findings = _repair(tables, sources, findings, pool)
                else:
                    findings.append(Finding("unfinished", "nothing was repaired: the tables themselves are damaged"))
    seconds = round(time.perf_counter() - started, 3)
    compared = len(sources.compared) if sources else 0
    return VerifyReport(len(tables.rows), len(ok), compared, findings, seconds, nbytes)


@contextlib.contextmanager
def _only_writer(store: Place) -> Iterator[None]:
    try:
        with store_lock(store):
            recover_store(store)
            yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise StoreError(f"{store} cannot be repaired, for it cannot be written: {error.strerror}") from error


def _find_sources(tables: StoreTables, folder: Place, sample: int, ok: list[int]) -> _Sources:
    try:
        settings, intensity = tables.attrs["settings"], tables.attrs["intensity"]
        layout, image = Layout(settings["layout"]), settings["image"]
        modality = next((row.modality for row in tables.rows if row.modality), None)
        rank = rank_of(layout, modality) if modality and image is None else None
        rule = IntensityRule(percentile=intensity["percentile"], top_level=intensity["top_level"])
        grid = Grid.from_json(tables.attrs["grid"])
    except UNREADABLE as error:
        raise StoreError(
            f"{tables.path} does not say how it was made ({error_text(error)}), so it cannot be compared; "
            "check it without --against"
        ) from error
    _, scans = find_scans(folder, layout, image, rank)
    by_name = {scan.name: scan for scan in scans}
    if not any(row.source in by_name for row in tables.rows):
        example = f", such as {tables.rows[0].source}" if tables.rows else ""
        raise StoreError(
            f"{folder} has none of the sources of {tables.path}{example}; name the folder that was ingested"
        )
    chosen = ok
    if 0 < sample < len(ok):
        chosen = np.random.default_rng(_SAMPLE_SEED).choice(ok, sample, replace=False).tolist()
    return _Sources(folder, by_name, grid, rule, frozenset(chosen))


def _check_scan(
    tables: StoreTables, number: int, buffers: VolumePerThread, sources: _Sources | None, scratch: Path
) -> tuple[list[Finding], int]:
    """Check one shard, and if it is sound and in the sample, its source; return the findings and the shard's bytes."""
    finding, content = check_shard(tables, number, buffers.volume)
    if finding:
        return [finding], len(content)
    if sources and number in sources.compared:
        return _compare(tables, number, content, buffers.volume, sources, scratch), len(content)
    return [], len(content)


def _compare(
    tables: StoreTables, number: int, content: np.ndarray, volume: np.ndarray, sources: _Sources, scratch: Path
) -> list[Finding]:
    """Make a scan again beside the store and compare; the shard of the store is known to be sound."""
    row = tables.rows[number]
    source = sources.by_name.get(row.source)
    if source is None or not as_place(source.path).exists():
        return [tables.finding(number, "source_missing", f"it is no longer in {sources.folder}")]
    again = convert_scan(source, number, scratch, sources.grid, sources.rule, tables.slab).row
    difference = ""
    if again.status != "ok":
        difference = f"the source now gives {again.status}: {again.error}"
    else:
        path = shard_path(scratch, number)
        made = np.frombuffer(path.read_bytes(), np.uint8)
        remove_shard(path)
        if not np.array_equal(made, content):  # else no need to look: another LZ4 may pack the same voxels otherwise
            other = np.empty_like(volume)
            decode_shard(made, tables.slab, other)
            if different := np.count_nonzero(other != volume):
                difference = f"{different} voxels differ from what the source gives now"
    if (row.source_size, repr(row.source_mtime)) != (again.source_size, repr(again.source_mtime)):
        detail = (
            f"the file has {again.source_size} bytes of time {again.source_mtime}, "
            f"when it was ingested {row.source_size} of {row.source_mtime}; {difference or 'the voxels are the same'}"
        )
        return [tables.finding(number, "source_changed", detail)]
    if difference:
        return [tables.finding(number, "voxels_differ", difference)]
    wrong = [
        f"{name} is {getattr(row, name)}, from the source {getattr(again, name)}"
        for name in _FROM_SOURCE
        if name in tables.known and not _same(getattr(row, name), getattr(again, name))
    ]
    return [tables.finding(number, "statistics_wrong", "; ".join(wrong))] if wrong else []


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _repair(tables: StoreTables, sources: _Sources, findings: list[Finding], pool: ThreadPoolExecutor) -> list[Finding]:
    """Make damaged scans again, remove files that belong to none, and say of each finding what became of it."""
    lost = {f.row for f in findings if f.row is not None and f.kind in _SHARD_LOST}
    damaged = sorted({f.row for f in findings if f.row is not None and f.kind in _REINGESTED})
    rows = list(tables.rows)
    outcome: dict[int, tuple[str, bool]] = {}
    simulated = False
    for start in range(0, len(damaged), _BATCH):
        batch = damaged[start : start + _BATCH]
        for number, (row, is_simulated) in zip(
            batch, pool.map(lambda n: _again(tables, sources, n), batch), strict=True
        ):
            if row.status in UNREADABLE_SOURCE and number not in lost:
                outcome[number] = (f"the source is {row.status}, so the sound volume is kept: {row.error}", False)
                continue
            rows[number] = row
            simulated |= is_simulated
            done = "ingested again" if row.status == "ok" else f"is now {row.status}: {row.error}"
            outcome[number] = (done, row.status == "ok" or row.status in EXPECTED_ABSENCES)
    if rows != tables.rows:
        write_scans(tables.path, rows)
    if simulated and not tables.attrs.get("simulated"):
        set_attributes(tables.path, {"simulated": True})
    for number in damaged:
        if rows[number].status != "ok":  # after the table, so that no row is ever ok without its shard
            remove_shard(shard_path(tables.path, number))
    repaired = []
    for finding in findings:
        result = outcome.get(finding.row) if finding.row is not None and finding.kind in _REINGESTED else None
        if result:
            repaired.append(replace(finding, detail=f"{finding.detail}; {result[0]}", repaired=result[1]))
        elif finding.kind in _REMOVED and finding.file:
            (tables.path / finding.file).unlink(missing_ok=True)
            repaired.append(replace(finding, detail=f"{finding.detail}; removed", repaired=True))
        else:
            repaired.append(finding)
    return repaired


def _again(tables: StoreTables, sources: _Sources, number: int) -> tuple[ScanRow, bool]:
    """Ingest one row again; return its row, and whether its header says that it is simulated."""
    row = tables.rows[number]
    source = sources.by_name.get(row.source)
    if source is None:
        source = ScanSource(str(sources.folder / row.source), row.source, row.participant, row.session, row.modality)
        return replace(pending_row(source), status="read_error", error=f"it is no longer in {sources.folder}"), False
    converted = convert_scan(source, number, tables.path, sources.grid, sources.rule, tables.slab)
    return converted.row, converted.simulated
