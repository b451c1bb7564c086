"""Fold scores against scikit-learn, and the corrected interval against a calculation by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from extract.probing.scores import (
    RANGES,
    auc,
    balanced_accuracy,
    corrected_interval,
    effective_number,
    mean_absolute_error,
    pearson,
    r_squared,
)


def _random_classes(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
    probabilities = rng.dirichlet(np.ones(classes), len(codes)).round(1) + 0.1  # rounding makes ties
    return codes, probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_binary_auc_is_that_of_scikit_learn_ties_included(seed):
    codes, probabilities = _random_classes(2, seed)
    assert len(np.unique(probabilities[:, 1])) < len(codes) / 2
    assert auc(codes, probabilities) == pytest.approx(metrics.roc_auc_score(codes, probabilities[:, 1]), abs=1e-12)


@pytest.mark.parametrize("classes", [3, 5])
def test_multiclass_auc_is_the_plain_mean_of_one_against_rest(classes):
    codes, probabilities = _random_classes(classes, 0)
    expected = metrics.roc_auc_score(codes, probabilities, multi_class="ovr", average="macro")
    assert auc(codes, probabilities) == pytest.approx(expected, abs=1e-12)


def test_auc_of_constant_predictions_is_one_half():
    assert auc(np.array([0, 1, 1, 0, 1]), np.full((5, 2), 0.5)) == 0.5


def test_balanced_accuracy_is_that_of_the_prior_corrected_decision():
    codes, probabilities = _random_classes(3, 1)
    frequencies = np.array([0.7, 0.2, 0.1])
    expected = metrics.balanced_accuracy_score(codes, np.argmax(probabilities / frequencies, axis=1))
    assert balanced_accuracy(codes, probabilities, frequencies) == pytest.approx(expected, abs=1e-12)


def test_balanced_accuracy_sees_what_the_most_probable_class_hides():
    # One in ten is positive and every probability is below one half, though the model ranks perfectly.
    codes = np.array([0] * 9 + [1])
    positive = np.where(codes == 1, 0.3, 0.05)
    probabilities = np.column_stack([1 - positive, positive])
    assert metrics.balanced_accuracy_score(codes, probabilities.argmax(axis=1)) == 0.5
    assert balanced_accuracy(codes, probabilities, np.array([0.9, 0.1])) == 1.0


def test_pearson_is_that_of_numpy_and_0_where_it_is_undefined():
    rng = np.random.default_rng(0)
    truth, predicted = rng.normal(size=(2, 30))
    assert pearson(truth, predicted) == pytest.approx(np.corrcoef(truth, predicted)[0, 1], abs=1e-12)
    assert pearson(truth, np.full(30, 0.1)) == 0
    assert pearson(np.full(30, 0.1), predicted) == 0


def test_r_squared_takes_the_training_mean_for_its_baseline():
    truth = np.array([1.0, 2.0, 3.0])
    assert r_squared(truth, truth, 0.0) == 1
    assert r_squared(truth, np.full(3, 5.0), 5.0) == 0  # the baseline itself, though the test mean is 2
    assert r_squared(truth, np.array([1.0, 2.0, 4.0]), 0.0) == pytest.approx(1 - 1 / 14)
    assert r_squared(np.full(3, 5.0), np.full(3, 4.0), 5.0) == 0


def test_mean_absolute_error():
    assert mean_absolute_error(np.array([1.0, 5.0]), np.array([2.0, 2.0])) == 2.0
    assert mean_absolute_error(np.array([1.0, 5.0]), 2.0) == 2.0


def test_corrected_interval_by_hand():
    # Four folds: q = 1/4, rho = 2 x 1/4 x 3/4 = 3/8, rho / (1 - rho) = 3/5.
    # Mean 0.7, variance (0.01 + 0.01 + 0 + 0) / 3, t(0.975, 3) = 3.182446.
    found = corrected_interval([0.6, 0.8, 0.7, 0.7], 1 / 3, chance=0.5)
    half = 3.182446 * np.sqrt(0.02 / 3 * (1 / 4 + 3 / 5))
    assert (found.score, found.chance) == (pytest.approx(0.7), 0.5)
    assert found.low == pytest.approx(0.7 - half, abs=1e-6)
    assert found.high == pytest.approx(0.7 + half, abs=1e-6)
    assert found.holds_chance


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_interval_is_never_narrower_than_the_corrected_resampled_t(folds):
    scores = np.random.default_rng(0).normal(0.6, 0.05, 2 * folds)
    t = 1 / (folds - 1)
    found = corrected_interval(scores, t, chance=0.5)
    half = stats.t.ppf(0.975, len(scores) - 1) * np.sqrt(scores.var(ddof=1) * (1 / len(scores) + t))
    assert half * 1.4 > (found.high - found.low) / 2 >= half * (1 - 1e-12)


def test_interval_does_not_shrink_to_nothing_with_ever_more_repeats():
    scores = list(np.random.default_rng(0).normal(0.6, 0.05, 5))
    few, many = (corrected_interval(scores * repeats, 1 / 4, chance=0.5) for repeats in (5, 500))
    floor = 2 * 1.96 * np.std(scores) * np.sqrt(0.32 / 0.68)
    assert few.high - few.low > many.high - many.low == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize(("metric", "ends"), [("auc", (0, 1)), ("r", (-1, 1)), ("mae", (0, np.inf))])
def test_interval_stays_within_what_the_score_can_be(metric, ends):
    found = corrected_interval([0.0, 1.0, 0.9], 1.0, chance=0.0, bounds=RANGES[metric])
    assert found.low == ends[0]
    assert found.high == ends[1] or metric == "mae"


def test_perfect_scores_are_no_certainty():
    found = corrected_interval([1.0] * 10, 0.25, chance=0.5, bounds=(0, 1), people=9)
    assert found.score == found.high == 1
    assert found.low == pytest.approx(stats.binomtest(9, 9).proportion_ci(method="exact").low)
    mixed = corrected_interval([1.0] * 9 + [0.9], 0.25, chance=0.5, bounds=(0, 1), people=9)
    assert mixed == corrected_interval([1.0] * 9 + [0.9], 0.25, chance=0.5, bounds=(0, 1))


def test_repeats_of_the_same_few_groups_tell_nothing_new():
    scores = [0.4, 0.7, 0.55]
    once = corrected_interval(scores, 1 / 2, chance=0.5)
    for repeats in (2, 50):
        again = corrected_interval(scores * repeats, 1 / 2, chance=0.5, groups=3.0)
        assert (again.low, again.high) == pytest.approx((once.low, once.high))
    assert corrected_interval(scores, 1 / 2, chance=0.5, groups=1000.0) == once
    assert effective_number(np.repeat([0, 1, 2, 3], 50)) == 4
    assert effective_number(np.repeat([0, 1, 2, 3], [100, 100, 1, 1])) == pytest.approx(2.04, abs=0.01)
