"""Probes a minute: ours, and scikit-learn's pipelines that do the same nested work; and what the matrices alone take.

A peer is what its users write: ``StandardScaler`` and ``RidgeCV`` (leave-one-out in closed form) or
``LogisticRegressionCV`` by log-loss (three inner folds, each penalty started from the last), over the same penalties
and the same outer folds, target by target. The benchmark checks first that scores agree. Nobody's threads are limited:
peers have BLAS's, and the choice among penalties a process for each core.

The limit is the arithmetic that no nested probe can do without: the Gram matrix of each training side and its
eigendecomposition, once per fold for all targets, at the speed at which this machine multiplies matrices.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import PredefinedSplit, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.results import Report, Result
from extract.embeddings import Embeddings
from extract.probing.confounds import read_confounds
from extract.probing.effort import estimate_effort
from extract.probing.linear import PENALTIES
from extract.probing.probe import probe
from extract.probing.results import TargetResult
from extract.probing.settings import ProbeSettings
from ingest.store import package_versions

#: Floating point operations of a symmetric eigendecomposition with vectors over the cube of its size, at least
#: (reduction to tridiagonal form 4/3, transformation back 2; Golub & Van Loan 2013, section 8.3).
_EIGEN_FLOPS = 10 / 3

#: Scores of 40,000 scans differ by no more, and of fewer in proportion to what chance does to them: the way in which a
#: penalty is chosen is another one.
_AGREE, _AGREE_SCANS = 0.002, 40_000

REGRESSIONS, CLASSIFICATIONS = ("age", "score", "household", "income"), ("sex", "smoking")
_TASKS = {"household": "count", "income": "ordinal", "sex": "binary", "smoking": "binary"}


def run_probe(
    *,
    scans: int = 40_000,
    few_scans: int = 2_000,
    features: int = 512,
    folds: int = 5,
    repeats: int = 1,
    turns: int = 3,
    phenotypes: int = 1_000,
    patterns: int = 20,
) -> Report:
    """Measure probes of four regressions (one matrix, four targets), of two classifications, and of many phenotypes.

    Parameters
    ----------
    scans, few_scans
        Of the two cohorts.
    features
        Of an embedding.
    folds, repeats
        Of the outer cross-validation.
    turns
        Of everything at `few_scans`; at `scans` there is one.
    phenotypes, patterns
        Continuous ones that are probed at once, with so many patterns of missing values: ours alone, once.

    Raises
    ------
    ValueError
        If scores of a peer differ from ours.
    """
    settings = ProbeSettings(folds=folds, repeats=repeats)
    seconds: dict[tuple[str, int, int], list[float]] = {}  # by name, scans, targets
    ratios: dict[str, float] = {}
    peak = matrix_speed()
    for count, times in ((few_scans, turns), (scans, 1)):
        cohort = make_cohort(count, features)
        for kind, targets, peer in (
            ("regressions", REGRESSIONS, _ridge_peer), ("classifications", CLASSIFICATIONS, _logistic_peer)
        ):  # fmt: skip
            ours = seconds.setdefault((f"ours, {kind}", count, len(targets)), [])
            theirs = seconds.setdefault((f"scikit-learn, {kind}", count, len(targets)), [])
            for turn in range(times):
                started = time.perf_counter()
                found = probe(cohort, targets, settings=settings)
                ours.append(time.perf_counter() - started)
                started = time.perf_counter()
                scores = [peer(cohort, result) for result in found]
                theirs.append(time.perf_counter() - started)
                peak = max(peak, matrix_speed())  # of a shared machine the best moment is the limit
                if turn == 0:
                    _check([result.headline.score for result in found], scores, targets, count)
            ratios[f"{kind}: ours/scikit-learn, {count} scans"] = round(median(theirs) / median(ours), 2)
    many = make_many(cohort, phenotypes, patterns)
    names = list(map(str, many.phenotypes.columns))
    effort = estimate_effort(many, names, settings=settings, confounds=read_confounds(many, ()))
    started = time.perf_counter()
    probe(many, names, settings=settings)
    seconds[f"ours, {patterns} patterns of missing values", scans, phenotypes] = [time.perf_counter() - started]
    results = []
    for (name, count, probed), taken in seconds.items():
        speeds = [60 * probed / each for each in taken]
        value, low, high = (round(speed, 3) for speed in (median(speeds), min(speeds), max(speeds)))
        matrices = patterns if probed == phenotypes else 1
        share = float(f"{matrices * limit_flops(count, features, folds, repeats) / peak / median(taken):.2g}")
        note = f"{median(taken):.3g} s"
        results.append(Result(f"{name}, {count} scans", value, "targets/min", low, high, share, note))
    report = {
        "scans": scans, "few_scans": few_scans, "features": features, "folds": folds, "repeats": repeats,
        "turns": turns, "penalties": len(PENALTIES), "cores": len(os.sched_getaffinity(0)),
        "phenotypes": phenotypes, "patterns": effort.patterns, "estimated_seconds": float(f"{effort.seconds:.3g}"),
        "gemm_gflops": round(peak / 1e9, 1),
        "limit_seconds": {
            str(count): round(limit_flops(count, features, folds, repeats) / peak, 4) for count in (few_scans, scans)
        },
        "versions": package_versions("numpy", "scipy", "scikit-learn"),
    }  # fmt: skip
    return Report("probe", report, results, ratios)


def make_cohort(scans: int, features: int) -> Embeddings:
    """Return embeddings of as many people, features correlated as those of networks are, that know each target."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, features + 1) ** -0.5  # eigenvalues fall as one over their number
    latent = rng.normal(size=(scans, features)) * spread
    matrix = (latent @ np.linalg.qr(rng.normal(size=(features, features)))[0]).astype(np.float32)
    known = latent / spread
    noise = rng.normal(size=(scans, 6))
    values = {
        "age": 62 + 7 * (known[:, 0] + known[:, 1] + noise[:, 0]),
        "score": known[:, 2] + 2 * noise[:, 1],
        "household": rng.poisson(np.exp(0.7 + 0.3 * known[:, 3])).astype(np.float64),
        "income": np.digitize(known[:, 4] + noise[:, 2], [-1, 0, 1, 2]).astype(np.float64),
        "sex": (known[:, 5] + noise[:, 3] > 0).astype(np.float64),
        "smoking": (0.3 * known[:, 6] + noise[:, 4] > 1).astype(np.float64),
    }
    people = pd.DataFrame({"row": np.arange(scans), "participant": [f"{person:07d}" for person in range(scans)]})
    variables = {name: {"task": _TASKS.get(name, "continuous")} for name in values}
    return Embeddings(matrix, people, pd.DataFrame(values), variables, {"model": "simulated", "simulated": True})


def make_many(cohort: Embeddings, phenotypes: int, patterns: int) -> Embeddings:
    """Return a cohort with other phenotypes; those of a pattern are known of the same nine tenths of people."""
    rng = np.random.default_rng(1)
    scans, features = cohort.features.shape
    effects = rng.normal(size=(features, phenotypes)) * (rng.random((features, phenotypes)) < 0.02)
    values = cohort.features @ effects + rng.normal(size=(scans, phenotypes))
    for pattern in range(patterns):
        values[rng.random(scans) < 0.1, pattern::patterns] = np.nan
    table = pd.DataFrame(values, columns=[f"phenotype{number}" for number in range(phenotypes)])
    variables = {str(name): {"task": "continuous"} for name in table.columns}
    return replace(cohort, phenotypes=table, variables=variables)


def limit_flops(scans: int, features: int, folds: int, repeats: int) -> float:
    """Return the operations of the smaller Gram matrix of each training side and of its eigendecomposition."""
    train = scans * (folds - 1) / folds
    rank = min(train, features)
    return folds * repeats * (train * features * rank + _EIGEN_FLOPS * rank**3)  # a Gram matrix is symmetric: half


def matrix_speed(size: int = 1024, turns: int = 5) -> float:
    """Return floating point operations a second of float64 matrix products on all cores, the best of some turns."""
    a = np.random.default_rng(0).normal(size=(size, size))
    best = np.inf
    for _ in range(turns):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _ridge_peer(cohort: Embeddings, ours: TargetResult) -> float:
    """Return the mean r of a target as scikit-learn finds it on the same folds."""
    values = cohort.phenotypes[ours.name].to_numpy()
    values = np.log1p(values) if ours.task == "count" else values
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES * cohort.features.shape[1]))
    return _mean_score(model, cohort, values, ours, _pearson)


def _logistic_peer(cohort: Embeddings, ours: TargetResult) -> float:
    """Return the mean AUC of a target as scikit-learn finds it on the same folds."""
    costs = 1 / (PENALTIES * cohort.features.shape[1])
    logistic = LogisticRegressionCV(Cs=costs, cv=3, scoring="neg_log_loss", n_jobs=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties, which are not chosen
        warnings.simplefilter("ignore", FutureWarning)  # of parameters that are left as they are
        values = cohort.phenotypes[ours.name].to_numpy()
        return _mean_score(make_pipeline(StandardScaler(), logistic), cohort, values, ours, "roc_auc")


def _mean_score(
    model: Pipeline,
    cohort: Embeddings,
    values: np.ndarray,
    ours: TargetResult,
    scoring: str | Callable[[Pipeline, np.ndarray, np.ndarray], float],
) -> float:
    assert ours.out_of_fold is not None
    folds = PredefinedSplit(ours.out_of_fold.fold)
    scores = cross_validate(model, cohort.features.astype(np.float64), values, cv=folds, scoring=scoring)
    return float(scores["test_score"].mean())


def _pearson(model: Pipeline, features: np.ndarray, truth: np.ndarray) -> float:
    return float(np.corrcoef(model.predict(features), truth)[0, 1])


def _check(ours: list[float], theirs: list[float], targets: Sequence[str], scans: int) -> None:
    allowed = _AGREE * max(1, _AGREE_SCANS / scans) ** 0.5
    for a, b, target in zip(ours, theirs, targets, strict=True):
        if abs(a - b) > allowed:
            raise ValueError(
                f"{target} of {scans} scans: scikit-learn scores {b:.4f}, ours {a:.4f}, which are more than "
                f"{allowed:.4f} apart: they do not do the same"
            )
