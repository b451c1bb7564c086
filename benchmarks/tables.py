"""Rows a second of what touches whole tables: inspect, opening for a loader, withdraw, discovery, joining phenotypes.

The store has as many rows as a biobank has scans, made without any scan: columns as `ingest` writes them, and a file of
one byte in the place of every shard. The limits are what the bare files take: to read all columns, to write them anew,
to list a folder and ask for the size of each file.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from benchmarks.results import Report, Result
from ingest.dictionary import VARIABLES
from ingest.grid import GRIDS, MNI152
from ingest.inspection import summarise_store
from ingest.layouts import Layout, find_scans
from ingest.phenotypes import join_phenotypes
from ingest.plan import make_plan
from ingest.scan import ScanRow
from ingest.shard import shard_path
from ingest.store import create_store, write_phenotypes
from ingest.withdraw import withdraw
from loaders import open_loader

READ, WRITE, LIST = "limit: read columns", "limit: write columns", "limit: list files"
INSPECT, OPEN, WITHDRAW = "inspect", "open for a loader", "withdraw 100 people"
DISCOVER, JOIN = "discover and plan", "join phenotypes"

#: Seconds that each may take with 100,000 rows.
TARGETS = {INSPECT: 1.0, WITHDRAW: 10.0, DISCOVER: 30.0}
WITHDRAWN = 100

_LIMITS = {INSPECT: READ, OPEN: READ, WITHDRAW: WRITE, DISCOVER: LIST, JOIN: None}
_FIRST_EID = 9_000_000


def run_tables(directory: Path, *, rows: int = 100_000, repeats: int = 3) -> Report:
    """Measure a store of `rows` scans of as many people.

    Parameters
    ----------
    directory
        Holds the store while it is measured, and empty archives in UK Biobank's layout, used again if they are there.
    repeats
        Of everything; 100 other people are withdrawn each time.

    Returns
    -------
    Report
        Speeds in rows a second; ``settings["seconds"]`` has the medians as times, ``settings["targets_s"]`` what they
        may be with 100,000 rows.

    Raises
    ------
    ValueError
        If an operation did not do all of its work, or there are fewer people than are to be withdrawn.
    """
    if rows < WITHDRAWN * repeats:
        raise ValueError(f"{rows} rows are too few to withdraw {WITHDRAWN} people {repeats} times")
    store, archives, table = _prepare(directory, rows)
    measured: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], int], expected: int = rows) -> None:
        started = time.perf_counter()
        done = work()
        measured.setdefault(name, []).append(rows / (time.perf_counter() - started))
        if done != expected:
            raise ValueError(f"{name} was of {done} rows, expected {expected}")

    lists = _withdrawal_lists(directory, rows, repeats)
    copy = directory / "copy"
    _copy_columns(store, copy)  # warms the page cache
    for number, people in enumerate(lists):
        removed = number * WITHDRAWN
        measure(READ, lambda: _read_columns(store), _column_bytes(store))
        measure(INSPECT, lambda: summarise_store(store).scans)
        measure(OPEN, lambda: _open(store), rows - removed)
        measure(WRITE, lambda: _copy_columns(store, copy), _column_bytes(store))
        measure(WITHDRAW, partial(_withdraw, people, store), WITHDRAWN)
        measure(LIST, lambda: _list_files(archives))
        measure(DISCOVER, lambda: len(make_plan([], find_scans(archives, Layout.ukb)[1]).todo))
        measure(JOIN, lambda: _join(table, rows))
    shutil.rmtree(copy)
    shutil.rmtree(store)  # there are fewer people in it now

    middle = {name: median(speeds) for name, speeds in measured.items()}
    results = []
    for name, speeds in measured.items():
        limit = _LIMITS.get(name)
        share = None if limit is None else round(middle[name] / middle[limit], 4)
        low, high = round(min(speeds)), round(max(speeds))
        results.append(Result(name, round(middle[name]), "rows/s", low, high, limit_share=share))
    settings = {
        "rows": rows,
        "repeats": repeats,
        "page_cache": "warm",
        "seconds": {name: round(rows / speed, 3) for name, speed in middle.items()},
        "targets_s": TARGETS,
    }
    ratios = {f"{name}/{limit}": round(middle[name] / middle[limit], 4) for name, limit in _LIMITS.items() if limit}
    return Report("tables", settings, results, ratios)


def _prepare(directory: Path, rows: int) -> tuple[Path, Path, Path]:
    """Make a store, and archives to find and a table of phenotypes if they are not there yet."""
    store, archives, table = directory / "store.zarr", directory / "ukb", directory / "phenotypes.csv"
    done = directory / "done.json"
    if not (done.is_file() and json.loads(done.read_text())["rows"] == rows):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _make_archives(archives, rows)
        _answers(rows).to_csv(table, index=False)
        done.write_text(json.dumps({"rows": rows}))
    shutil.rmtree(store, ignore_errors=True)  # of a run that was stopped: people are missing from it
    make_store(store, archives, table)
    return store, archives, table


def make_store(store: Path, archives: Path, table: Path) -> None:
    """Write a store with a row, its answers and a shard of one byte for every archive."""
    plan = make_plan([], find_scans(archives, Layout.ukb)[1])
    rng = np.random.default_rng(0)
    numbers = zip(rng.uniform(1, 9, len(plan.rows)).tolist(), rng.integers(10**6, 2 * 10**6, len(plan.rows)).tolist(),
                  rng.uniform(60, 120, len(plan.rows)).tolist(), strict=True)  # fmt: skip
    done: list[ScanRow] = [
        replace(row, status="ok", scale=scale, brain_voxels=voxels, mean=mean, head_scale=scale / 9)
        for row, (scale, voxels, mean) in zip(plan.rows, numbers, strict=True)
    ]
    found = join_phenotypes(table, [row.participant for row in done], [row.session for row in done])
    unfinished = store.with_name("unfinished.zarr")
    shutil.rmtree(unfinished, ignore_errors=True)
    create_store(unfinished, done, GRIDS[MNI152], attrs={"settings": {}, "intensity": {}})
    write_phenotypes(unfinished, found.table, found.variables)
    for number in range(len(done)):
        path = Path(str(shard_path(unfinished, number)))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    unfinished.rename(store)


def _make_archives(folder: Path, rows: int) -> None:
    step = max(1, 900_000 // rows)  # spread over the folders 90 to 98
    for number in range(rows):
        eid = str(_FIRST_EID + number * step)
        below = folder / eid[:2]
        if number == 0 or eid[:2] != str(_FIRST_EID + (number - 1) * step)[:2]:
            below.mkdir(parents=True, exist_ok=True)
        (below / f"{eid}_20252_2_0.zip").touch()


def _answers(rows: int) -> pd.DataFrame:
    """Return answers of everybody to everything in the dictionary, at the first imaging visit."""
    rng = np.random.default_rng(0)
    people = _FIRST_EID + np.arange(rows) * max(1, 900_000 // rows)
    columns = {"eid": people}
    for variable in VARIABLES:
        instance = 0 if variable.instances == (0,) else 2
        values = rng.choice(list(variable.labels), rows) if variable.labels else rng.integers(1, 14, rows)
        columns[f"{variable.ukb_field}-{instance}.0"] = values
    return pd.DataFrame(columns)


def _withdrawal_lists(directory: Path, rows: int, repeats: int) -> list[Path]:
    """Write lists of 100 people each, nobody on two of them."""
    people = np.random.default_rng(1).permutation(rows)[: WITHDRAWN * repeats].reshape(repeats, WITHDRAWN)
    lists = []
    for number, chosen in enumerate(people * max(1, 900_000 // rows) + _FIRST_EID):
        lists.append(directory / f"w1234_{number}.csv")
        lists[-1].write_text("\n".join(map(str, chosen)) + "\n")
    return lists


def _column_files(store: Path) -> list[Path]:
    return [file for name in ("scans", "phenotypes") for file in (store / name).rglob("*") if file.is_file()]


def _column_bytes(store: Path) -> int:
    return sum(file.stat().st_size for file in _column_files(store))


def _read_columns(store: Path) -> int:
    return sum(len(file.read_bytes()) for file in _column_files(store))


def _copy_columns(store: Path, copy: Path) -> int:
    shutil.rmtree(copy, ignore_errors=True)
    written = 0
    for file in _column_files(store):
        place = copy / file.relative_to(store)
        place.parent.mkdir(parents=True, exist_ok=True)
        written += place.write_bytes(file.read_bytes())
    return written


def _list_files(folder: Path) -> int:
    return sum(1 for parent, _, names in os.walk(folder) for name in names if os.stat(os.path.join(parent, name)))


def _open(store: Path) -> int:
    with open_loader(store, batch_size=1, backend="torch", device="cpu") as loader:
        return len(loader)


def _withdraw(people: Path, store: Path) -> int:
    return withdraw(people, [store]).removals[0].scans


def _join(table: Path, rows: int) -> int:
    people = (_FIRST_EID + np.arange(rows) * max(1, 900_000 // rows)).astype(str)
    return int(join_phenotypes(table, people, ["2"] * rows).table["age"].notna().sum())
