"""Permutation p-values and bootstrap intervals: exact where nothing is there, small where something is."""

from __future__ import annotations

import numpy as np
import pytest
from embedded import make_cohort, make_embeddings
from scipy import stats
from sklearn.metrics import roc_auc_score

from extract.probing.bootstrap import (
    draw_weights,
    percentile_interval,
    weighted_auc,
    weighted_balanced_accuracy,
    weighted_mean_absolute_error,
    weighted_pearson,
    weighted_r_squared,
)
from extract.probing.confounds import ConfoundValues
from extract.probing.groups import Groups
from extract.probing.linear import ridge
from extract.probing.permutation import _exchange, _fold_statistic, permutation_test
from extract.probing.probe import probe
from extract.probing.scores import auc, balanced_accuracy, mean_absolute_error, pearson, r_squared
from extract.probing.settings import ProbeSettings


def test_as_many_folds_as_people_leave_a_p_value():
    rng = np.random.default_rng(0)
    known = rng.normal(size=40)
    embeddings = make_embeddings(np.column_stack([known, rng.normal(size=(40, 3))]), {"y": known, "s": known > 0})
    for found in probe(embeddings, settings=ProbeSettings(folds=40, repeats=1, permutations=39)):
        assert found.headline.score > 0.9
        assert found.p_value == 1 / 40, "folds of one person have no correlation"


def alone(count: int) -> Groups:
    people = np.arange(count)
    return Groups(people, people, people, np.zeros(count, dtype=np.int64))


# ---- permutations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "repeated"), [("continuous", False), ("binary", True), ("multiclass", False)])
def test_p_values_of_nothing_are_uniform(task, repeated):
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        people = np.repeat(np.arange(30), 2) if repeated else np.arange(60)
        label = {
            "continuous": rng.normal(size=60),
            "binary": rng.permutation(60) % 2,
            "multiclass": rng.integers(0, 3, 60),
        }
        groups = Groups(people, people, people, np.zeros(60, dtype=np.int64))
        truth = label[task][people] if repeated else label[task]
        features = rng.normal(size=(60, 20)) + (rng.normal(size=(60, 20))[people] if repeated else 0)
        p_value, _ = permutation_test(features, truth, task, groups, None, permutations=39, folds=5, seed=seed)
        found.append(p_value)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) < 0.15


@pytest.mark.parametrize("task", ["continuous", "count", "binary", "multiclass"])
def test_p_values_of_effects_are_the_least_there_can_be(task):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 10))
    signal = features[:, 0] + 0.3 * rng.normal(size=100)
    truth = {
        "continuous": signal,
        "count": np.round(np.exp(signal)),
        "binary": (signal > 0).astype(int),
        "multiclass": np.digitize(signal, [-0.5, 0.5]),
    }[task]
    p_value, null = permutation_test(features, truth, task, alone(100), None, permutations=49, folds=5, seed=0)
    assert p_value == 1 / 50
    assert ("AUC" in null) == (task in ("binary", "multiclass"))


def test_with_confounds_the_null_is_that_nothing_is_known_beyond_them():
    rejected, found_beside = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        age = rng.normal(size=120)
        confounds = ConfoundValues(("age",), (False,), age[:, None])
        features = rng.normal(size=(120, 8)) + age[:, None]
        options = {"permutations": 39, "folds": 5, "seed": seed}
        through = age + 0.5 * rng.normal(size=120)
        assert permutation_test(features, through, "continuous", alone(120), None, **options)[0] == 1 / 40
        rejected += permutation_test(features, through, "continuous", alone(120), confounds, **options)[0] <= 0.05
        beside = (age + features[:, 0] > 0).astype(int)
        p_value, null = permutation_test(features, beside, "binary", alone(120), confounds, **options)
        found_beside += p_value <= 0.05
        assert "beyond age" in null
    assert rejected <= 4
    assert found_beside >= 16


def test_exchanged_residuals_are_as_free_of_confounds_as_those_observed(monkeypatch):
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(60, 3))
    confounds = ConfoundValues(("a", "b", "c"), (False,) * 3, columns)
    seen = []

    def spy(rotation, features, labels, tested, truth, ranked):
        both = np.concatenate([labels, truth])  # of one fold, in another order than the confounds
        seen.append((both**2).sum(axis=0))
        return _fold_statistic(rotation, features, labels, tested, truth, ranked)

    monkeypatch.setattr("extract.probing.permutation._fold_statistic", spy)
    truth = (columns[:, 0] + rng.normal(size=60) > 0).astype(int)
    permutation_test(rng.normal(size=(60, 4)), truth, "binary", alone(60), confounds, permutations=9, folds=3, seed=0)
    squares = seen[0][:, 0]
    assert (squares[1:] < squares[0] - 1e-6).all()  # what an exchange brings back of the confounds is taken out


def test_one_column_is_the_ridge_regression_it_stands_for():
    from extract.probing.linear import rotate

    rng = np.random.default_rng(0)
    train, tested = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    labels = np.stack([train[:, 0] > 0, train[:, 1] > 0.2], axis=1).astype(float)[:, :, None]
    truth = np.stack([tested[:, 0] > 0, tested[:, 1] > 0.2], axis=1).astype(float)[:, :, None]
    found = _fold_statistic(rotate(train), train, labels, tested, truth, True)
    for i in range(2):
        errors = []
        for penalty in rotate(train).penalties:  # generalised cross-validation by its definition
            hat = np.column_stack(
                [ridge(train, one[:, None], np.arange(50), penalty=penalty).decide(train)[:, 0] for one in np.eye(50)]
            )
            residuals = labels[:, i, 0] - hat @ labels[:, i, 0]
            errors.append(np.mean(residuals**2) / (1 - np.trace(hat) / 50) ** 2)
        best = rotate(train).penalties[np.argmin(errors)]
        predicted = ridge(train, labels[:, i], np.arange(50), penalty=best).decide(tested)[:, 0]
        assert found[i] == pytest.approx(roc_auc_score(truth[:, i, 0], predicted), abs=1e-12)


def test_labels_are_exchanged_as_wholes():
    people = np.array([0, 0, 1, 2, 3, 3, 4, 5, 5])
    zeros = np.zeros(9, dtype=np.int64)
    truth = np.arange(9.0)  # people change between their scans: only those with as many scans can be exchanged
    exchange, words = _exchange(Groups(people, people, people, zeros), truth, free=True)
    assert "same number of scans" in words
    seen = set()
    for seed in range(50):
        source = exchange.draw(9, np.random.default_rng(seed))
        assert sorted(source) == list(range(9))
        assert all(np.array_equal(source[[a, a + 1]], [source[a], source[a] + 1]) for a in (0, 4, 7))
        assert set(source[[2, 3, 6]]) == {2, 3, 6}
        seen.add(tuple(source))
    assert len(seen) > 20
    constant = people % 2 + 0.0
    exchange, words = _exchange(Groups(people, people, people, zeros), constant, free=True)
    assert "one label each" in words
    drawn = [constant[exchange.draw(9, np.random.default_rng(seed))] for seed in range(50)]
    assert all(len(set(labels[people == person])) == 1 for labels in drawn for person in range(6))
    assert {labels[2] for labels in drawn if labels[0] == labels[4]} == {0.0, 1.0}  # across numbers of scans
    families = np.array([0, 0, 1, 2, 1, 1, 2, 3, 3])  # shapes (2), (2, 1), (1, 1), (2)
    exchange, words = _exchange(Groups(people, families, families, zeros), truth, free=True)
    assert "families" in words
    sources = {tuple(exchange.draw(9, np.random.default_rng(seed))) for seed in range(30)}
    assert sources == {(0, 1, 2, 3, 4, 5, 6, 7, 8), (7, 8, 2, 3, 4, 5, 6, 0, 1)}
    sites = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    exchange, _ = _exchange(Groups(people, sites, people, sites, "2 groups by site"), truth, free=True)
    assert all(set(exchange.draw(9, np.random.default_rng(seed))[:4]) == {0, 1, 2, 3} for seed in range(20))


def test_probe_gives_p_values_by_option_the_same_for_the_same_seed():
    settings = ProbeSettings(repeats=1, permutations=29)
    found = {one.name: one for one in probe(make_cohort(), ["sex", "fluid_intelligence"], settings=settings)}
    assert found["gender"].p_value == 1 / 30
    assert found["fluid_intelligence"].p_value > 0.05
    assert found["gender"].permutations == 29
    assert "labels exchanged between people" in found["gender"].null
    again = probe(make_cohort(), ["fluid_intelligence"], settings=settings)[0]
    assert again.p_value == found["fluid_intelligence"].p_value
    assert found["gender"].to_json()["p_value"] == 1 / 30
    assert probe(make_cohort(), ["sex"], settings=ProbeSettings(repeats=1))[0].p_value is None


# ---- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_with_weights_are_those_of_scans_that_are_there_so_often(classes):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, classes, 40)
    shares = rng.dirichlet(np.ones(classes), 40).round(1) + 0.1  # rounding makes ties
    frequencies = np.array([0.5, 0.3, 0.2])[:classes]
    truth, predicted = rng.normal(size=(2, 40))
    weights = draw_weights(40, 30, 0)
    assert (weights.sum(axis=1) == 40).all()
    pairs = [
        (weighted_auc(codes, shares, weights), lambda t: auc(codes[t], shares[t])),
        (
            weighted_balanced_accuracy(codes, shares, frequencies, weights),
            lambda t: balanced_accuracy(codes[t], shares[t], frequencies),
        ),
        (weighted_pearson(truth, predicted, weights), lambda t: pearson(truth[t], predicted[t])),
        (weighted_r_squared(truth, predicted, 0.3, weights), lambda t: r_squared(truth[t], predicted[t], 0.3)),
        (
            weighted_mean_absolute_error(truth, predicted, weights),
            lambda t: mean_absolute_error(truth[t], predicted[t]),
        ),
    ]
    for found, score in pairs:
        expected = [score(np.repeat(np.arange(40), row)) for row in weights]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_draw_without_a_class_counts_in_other_folds_alone():
    codes, shares = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    weights = np.array([[1, 1, 1], [2, 1, 0]])
    found = weighted_auc(codes, shares, weights)
    assert (found[0], np.isnan(found[1])) == (0.5, True)
    assert percentile_interval(np.array([[0.5, np.nan], [0.7, 0.9]])) == pytest.approx((0.6075, 0.8925))
    assert percentile_interval(np.array([[np.nan]])) is None


def test_bootstrap_intervals_hold_the_score_and_do_not_shrink_with_repeats():
    widths = {}
    for repeats in (1, 6):
        settings = ProbeSettings(repeats=repeats, bootstrap=300, confounds=("age",))
        for found in probe(make_cohort(), ["sex", "fluid_intelligence"], settings=settings):
            parts = found.metrics | found.confound_metrics
            assert all(
                one.boot_low < one.score < one.boot_high for one in parts.values() if one.boot_low != one.boot_high
            )
            widths[found.name, repeats] = found.headline.boot_high - found.headline.boot_low
            assert found.gains[found.metric].boot_low is not None
            assert found.to_json()["boot_low"] == pytest.approx(found.headline.boot_low, rel=1e-5)
    for name in ("gender", "fluid_intelligence"):  # repeats test the same people
        assert widths[name, 6] > 0.6 * widths[name, 1]
    assert probe(make_cohort(), ["sex"], settings=ProbeSettings(repeats=1))[0].headline.boot_low is None


def test_bootstrap_draws_people_not_scans():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5))
    y = features[:, 0] + rng.normal(size=40)
    once = make_embeddings(features, {"y": y})
    thrice = make_embeddings(np.repeat(features, 3, axis=0), {"y": np.repeat(y, 3)}, people=np.repeat(np.arange(40), 3))
    ends = [probe(one, settings=ProbeSettings(repeats=2, bootstrap=500, folds=4))[0].headline for one in (once, thrice)]
    width = [one.boot_high - one.boot_low for one in ends]
    assert width[1] > 0.8 * width[0]  # by scans it would be 0.58 of it
