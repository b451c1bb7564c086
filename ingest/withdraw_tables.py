"""Removing people who withdrew from tables of predictions, and from the folders of fine-tuning runs."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ingest.errors import StoreError
from ingest.people import participant_key
from ingest.writing import write_text_whole, write_whole

_COLUMN = "participant"

#: Files of a run, as `finetune.results` calls them.
_SPLIT, _RESULTS = "split.csv", "results.json"
_PAGES = ("report.html", "curve.html")
_CHECKPOINT = "last.pt"

#: Test predictions of a cell of a curve, and what counts it as done, as `finetune.curves.cells` calls them.
_CELL, _CELL_RECORD = "test.npz", "cell.json"
_CELL_PEOPLE = "_participants"

#: What a curve has embedded.
RUN_EMBEDDINGS = "embeddings.zarr"

#: What the processes that make a curve hold a lock of.
RUN_LOCK = "people"

#: What a process that was killed in writing a file has left, see `ingest.writing.write_whole`.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp")


def is_table(path: Path) -> bool:
    """Tell whether a file is a table with a column of participants, as ``predict`` and ``probe apply`` write them."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            return _COLUMN in next(csv.reader(file), [])
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        schema = pq.read_schema(path)
        return _COLUMN in schema.names and not any(key.startswith(b"brain-") for key in schema.metadata or {})
    return False


def is_run(path: Path) -> bool:
    """Tell whether a folder is that of a run of ``finetune``, or of a curve."""
    return path.is_dir() and (path / _SPLIT).is_file() and not (path / "zarr.json").exists()


def remove_from_table(path: Path, people: frozenset[str]) -> tuple[set[str], int]:
    """Remove the rows of people from a table, which is replaced at once.

    Returns
    -------
    people : set of str
        Who were in it.
    rows : int
        How many of theirs.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
    ids = table[_COLUMN].astype(str).map(participant_key)
    theirs = ids.isin(people)
    if theirs.any():
        kept = table[~theirs]
        if path.suffix == ".csv":
            write_whole(path, lambda aside: kept.to_csv(aside, index=False))
        else:
            write_whole(path, lambda aside: kept.to_parquet(aside, index=False))
    return set(ids[theirs]), int(theirs.sum())


def remove_from_run(folder: Path, people: frozenset[str], without: Callable[[Any], Any]) -> tuple[set[str], int, int]:
    """Remove people from the files of a run, and of all runs of a curve.

    Their rows go from the split, the predictions, and the cells of a curve, their file names from the reasons why scans
    were left out, or a cell failed. Pages, which show brains, go whole, and so does a checkpoint to go on from, which
    knows such reasons, too. What a network has learnt from them stays in its weights: train again without them if that
    must go, too.

    Parameters
    ----------
    without
        Makes of a document one in which they are not named.

    Returns
    -------
    people : set of str
        Who were in a split.
    rows, bytes : int
        Of the predictions, and of the pages.
    """
    for inside in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        remove_temporaries(inside)
    found: set[str] = set()
    deleted, rows = 0, sum(_remove_from_cell(cell, people) for cell in sorted(folder.rglob(_CELL)))
    for record in sorted(folder.rglob(_CELL_RECORD)):
        _clean(record, without)
    for split in sorted(folder.rglob(_SPLIT)):
        run = split.parent
        for page in _PAGES:
            if (run / page).is_file():
                deleted += (run / page).stat().st_size
                (run / page).unlink()
        if not (run / _RESULTS).is_file():
            (run / _CHECKPOINT).unlink(missing_ok=True)
        for name in (_RESULTS, "curve.json"):
            if (run / name).is_file():
                _clean(run / name, without)
        for table in [*run.glob("*.parquet"), *run.glob("*.csv")]:
            if table != split and is_table(table):
                rows += remove_from_table(table, people)[1]
        found |= remove_from_table(split, people)[0]  # the names, last
    return found, rows, deleted


def remove_temporaries(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed have left of a file in a folder, or of any; for whoever holds the lock."""
    for path in list(folder.iterdir()):
        left = _TEMPORARY.fullmatch(path.name)
        if left and name in (None, left["name"]) and path.is_file():
            path.unlink()


def _remove_from_cell(path: Path, people: frozenset[str]) -> int:
    """Remove people from the predictions of a cell; one that does not say of whom they are goes whole, to be redone."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        raise StoreError(f"{path} is damaged; remove it, or the whole curve, by hand") from None
    targets = [name.removesuffix(_CELL_PEOPLE) for name in arrays if name.endswith(_CELL_PEOPLE)]
    if arrays and not targets:
        path.with_name(_CELL_RECORD).unlink(missing_ok=True)
        path.unlink()
        return 0
    removed = 0
    for target in targets:
        theirs = np.array([participant_key(who) in people for who in arrays[target + _CELL_PEOPLE]], bool)
        removed += int(theirs.sum())
        arrays |= {name: values[~theirs] for name, values in arrays.items() if name.startswith(f"{target}_")}
    if removed:

        def write(aside: Path) -> None:
            with open(aside, "wb") as file:  # a name that does not end in .npz would get that added
                np.savez_compressed(file, **arrays)

        write_whole(path, write)
    return removed


def _clean(path: Path, without: Callable[[Any], Any]) -> None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreError(f"{path} is damaged; remove it, or the whole run, by hand") from None
    cleaned = without(document)
    if cleaned != document:
        write_text_whole(path, json.dumps(cleaned, indent=1) + "\n")
