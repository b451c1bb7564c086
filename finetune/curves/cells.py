"""The cells of a curve: one method, one number of people, one seed; each in a folder of its own, done once."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ingest.errors import StoreBusyError
from ingest.lock import store_lock
from ingest.writing import write_text_whole, write_whole

_RECORD, _PREDICTIONS = "cell.json", "test.npz"


@dataclass(frozen=True)
class Cell:
    """One training (or probe) of a curve."""

    method: str
    size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.size} people, seed {self.seed}"

    def folder(self, run_dir: Path) -> Path:
        """Return where its files are."""
        return run_dir / self.method / f"n{self.size}" / f"seed{self.seed}"


@dataclass(frozen=True)
class TargetScores:
    """How a cell predicts one target of the people tested.

    Attributes
    ----------
    name, task, labels, units, metric
        See `extract.probing.results.TargetResult`.
    scores, chances
        Metric -> score, and that of guessing.
    rows, people, groups
        int64 (scan,): of the store; who they are; and what is independent of each other, people or families, by numbers
        that are the same in all cells.
    truth, predicted
        float64 (scan,) codes or values; (scan, class) probabilities or (scan,) values.
    participants
        Text (scan,), by which those who withdraw are found.
    """

    name: str
    task: str
    labels: tuple[str, ...]
    units: str | None
    metric: str
    scores: dict[str, float]
    chances: dict[str, float]
    rows: np.ndarray
    people: np.ndarray
    groups: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    participants: np.ndarray


@dataclass(frozen=True)
class CellResult:
    """What came of a cell.

    Attributes
    ----------
    status, reason
        ``ok``, ``failed`` with the reason, or ``unfinished``: not begun, stopped, or under way.
    train_people, train_scans
        That it was trained on.
    seconds
        That it took.
    training
        In words and numbers, what there is to know of the training: epochs, steps, why it stopped, or the penalty.
    skipped
        Scans that could not be read.
    """

    cell: Cell
    status: str
    reason: str = ""
    train_people: int = 0
    train_scans: int = 0
    seconds: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    targets: tuple[TargetScores, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all but the predictions."""
        return {
            "method": self.cell.method,
            "size": self.cell.size,
            "seed": self.cell.seed,
            "status": self.status,
            "reason": self.reason,
            "train_people": self.train_people,
            "train_scans": self.train_scans,
            "seconds": round(self.seconds, 2),
            "training": self.training,
            "skipped": self.skipped,
            "targets": [
                {
                    "name": target.name,
                    "task": target.task,
                    "labels": list(target.labels),
                    "units": target.units,
                    "metric": target.metric,
                    "scores": target.scores,
                    "chances": target.chances,
                }
                for target in self.targets
            ],
        }


def list_cells(methods: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a curve in the order in which they are done: whole curves of one seed after the other.

    So what is there after some time already is a curve, and what is to be compared lies close together.
    """
    return [Cell(method, size, seed) for seed in seeds for size in sizes for method in methods]


def write_cell(run_dir: Path, result: CellResult) -> None:
    """Write what came of a cell; it counts as done once this returns, and not before."""
    folder = result.cell.folder(run_dir)
    arrays = {
        f"{i}_{name}": getattr(target, name)
        for i, target in enumerate(result.targets)
        for name in ("rows", "people", "groups", "truth", "predicted", "participants")
    }

    def write_arrays(path: Path) -> None:
        with open(path, "wb") as file:  # a name that does not end in .npz would get that added
            np.savez_compressed(file, **arrays)

    write_whole(folder / _PREDICTIONS, write_arrays)
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_text_whole(folder / _RECORD, text)


def read_cell(run_dir: Path, cell: Cell) -> CellResult:
    """Return what came of a cell, ``unfinished`` if there is nothing yet.

    Raises
    ------
    ValueError
        If its files are damaged.
    """
    folder = cell.folder(run_dir)
    try:
        document = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return CellResult(cell, "unfinished")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    try:
        with np.load(folder / _PREDICTIONS, allow_pickle=False) as arrays:
            targets = tuple(
                TargetScores(
                    name=known["name"],
                    task=known["task"],
                    labels=tuple(known["labels"]),
                    units=known["units"],
                    metric=known["metric"],
                    scores=known["scores"],
                    chances=known["chances"],
                    rows=arrays[f"{i}_rows"],
                    people=arrays[f"{i}_people"],
                    groups=arrays[f"{i}_groups"],
                    truth=arrays[f"{i}_truth"],
                    predicted=arrays[f"{i}_predicted"],
                    participants=arrays.get(f"{i}_participants", np.empty(0, np.str_)),  # older cells do not say
                )
                for i, known in enumerate(document["targets"])
            )
        kept = ("status", "reason", "train_people", "train_scans", "seconds", "training", "skipped")
        return CellResult(cell, **{name: document[name] for name in kept}, targets=targets)
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(folder, error) from None


def is_done(run_dir: Path, cell: Cell) -> bool:
    """Tell whether a cell came to an end, good or bad."""
    return (cell.folder(run_dir) / _RECORD).is_file()


def forget_cell(run_dir: Path, cell: Cell) -> None:
    """Take back that a cell came to an end, with all that it has kept: it begins anew."""
    folder = cell.folder(run_dir)
    aside = folder.with_name(f".{folder.name}.forgotten")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed below
    folder.rename(aside)  # at once: a run that lacks some of its files could neither go on nor begin
    shutil.rmtree(aside)


@contextlib.contextmanager
def claim(run_dir: Path, cell: Cell) -> Iterator[bool]:
    """Hold the only right to work on a cell; gives False at once if another process has it.

    The kernel gives the right up when its holder dies, see `ingest.lock`; so it does between the machines of a cluster
    whose file system has locks.
    """
    folder = cell.folder(run_dir)
    with held(folder.with_name(f"{folder.name}.claim")) as mine:
        yield mine


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a lock of a name; gives False at once if another process has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store_lock(path))
        except StoreBusyError:
            yield False
            return
        yield True


def _damaged(folder: Path, error: BaseException) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{folder} cannot be read as a cell of a curve: {reason}; remove that folder, and run it again")
