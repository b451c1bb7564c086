"""Fine-tuning where the truth is known: simulated people whose sex and age show, and three phenotypes that do not.

One network is trained for sex and age, another for the phenotypes without effect, on the same people. Beside them stand
linear probes of the network as it was before (the same weights and training people; `finetune.curves.frozen`), scored
on the same people. Everything that decides about the outcome is in `PLAN`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import Report, Result
from extract.probing.bootstrap import draw_weights, percentile_interval, weighted_auc, weighted_pearson
from extract.probing.numbers import SHORT_NAMES
from extract.probing.results import OutOfFold, TargetResult
from extract.probing.scores import auc, pearson
from finetune import finetune
from finetune.cohort import read_cohort
from finetune.curves.frozen import embed_once, probe_cell
from finetune.results import SPLIT, RunResult
from finetune.run import Progress
from finetune.settings import FinetuneSettings, make_settings
from ingest import IngestSettings, ingest
from ingest.simulate import simulate_cohort
from ingest.store import VolumeStore, open_store, package_versions

TUNED, FROZEN = "fine-tuned", "frozen probe"
KNOWN, NULL = "known", "null"
DRAWS = 2000
LEAST_SEX_AUC = 0.98


@dataclass(frozen=True)
class Pretraining:
    """A run on a simulated cohort of its own, whose weights others begin with.

    Attributes
    ----------
    people, seed, layout
        Of that cohort, see `ingest.simulate_cohort`.
    settings
        Of the run, see `finetune.FinetuneSettings`.
    """

    people: int
    seed: int
    layout: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class CohortPlan:
    """What is simulated, and how it is trained on.

    Attributes
    ----------
    people, seed
        Of the cohort.
    common
        Settings of both runs, see `finetune.FinetuneSettings`.
    known, null
        More of them: of the run for what shows, and of that for what does not.
    pretraining
        What the weights are from; None begins with random ones.
    """

    people: int
    seed: int
    common: Mapping[str, Any]
    known: Mapping[str, Any]
    null: Mapping[str, Any]
    pretraining: Pretraining | None = None


PLAN = CohortPlan(
    people=400,
    seed=11,
    common={
        "model": "resnet18", "view": "coronal", "slices": 4, "scale": 0.5, "validation": 0.15, "test": 0.25,
        "batch_size": 16, "weight_decay": 0.05, "tensorboard": False, "bootstrap": DRAWS,
        # In a standard space shape shows as position, and shifts by 5 mm hide a difference of 4 mm.
        "augmentation": "none",
    },
    known={"target": ("sex", "age"), "lr": 1e-3, "epochs": 15},
    null={"target": ("household_size", "income", "smoking"), "lr": 1e-3, "epochs": 6},
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """The headline score of a target on the people tested, with a 95 % interval over draws of them."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies within the interval."""
        return self.low <= value <= self.high

    def to_json(self) -> dict[str, float]:
        """Return the numbers, rounded."""
        return {name: round(number, 4) for name, number in vars(self).items()}


@dataclass(frozen=True)
class Compared:
    """A target: what fine-tuning and the frozen probe reach on the same people, and the difference."""

    name: str
    metric: str
    people: int
    chance: float
    tuned: Score
    frozen: Score
    gap: Score


@dataclass
class Clock:
    """Minutes of each part."""

    minutes: dict[str, float] = field(default_factory=dict)
    _begun: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Count what has passed since the last lap to a part."""
        now = time.perf_counter()
        self.minutes[name] = round(self.minutes.get(name, 0.0) + (now - self._begun) / 60, 2)
        self._begun = now


def run_finetune_cohort(directory: Path, plan: CohortPlan = PLAN, tell: Callable[[str], None] = print) -> Report:
    """Simulate, ingest, fine-tune, probe, compare.

    Parameters
    ----------
    directory
        Holds cohorts, which are kept, and runs, which are made anew.
    tell
        Is told how it goes, line by line.
    """
    clock = Clock()
    store = prepare_cohort(directory, plan.people, seed=plan.seed, layout="ukb")
    weights = "scratch"
    if plan.pretraining is not None:
        before, run_dir = plan.pretraining, directory / "pretrained"
        cohort = prepare_cohort(directory, before.people, seed=before.seed, layout=before.layout)
        clock.lap("simulation and ingest")
        shutil.rmtree(run_dir, ignore_errors=True)
        weights = str(pretrain(cohort, run_dir, before, tell).run_dir)
        clock.lap("pre-training")
    clock.lap("simulation and ingest")
    return demonstrate(store, directory / "runs", plan, weights, clock, tell)


def prepare_cohort(parent: Path, people: int, *, seed: int, layout: str) -> VolumeStore:
    """Simulate a cohort and ingest it, unless that was done before; of the scans only the store is kept."""
    directory = parent / f"cohort-{seed}-{layout}"
    done, path = directory / "done.json", directory / "cohort.zarr"
    wanted = {"people": people, "seed": seed, "layout": layout}
    if not (done.is_file() and json.loads(done.read_text()) == wanted):
        shutil.rmtree(directory, ignore_errors=True)
        source = directory / "source"
        simulate_cohort(source, people, seed=seed, layout=layout)
        phenotypes = source / "phenotypes.csv" if layout == "ukb" else None
        ingest(source, path, IngestSettings(phenotypes=phenotypes))
        shutil.rmtree(source)
        done.write_text(json.dumps(wanted))
    return open_store(path)


def pretrain(store: VolumeStore, run_dir: Path, plan: Pretraining, tell: Callable[[str], None]) -> RunResult:
    """Train on the cohort of a plan; a run that is there goes on, or is taken as it is."""
    settings = make_settings({"weights": "scratch", **plan.settings})
    result = finetune(store.path, run_dir, settings, report=False, on_progress=teller("pre-training", tell))
    scores = ", ".join(f"{one.name} {SHORT_NAMES[one.metric]} {one.headline.score:.3f}" for one in result.test)
    tell(f"pre-trained on {result.people['train']} simulated people: {scores} of {result.people['test']} others")
    return result


def teller(name: str, tell: Callable[[str], None]) -> Callable[[Progress], None]:
    """Return what tells of a training after each of its validations."""
    told: dict[str, float] = {}
    speed = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal told, speed
        speed = progress.scans_per_second or speed  # it is 0 when an epoch has just come to its end
        if progress.scores is told or not progress.scores:
            return
        told = progress.scores
        scores = ", ".join(f"{target} {score:.3f}" for target, score in progress.scores.items())
        tell(f"{name}: epoch {progress.epoch} of {progress.epochs}, {speed:.1f} scans/s, validation: {scores}")

    return on_progress


def demonstrate(
    store: VolumeStore, folder: Path, plan: CohortPlan, weights: str, clock: Clock, tell: Callable[[str], None] = print
) -> Report:
    """Train both runs, probe, and compare.

    Parameters
    ----------
    folder
        Of the runs, made anew.
    weights
        ``scratch``, or the folder of a run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    runs: dict[str, RunResult] = {}
    compared: dict[str, list[Compared]] = {}
    used: dict[str, FinetuneSettings] = {}
    for name, own in ((KNOWN, plan.known), (NULL, plan.null)):
        split = str(folder / KNOWN / SPLIT) if name == NULL else None
        settings = make_settings({**plan.common, **own, "weights": weights, "split": split})
        runs[name] = finetune(store.path, folder / name, settings, report=False, on_progress=teller(name, tell))
        used[name] = settings
        clock.lap(f"training, {name}")
        cohort = read_cohort(store, settings, folder / name / SPLIT)
        embeddings = embed_once(store, folder, used[KNOWN])
        frozen = probe_cell(store, embeddings, cohort, settings).results
        people = store.scans["participant"].to_numpy().astype(str)
        compared[name] = [compare(*pair, people) for pair in zip(runs[name].test, frozen, strict=True)]
        clock.lap("frozen probes")
    everything = [*compared[KNOWN], *compared[NULL]]
    results = [
        Result(
            f"{one.name}, {way}", round(score.value, 4), SHORT_NAMES[one.metric],
            round(score.low, 4), round(score.high, 4),
            note=f"{one.people} people, chance {one.chance:g}",
        )
        for one in everything
        for way, score in ((TUNED, one.tuned), (FROZEN, one.frozen))
    ]  # fmt: skip
    outcome = {
        "people": plan.people, "seed": plan.seed, "simulated": bool(store.attrs["simulated"]),
        "weights": "scratch" if plan.pretraining is None else "pre-trained on another simulated cohort",
        "pretraining": None if plan.pretraining is None else asdict(plan.pretraining),
        "runs": {name: described(one) for name, one in used.items()},
        "people_of_parts": runs[KNOWN].people, "scans_of_parts": runs[KNOWN].scans,
        "best_epoch": {name: run.best_epoch for name, run in runs.items()},
        "training_scans_per_second": {name: round(run.scans_per_second, 2) for name, run in runs.items()},
        "minutes": {**clock.minutes, "in all": round(sum(clock.minutes.values()), 2)},
        "tuned_minus_frozen": {one.name: one.gap.to_json() for one in everything},
        "holds": what_holds(compared[KNOWN], compared[NULL]),
        "versions": package_versions("torch", "torchvision"),
    }  # fmt: skip
    return Report("finetune-cohort", outcome, results)


def described(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the settings of a run that are not the defaults, without names of files."""
    given = settings.model_dump(mode="json", exclude={"weights", "weights_dir", "split"}, exclude_defaults=True)
    return {name: value for name, value in given.items() if value is not None}


def compare(tuned: TargetResult, frozen: TargetResult, people: np.ndarray) -> Compared:
    """Score a target of two methods on the same scans, and the difference on the same draws of people.

    Parameters
    ----------
    people
        Text (row of the store,), whose scan it is.

    Raises
    ------
    ValueError
        If a score is not defined.
    """
    found = [_predictions(one) for one in (tuned, frozen)]
    both = np.intersect1d(found[0].rows, found[1].rows)
    units = np.unique(people[both], return_inverse=True)[1]
    drawn = draw_weights(int(units.max()) + 1, DRAWS, 0)[:, units].astype(np.float64)
    classes = bool(tuned.labels)
    (value, of_draws), (other, of_same_draws) = (_score(one, both, drawn, classes) for one in found)
    scores = _with_interval(value, of_draws), _with_interval(other, of_same_draws)
    gap = _with_interval(value - other, of_draws - of_same_draws)
    chance = 0.5 if classes else 0.0
    return Compared(tuned.name, tuned.metric, int(units.max()) + 1, chance, scores[0], scores[1], gap)


def _predictions(one: TargetResult) -> OutOfFold:
    if one.out_of_fold is None:
        raise ValueError(f"{one.name} has no score: {one.reason}; use more people")
    return one.out_of_fold


def _score(found: OutOfFold, rows: np.ndarray, drawn: np.ndarray, classes: bool) -> tuple[float, np.ndarray]:
    """Return the score of some rows, and that of each draw of them."""
    order = np.argsort(found.rows)
    at = order[np.searchsorted(found.rows[order], rows)]
    truth, predicted = found.truth[at], found.predicted[at]
    if classes:
        codes = truth.astype(np.int64)
        return auc(codes, predicted), weighted_auc(codes, predicted, drawn)
    return pearson(truth, predicted), weighted_pearson(truth, predicted, drawn)


def _with_interval(value: float, of_draws: np.ndarray) -> Score:
    low, high = percentile_interval(of_draws[None]) or (float("nan"), float("nan"))
    return Score(value, low, high)


def what_holds(known: list[Compared], null: list[Compared]) -> dict[str, bool]:
    """Tell what was to be shown, and whether it is so."""
    holds = {}
    for one in known:
        if one.name == "sex":
            holds[f"sex AUC at least {LEAST_SEX_AUC:g}"] = one.tuned.value >= LEAST_SEX_AUC
        else:
            holds[f"{one.name} {SHORT_NAMES[one.metric]} above the frozen probe's"] = one.gap.value > 0
            holds[f"{one.name} {SHORT_NAMES[one.metric]} above it by an interval without 0"] = one.gap.low > 0
    holds |= {f"interval of {one.name} holds chance": one.tuned.holds(one.chance) for one in null}
    return holds


def show_cohort(report: Report, console: Console) -> None:
    """Print the scores of both ways beside each other, and what holds."""
    table = Table(title=f"benchmark {report.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("target", "metric", TUNED, "95 % interval", FROZEN, "95 % interval", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column in ("target", "metric") else "right")
    found = {result.name: result for result in report.results}
    for target, gap in report.settings["tuned_minus_frozen"].items():
        cells: list[str] = []
        for way in (TUNED, FROZEN):
            result = found[f"{target}, {way}"]
            cells += [f"{result.value:.3f}", f"{result.low:.3f} to {result.high:.3f}"]
        cells += [f"{gap['value']:+.3f}", f"{gap['low']:+.3f} to {gap['high']:+.3f}"]
        table.add_row(target, found[f"{target}, {TUNED}"].unit, *cells)
    console.print(table, highlight=False)
    for name, holds in report.settings["holds"].items():
        console.print(f"{name}: {'yes' if holds else 'no'}", highlight=False)
    for name, minutes in report.settings["minutes"].items():
        console.print(f"{name}: {minutes:.1f} min", highlight=False)
