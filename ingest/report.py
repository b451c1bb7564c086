"""A page about every scan of a store: quality numbers, outliers first, pictures, failures with their reasons."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ingest.checks import error_text
from ingest.decode import VolumePerThread, decode_shard
from ingest.errors import StoreError
from ingest.outliers import Cohort, compare_scans
from ingest.pictures import montage_webp, picture_order
from ingest.places import Place
from ingest.quality import MOST_BRAIN_ML, ScanQuality, measure_volume, measures_of
from ingest.replacing import check_own_page, check_page_suffix
from ingest.report_page import PAGE_BYTES, render_page
from ingest.shard import shard_path
from ingest.store import VolumeStore, open_store
from ingest.writing import behind_link, check_writable, write_whole

_BATCH = 1024  # scans handed to the threads at once: their results stay few
_PICTURE_BATCH = 64
_TYPICAL_PICTURE_BYTES = 7000  # in base64; only for the time left that a progress bar shows
_NAMED_OUTLIERS = 10


@dataclass(frozen=True)
class NamedOutlier:
    """A scan that stands out, and why in words."""

    row: int
    participant: str
    session: str
    source: str
    score: float
    why: str


@dataclass(frozen=True)
class ReportSummary:
    """What was written.

    Attributes
    ----------
    report
        The page.
    scans, pictures
        Rows of the store, and how many of them have their picture in the page.
    bytes
        Of the page.
    outliers
        The first few, the highest score first; `outlier_scans` says how many there are.
    damaged
        Scans whose shard could not be read; `reasons` has (row, source, reason) of each.
    """

    report: str
    scans: int
    pictures: int
    bytes: int
    outliers: list[NamedOutlier]
    outlier_scans: int
    damaged: int
    reasons: list[tuple[int, str, str]]
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether every volume could be read."""
        return self.damaged == 0

    def to_json(self) -> dict[str, Any]:
        """Return the summary as printed by ``--json``."""
        return asdict(self)


def write_report(
    store: str | Place,
    page: Path,
    *,
    rows: Sequence[int] = (),
    page_bytes: int = PAGE_BYTES,
    threads: int | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_scan: Callable[[int], None] | None = None,
) -> ReportSummary:
    """Measure every volume of a store and write a page about it.

    The page is one HTML file that needs neither network nor other files. It appears whole or not at all. It names
    participants and shows their brains, so it belongs where the store is. One decoded volume per thread is in memory.

    Parameters
    ----------
    store
        A version-1 store; it is only read.
    page
        The .html file; another report there is replaced, nothing else. Its folder is made.
    rows
        Scans whose pictures are wanted before all others. The pictures of outliers come next.
    page_bytes
        What the page may have; pictures are left out, the tables never.
    threads
        By default one per core, at most 8.
    on_plan, on_scan
        Called with about how many volumes will be read (once for the numbers, once for pictures), and with the row of
        each when that is done.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    StoreError
        If the store is of an unknown version or unfinished, a row of `rows` has no volume, the page cannot be written
        or has another ending, another file has its name, or people were withdrawn from the store meanwhile.
    """
    started = time.perf_counter()
    opened = open_store(store)
    present = opened.ok_rows
    _check_rows(opened, rows)
    check_writable(page)  # before minutes are spent on what goes into it
    check_page_suffix(page)
    check_own_page(page, "ingest report")
    written = behind_link(page)
    written.parent.mkdir(parents=True, exist_ok=True)
    threads = threads or min(8, len(os.sched_getaffinity(0)))
    most_pictures = min(len(present), page_bytes // _TYPICAL_PICTURE_BYTES)
    if on_plan:
        on_plan(len(present) + most_pictures)
    buffers = VolumePerThread(opened.grid.shape_zyx)
    with ThreadPoolExecutor(threads) as pool:
        cohort, damaged = _measure(opened, pool, buffers, on_scan)
        readable = np.setdiff1d(present, list(damaged))
        order = picture_order(readable, cohort.outliers, rows)
        pictures = _draw(opened, order, pool, buffers, on_scan)
        text, picture_count = render_page(opened, cohort, damaged, pictures, page_bytes=page_bytes)
    content = text.encode("utf-8", errors="replace")  # file names may be no UTF-8
    write_whole(written, lambda temporary: temporary.write_bytes(content))
    if not _is_still_true(opened):
        written.unlink(missing_ok=True)
        raise StoreError(
            f"{store} changed while its report was made (people withdrew, or it was made anew), "
            "so no report was written; run the same command again"
        )
    sources = opened.scans["source"]
    return ReportSummary(
        report=str(page),
        scans=len(opened.scans),
        pictures=picture_count,
        bytes=len(content),
        outliers=[_named(opened, cohort, row) for row in cohort.outliers[:_NAMED_OUTLIERS].tolist()],
        outlier_scans=len(cohort.outliers),
        damaged=len(damaged),
        reasons=[(row, str(sources.iloc[row]), reason) for row, reason in sorted(damaged.items())],
        seconds=round(time.perf_counter() - started, 3),
    )


def _check_rows(store: VolumeStore, rows: Sequence[int]) -> None:
    present = set(store.ok_rows.tolist())
    for row in rows:
        if row not in present:
            status = store.scans["status"].iloc[row] if 0 <= row < len(store.scans) else f"of {len(store.scans)} rows"
            raise StoreError(f"row {row} ({status}) has no volume, so no picture; choose rows whose status is ok")


def _measure(
    store: VolumeStore, pool: ThreadPoolExecutor, buffers: VolumePerThread, on_scan: Callable[[int], None] | None
) -> tuple[Cohort, dict[int, str]]:
    """Measure all volumes and compare them; return also the rows that could not be read, with the reason."""
    present = store.ok_rows.tolist()
    voxel_mm = store.grid.voxel_mm
    # Of the whole store and not of each scan, or a scan whose skull was left on by mistake would not stand out.
    usual_ml = store.scans["brain_voxels"].iloc[present].median() * voxel_mm**3 / 1000
    whole_heads = bool(usual_ml > MOST_BRAIN_ML)

    def measure(row: int) -> ScanQuality | str:
        reason = _read(store, row, buffers.volume)
        return reason or measure_volume(buffers.volume, voxel_mm, whole_heads=whole_heads)

    columns = [column.name for column in fields(ScanQuality)]
    numbers = np.full((len(store.scans), len(columns)), math.nan)
    damaged: dict[int, str] = {}
    for start in range(0, len(present), _BATCH):
        batch = present[start : start + _BATCH]
        for row, result in zip(batch, pool.map(measure, batch), strict=True):
            if isinstance(result, str):
                damaged[row] = result
            else:
                numbers[row] = astuple(result)
            if on_scan:
                on_scan(row)
    return compare_scans(pd.DataFrame(numbers, columns=columns), measures_of(whole_heads=whole_heads)), damaged


def _read(store: VolumeStore, row: int, out: np.ndarray) -> str:
    """Decode the volume of a row into `out`; return why that is not possible, or nothing."""
    path = shard_path(store.path, row)
    try:
        decode_shard(np.frombuffer(path.read_bytes(), np.uint8), store.slab, out)
    except FileNotFoundError:
        return f"its shard volumes/c/{row}/0/0/0 is absent"
    except OSError as error:
        return f"the shard cannot be read: {error.strerror or error}"  # an object store has no strerror
    except (ValueError, MemoryError) as error:
        return error_text(error)
    return ""


def _draw(
    store: VolumeStore,
    order: Sequence[int],
    pool: ThreadPoolExecutor,
    buffers: VolumePerThread,
    on_scan: Callable[[int], None] | None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (row, picture), reading ahead only a little: whoever takes them stops when the page is full."""

    def draw(row: int) -> bytes | None:
        return None if _read(store, row, buffers.volume) else montage_webp(buffers.volume)

    for start in range(0, len(order), _PICTURE_BATCH):
        batch = order[start : start + _PICTURE_BATCH]
        for row, content in zip(batch, pool.map(draw, batch), strict=True):
            if on_scan:
                on_scan(row)
            if content is not None:
                yield row, content


def _is_still_true(store: VolumeStore) -> bool:
    """Whether nobody in the page has withdrawn while it was made.

    Asked when the page is there: a withdrawal that ends later than this finds the page and removes it.
    """
    try:
        now = open_store(store.path)
    except (FileNotFoundError, StoreError):
        return False
    withdrawn, were = ((scans["status"] == "withdrawn").to_numpy() for scans in (now.scans, store.scans))
    return now.attrs.get("store_id") == store.attrs.get("store_id") and not (withdrawn[: len(were)] & ~were).any()


def _named(store: VolumeStore, cohort: Cohort, row: int) -> NamedOutlier:
    scan = store.scans.iloc[row]
    score = round(float(cohort.score[row]), 2)
    return NamedOutlier(row, scan["participant"], scan["session"], scan["source"], score, cohort.explain(row))
