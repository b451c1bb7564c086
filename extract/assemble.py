"""Finished blocks, and the file that was there before -> the embedding file, block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.blocks import Finished, read_block, read_finished, remove_parts, same_scans
from extract.embeddings import read_features, write_file
from extract.tables import Tables
from ingest.errors import StoreError
from ingest.store import VolumeStore


@dataclass(frozen=True)
class OldFile:
    """The file that is there already, and where in it each scan wanted is, or -1."""

    path: Path
    tables: Tables
    place: np.ndarray


def assemble(
    out: Path,
    volumes: VolumeStore,
    wanted: pd.DataFrame,
    had: OldFile | None,
    parts: Path,
    attrs: dict[str, Any],
) -> tuple[Tables, int, dict[int, str]]:
    """Write the file, if anything in it is to change; return its tables, its features, and the scans left out."""
    finished = read_finished(parts)
    old = np.full(len(wanted), -1, np.int64) if had is None else had.place
    new = np.where(old < 0, same_scans(wanted, finished.scans), -1)
    there = (old >= 0) | (new >= 0)
    all_rows = wanted["row"].to_numpy()
    rows = all_rows[there]
    skipped = {row: finished.skipped[row] for row in all_rows[~there].tolist() if row in finished.skipped}
    if len(rows) + len(skipped) < len(wanted):
        raise StoreError(f"blocks of this run are missing in {parts}; run the same command again: it makes them anew")
    if not len(rows):
        remove_parts(parts)
        reason = next(iter(skipped.values()))
        raise ValueError(f"none of the {len(wanted)} scans of {volumes.path} can be read; the first: {reason}")
    attrs |= {"skipped": [{"row": row, "reason": reason} for row, reason in skipped.items()]}
    if had is not None and (old >= 0).any():
        attrs |= _kept_provenance(had.tables.attrs, attrs, grown=bool((new >= 0).any()))
    tables = Tables(
        scans=wanted[there].reset_index(drop=True),
        phenotypes=volumes.phenotypes.iloc[rows].reset_index(drop=True),
        variables=volumes.variables,
        attrs=plain(attrs),
    )
    features = _Gather(had, old[there], parts, finished, new[there])
    if had is None or len(finished.scans) or not _is_same(had.tables, tables):
        write_file(out, tables, (len(rows), features.width), features)
    return tables, features.width, skipped


def _kept_provenance(had: dict[str, Any], now: dict[str, Any], *, grown: bool) -> dict[str, Any]:
    """Return what a file still says of its making: who began it, and who has added features last, if others did."""
    kept: dict[str, Any] = {key: had[key] for key in ("created_by", "updated_by") if key in had}
    if grown and kept.get("created_by") != now["created_by"]:
        kept["updated_by"] = now["created_by"]
    if not grown and "backend" in had:
        kept["backend"] = had["backend"]
    return kept


def _is_same(had: Tables, now: Tables) -> bool:
    """Tell whether a file would be the same if it were written again."""
    format_keys = ("format", "format_version")
    attrs = {key: value for key, value in had.attrs.items() if key not in format_keys}
    return (
        had.scans.astype(object).equals(now.scans.astype(object))
        and had.phenotypes.reindex(columns=now.phenotypes.columns).equals(now.phenotypes)
        and len(had.phenotypes.columns) == len(now.phenotypes.columns)
        and had.variables == plain(now.variables)
        and attrs == now.attrs
    )


class _Gather:
    """Gives the features of the file to be written, range after range, from the old file and from blocks.

    Attributes
    ----------
    width
        Features of a scan.
    """

    def __init__(self, had: OldFile | None, old: np.ndarray, parts: Path, finished: Finished, new: np.ndarray) -> None:
        self._from_old = old >= 0
        self._block = np.where(new >= 0, finished.block[new], -1) if len(finished.block) else np.full(len(new), -1)
        self._place = finished.place[new] if len(finished.place) else new
        self._parts = parts
        self._loaded = -1, np.empty((0, 0), np.float32)
        self._old_rows: Iterator[np.ndarray] = iter(())
        widths = [] if had is None else [next(read_features(had.path)).shape[1]]
        widths += [self._read(number).shape[1] for number in self._block[~self._from_old][:1]]
        self.width = widths[0]
        if len(set(widths)) > 1:
            raise StoreError(f"{parts} has {widths[1]} features of each scan, the file {widths[0]}; use --overwrite")
        if had is not None:
            self._old_rows = _chosen_rows(had.path, old[self._from_old])

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return the features of scans [start, stop)."""
        found = np.empty((stop - start, self.width), np.float32)
        from_old = self._from_old[start:stop]
        for place in np.flatnonzero(from_old):
            found[place] = next(self._old_rows)
        blocks, places = self._block[start:stop], self._place[start:stop]
        for number in np.unique(blocks[~from_old]):
            chosen = ~from_old & (blocks == number)
            found[chosen] = self._read(number)[places[chosen]]
        return found

    def _read(self, number: int) -> np.ndarray:
        if self._loaded[0] != number:
            self._loaded = number, read_block(self._parts, number)
        return self._loaded[1]


def _chosen_rows(path: Path, places: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the features of some scans of a file, whose places are in ascending order."""
    start = 0
    for block in read_features(path):
        inside = places[(places >= start) & (places < start + len(block))] - start
        yield from block[inside]
        start += len(block)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found
