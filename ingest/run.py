"""The coordinator of an ingest: find the scans, create the store, have the shards written, finalise the tables."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ingest.convert import ConvertedScan, convert_scan, load_volume, pending_row, volume_space
from ingest.errors import ScanError, StoreError
from ingest.grid import GRIDS, MNI152, NATIVE, Grid
from ingest.intensity import IntensityRule
from ingest.layouts import Layout, find_scans
from ingest.phenotypes import Phenotypes, join_phenotypes
from ingest.scan import EXPECTED_ABSENCES, ScanRow, ScanSource
from ingest.store import DEFAULT_SLAB, create_store, set_attributes, write_phenotypes, write_scans
from ingest.workers import run_tasks


class Space(StrEnum):
    """Space of a store: ``auto`` is that of the first readable scan."""

    auto = "auto"
    mni = "mni"
    native = "native"


@dataclass(frozen=True)
class IngestSettings:
    """Everything that decides what a store holds.

    Attributes
    ----------
    layout
        How scans are named.
    image
        Member, suffix or part of the name to take, see `ingest.layouts.find_scans`.
    space
        One space per store; scans in another become rows with status ``wrong_shape``.
    phenotypes
        Table to join; None takes a BIDS ``participants.tsv`` if there is one.
    slab
        Planes per LZ4 slab; a divisor of the grid's 160 planes.
    intensity
        How intensities become grey levels.
    """

    layout: Layout = Layout.auto
    image: str | None = None
    space: Space = Space.auto
    phenotypes: Path | None = None
    slab: int = DEFAULT_SLAB
    intensity: IntensityRule = field(default_factory=IntensityRule)


@dataclass(frozen=True)
class IngestSummary:
    """What a run did.

    Attributes
    ----------
    status
        Rows by status.
    failures
        (source, status, reason) of every row that is neither ok nor an expected absence.
    warnings
        Sentences about phenotypes and voxels cut off.
    bad_values
        Phenotype values that were not understood, and duplicate rows.
    """

    scans: int
    status: dict[str, int]
    seconds: float
    volumes_per_second: float
    simulated: bool
    failures: list[tuple[str, str, str]]
    warnings: list[str]
    bad_values: int = 0

    @property
    def clean(self) -> bool:
        """Whether everything asked for was done."""
        return not self.failures and not self.bad_values

    def to_json(self) -> dict[str, Any]:
        """Return the summary as printed by ``--json``."""
        return asdict(self)


def ingest(
    source: Path,
    out: Path,
    settings: IngestSettings | None = None,
    *,
    workers: int = 0,
    overwrite: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_scan: Callable[[ScanRow], None] | None = None,
) -> IngestSummary:
    """Turn a folder of scans into a store.

    The store is built beside its place, as ``OUT.partial``, and appears by one rename when all of it is there.

    Parameters
    ----------
    source
        Folder of UK Biobank zips, BIDS tree or folder of NIfTI files.
    out
        The store to make, conventionally ``*.zarr``.
    workers
        Processes of a local dask cluster; 0 works in this process.
    overwrite
        Replace a store that exists.
    on_plan, on_scan
        Called with the number of scans, and with each finished row.

    Raises
    ------
    SourceError
        If no scans are found.
    StoreError
        If `out` exists and may not be replaced.
    TableError
        If the phenotype table cannot be used.
    """
    settings = settings or IngestSettings()
    started = time.perf_counter()
    _check_replaceable(out, overwrite=overwrite)
    layout, sources = find_scans(source, settings.layout, settings.image)
    phenotypes = _phenotypes(source, layout, settings.phenotypes, sources)
    if on_plan:
        on_plan(len(sources))

    rows = _plan(sources)
    todo = [index for index, row in enumerate(rows) if row.status == "pending"]
    grid = _choose_grid(settings.space, [sources[index] for index in todo])
    partial_store = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_store, ignore_errors=True)
    create_store(
        partial_store,
        len(sources),
        grid,
        slab=settings.slab,
        attrs={
            "intensity": settings.intensity.to_json(),
            "settings": {
                "source": str(source),
                "layout": str(layout),
                "image": settings.image,
                "space": str(settings.space),
                "phenotypes": settings.phenotypes.name if settings.phenotypes else None,
                "slab": settings.slab,
            },
        },
    )

    work = partial(_convert, store=partial_store, grid=grid, rule=settings.intensity, slab=settings.slab)
    simulated = False
    for index, converted in run_tasks(work, [(index, sources[index]) for index in todo], workers):
        rows[index] = converted.row
        simulated |= converted.simulated
        if on_scan:
            on_scan(converted.row)

    set_attributes(partial_store, {"simulated": simulated})
    if phenotypes:
        write_phenotypes(partial_store, phenotypes.table, phenotypes.variables)
    write_scans(partial_store, rows)
    if out.exists():
        shutil.rmtree(out)
    partial_store.rename(out)
    return _summarise(rows, time.perf_counter() - started, phenotypes, simulated=simulated)


def _convert(
    task: tuple[int, ScanSource], *, store: Path, grid: Grid, rule: IntensityRule, slab: int
) -> tuple[int, ConvertedScan]:
    index, source = task
    return index, convert_scan(source, index, store, grid, rule, slab)


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
    elif not overwrite:
        raise StoreError(f"{out} exists; add --overwrite to replace it, or choose another name")
    elif not (out / "zarr.json").is_file():
        raise StoreError(f"{out} is not a Zarr store, so --overwrite will not delete it; choose another name")


def _plan(sources: list[ScanSource]) -> list[ScanRow]:
    """Return a row per scan; a second scan of the same person, session and modality is a duplicate."""
    first: dict[tuple[str, str, str], str] = {}
    rows = []
    for source in sources:
        row = pending_row(source)
        key = (source.participant, source.session, source.modality)
        if key in first:
            row = replace(row, status="duplicate", error=f"same participant, session and modality as {first[key]}")
        else:
            first[key] = source.name
        rows.append(row)
    return rows


def _choose_grid(space: Space, sources: list[ScanSource]) -> Grid:
    if space is not Space.auto:
        return GRIDS[MNI152 if space is Space.mni else NATIVE]
    for source in sources:
        try:
            volume, _ = load_volume(source)
        except ScanError:
            continue
        return GRIDS[volume_space(source, volume)]
    return GRIDS[NATIVE]


def _phenotypes(source: Path, layout: Layout, table: Path | None, sources: list[ScanSource]) -> Phenotypes | None:
    if table is None and layout is Layout.bids and (source / "participants.tsv").is_file():
        table = source / "participants.tsv"
    if table is None:
        return None
    return join_phenotypes(table, [s.participant for s in sources], [s.session for s in sources])


def _summarise(rows: list[ScanRow], seconds: float, phenotypes: Phenotypes | None, *, simulated: bool) -> IngestSummary:
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
        volumes_per_second=float(np.round(status["ok"] / seconds, 3)),
        simulated=simulated,
        failures=[
            (row.source, row.status, row.error)
            for row in rows
            if row.status != "ok" and row.status not in EXPECTED_ABSENCES
        ],
        warnings=warnings,
        bad_values=phenotypes.bad_values if phenotypes else 0,
    )
