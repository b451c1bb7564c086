"""A run from its settings to its scores: begins, goes on where it was killed, or is found finished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.checkpoints import BEST, LAST
from extract.distributed import Group, named_death
from extract.fast import memory_for
from extract.probing.apply import write_predictions
from finetune.batch_norm import choose_scans, update_statistics
from finetune.build import (
    build_network,
    build_training,
    check_scale,
    check_volumes,
    open_part,
    open_scans,
    resolved_of,
    without_effect,
)
from finetune.checkpoints import checkpoint_of, load_run, write_checkpoint
from finetune.cohort import read_cohort
from finetune.evaluate import Outputs
from finetune.folder import begin_folder, check_folder, existing, leave_weights, remove_half_written
from finetune.logs import TENSORBOARD, Log, tensorboard, write_epochs
from finetune.predictions import TRUE, prediction_table, true_column
from finetune.results import (
    EPOCHS,
    PREDICTIONS,
    REPORT,
    RESULTS,
    SPLIT,
    RunResult,
    read_result,
    write_result,
)
from finetune.resume import check_store, go_on, load_finished, weights_for
from finetune.settings import FinetuneSettings
from finetune.training import StepDone, Training, train_epoch
from finetune.validation import keep_best, predict_part, score_part, validate
from ingest.lock import store_lock
from ingest.places import Place
from ingest.store import VolumeStore, open_store, package_versions
from loaders import Loader


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes
    ----------
    step, steps, epoch, epochs
        Done, and in all.
    loss
        Of the last step.
    scores
        Of the last validation: ``loss``, and each target's headline by its name.
    scans_per_second, starved
        Of the epoch under way, and the share of its time that it waited for scans.
    ended
        Row of the history of the epoch that has just ended; None after a step.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    scores: dict[str, float]
    scans_per_second: float
    starved: float
    ended: dict[str, float] | None = None


def finetune(
    store: str | Place,
    run_dir: str | Path,
    settings: FinetuneSettings,
    *,
    group: Group | None = None,
    overwrite: bool = False,
    report: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a network for some targets, and score it on people whom it has not seen.

    A run that was killed goes on at its last checkpoint, and ends with the weights of an undisturbed one; one that is
    finished is returned as it is.

    Parameters
    ----------
    store
        Path or ``s3://`` address of a store.
    run_dir
        What the run keeps: ``settings.yaml``, ``split.csv``, ``epochs.csv``, ``tensorboard/``, ``last.pt``,
        ``best.pt``, ``predictions.parquet``, ``results.json`` and ``report.html``.
    settings
        See `FinetuneSettings`.
    group
        The processes that share the run, see `extract.distributed.join_group`.
    overwrite
        Begin anew.
    report
        Write ``report.html``.
    on_progress
        Called after each step and each validation.

    Raises
    ------
    ValueError
        For settings that cannot be, or others than those that the run was begun with.
    StoreError
        If the store or the folder cannot be used, or another process is at work there.
    WeightsUnavailableError
        If the weights cannot be had.
    NonFiniteLossError
        If a loss or gradient is not finite.
    """
    run_dir, group = Path(run_dir), group or Group()
    with ExitStack() as stack:
        with group.first_here():
            if group.rank == 0:
                stack.enter_context(store_lock(run_dir))
                check_folder(run_dir, settings, overwrite=overwrite)
            volumes = open_store(store)
            done = not overwrite and (run_dir / RESULTS).is_file()
            if not done:
                cohort = read_cohort(volumes, settings, None if overwrite else existing(run_dir / SPLIT))
                weights, about = weights_for(settings, volumes, None if overwrite else existing(run_dir / LAST))
                network = build_network(settings, cohort.heads, weights)
                check_volumes(network, volumes.grid.shape_zyx)
                check_scale(network.seen, volumes.grid.shape_zyx)
        if done:
            return _finished(run_dir, volumes, group, report=report)
        training = build_training(volumes, settings, cohort, network, group)
        stack.enter_context(memory_for(training.device))
        stack.callback(training.loader.close)
        with group.first_here():
            if group.rank == 0:
                begin_folder(run_dir, settings, cohort.split, overwrite=overwrite)
        attrs = _attrs(volumes, about) | {"resolved": {"weights": about["name"], **resolved_of(training, volumes)}}
        cohort.warnings.extend([*about.get("notes", []), *without_effect(settings, cohort.heads)])
        if (run_dir / LAST).is_file():
            go_on(training, run_dir / LAST, volumes)
        _train(training, volumes, run_dir, attrs, on_progress or (lambda _: None))
        result = _finish(training, volumes, run_dir, attrs)
        if report and group.rank == 0:
            _write_report(result, volumes)
        return result


def _finished(run_dir: Path, volumes: VolumeStore, group: Group, *, report: bool) -> RunResult:
    """Return what came of a run that is finished; if it was killed after that was written, do the rest."""
    run = load_finished(run_dir)
    check_store(run_dir, run.attrs, volumes)
    result = read_result(run_dir, run.heads)
    if group.rank == 0:
        remove_half_written(run_dir)
        leave_weights(run_dir / LAST)
        if report and not (run_dir / REPORT).is_file():
            _write_report(result, volumes)
    return result


def _write_report(result: RunResult, volumes: VolumeStore) -> None:
    from finetune.report import write_finetune_report  # drawing needs matplotlib, which takes a second to import

    write_finetune_report(result.run_dir / REPORT, result, load_run(result.run_dir), volumes, warnings=result.warnings)


def _attrs(volumes: VolumeStore, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "store": {
            "path": str(volumes.path.absolute()),
            "id": volumes.attrs["store_id"],
            "grid": volumes.attrs["grid"],
            "intensity": volumes.attrs.get("intensity"),
        },
        "simulated": bool(volumes.attrs["simulated"]),
        "weights": about,
        "created_by": package_versions("torch", "torchvision", "zarr", "numpy"),
    }


def _save(training: Training, run_dir: Path, attrs: dict[str, Any]) -> None:
    """Write the last and the best checkpoint; all processes must come here."""
    state = training.state_dict()
    if training.group.rank == 0:
        attrs_now = {**attrs, "epoch": training.epoch, "step": training.step}
        content = checkpoint_of(training.network, training.settings, attrs_now, training=state)
        write_checkpoint(run_dir / LAST, content)
        write_checkpoint(run_dir / BEST, _best_content(training, attrs))


def _train(
    training: Training, volumes: VolumeStore, run_dir: Path, attrs: dict[str, Any], tell: Callable[[Progress], None]
) -> None:
    """Train to the end, or until nothing gets better."""
    steps, settings, rank = training.steps, training.settings, training.group.rank
    with ExitStack() as stack:
        validation = open_part(volumes, training, "validation")
        statistics = None
        if settings.batch_norm == "train":
            statistics = open_scans(volumes, training, choose_scans(training.cohort.rows_of("train"), settings.seed))
        for loader in (validation, statistics):
            if loader is not None:
                stack.callback(loader.close)
        folder = run_dir / TENSORBOARD if settings.tensorboard and rank == 0 else None
        log = stack.enter_context(tensorboard(folder, training.step))
        scores: dict[str, float] = {}

        def after_step(done: StepDone) -> None:
            log.add_scalar("train/loss", done.loss, done.step)
            log.add_scalar("train/lr", training.rate(done.step), done.step)
            tell(_progress(training, done.loss, scores))
            if done.step % settings.checkpoint_every == 0:
                log.flush()
                _save(training, run_dir, attrs)

        while True:
            if training.epoch > len(training.history):
                scores = _end_epoch(training, validation, statistics, log)
                if rank == 0:
                    write_epochs(run_dir / EPOCHS, training.history)
                row = training.history[-1]
                tell(replace(_progress(training, row["train_loss"], scores), ended=row))
            if training.epoch >= steps.epochs or _is_over(training):
                return
            with named_death():
                train_epoch(training, after_step)


def _progress(training: Training, loss: float, scores: dict[str, float]) -> Progress:
    elapsed = max(training.elapsed, 1e-9)
    return Progress(
        training.step, training.steps.total, training.epoch, training.steps.epochs, loss, scores,
        training.seen / elapsed, training.starved / elapsed,
    )  # fmt: skip


def _is_over(training: Training) -> bool:
    return training.settings.patience is not None and training.waited >= training.settings.patience


def _end_epoch(training: Training, validation: Loader | None, statistics: Loader | None, log: Log) -> dict[str, float]:
    """Validate if it is time, note how the epoch went, and keep the weights if they are the best."""
    group, steps = training.group, training.steps
    seconds, seen = max(training.elapsed, 1e-9), training.seen
    row: dict[str, float] = {
        "epoch": training.epoch,
        "step": training.step,
        "lr": training.rate(training.step),
        "train_loss": float(np.sum(group.gather_all(training.loss_sum))) / steps.per_epoch,
        "seconds": round(seconds, 3),
        "scans_per_second": round(seen / seconds, 3),
        "starved": round(training.starved / seconds, 4),
    }
    scores: dict[str, float] = {}
    due = training.epoch >= steps.epochs or training.step - training.validated >= training.settings.validate_every
    if due and statistics is not None:
        update_statistics(training.network, statistics, training.dtype)
    if due and len(training.cohort.rows_of("validation")):
        outputs = predict_part(training, validation)
        measured = group.tell(validate(training, outputs) if group.rank == 0 else None)
        row |= measured
        training.validated = training.step
        heads = training.network.heads_info
        scores = {"loss": row["validation_loss"]} | {head.name: row[f"{head.name}_{head.metric}"] for head in heads}
        keep_best(training, row)
    training.history.append(row)
    for name, value in row.items():
        if name not in ("epoch", "step", "lr"):
            log.add_scalar(f"epoch/{name}", value, training.step)
    training.loss_sum = training.starved = training.elapsed = 0.0
    training.seen = 0
    return scores


def _best_content(training: Training, attrs: dict[str, Any]) -> dict[str, Any]:
    best = training.best
    if best is None:
        return checkpoint_of(
            training.network, training.settings, {**attrs, "epoch": training.epoch, "step": training.step}
        )
    attrs = {**attrs, "epoch": best["epoch"], "step": best["step"]}
    return checkpoint_of(training.network, training.settings, attrs, state_dict=best["state_dict"])


def _finish(training: Training, volumes: VolumeStore, run_dir: Path, attrs: dict[str, Any]) -> RunResult:
    """Score the best weights, and write everything; the results last, by which the run is known to be finished."""
    group, cohort, network = training.group, training.cohort, training.network
    _save(training, run_dir, attrs)
    best_epoch = training.epoch if training.best is None else training.best["epoch"]
    if training.best is not None:
        network.load_state_dict(training.best["state_dict"])
    parts: dict[str, Outputs] = {}
    for part in ("validation", "test"):
        loader = open_part(volumes, training, part)
        try:
            parts[part] = predict_part(training, loader)
        finally:
            if loader is not None:
                loader.close()
    history = training.history
    seconds = sum(row["seconds"] for row in history)
    skipped = {row: reason for some in group.gather_all(training.skipped) for row, reason in some.items()}
    scores = {
        part: score_part(training, outputs, bootstrap=training.settings.bootstrap) for part, outputs in parts.items()
    }
    trained = sum(row["scans_per_second"] * row["seconds"] for row in history)
    result = RunResult(
        run_dir=run_dir,
        test=scores["test"],
        validation=scores["validation"],
        history=history,
        best_epoch=best_epoch,
        epochs=training.epoch,
        steps=training.step,
        stopped="early" if training.epoch < training.steps.epochs else "done",
        seconds=seconds,
        scans_per_second=trained / max(seconds, 1e-9),
        starved=sum(row["starved"] * row["seconds"] for row in history) / max(seconds, 1e-9),
        people=cohort.people(),
        scans=cohort.scans(),
        skipped=skipped,
        warnings=cohort.warnings,
        resolved=attrs["resolved"],
    )
    if group.rank == 0:
        tables = []
        for part, outputs in parts.items():
            table = prediction_table(volumes, outputs, network.heads_info, network.head_slices)
            table.insert(1, "part", part)
            at = np.searchsorted(cohort.rows, outputs.rows)
            for head, target in zip(network.heads_info, cohort.targets, strict=True):
                table[f"{TRUE}{head.name}"] = true_column(head, target.values[at])
            tables.append(table)
        write_predictions(run_dir / PREDICTIONS, pd.concat(tables, ignore_index=True))
        write_result(result)
        leave_weights(run_dir / LAST)
    return result
