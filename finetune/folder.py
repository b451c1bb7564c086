"""The folder of a run: whether it is one, and of these settings; how it begins, and what a killed process left."""

from __future__ import annotations

import shutil
from pathlib import Path

from extract.checkpoints import BEST, LAST
from finetune.checkpoints import read_last, write_checkpoint
from finetune.errors import ANEW
from finetune.logs import TENSORBOARD
from finetune.results import EPOCHS, PREDICTIONS, REPORT, RESULTS, SETTINGS, SPLIT
from finetune.settings import FinetuneSettings, make_settings, read_settings
from finetune.split import Split, read_split, write_split
from ingest.errors import StoreError
from ingest.writing import write_text_whole

#: What may be another when a run goes on: none of it is about what is learnt. With dropout, and batch norms that are
#: trained, other micro-batches draw and average otherwise; the rest changes no more than the last digits.
FREE = ("device", "backend", "threads", "micro_batch", "checkpointing", "checkpoint_every", "on_error", "tensorboard")

#: What a run keeps beside its settings, in the order in which it is removed: what is there tells at any time how far it
#: is, as `RESULTS` that it is finished.
_FILES = (LAST, RESULTS, REPORT, PREDICTIONS, BEST, EPOCHS, SPLIT)


def check_folder(run_dir: Path, settings: FinetuneSettings, *, overwrite: bool) -> None:
    """Check that a folder is new, or that of a run, and, unless it is begun anew, of the same settings.

    Raises
    ------
    StoreError
        If it is a file, or has files and is not that of a run.
    ValueError
        For a setting that is another one.
    """
    check_no_file(run_dir, "run")
    if not run_dir.exists() or not set(run_dir.iterdir()) - set(_half_written(run_dir)):
        return
    before = _begun_with(run_dir)
    for name, value in settings.model_dump().items():
        was = getattr(before, name)
        same = value == was or (name == "split" and _same_split(run_dir, value))
        if not same and name not in FREE and not overwrite:
            raise ValueError(
                f"{run_dir} was begun with {name} {was!r}, not {value!r}; use the same settings to go on, or another "
                f"folder; {ANEW}"
            )


def check_no_file(run_dir: Path, kind: str) -> None:
    """Raise StoreError if what is to be the folder of a run, or another kind, is a file."""
    if run_dir.exists() and not run_dir.is_dir():
        raise StoreError(f"{run_dir} is a file, expected the folder of a {kind}; choose another name")


def _same_split(run_dir: Path, split: str | None) -> bool:
    """Return whether a file of a split, wherever it lies by now, says what the run has written down."""
    if split is None:
        return False
    try:
        return read_split(Path(split)).whole() == read_split(run_dir / SPLIT).whole()
    except ValueError:  # it is not there
        return False


def begin_folder(run_dir: Path, settings: FinetuneSettings, split: Split, *, overwrite: bool) -> None:
    """Write down settings and split, and remove what was left half written; with `overwrite` all that there was.

    The folder is one that `check_folder` has found fit.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_half_written(run_dir)
    if overwrite:
        for name in _FILES:
            (run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
    write_text_whole(run_dir / SETTINGS, settings.to_yaml())
    write_split(run_dir / SPLIT, split)


def leave_weights(path: Path) -> None:
    """Leave out of a last checkpoint, if it is there, what it takes to go on, which is three times as much."""
    content = read_last(path) if path.is_file() else {}
    if content.pop("training", None) is not None:
        write_checkpoint(path, content)


def remove_half_written(run_dir: Path) -> None:
    """Remove what processes were writing when they were killed."""
    for file in _half_written(run_dir):
        file.unlink()


def existing(path: Path) -> Path | None:
    """Return a path if it is that of a file."""
    return path if path.is_file() else None


def _half_written(run_dir: Path) -> list[Path]:
    """Return files by the names that `write_whole` gives them meanwhile."""
    return [file for name in (*_FILES, SETTINGS) for file in run_dir.glob(f".{name}.*.tmp")]


def _begun_with(run_dir: Path) -> FinetuneSettings:
    path, problem = run_dir / SETTINGS, f"it has files but no {SETTINGS}"
    if path.is_file():
        try:
            before = make_settings(read_settings(path), SETTINGS)
            if before.target:
                return before
            problem = f"{SETTINGS} has no target"
        except ValueError as error:
            problem = str(error)
    raise StoreError(f"{run_dir} is no folder of a run: {problem}; choose another name")
