"""Phenotypes that have nothing to do with brains: how often intervals hold chance, and how wide they are.

The simulated cohort of `benchmarks.finetune_cohort` has three of them. For each seed their values are exchanged between
people, a person's three together, which is as good as another cohort; folds, splits and trainings follow from the seed.
Probes are of the features of a random network, fine-tuning is as in that benchmark.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.finetune_cohort import PLAN, CohortPlan, described, prepare_cohort
from benchmarks.results import Report, Result
from extract import build_encoder, extract
from extract.probing.probe import probe
from extract.probing.results import Interval, TargetResult
from extract.probing.settings import ProbeSettings
from finetune import finetune
from finetune.settings import make_settings
from ingest.places import as_place
from ingest.store import VolumeStore, package_versions, write_phenotypes

PROBE, TUNED = "probe", "fine-tuned"
AUC_WITHIN = 0.02  # of 0.5, the mean over seeds
LEAST_SHARE = 52 / 60  # of intervals at 95 % that hold chance: fewer happen to one in 300 calibrated methods


def run_nulls(
    directory: Path,
    *,
    probe_seeds: int = 20,
    finetune_seeds: int = 20,
    plan: CohortPlan = PLAN,
    tell: Callable[[str], None] = print,
) -> Report:
    """Simulate, ingest, and score phenotypes without effect.

    Parameters
    ----------
    directory
        Holds the cohort, which is kept, and runs, which are removed.
    tell
        Is told how it goes, line by line.
    """
    store = prepare_cohort(directory, plan.people, seed=plan.seed, layout="ukb")
    return measure_nulls(store, directory / "nulls", plan, probe_seeds, finetune_seeds, tell)


def measure_nulls(
    store: VolumeStore,
    folder: Path,
    plan: CohortPlan,
    probe_seeds: int,
    finetune_seeds: int,
    tell: Callable[[str], None] = print,
) -> Report:
    """Score the null phenotypes of a plan, probes first.

    Parameters
    ----------
    folder
        Of runs, made anew and removed.
    """
    settings = make_settings({**plan.common, **plan.null, "weights": "scratch"})
    names = list(settings.target)
    embeddings = extract(store.path, build_encoder(weights="random"))
    found: dict[str, list[TargetResult]] = {PROBE: [], TUNED: []}
    begun = time.perf_counter()
    for seed in range(probe_seeds):
        table = exchange(embeddings.phenotypes, embeddings.scans["participant"].to_numpy(), names, seed)
        results = probe(replace(embeddings, phenotypes=table), names, settings=ProbeSettings(seed=seed))
        found[PROBE] += results
        tell(f"{PROBE}, seed {seed}: {_in_words(results)}")
    minutes = {PROBE: round((time.perf_counter() - begun) / 60, 2)}
    begun = time.perf_counter()
    for seed in range(finetune_seeds):
        shutil.rmtree(folder, ignore_errors=True)
        table = exchange(store.phenotypes, store.scans["participant"].to_numpy(), names, seed)
        path = linked(store, folder / "store.zarr", table)
        seeded = make_settings({**plan.common, **plan.null, "weights": "scratch", "seed": seed})
        run = finetune(path, folder / "run", seeded, report=False)
        found[TUNED] += run.test
        tell(f"{TUNED}, seed {seed}: {_in_words(run.test)}")
    shutil.rmtree(folder, ignore_errors=True)
    minutes[TUNED] = round((time.perf_counter() - begun) / 60, 2)
    seeds = {PROBE: probe_seeds, TUNED: finetune_seeds}
    summary = {way: summarise([one.headline for one in results], seeds[way]) for way, results in found.items()}
    scores: list[Result] = []
    for way, of_way in found.items():
        for name in names:
            reached = [one.headline.score for one in of_way if one.name == name]
            if reached:
                unit = "AUC" if of_way[names.index(name)].metric == "auc" else "r"
                value, low, high = (round(float(of(reached)), 4) for of in (np.mean, np.min, np.max))
                scores.append(Result(f"{way}, {name}", value, unit, low, high, note=f"mean of {len(reached)} seeds"))
    outcome: dict[str, Any] = {
        "people": plan.people, "seed": plan.seed, "simulated": bool(store.attrs["simulated"]), "targets": names,
        "seeds": seeds, "finetune": described(settings), "summary": summary, "minutes": minutes,
        "versions": package_versions("torch", "torchvision", "scikit-learn"),
    }  # fmt: skip
    return Report("nulls", outcome, scores)


def exchange(phenotypes: pd.DataFrame, participants: np.ndarray, names: list[str], seed: int) -> pd.DataFrame:
    """Return phenotypes of which some are those of another person each, the same at all scans of a person."""
    people, first, whose = np.unique(participants, return_index=True, return_inverse=True)
    given = np.random.default_rng(seed).permutation(len(people))
    exchanged = phenotypes.copy()
    exchanged[names] = phenotypes[names].to_numpy()[first[given]][whose]
    return exchanged


def linked(store: VolumeStore, path: Path, phenotypes: pd.DataFrame) -> Path:
    """Write a store with other phenotypes, whose volumes are links to those of the first one."""

    def copy(source: str, target: str) -> None:
        if Path(source).name == "zarr.json":
            shutil.copy2(source, target)
        else:
            os.link(source, target)

    shutil.copytree(str(store.path), path, copy_function=copy)
    write_phenotypes(as_place(path), phenotypes, store.variables)
    return path


def summarise(intervals: list[Interval], seeds: int) -> dict[str, Any]:
    """Return how many intervals hold chance, how wide they are, and how far the mean scores lie from chance."""
    known = [one for one in intervals if np.isfinite(one.low)]
    if not known:
        return {}
    areas = [one.score for one in known if one.chance == 0.5]
    holding = sum(one.holds_chance for one in known)
    return {
        "seeds": seeds,
        "intervals": len(known),
        "hold_chance": holding,
        "mean_width": round(float(np.mean([one.high - one.low for one in known])), 4),
        "mean_auc": round(float(np.mean(areas)), 4) if areas else None,
        "mean_auc_error": round(float(np.std(areas, ddof=1) / len(areas) ** 0.5), 4) if len(areas) > 1 else None,
        "enough_hold_chance": bool(holding >= LEAST_SHARE * len(known)),
        f"mean_auc_within_{AUC_WITHIN:g}": bool(abs(np.mean(areas) - 0.5) <= AUC_WITHIN) if areas else None,
    }


def show_nulls(report: Report, console: Console) -> None:
    """Print mean scores, and what the intervals are worth."""
    table = Table(title=f"benchmark {report.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "metric", "mean", "lowest", "highest", "seeds"):
        table.add_column(column, justify="left" if column in ("what", "metric") else "right")
    for one in report.results:
        seeds = report.settings["seeds"][one.name.split(",")[0]]
        table.add_row(one.name, one.unit, *(f"{score:.3f}" for score in (one.value, one.low, one.high)), str(seeds))
    console.print(table, highlight=False)
    for way, found in report.settings["summary"].items():
        if found:
            line = f"{way}: {found['hold_chance']} of {found['intervals']} intervals hold chance"
            line += f", mean width {found['mean_width']:.3f}"
            if found["mean_auc"] is not None:
                line += f", mean AUC {found['mean_auc']:.3f}"
            console.print(line, highlight=False)


def _in_words(results: list[TargetResult]) -> str:
    return ", ".join(
        f"{one.name} {one.headline.score:.3f} ({one.headline.low:.3f} to {one.headline.high:.3f})" for one in results
    )
