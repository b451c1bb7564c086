"""What a run of ``extract`` has finished: blocks of scans in a folder beside the file that it makes.

Each block says which scans it has, as they were in the store when they were embedded. So whatever a killed run has
left counts in the next one, also if the store has grown or changed in between, or if it runs on another number of GPUs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.formats import DAMAGE
from ingest.errors import StoreError
from ingest.writing import write_text_whole, write_whole

_BATCHES, _SCANS = 8, 2048  # of a block, at most: what a kill may cost, and what GPUs can share
_SETTINGS = "settings.json"
_SCANS_PREFIX = "scans/"


@dataclass(frozen=True)
class Finished:
    """The scans of all blocks.

    Attributes
    ----------
    scans
        As in an embedding file; a scan that was embedded twice is there twice.
    block, place
        int64 (scan,), number of its block, and its place there.
    skipped
        By row of the store, why scans were left out.
    next_number
        Of the next block.
    """

    scans: pd.DataFrame
    block: np.ndarray
    place: np.ndarray
    skipped: dict[int, str]
    next_number: int


def parts_path(out: Path) -> Path:
    """Return where the blocks of an embedding file lie until it is finished."""
    return out.with_name(out.name + ".parts")


def scans_per_block(batch_size: int, share: int = _SCANS) -> int:
    """Return how many scans make a block: whole batches, so that a run that goes on has the same batches.

    Parameters
    ----------
    share
        Scans of each process: a block has no more, or one batch, so that all of them have work.
    """
    return batch_size * max(1, min(_BATCHES, _SCANS // batch_size, share // batch_size))


def read_settings(parts: Path) -> dict[str, Any] | None:
    """Return what the blocks were made with, or None if there are none that count.

    Raises
    ------
    StoreError
        If there is something else at `parts`.
    """
    _refuse_others(parts)
    try:
        found = json.loads((parts / _SETTINGS).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def start_parts(parts: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or say of the one that is there what the next blocks are made with."""
    if read_settings(parts) is None:
        remove_parts(parts)  # blocks without settings: it was being removed
    parts.mkdir(exist_ok=True)
    for temporary in parts.glob(".*.tmp"):
        temporary.unlink()
    write_text_whole(parts / _SETTINGS, json.dumps(settings, indent=2))


def remove_parts(parts: Path) -> int:
    """Remove the folder, if it is there; return how many bytes it had. StoreError if something else is there."""
    _refuse_others(parts)
    if not parts.exists():
        return 0
    size = sum(file.stat().st_size for file in parts.iterdir())
    (parts / _SETTINGS).unlink(missing_ok=True)  # first: without it no block counts
    shutil.rmtree(parts)
    return size


def _refuse_others(parts: Path) -> None:
    if parts.exists() and not parts.is_dir():
        raise StoreError(
            f"{parts} is a file, but unfinished work goes into a folder of that name; remove or rename it, or choose "
            "another name for the embeddings"
        )


def write_block(
    parts: Path, number: int, scans: pd.DataFrame, features: np.ndarray, skipped: Mapping[int, str]
) -> None:
    """Write a block; it is there whole or not at all, also after a power cut.

    Parameters
    ----------
    scans
        Those that were embedded, as in an embedding file.
    features
        float32 (scan, feature).
    skipped
        By row, why others were left out.
    """
    arrays: dict[str, Any] = {"features": features}
    arrays["skipped"] = np.array(list(skipped), np.int64)
    arrays["reasons"] = np.array(list(skipped.values()), np.str_)
    for name in scans.columns:
        values = scans[name].to_numpy()
        arrays[_SCANS_PREFIX + str(name)] = values.astype(np.str_) if values.dtype.kind in "OUT" else values

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    write_whole(_block_path(parts, number), save)


def read_finished(parts: Path) -> Finished:
    """Read which scans are finished. Damaged blocks are removed: their scans will be embedded again.

    Raises
    ------
    OSError
        If the system does not give what a block holds; that says nothing about the block, which stays.
    """
    tables: list[pd.DataFrame] = []
    skipped: dict[int, str] = {}
    last = -1
    for file, number in _block_files(parts):
        last = number
        try:
            with open(file, "rb") as content, np.load(content, allow_pickle=False) as block:
                names = [name for name in block.files if name.startswith(_SCANS_PREFIX)]
                columns = {name.removeprefix(_SCANS_PREFIX): block[name] for name in names}
                reasons = dict(zip(block["skipped"].tolist(), block["reasons"].tolist(), strict=True))
        except MemoryError:
            raise
        except DAMAGE:
            file.unlink()
            continue
        table = pd.DataFrame({name: _plain(values) for name, values in columns.items()})
        tables.append(table.assign(_block=number, _place=np.arange(len(table))))
        skipped |= reasons
    if not tables:
        nothing = np.empty(0, np.int64)
        return Finished(pd.DataFrame({"row": nothing}), nothing, nothing, skipped, last + 1)
    together = pd.concat(tables, ignore_index=True)
    places = together.pop("_block").to_numpy(np.int64), together.pop("_place").to_numpy(np.int64)
    return Finished(together, *places, skipped, last + 1)


def read_block(parts: Path, number: int) -> np.ndarray:
    """Return the features of a block, float32 (scan, feature)."""
    path = _block_path(parts, number)
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as block:
            features: np.ndarray = block["features"]
    except DAMAGE as error:
        raise StoreError(f"{path} cannot be read: {error}; remove that file and run the same command again") from None
    return features


def same_scans(wanted: pd.DataFrame, had: pd.DataFrame) -> np.ndarray:
    """Return for each scan wanted where it is in another table, or -1 where it is not, or was another image.

    Parameters
    ----------
    wanted, had
        As in an embedding file. Of several scans of one ``row`` in `had` the last counts.

    Returns
    -------
    numpy.ndarray
        int64 (scan,).
    """
    nowhere = np.full(len(wanted), -1, np.int64)
    if not len(had) or set(map(str, had.columns)) != set(map(str, wanted.columns)):
        return nowhere
    last = pd.Series(np.arange(len(had)), index=had["row"].to_numpy()).groupby(level=0).last()
    place = last.reindex(wanted["row"].to_numpy(), fill_value=-1).to_numpy(np.int64)
    there = np.flatnonzero(place >= 0)
    same = np.ones(len(there), np.bool_)
    for name in wanted.columns:
        a, b = wanted[name].to_numpy()[there], had[name].to_numpy()[place[there]]
        same &= (a == b) | (pd.isna(a) & pd.isna(b))
    nowhere[there[same]] = place[there[same]]
    return nowhere


def _block_files(parts: Path) -> Iterator[tuple[Path, int]]:
    for file in sorted(parts.glob("*.npz")):
        if file.stem.isdecimal():
            yield file, int(file.stem)


def _block_path(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.npz"


def _plain(values: np.ndarray) -> np.ndarray:
    return values.astype(object) if values.dtype.kind == "U" else values
