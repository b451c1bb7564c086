"""Folds split people and hold every class; the models of a probe are those of scikit-learn."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from embedded import make_embeddings
from scipy import linalg, stats
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from extract.probing.cross_validation import fit_classes, penalty_folds
from extract.probing.folds import (
    class_strata,
    deal_folds,
    folds_with_all_classes,
    limit_people,
    rank_summary,
    value_strata,
)
from extract.probing.groups import Groups
from extract.probing.linear import PENALTY_SCANS, leave_group_out_errors, ridge, rotate
from extract.probing.logistic import fit_logistic, logistic, probabilities
from extract.probing.probe import probe

# ---- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_folds_split_people_and_give_every_fold_every_class(seed):
    rng = np.random.default_rng(seed)
    scans_of = rng.choice([1, 2, 5], 60, p=[0.7, 0.2, 0.1])
    people = rng.permutation(np.repeat(np.arange(60), scans_of))
    codes = rng.choice(3, len(people), p=[0.8, 0.15, 0.05])  # people change class between their scans
    codes[np.unique(people, return_index=True)[1][:5]] = 2
    strata = class_strata(codes, people)
    folds = min(5, np.bincount(strata, minlength=3).min())
    assert folds >= 2
    fold_of = deal_folds(people, strata, folds, rng)
    for fold in range(folds):
        test = fold_of == fold
        assert not set(people[test]) & set(people[~test])
        assert set(codes[test]) == set(codes[~test]) == {0, 1, 2}
    assert np.ptp(list(Counter(fold_of[np.unique(people, return_index=True)[1]]).values())) <= 1


def test_folds_of_a_regression_hold_like_values():
    values = np.random.default_rng(0).exponential(size=200)
    people = np.arange(200)
    fold_of = deal_folds(people, value_strata(values, people), 5, np.random.default_rng(0))
    assert np.ptp([np.median(values[fold_of == fold]) for fold in range(5)]) < 0.15
    other = deal_folds(people, value_strata(values, people), 5, np.random.default_rng(1))
    assert (other != fold_of).mean() > 0.5


def test_folds_by_site_hold_every_class_or_are_fewer():
    rng = np.random.default_rng(0)
    people = np.arange(300)
    sites = rng.choice(6, 300, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    codes = rng.integers(0, 2, 300)
    codes[sites == 5] = 0  # a site with one class cannot be a fold of its own
    dealt = folds_with_all_classes(sites, people, codes, 6, 2, [0], 2)
    assert dealt.shape == (2, 300)
    for fold_of in dealt:
        assert 2 <= fold_of.max() + 1 < 6
        assert all(len(set(fold_of[sites == site])) == 1 for site in range(6))
        assert all(np.bincount(codes[fold_of == k], minlength=2).min() >= 2 for k in range(fold_of.max() + 1))
    assert folds_with_all_classes(codes, people, codes, 5, 1, [0], 1) is None  # groups that are the classes


def test_fewer_people_to_train_on_are_some_of_more():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(200), 2)
    strata = (np.arange(200) < 12).astype(int)
    train = people % 5 > 0
    kept = [limit_people(people, strata, train, most, np.random.default_rng(3)) for most in (10, 40, 100, 500)]
    assert [len(set(people[mask])) for mask in kept] == [10, 40, 100, 160]
    assert all((small <= large).all() for small, large in itertools.pairwise(kept))
    assert (kept[-1] == train).all()
    assert all(np.bincount(strata[np.unique(people[mask])]).min() >= 2 for mask in kept)  # of the rare stratum, too
    other = limit_people(people, strata, train, 40, rng)
    assert (other != kept[1]).any()


def test_rank_summary_goes_along_with_all_variables_and_with_the_only_one():
    rng = np.random.default_rng(0)
    common = rng.normal(size=200)
    values = np.column_stack([np.exp(common + 0.3 * rng.normal(size=200)) for _ in range(3)])
    values[:20, 0] = np.nan
    summary = rank_summary(np.column_stack([values, np.full(200, 3.0), np.full(200, np.nan)]))
    assert abs(np.corrcoef(summary, common)[0, 1]) > 0.9
    alone = rank_summary(values[:, 1:2])
    assert abs(np.corrcoef(np.argsort(np.argsort(alone)), np.argsort(np.argsort(values[:, 1])))[0, 1]) > 0.999
    assert not rank_summary(np.zeros((5, 0))).any()


@pytest.mark.parametrize("variables", [2, 6, 90])
def test_rank_summary_is_of_the_smaller_matrix_and_has_one_sign(monkeypatch, variables):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, variables)) - rng.normal(size=(60, 1)) * np.arange(1, variables + 1)
    shapes, eigh = [], linalg.eigh

    def decompose(gram: np.ndarray, **options: object):
        shapes.append(gram.shape)
        values, vectors = eigh(gram, **options)
        return values, vectors * (-1) ** len(shapes)  # another LAPACK may give another sign

    monkeypatch.setattr("extract.probing.folds.linalg.eigh", decompose)
    summary = rank_summary(values)
    assert shapes == [(min(variables, 60),) * 2]
    ranks = stats.zscore(stats.rankdata(values, axis=0))
    first = np.linalg.svd(ranks, full_matrices=False)[2][0]
    assert np.corrcoef(summary, ranks @ first)[0, 1] ** 2 == pytest.approx(1)
    np.testing.assert_allclose(rank_summary(values), summary)


# ---- models against scikit-learn -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [20, 150])
def test_ridge_is_that_of_scikit_learn_at_every_penalty(features):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, features)), rng.normal(size=(25, features))
    train[:, 3] = test[:, 3] = 0.1  # a constant feature
    train[:, 4] *= 1e4
    target = 5 + train[:, 0] + rng.normal(size=60)
    scaler = StandardScaler().fit(train)
    for penalty in (1e-2, 1.0, 1e2, 1e4):
        predicted = ridge(train, target[:, None], np.arange(60), penalty=penalty).decide(test)[:, 0]
        expected = Ridge(alpha=penalty).fit(scaler.transform(train), target).predict(scaler.transform(test))
        np.testing.assert_allclose(predicted, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("features", [20, 150])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_that_of_scikit_learn(features, classes):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(80, features)), rng.normal(size=(25, features))
    codes = np.arange(80) % classes
    train[:, 0] += codes
    scaler = StandardScaler().fit(train)
    for penalty in (0.1, 10.0, 1e3):
        predicted = probabilities(logistic(train, codes, codes, codes, penalty=penalty).decide(test))
        model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000)
        expected = model.fit(scaler.transform(train), codes).predict_proba(scaler.transform(test))
        np.testing.assert_allclose(predicted, expected, atol=2e-4)


@pytest.mark.parametrize("effect", [0.0, 0.15, 0.6])
def test_logistic_penalty_is_the_best_of_all_penalties(effect):
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    train = rng.normal(size=(60, 200)) + effect * codes[:, None]
    inner = rng.permutation(np.arange(60) // 2 % 3)
    penalty = logistic(train, codes, inner, np.arange(60)).penalties[0]
    losses = []
    for candidate in rotate(train).penalties:
        loss = 0.0
        for fold in range(3):
            out = inner == fold
            scaler = StandardScaler().fit(train[~out])
            model = LogisticRegression(C=1 / candidate, tol=1e-7, max_iter=2000)
            model.fit(scaler.transform(train[~out]), codes[~out])
            loss += log_loss(codes[out], model.predict_proba(scaler.transform(train[out])), normalize=False)
        losses.append(loss)
    assert losses[list(rotate(train).penalties).index(penalty)] < min(losses) + 0.1  # nats, over all scans


def test_the_search_for_a_penalty_passes_strong_axes_that_know_nothing():
    # The first axes have nearly all variance and know nothing, which raises the loss before weaker axes lower it.
    rng = np.random.default_rng(0)
    codes = np.arange(600) % 2
    features = rng.normal(size=(600, 60)) + 0.35 * codes[:, None] * (np.arange(60) < 20)
    features += rng.normal(size=(600, 20)) @ rng.normal(size=(20, 60))
    fit = logistic(features[:400], codes[:400], np.arange(400) // 2 % 5, np.arange(400))
    right = (fit.decide(features[400:])[:, 0] > 0) == codes[400:]
    assert right.mean() > 0.7


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_reaches_the_minimum(classes):
    rng = np.random.default_rng(0)
    design = np.column_stack([rng.normal(size=(90, 7)), np.ones(90)])
    codes = np.arange(90) % classes
    weights = fit_logistic(design, codes, 2.0, tolerance=1e-8)
    indicator = np.eye(classes)[codes][:, 1 if classes == 2 else 0 :]
    predicted = probabilities(design @ weights)[:, 1 if classes == 2 else 0 :]
    slope = design.T @ (predicted - indicator)
    slope[:-1] += 2.0 * weights[:-1]
    np.testing.assert_allclose(slope, 0, atol=1e-4)
    np.testing.assert_allclose(fit_logistic(design, codes, 2.0, weights, tolerance=1e-8), weights, atol=1e-6)


@pytest.mark.parametrize("features", [10, 80])
def test_rotation_keeps_distances_and_orders_nothing_anew(features):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, features)), rng.normal(size=(15, features))
    rotation = rotate(train)
    scaler = StandardScaler().fit(train)
    scores = rotation.apply(train)
    assert scores.shape[1] <= min(40, features)
    gram = scaler.transform(train) @ scaler.transform(train).T
    np.testing.assert_allclose(scores @ scores.T, gram, atol=1e-9)
    np.testing.assert_allclose(scores.T @ scores, np.diag(rotation.eigenvalues), atol=1e-9)
    across = scaler.transform(test) @ scaler.transform(train).T
    np.testing.assert_allclose(rotation.apply(test) @ scores.T, across, atol=1e-9)
    target = rng.normal(3, 1, size=(40, 2))
    np.testing.assert_allclose(rotation.covariance(train, target), scores.T @ target, atol=1e-9)


@pytest.mark.parametrize("features", [8, 70])
@pytest.mark.parametrize("grouping", ["people", "sites"])
def test_leaving_a_group_out_is_what_refitting_without_it_gives(features, grouping):
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(25), np.arange(10), np.arange(5)])
    groups = people if grouping == "people" else people % 3  # of more scans than features, and of fewer
    train = rng.normal(size=(40, features))
    targets = train[:, :2] + rng.normal(size=(40, 2)) + 3
    penalties = np.array([0.5, 20.0, 1e3])
    standard = StandardScaler().fit_transform(train)
    errors = np.empty((3, 40, 2))
    for i, penalty in enumerate(penalties):
        for group in set(groups):
            out = groups == group
            errors[i, out] = targets[out] - Ridge(alpha=penalty).fit(standard[~out], targets[~out]).predict(
                standard[out]
            )
    found = leave_group_out_errors(rotate(train), train, targets, groups, penalties)
    np.testing.assert_allclose(found, np.mean(errors**2, axis=1), rtol=1e-8)
    some = np.flatnonzero(groups < 2)
    found = leave_group_out_errors(rotate(train), train, targets, groups, penalties, some)
    np.testing.assert_allclose(found, np.mean(errors[:, some] ** 2, axis=1), rtol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_penalties_are_chosen_without_a_persons_other_scans(seed):
    # Features know the person and nothing else: leaving out scans would see a perfect effect and hardly shrink.
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(60), 3)
    train = rng.normal(size=(60, 60))[people] + 0.05 * rng.normal(size=(180, 60))
    target = rng.normal(size=60)[people][:, None]
    (by_person,) = ridge(train, target, people).penalties
    (by_scan,) = ridge(train, target, np.arange(180)).penalties
    assert by_person > 100 * by_scan
    assert by_person in rotate(train).penalties


def test_folds_for_a_penalty_of_classes_keep_groups_whole():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(3000), 2)
    codes = (rng.random(len(people)) < 0.01).astype(int)
    families = people // 3
    groups = Groups(people, families, families, np.zeros_like(people))
    inner = penalty_folds(groups, codes, np.arange(len(people)), [0, 0, 0], 5)
    for fold in range(5):
        assert set(codes[inner == fold]) == {0, 1}
        assert not set(families[inner == fold]) & set(families[inner != fold])
    # Two sites of which one has no cases: people are dealt instead.
    people, sites = np.arange(100), np.arange(100) // 50
    codes = (np.arange(100) < 25).astype(int)
    inner = penalty_folds(Groups(people, sites, people, sites), codes, people, [0, 0, 0], 5)
    assert all(set(codes[inner == fold]) == {0, 1} for fold in range(5))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("effect", [0.0, 0.02, 0.3, 2.0])
def test_the_penalty_of_many_scans_is_the_best_of_all_penalties(classes, effect):
    """The search that begins with a ridge regression finds what trying every penalty finds, or one as good."""
    rng = np.random.default_rng(0)
    scans = 2400
    codes = rng.integers(0, classes, scans)
    train = rng.normal(size=(scans, 24)) * np.arange(1, 25) ** -0.5
    train[:, 2] += effect * train[:, 2].std() * codes
    people = np.arange(scans)
    groups = Groups(people, people, people, np.zeros_like(people))
    found = fit_classes(train, codes, groups, people, [0, 0, 0]).penalties[0]
    inner = penalty_folds(groups, codes, people, [0, 0, 0], 3)
    losses = {}
    for penalty in rotate(train).penalties:
        losses[penalty] = 0.0
        for fold in range(3):
            out = inner == fold
            predicted = probabilities(
                logistic(train[~out], codes[~out], inner, inner, penalty=penalty).decide(train[out])
            )
            losses[penalty] += log_loss(codes[out], predicted, normalize=False, labels=range(classes))
    assert losses[found] < min(losses.values()) + 0.5  # nats, over all scans


def test_a_fit_to_some_scans_is_that_to_them_alone():
    rng = np.random.default_rng(0)
    design = np.column_stack([rng.normal(size=(90, 7)), np.ones(90)])
    codes, used = np.arange(90) % 3, rng.random(90) < 0.7
    found = fit_logistic(design, codes, 2.0, used=used, tolerance=1e-8)
    np.testing.assert_allclose(found, fit_logistic(design[used], codes[used], 2.0, tolerance=1e-8), atol=1e-6)


def test_targets_together_are_fitted_as_they_are_alone():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(80, 30)), rng.normal(size=(9, 30))
    targets = np.column_stack([train[:, 0], train[:, :9].sum(axis=1), np.zeros(80)]) + rng.normal(size=(80, 3))
    together = ridge(train, targets, np.arange(80) // 2)
    assert len(set(together.penalties)) > 1
    for i in range(3):
        alone = ridge(train, targets[:, [i]], np.arange(80) // 2)
        assert alone.penalties[0] == together.penalties[i]
        np.testing.assert_allclose(alone.decide(test)[:, 0], together.decide(test)[:, i], rtol=1e-9)


def test_penalties_of_many_scans_are_chosen_on_some_of_them():
    rng = np.random.default_rng(0)
    n = 3 * PENALTY_SCANS
    train = rng.normal(size=(n, 12))
    targets = train[:, :1] + 3 * rng.normal(size=(n, 1))
    penalties = rotate(train).penalties
    groups = np.arange(n) // 2
    errors = leave_group_out_errors(rotate(train), train, targets, groups, penalties)[:, 0]
    (chosen,) = ridge(train, targets, groups).penalties
    assert errors[list(penalties).index(chosen)] < errors.min() * 1.001


def test_a_target_whose_penalty_cannot_be_chosen_is_skipped_alone():
    """Every class has four people or more, but those who change between them cannot be halved in some fold."""
    changes = {7: (1, 0), 8: (0, 1), 14: (1, 2), 15: (2, 1), 16: (0, 1), 20: (0, 2), 23: (1, 2)}
    classes = np.array([changes.get(person, (0, 0)) for person in range(24)], float).ravel()
    people = np.repeat(np.arange(24), 2)
    rng = np.random.default_rng(0)
    embeddings = make_embeddings(
        rng.normal(size=(len(classes), 3)), {"kind": classes, "age": rng.normal(60, 8, len(classes))}, people=people,
        variables={"kind": {"task": "multiclass"}},
    )  # fmt: skip
    kind, age = probe(embeddings, ["kind", "age"])
    assert (kind.status, age.status) == ("skipped", "ok")
    assert "both halves hold every class" in kind.reason
