"""An honest transfer: weights from one simulated cohort and one target, on other people, another target, real scans.

A network is trained for age on a simulated cohort. From its weights the curves of `finetune.curves` begin: sex in a
second simulated cohort, drawn with another seed, and gender in the real ds002748, each against the same network from
random weights and against linear probes of the first one as it is. All three see the same training people, and none
has others to choose an epoch by: sizes are all the labels that a method has. Every training has the same number of
steps at least, which were set beforehand. Everything that decides about the outcome is in `PLAN`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune_cohort import Clock, Pretraining, prepare_cohort, pretrain
from benchmarks.made import SHAPE
from benchmarks.results import Report, Result
from extract.probing.numbers import SHORT_NAMES
from finetune.batch_norm import SCANS
from finetune.build import build_network, find_weights
from finetune.curves import CurveProgress, CurveResult, CurveSettings, run_curve
from finetune.curves.charts import curve_png
from finetune.curves.results import TargetCurve
from finetune.curves.words import describe_state, describe_target
from finetune.evaluate import what_to_load
from finetune.heads import Head
from finetune.optimiser import make_optimiser
from finetune.settings import FinetuneSettings, make_settings
from finetune.steps import plan_steps
from ingest import ingest
from ingest.store import VolumeStore, open_store, package_versions
from ingest.writing import write_text_whole, write_whole
from loaders.views import as_images, plan_picture

REAL = "ds002748"
MINUTES = 75.0
CHART_TITLE = "Pre-trained for age on a SIMULATED cohort"

_DATA = "BRAIN_VOLUMES_DATA"
_AROUND_S = 2.0  # about, of each training: to begin, write, score
_FORWARD = 1 / 3  # about, of the time of a training step


@dataclass(frozen=True)
class CurvePlan:
    """One curve.

    Attributes
    ----------
    name
        What it is called.
    people, seed, layout
        Of the simulated cohort; a seed of None stands for `REAL`, which has so many people.
    sizes
        People trained on.
    settings
        Of its trainings, beside those that are common to all; its target is among them.
    """

    name: str
    people: int
    seed: int | None
    sizes: tuple[int, ...]
    settings: Mapping[str, Any]
    layout: str = "bids"


@dataclass(frozen=True)
class TransferPlan:
    """Everything that is done.

    Attributes
    ----------
    pretraining
        Where the weights are from.
    curves
        Where they go.
    common
        Settings of the trainings of all curves, see `finetune.FinetuneSettings`; the same from any weights.
    seeds
        Repeats: training people and random numbers anew.
    """

    pretraining: Pretraining
    curves: tuple[CurvePlan, ...]
    common: Mapping[str, Any]
    seeds: int = 5


_SEEN = {"model": "resnet18", "view": "axial", "slices": 3, "scale": 0.4, "tensorboard": False}

PLAN = TransferPlan(
    pretraining=Pretraining(
        people=400,
        seed=21,
        layout="bids",  # heads as scanners see them, as in ds002748
        settings={
            **_SEEN, "target": ("age",), "validation": 0.1, "test": 0.2, "batch_size": 16, "lr": 1e-3, "epochs": 20,
            "weight_decay": 0.05,
        },
    ),
    curves=(
        CurvePlan("second simulated cohort", 240, 22, (12, 25, 50, 100), {"target": ("sex",), "test": 0.5}),
        CurvePlan(REAL, 32, None, (4, 8, 12, 16), {"target": ("gender",), "test": 0.5}),
    ),
    common={
        **_SEEN, "validation": 0.0, "batch_size": 12, "epochs": 1, "min_steps": 50, "lr": 1e-3, "weight_decay": 0.05,
        "bootstrap": 0,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """What came of it: the numbers, the curves with their names, and the words about each."""

    report: Report
    curves: list[tuple[str, CurveResult]]
    words: dict[str, list[str]]


def real_data() -> Path:
    """Return where the real scans are, by ``BRAIN_VOLUMES_DATA`` or beside the project."""
    return Path(os.environ.get(_DATA, Path(__file__).parents[2] / "shared" / "data")) / REAL


def run_transfer(
    directory: Path,
    *,
    real: Path | None = None,
    plan: TransferPlan = PLAN,
    minutes: float = MINUTES,
    tell: Callable[[str], None] = print,
) -> Transfer:
    """Pre-train, and make the curves. What was killed goes on; other settings begin in a folder of their own.

    Parameters
    ----------
    directory
        Holds cohorts and runs.
    real
        Folder of the real scans in BIDS layout, by default `real_data`. Its curve is left out if it is not there.
    minutes
        That all of it may take.
    tell
        Is told how it goes, line by line.

    Raises
    ------
    ValueError
        If it would take longer.
    """
    real = real or real_data()
    if not real.is_dir():
        tell(f"{REAL} is not at {real}, and left out; {_DATA} names the folder that holds it")
        plan = replace(plan, curves=tuple(curve for curve in plan.curves if curve.seed is not None))
    speed = measure_slices(make_settings(plan.common))
    budget = plan_budget(plan, speed)
    for name, part in budget.items():
        tell(f"{name}: {part['slices']:,.0f} slices / {speed:.1f} slices/s = {part['minutes']:.1f} min")
    expected = sum(part["minutes"] for part in budget.values())
    tell(f"in all: {expected:.0f} min, and what simulation and ingest take; {minutes:g} min are allowed")
    if expected > minutes:
        raise ValueError(
            f"this would take {expected:.0f} minutes on this machine as it is, more than {minutes:g}; let it be idle, "
            "use fewer steps or sizes, or allow more --minutes"
        )
    clock = Clock()
    before = plan.pretraining
    cohort = prepare_cohort(directory, before.people, seed=before.seed, layout=before.layout)
    stores = {curve.name: _store(directory, curve, real) for curve in plan.curves}
    clock.lap("simulation and ingest")
    curves, words = make_curves(directory / f"plan-{_digest(plan)}", plan, cohort, stores, clock, tell)
    return Transfer(_report(plan, speed, budget, clock, curves, words), curves, words)


def make_curves(
    folder: Path, plan: TransferPlan, cohort: VolumeStore, stores: Mapping[str, VolumeStore], clock: Clock,
    tell: Callable[[str], None] = print,
) -> tuple[list[tuple[str, CurveResult]], dict[str, list[str]]]:  # fmt: skip
    """Pre-train on a cohort, and make the curve of each store; return curves and words by their names."""
    pretrained = pretrain(cohort, folder / "pretrained", plan.pretraining, tell)
    clock.lap("pre-training")
    curves: list[tuple[str, CurveResult]] = []
    for curve in plan.curves:
        settings = make_settings({**plan.common, **curve.settings, "weights": str(pretrained.run_dir)})
        of_curve = CurveSettings(sizes=curve.sizes, seeds=tuple(range(plan.seeds)))
        where, on_progress = folder / curve.name.replace(" ", "-"), _teller(curve, tell)
        result = run_curve(stores[curve.name].path, where, settings, of_curve, on_progress=on_progress)
        curves.append((curve.name, result))
        clock.lap(f"curve, {curve.name}")
    one = pretrained.test[0]
    start = (
        f"The weights are from a training for {one.name} on {pretrained.people['train']:,} simulated people, one alone "
        f"({SHORT_NAMES[one.metric]} {one.headline.score:.3f} of {one.participants:,} others): intervals tell nothing "
        "of how others of its kind would do."
    )
    return curves, {name: [start, *_words(result)] for name, result in curves}


def _words(result: CurveResult) -> list[str]:
    about = [sentence for curve in result.targets for sentence in describe_target(curve)]
    return about + describe_state(result)


def _digest(plan: TransferPlan) -> str:
    """Return what tells these settings apart from others."""
    return hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:8]


def _store(directory: Path, curve: CurvePlan, real: Path) -> VolumeStore:
    if curve.seed is not None:
        return prepare_cohort(directory, curve.people, seed=curve.seed, layout=curve.layout)
    path = directory / f"{REAL}.zarr"
    ingest(real, path)  # reads what is new alone
    return open_store(path)


def measure_slices(settings: FinetuneSettings) -> float:
    """Return how many slices a second are trained on, of random numbers."""
    head = Head("any", "binary", ("a", "b"), frequencies=(0.5, 0.5))
    settings = settings.model_copy(update={"weights": "scratch"})
    network = build_network(settings, [head], find_weights(settings))
    view, slices = what_to_load(network.seen, SHAPE)
    network.to(memory_format=torch.channels_last).train()
    optimiser = make_optimiser(network, settings)
    picture = plan_picture(SHAPE, 1, view, slices)
    images = as_images(picture.split(torch.rand((settings.batch_size, *picture.shape))))
    seconds: list[float] = []
    for _ in range(4):
        begun = time.perf_counter()
        network(images, cut=network.seen.cut).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - begun)
    return settings.batch_size * settings.slices / (sum(seconds[1:]) / len(seconds[1:]))


def plan_budget(plan: TransferPlan, speed: float) -> dict[str, dict[str, float]]:
    """Return for each part the slices that are trained on, those that are only looked at as a share, and minutes."""
    budget: dict[str, dict[str, float]] = {}
    before = make_settings(plan.pretraining.settings)
    trained = round(plan.pretraining.people * (1 - before.validation - before.test))
    steps = plan_steps(trained, before, before.batch_size)
    slices: float = steps.total * steps.batch * before.slices
    looked_at = (round(plan.pretraining.people * before.validation) + min(trained, SCANS)) * before.slices
    slices += _FORWARD * steps.epochs * looked_at
    budget["pre-training"] = {"slices": slices, "minutes": slices / speed / 60}
    for curve in plan.curves:
        settings = make_settings({**plan.common, **curve.settings})
        tested = round(curve.people * settings.test) * settings.slices
        slices, trainings = 0.0, 0
        for size in curve.sizes:
            steps = plan_steps(size, settings, settings.batch_size)
            looked_at = tested + min(size, SCANS) * settings.slices
            each = steps.total * steps.batch * settings.slices + _FORWARD * looked_at
            slices += 2 * plan.seeds * each  # transfer and scratch
            trainings += 2 * plan.seeds
        slices += _FORWARD * curve.people * settings.slices  # extracted once for the probes
        minutes = slices / speed / 60 + trainings * _AROUND_S / 60
        budget[f"{trainings} trainings, {curve.name}"] = {"slices": slices, "minutes": minutes}
    return {name: {key: round(value, 2) for key, value in part.items()} for name, part in budget.items()}


def _teller(curve: CurvePlan, tell: Callable[[str], None]) -> Callable[[CurveProgress], None]:
    def on_progress(progress: CurveProgress) -> None:
        found = progress.result
        if found is None:
            return
        scores = ", ".join(f"{SHORT_NAMES[one.metric]} {one.scores[one.metric]:.3f}" for one in found.targets)
        what = scores or f"{found.status}: {found.reason}"
        tell(f"{curve.name}, {progress.done} of {progress.total}: {found.cell}: {what}, {found.seconds:.0f} s")

    return on_progress


def _report(
    plan: TransferPlan, speed: float, budget: dict[str, dict[str, float]], clock: Clock,
    curves: list[tuple[str, CurveResult]], words: dict[str, list[str]],
) -> Report:  # fmt: skip
    results = [
        Result(
            f"{name}, {curve.name}, {point.method}, {point.size} people", round(point.estimate.score, 4),
            SHORT_NAMES[curve.metric], round(point.estimate.low, 4),
            round(point.estimate.high, 4), note=f"{point.estimate.seeds} seeds, {curve.people} people tested",
        )
        for name, result in curves
        for curve in result.targets
        for point in curve.points
    ]  # fmt: skip
    settings = {
        "plan": asdict(plan), "slices_per_second": round(speed, 1), "budget": budget,
        "minutes": {**clock.minutes, "in all": round(sum(clock.minutes.values()), 2)},
        "training_minutes": {
            name: round(sum(cell.seconds for cell in result.cells) / 60, 2) for name, result in curves
        },
        "people": {name: result.plan.people for name, result in curves},
        "simulated": {name: result.plan.simulated for name, result in curves},
        "failed_cells": {name: len(result.failed) for name, result in curves},
        "words": words,
        "curves": {name: [curve.to_json() for curve in result.targets] for name, result in curves},
        "versions": package_versions("torch", "torchvision"),
    }  # fmt: skip
    return Report("transfer", settings, results)


def write_chart(transfer: Transfer, path: Path) -> None:
    """Draw the curves, one below the other, as a PNG file."""
    named: list[TargetCurve] = [
        replace(curve, name=f"{curve.name}, {name}") for name, result in transfer.curves for curve in result.targets
    ]
    content = curve_png(named, CHART_TITLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def write_words(transfer: Transfer, path: Path) -> None:
    """Write what there is to say as Markdown."""
    parts = ["# Transfer from a simulated cohort"]
    for name, sentences in transfer.words.items():
        parts += [f"## {name}", "\n".join(f"* {sentence}" for sentence in sentences)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, "\n\n".join(parts) + "\n")
