"""With confounds a penalty is chosen as it would be if they were removed anew without the scans that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from extract.probing.confounds import fit_residualiser
from extract.probing.cross_validation import fit_classes, fit_values, penalty_folds
from extract.probing.groups import Groups
from extract.probing.linear import PENALTIES
from extract.probing.logistic import logistic, probabilities

SCANS, FEATURES = 120, 12


def everybody_alone(scans: int) -> Groups:
    people = np.arange(scans)
    return Groups(people, people, people, np.zeros(scans, np.int64))


def confounded(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, confound (scan, 1), and a target of which the confound explains 9 tenths, the features 5 %."""
    rng = np.random.default_rng(seed)
    confound = rng.normal(size=(SCANS, 1))
    own = rng.normal(size=(SCANS, FEATURES))
    features = own + confound * rng.normal(size=FEATURES)
    weights = rng.normal(size=FEATURES)
    return features, confound, own @ weights / np.linalg.norm(weights) + rng.normal(size=SCANS) + 4 * confound[:, 0]


def without(confound: np.ndarray, features: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return fit_residualiser(features[kept], confound[kept]).apply(features, confound)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_ridge_regression(seed):
    features, confound, target = confounded(seed)
    groups, everybody = everybody_alone(SCANS), np.ones(SCANS, np.bool_)
    left = without(confound, features, everybody)
    rows = np.arange(SCANS)

    errors = np.zeros(len(PENALTIES))
    for scan in range(SCANS):  # the slow way: the confound is removed without the scan, and so is its mean
        kept = rows != scan
        seen = without(confound, features, kept)
        mean, scale = seen[kept].mean(axis=0), left.std(axis=0)
        standard = (seen - mean) / scale
        for place, penalty in enumerate(PENALTIES * FEATURES):
            gram = standard[kept].T @ standard[kept] + penalty * np.eye(FEATURES)
            centre = target[kept].mean()
            weights = np.linalg.solve(gram, standard[kept].T @ (target[kept] - centre))
            explained = fit_residualiser(target[kept, None], confound[kept])
            beyond = explained.apply(target[:, None], confound)[scan, 0]  # what is left of it to be told
            errors[place] += (beyond - centre - standard[scan] @ weights) ** 2
    best = int(errors.argmin())

    found = fit_values(left, target[:, None], groups, rows, confound)
    plain = fit_values(left, target[:, None], groups, rows)
    place, before = (int(np.abs(PENALTIES * FEATURES - fit.penalties[0]).argmin()) for fit in (found, plain))
    assert abs(place - best) <= 1
    assert before < place, "it was too strong"
    same = fit_values(left, target[:, None], groups, rows, confound)
    np.testing.assert_array_equal(found.coefficients, same.coefficients)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_logistic_regression(seed):
    features, confound, target = confounded(seed)
    codes = (target > np.median(target)).astype(np.int64)
    groups, rows = everybody_alone(SCANS), np.arange(SCANS)
    left = without(confound, features, np.ones(SCANS, np.bool_))
    folds = penalty_folds(groups, codes, rows, [seed], 5)

    losses = np.zeros(len(PENALTIES))
    for fold in range(5):
        kept = folds != fold
        seen = without(confound, features, kept) / left.std(axis=0)
        for place, penalty in enumerate(PENALTIES * FEATURES):
            fit = logistic(seen[kept], codes[kept], folds[kept], rows[kept], penalty=penalty)
            chances = probabilities(fit.decide(seen[~kept]))
            losses[place] -= np.log(chances[np.arange(len(chances)), codes[~kept]]).sum()

    found = fit_classes(left, codes, groups, rows, [seed], confound)
    place = int(np.abs(PENALTIES * FEATURES - found.penalties[0]).argmin())
    assert losses[place] <= losses.min() * 1.002


def test_the_search_of_a_logistic_penalty_leaves_what_is_worse_than_guessing():
    """Ridge regressions of the classes begin it where many weights fit the people trained on, and nobody else."""
    rng = np.random.default_rng(1)
    mixed = np.diag(np.exp(rng.normal(size=300))) @ np.linalg.qr(rng.normal(size=(300, 300)))[0]
    features = rng.normal(size=(100, 300)) @ mixed
    codes = (rng.random(100) < 0.2).astype(np.int64)
    features[:, :2] += features.std() * np.eye(2)[codes]
    groups, rows = everybody_alone(100), np.arange(100)
    folds = penalty_folds(groups, codes, rows, [1], 5)
    found = fit_classes(features, codes, groups, rows, [1])
    chosen = float(found.penalties[0])
    loss, guess = 0.0, 0.0
    for fold in range(5):
        kept = folds != fold
        chances = probabilities(
            logistic(features[kept], codes[kept], folds[kept], rows[kept], penalty=chosen).decide(features[~kept])
        )
        loss -= np.log(chances[np.arange(len(chances)), codes[~kept]]).sum()
        guess -= np.log(np.bincount(codes[kept])[codes[~kept]] / kept.sum()).sum()
    assert loss <= 1.02 * guess
