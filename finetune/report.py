"""The report of a fine-tuning run: one HTML page that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.probing.calibration import probability_calibration_plot, value_calibration_plot
from extract.probing.numbers import in_time
from extract.probing.page import (
    ABSENT,
    last_component,
    plain,
    render_page,
    settings_lines,
    store_lines,
    versions_line,
    write_page,
)
from extract.probing.plots import MANY_POINTS, confusion_plot, roc_plot, scatter_plot
from extract.probing.report import kind_of
from extract.probing.report_targets import METRICS, Picture, Predictions, Score, data_uri, score_in_words, svg_uri
from extract.probing.results import OutOfFold, TargetResult
from finetune.checkpoints import LoadedRun
from finetune.examples import Examples, make_examples, units_of
from finetune.heads import Head
from finetune.report_plots import colour_bar_png, loss_plot, rate_plot, score_plot
from finetune.results import RunResult
from ingest.store import VolumeStore
from loaders.views import View

REPORT = "report.html"

_PATHS = ("weights", "weights_dir", "split", "groups")  # settings that may be paths: folders may name people
_MOST_ROWS = 10  # of scans that could not be read, to be named


@dataclass(frozen=True)
class Row:
    """A target as the table shows it: what it reached among the test people, and before that in the validation."""

    result: TargetResult
    headline: Score | None
    others: list[Score]
    validation: Score | None


def write_finetune_report(
    path: str | Path,
    result: RunResult,
    run: LoadedRun,
    store: VolumeStore | None,
    *,
    examples: int = 4,
    warnings: Sequence[str] = (),
) -> list[str]:
    """Write the report of a run; it appears whole or not at all.

    The page names no participant and no folder, so that it can be passed on.

    Parameters
    ----------
    path
        The HTML file, replaced if it exists; its folder is made.
    result, run
        What came of the run, and its best weights.
    store
        That the run is of, for maps over brains; None where it is gone.
    examples
        Test scans that are shown with a map, at most.
    warnings
        More to be shown.

    Returns
    -------
    list of str
        Warnings, which the page shows too: those given, those of the run, and why maps are absent.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    page, warnings = render_finetune_report(result, run, store, examples=examples, warnings=warnings)
    write_page(Path(path), page)
    return warnings


def render_finetune_report(
    result: RunResult,
    run: LoadedRun,
    store: VolumeStore | None,
    *,
    examples: int = 4,
    warnings: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Return the page of `write_finetune_report` and its warnings."""
    shown = make_examples(run, result.test, store, examples)
    warnings = [*dict.fromkeys([*warnings, *result.warnings]), *_skipped(result), *(shown.warnings if shown else [])]
    grid = (run.attrs.get("store") or {}).get("grid") or {}
    heads = {head.name: head for head in run.heads}
    page = render_page(
        "finetune",
        "finetune.html",
        simulated=bool(run.attrs.get("simulated")),
        summary=_summary(result, run),
        provenance=[("Run", _provenance(run)), ("Settings", _settings(run)), *_resolved(run)],
        scratch=_weights(run) == "scratch" or _weights(run).startswith("random"),
        title=", ".join(head.name for head in run.heads),
        rows=[_row(one, result.validation, heads[one.name]) for one in result.test],
        kind=kind_of,
        intervals=run.settings.bootstrap,
        courses=_courses(result),
        best_epoch=result.best_epoch,
        stopped_early=result.stopped == "early",
        predictions=[
            Predictions(one, _pictures(one, heads[one.name], run.settings.class_weights == "balanced"))
            for one in result.test
            if one.status == "ok" and one.out_of_fold is not None
        ],
        examples=shown if shown and shown.shown else None,
        example_pictures=_example_pictures(shown),
        colours={both: data_uri(colour_bar_png(both=both), "image/png") for both in (False, True)},
        space=grid.get("space"),
        validated=result.people.get("validation", 0) > 0,
        people=[
            (part, result.people.get(part, 0), result.scans.get(part, 0)) for part in ("train", "validation", "test")
        ],
        warnings=warnings,
    )
    return page, warnings


def _skipped(result: RunResult) -> list[str]:
    """Say which scans were left out; not why, for these reasons name files."""
    if not result.skipped:
        return []
    rows = sorted(result.skipped)
    named = ", ".join(map(str, rows[:_MOST_ROWS])) + (" …" if len(rows) > _MOST_ROWS else "")
    return [f"{len(rows):,} scans could not be read and were left out (rows {named} of the store)"]


def _weights(run: LoadedRun) -> str:
    """Return the name of the weights that training began with, without folders."""
    return last_component(str((run.attrs.get("weights") or {}).get("name") or run.settings.weights or ABSENT))


def _row(result: TargetResult, validation: Sequence[TargetResult], head: Head) -> Row:
    units = units_of(head)
    before = next((one for one in validation if one.name == result.name and one.status == "ok"), None)
    reached = None if before is None else score_in_words(before.metric, before.headline, units)
    if result.status != "ok":
        return Row(result, None, [], reached)
    others = [score_in_words(name, found, units) for name, found in result.metrics.items() if name != result.metric]
    return Row(result, score_in_words(result.metric, result.headline, units), others, reached)


def _summary(result: RunResult, run: LoadedRun) -> list[tuple[str, str]]:
    seen = run.network.seen
    view = "whole volume" if seen.view is View.volume else f"{seen.view} × {seen.slices} slices"
    people = [f"{result.people.get(part, 0):,} {name}" for part, name in _PARTS.items()]
    ended = ", stopped early" if result.stopped == "early" else ""
    return [
        ("Participants", ", ".join(people)),
        ("Model", run.network.model),
        ("View", view),
        ("Began with", f"{_weights(run)} weights" if _weights(run) != ABSENT else ABSENT),
        ("Epochs", f"{result.epochs:,} ({result.steps:,} steps){ended}"),
        ("Best epoch", f"{result.best_epoch:,}"),
        ("Training took", in_time(result.seconds)),
        ("Speed", f"{result.scans_per_second:.3g} scans/s, {100 * result.starved:.0f} % of it waiting for scans"),
    ]


_PARTS = {"train": "to train on", "validation": "to validate", "test": "to test"}


def _courses(result: RunResult) -> list[Picture]:
    """Return pictures of the run over epochs."""
    history, best = result.history, result.best_epoch
    if not history:
        return []
    named = {}
    for one in result.validation or result.test:
        metric = one.metric or next((m for m in ("auc", "r") if any(f"{one.name}_{m}" in row for row in history)), "")
        if any(np.isfinite(row.get(f"{one.name}_{metric}", np.nan)) for row in history):
            named[f"{one.name}, {METRICS.get(metric, metric)}"] = f"{one.name}_{metric}"
    pictures = [
        Picture(svg_uri(loss_plot(history, best)), "loss of training and validation over epochs", title="Loss"),
        Picture(svg_uri(rate_plot(history, best)), "learning rate over epochs", title="Learning rate"),
    ]
    if named:
        plot = score_plot(history, best, named)
        pictures.insert(1, Picture(svg_uri(plot), "validation scores over epochs", title="Validation scores"))
    return pictures


def _pictures(result: TargetResult, head: Head, balanced: bool) -> list[Picture]:
    """Return pictures of the predictions of a target: ROC and confusion, or scatter; and calibration."""
    found, name = result.out_of_fold, result.name
    if found is None:
        return []
    if not head.labels:
        return _value_pictures(found, head)
    labels = list(head.labels)
    roc = f"positive class: {labels[1]}" if len(labels) == 2 else "each class against the rest"
    # What `confusion_plot` does for folds, by the classes' frequencies among the scans trained on
    odds = found.predicted / np.array(head.frequencies)
    decided = OutOfFold(found.truth, odds / odds.sum(axis=1, keepdims=True), found.fold, found.rows)
    calibration = (
        "Calibration: how often a class came true, by predicted probability, in bins of equally many scans, with "
        "95 % intervals (Wilson). Below: scans by probability."
    )
    if balanced:
        calibration += " All classes counted the same in training, so that rare ones are predicted too often."
    return [
        Picture(svg_uri(roc_plot(found, labels)), f"ROC curve of {name}", f"ROC curve of the test scans; {roc}."),
        Picture(
            svg_uri(confusion_plot(decided, labels)),
            f"confusion matrix of {name}",
            "Class given to each test scan, all classes taken as equally likely (as for balanced accuracy): share of "
            "each true class, and number of scans.",
        ),
        Picture(svg_uri(probability_calibration_plot(found, labels)), f"calibration of {name}", calibration),
    ]


def _value_pictures(found: OutOfFold, head: Head) -> list[Picture]:
    units = units_of(head)
    quantity = f"{head.name} ({units})" if units else head.name
    caption = "Predicted against true values of the test scans; on the dashed line they are equal."
    if len(found.truth) > MANY_POINTS:
        caption += " Colour: number of scans."
    return [
        Picture(svg_uri(scatter_plot(found, quantity)), f"predicted against true {head.name}", caption),
        Picture(
            svg_uri(value_calibration_plot(found, quantity)),
            f"calibration of {head.name}",
            "Calibration: mean true value by prediction, in bins of equally many scans, with 95 % intervals; slope of "
            "true on predicted values. Below: scans by prediction.",
        ),
    ]


def _example_pictures(examples: Examples | None) -> list[Picture]:
    if examples is None:
        return []
    return [
        Picture(
            data_uri(example.png, "image/png"),
            f"{examples.method} map over the axial, coronal and sagittal plane of the brain in row {example.row}",
        )
        for example in examples.shown
    ]


def _provenance(run: LoadedRun) -> list[tuple[str, str]]:
    attrs = run.attrs
    weights, store = (attrs.get(name) or {} for name in ("weights", "store"))
    return [
        ("weights begun with", _weights(run)),
        ("sha256 of these", plain(weights.get("sha256")) or "none"),
        ("weights of the run", f"epoch {attrs.get('epoch', '?')}, step {attrs.get('step', '?')}"),
        ("sha256 of their file", run.sha256),
        ("input mean, std", f"{plain(run.network.seen.mean)}; {plain(run.network.seen.std)}"),
        *store_lines(store),
        ("simulated", "yes" if attrs.get("simulated") else "no"),
        versions_line(attrs.get("created_by")),
    ]


def _settings(run: LoadedRun) -> list[tuple[str, str]]:
    """Return the settings of the run in words, in their order; of paths the last component."""
    given = run.settings.model_dump(mode="json")
    for name in _PATHS:
        given[name] = None if given[name] is None else last_component(str(given[name]))
    given["augmentation"] = given["augmentation"] or "default"
    return settings_lines(given, absent="not set")


def _resolved(run: LoadedRun) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what became of settings that depend on the machine or the data, where the run has recorded it."""
    found = run.attrs.get("resolved")
    if not isinstance(found, Mapping) or not found:
        return []
    shown = {str(name): last_component(str(value)) if name in _PATHS else value for name, value in found.items()}
    return [("As it was run", settings_lines(shown))]
