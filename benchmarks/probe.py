"""Probes a minute: ours, and scikit-learn's pipelines that do the same nested work; and what the matrices alone take.

A peer is what its users write: ``StandardScaler`` and ``RidgeCV`` (leave-one-out in closed form) or a grid search of
``LogisticRegression`` by log-loss, over the same 21 penalties, in ``cross_validate`` over the same number of folds and
repeats, target by target. The benchmark checks first that scores agree. Nobody's threads are limited: peers have
BLAS's, and the grid search a process for each core.

The limit is the arithmetic that no nested probe can do without: the Gram matrix of each training side and its
eigendecomposition, once per fold for all targets, at the speed at which this machine multiplies matrices.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, KFold, RepeatedKFold, RepeatedStratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.results import Report, Result
from extract.embeddings import Embeddings
from extract.probing.linear import PENALTIES
from extract.probing.probe import probe
from extract.probing.settings import ProbeSettings
from ingest.store import package_versions

#: Floating point operations of a symmetric eigendecomposition with vectors over the cube of its size, at least
#: (reduction to tridiagonal form 4/3, transformation back 2; Golub & Van Loan 2013, section 8.3).
_EIGEN_FLOPS = 10 / 3

_AGREE = 0.05  # scores: folds are others, and so is the way in which a penalty is chosen


def run_probe(
    *,
    scans: int = 40_000,
    peer_scans: int = 2_000,
    features: int = 512,
    folds: int = 5,
    repeats: int = 1,
    turns: int = 3,
) -> Report:
    """Measure probes of three regressions (one matrix, three targets) and of one classification.

    Parameters
    ----------
    scans
        That ours is measured with, beside `peer_scans`, which all are.
    features
        Of an embedding.
    folds, repeats
        Of the outer cross-validation.
    turns
        Of everything at `peer_scans`; at `scans` there is one.

    Raises
    ------
    ValueError
        If scores of a peer differ from ours.
    """
    small, large = (make_cohort(count, features) for count in (peer_scans, scans))
    settings = ProbeSettings(folds=folds, repeats=repeats)
    kinds: dict[str, tuple[list[str], Callable[[], list[float]]]] = {
        "regressions": (
            ["age", "score", "head"], lambda: _ridge_peer(small, ["age", "score", "head"], folds, repeats)
        ),
        "classification": (["sex"], lambda: _logistic_peer(small, "sex", folds, repeats)),
    }  # fmt: skip
    measured: list[tuple[str, int, int, list[float]]] = []  # name, scans, targets, seconds
    ratios: dict[str, float] = {}
    peak = matrix_speed()
    for kind, (targets, peer) in kinds.items():
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(turns):
            started = time.perf_counter()
            found = probe(small, targets, settings=settings)
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            scores = peer()
            theirs.append(time.perf_counter() - started)
            peak = max(peak, matrix_speed())  # of a shared machine the best moment is the limit
            if turn == 0:
                _check(kind, [result.headline.score for result in found], scores)
        started = time.perf_counter()
        probe(large, targets, settings=settings)
        whole = time.perf_counter() - started
        measured += [
            (f"ours, {kind}", peer_scans, len(targets), ours),
            (f"scikit-learn, {kind}", peer_scans, len(targets), theirs),
            (f"ours, {kind}", scans, len(targets), [whole]),
        ]
        ratios[f"{kind}: ours/scikit-learn"] = round(median(theirs) / median(ours), 2)
        ratios[f"{kind}: {scans}/{peer_scans} scans, time of ours"] = round(whole / median(ours), 2)
    results = []
    for name, count, probed, seconds in measured:
        speeds = [60 * probed / each for each in seconds]
        value, low, high = (round(speed, 3) for speed in (median(speeds), min(speeds), max(speeds)))
        share = float(f"{limit_flops(count, features, folds, repeats) / peak / median(seconds):.2g}")
        results.append(Result(f"{name}, {count} scans", value, "targets/min", low, high, share))
    report = {
        "scans": scans, "peer_scans": peer_scans, "features": features, "folds": folds, "repeats": repeats,
        "turns": turns, "penalties": len(PENALTIES), "cores": len(os.sched_getaffinity(0)),
        "gemm_gflops": round(peak / 1e9, 1),
        "limit_seconds": {
            str(count): round(limit_flops(count, features, folds, repeats) / peak, 4) for count in (peer_scans, scans)
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
    noise = rng.normal(size=(scans, 4))
    values = {
        "age": 62 + 7 * (known[:, 0] + known[:, 1] + noise[:, 0]),
        "score": known[:, 2] + 2 * noise[:, 1],
        "head": known[:, 3] + 0.5 * noise[:, 2],
        "sex": (known[:, 4] + noise[:, 3] > 0).astype(np.float64),
    }
    people = pd.DataFrame({"row": np.arange(scans), "participant": [f"{person:07d}" for person in range(scans)]})
    variables = {name: {"task": "binary" if name == "sex" else "continuous"} for name in values}
    return Embeddings(matrix, people, pd.DataFrame(values), variables, {"model": "simulated", "simulated": True})


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


def _ridge_peer(cohort: Embeddings, targets: list[str], folds: int, repeats: int) -> list[float]:
    """Return the mean r of each target as scikit-learn finds it."""
    splits = RepeatedKFold(n_splits=folds, n_repeats=repeats, random_state=0)
    alphas = PENALTIES * cohort.features.shape[1]
    found = []
    for target in targets:
        values = cohort.phenotypes[target].to_numpy()
        model = make_pipeline(StandardScaler(), RidgeCV(alphas))
        scores = cross_validate(model, cohort.features.astype(np.float64), values, cv=splits, scoring=_pearson)
        found.append(float(scores["test_score"].mean()))
    return found


def _logistic_peer(cohort: Embeddings, target: str, folds: int, repeats: int) -> list[float]:
    """Return the mean AUC as scikit-learn finds it."""
    splits = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=0)
    costs = 1 / (PENALTIES * cohort.features.shape[1])
    model = make_pipeline(
        StandardScaler(),
        GridSearchCV(LogisticRegression(max_iter=200), {"C": costs}, cv=KFold(5), scoring="neg_log_loss", n_jobs=-1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties, which are not chosen
        scores = cross_validate(
            model,
            cohort.features.astype(np.float64),
            cohort.phenotypes[target].to_numpy(),
            cv=splits,
            scoring="roc_auc",
        )
    return [float(scores["test_score"].mean())]


def _pearson(model: object, features: np.ndarray, truth: np.ndarray) -> float:
    return float(np.corrcoef(model.predict(features), truth)[0, 1])  # type: ignore[attr-defined]


def _check(kind: str, ours: list[float], theirs: list[float]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if abs(a - b) > _AGREE:
            raise ValueError(f"{kind}: scikit-learn scores {b:.3f}, ours {a:.3f}: they do not do the same")
