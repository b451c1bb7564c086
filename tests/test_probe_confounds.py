"""Confounds: removed within the folds, scored beside the features, and coded by what the training side knows."""

from __future__ import annotations

import numpy as np
import pytest
from embedded import make_cohort, make_embeddings
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.preprocessing import StandardScaler

from extract.probing.confounds import (
    ConfoundValues,
    fit_coding,
    fit_residualiser,
    match_confounds,
    missing_warnings,
    number_warnings,
    read_confounds,
)
from extract.probing.doubts import doubts
from extract.probing.model import refit
from extract.probing.probe import probe
from extract.probing.scores import pearson
from extract.probing.settings import ProbeSettings


def confounded(seed: int = 0, n: int = 200):
    """Return embeddings whose features know age and nothing else, of which an outcome and a class depend."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(45, 80, n)
    features = rng.normal(size=(n, 20)) + (age[:, None] - 62) / 10 * (np.arange(20) < 8)
    outcome = (age - 62) / 10 + 0.5 * rng.normal(size=n)
    return make_embeddings(
        features,
        {"age": age, "outcome": outcome, "ill": outcome + 0.3 * rng.normal(size=n) > 0},
        variables={"ill": {"task": "binary"}},
    )


def test_what_features_know_through_a_confound_goes_with_it():
    embeddings = confounded()
    plain = probe(embeddings, ["outcome", "ill"], settings=ProbeSettings(repeats=2))
    found = probe(embeddings, ["outcome", "ill"], settings=ProbeSettings(repeats=2, confounds=("age",)))
    for with_age, without in zip(plain, found, strict=True):
        chance = without.headline.chance
        assert with_age.headline.low > chance + 0.2
        assert with_age.confound_metrics == with_age.gains == {}
        assert without.confounds == ["age"]
        assert "age removed" in without.method
        assert without.headline.holds_chance
        assert without.confound_metrics[without.metric].low > chance + 0.2
        assert without.gains[without.metric].high < 0
        assert without.gains[without.metric].score == pytest.approx(
            without.headline.score - without.confound_metrics[without.metric].score
        )


def test_what_features_know_beside_a_confound_stays():
    rng = np.random.default_rng(0)
    sex, own = rng.integers(0, 2, 200), rng.normal(size=200)
    features = rng.normal(size=(200, 10)) + np.column_stack([sex, own]) @ rng.normal(size=(2, 10))
    embeddings = make_embeddings(features, {"sex": sex, "y": own + sex}, variables={"sex": {"task": "binary"}})
    (found,) = probe(embeddings, ["y"], settings=ProbeSettings(repeats=2, confounds=("gender",)))
    assert found.confounds == ["sex"]  # by its other name
    assert found.headline.low > 0.5
    assert found.gains["r"].low > 0


def test_scores_are_those_of_a_slow_reference():
    embeddings = confounded(3, 36)
    settings = ProbeSettings(repeats=1, folds=3, confounds=("age",))
    (found,) = probe(embeddings, ["outcome"], settings=settings)
    age, y = (embeddings.phenotypes[name].to_numpy() for name in ("age", "outcome"))
    features, fold_of = embeddings.features.astype(float), found.out_of_fold.fold
    scores = {"features": [], "age": []}
    for fold in range(3):
        train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        explained = LinearRegression().fit(age[train, None], features[train])
        known = LinearRegression().fit(age[train, None], y[train])
        beyond = y - known.predict(age[:, None]) + y[train].mean()  # by which the penalty is chosen
        columns = {"features": (features - explained.predict(age[:, None]), beyond), "age": (age[:, None], y)}
        for name, (x, chosen_by) in columns.items():
            standard = StandardScaler().fit(x[train]).transform(x)
            errors = []
            candidates = np.logspace(5, -5, 21) * x.shape[1]
            for penalty in candidates:
                left_out = []
                for i in train:
                    others = train[train != i]
                    fit = Ridge(alpha=penalty).fit(standard[others], chosen_by[others])
                    left_out.append(chosen_by[i] - fit.predict(standard[[i]]))
                errors.append(np.mean(np.square(left_out)))
            model = Ridge(alpha=candidates[np.argmin(errors)]).fit(standard[train], y[train])
            scores[name].append(pearson(y[test], model.predict(standard[test])))
    np.testing.assert_allclose(found.fold_scores["r"], scores["features"], atol=1e-8)
    assert found.confound_metrics["r"].score == pytest.approx(np.mean(scores["age"]), abs=1e-8)


def test_removing_before_the_folds_is_not_removing_within_them():
    # A column of confounds for every five scans: fitted to everyone they take part of the test scans' noise.
    rng = np.random.default_rng(0)
    table = {f"c{i}": rng.normal(size=60) for i in range(12)}
    y = sum(table.values()) + rng.normal(size=60)
    features = np.column_stack(list(table.values())) + 0.5 * rng.normal(size=(60, 12))
    embeddings = make_embeddings(features, table | {"y": y})
    (within,) = probe(embeddings, ["y"], settings=ProbeSettings(repeats=2, confounds=tuple(table)))
    columns = np.column_stack(list(table.values()))
    before = fit_residualiser(features, columns).apply(features, columns)
    (naive,) = probe(make_embeddings(before, {"y": y}), settings=ProbeSettings(repeats=2))
    assert within.fold_scores["r"].shape == naive.fold_scores["r"].shape
    assert np.abs(within.fold_scores["r"] - naive.fold_scores["r"]).max() > 0.01
    assert naive.headline.score < within.headline.score - 0.05  # below chance: the test scans were fitted away


def test_a_target_is_no_confound_of_itself():
    settings = ProbeSettings(repeats=1, confounds=("age", "sex"))
    found = {result.name: result for result in probe(make_cohort(), ["age", "gender", "smoking"], settings=settings)}
    assert {name: result.confounds for name, result in found.items()} == {
        "age": ["gender"],
        "gender": ["age"],
        "smoking": ["age", "gender"],
    }
    only = probe(make_cohort(), ["age"], settings=ProbeSettings(repeats=1, confounds=("age",)))[0]
    assert (only.confounds, only.confound_metrics) == ([], {})
    assert only.metrics == probe(make_cohort(), ["age"], settings=ProbeSettings(repeats=1))[0].metrics


def test_scans_that_lack_a_confound_are_left_out():
    # It stays in their features: with 30 % of them this outcome, which knows age alone, had r = 0.32 and p = 0.01.
    rng = np.random.default_rng(3)
    n = 200
    age = rng.normal(size=n)
    features = rng.normal(size=(n, 15)) + 5 * age[:, None] * rng.normal(size=15)
    outcome = rng.normal(size=n) + age
    known = rng.random(n) > 0.3
    table = {"age": np.where(known, age, np.nan), "outcome": outcome, "ill": outcome > 0}
    settings = ProbeSettings(repeats=1, permutations=19, confounds=("age",))
    embeddings = make_embeddings(features, table)
    found, ill = probe(embeddings, ["outcome", "ill"], settings=settings)
    assert (found.n, ill.n, found.headline.holds_chance) == (known.sum(), known.sum(), True)
    assert found.p_value > 0.05
    assert f"{n - known.sum()} scans that lack a confound left out" in found.method
    whole = make_embeddings(features[known], {name: values[known] for name, values in table.items()})
    assert ill.metrics == probe(whole, ["ill"], settings=settings)[0].metrics
    assert refit(embeddings, "ill", settings=settings).n == known.sum()
    values = read_confounds(embeddings, ["age"])
    assert missing_warnings(values) == [
        f"{n - known.sum()} of 200 scans lack a confound (age {n - known.sum()}) and are left out, since it could not "
        "be removed from their features; fill in its values, or name fewer confounds"
    ]
    assert missing_warnings(values.rows(known)) == []
    few = make_embeddings(features, table | {"age": np.where(np.arange(n) < 19, age, np.nan)})
    skipped = probe(few, ["outcome"], settings=settings)[0].reason
    assert skipped == "19 participants have a value, at least 20 are needed (181 scans that lack a confound left out)"


def test_columns_are_those_of_the_training_side():
    values = np.array([[1.0, 10.0], [2.0, np.nan], [1.0, 30.0], [2.0, 20.0]])
    coding = fit_coding(ConfoundValues(("site", "age"), (True, False), values))
    np.testing.assert_array_equal(coding.encode(values), [[1, 0, 10], [0, 1, 20], [1, 0, 30], [0, 1, 20]])
    # A site that is missing, or that training has not seen, is the average scan's.
    rare = fit_coding(ConfoundValues(("site",), (True,), np.array([[1.0], [1], [1], [2], [np.nan]])))
    np.testing.assert_array_equal(rare.encode(np.array([[3.0], [np.nan], [2.0]])), [[0.75, 0.25], [0.75, 0.25], [0, 1]])
    np.testing.assert_array_equal(
        coding.encode(np.array([[3.0, 5.0], [np.nan, np.nan]])), [[0.5, 0.5, 5], [0.5, 0.5, 20]]
    )


def test_a_feature_that_confounds_explain_whole_says_nothing_more():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(50, 2))
    features = np.column_stack([columns @ [1.0, 2.0], rng.normal(size=50)]).astype(np.float32).astype(float)
    residualiser = fit_residualiser(features, columns)
    assert residualiser.left.tolist() == [False, True]
    rest = residualiser.apply(features, columns)
    assert not rest[:, 0].any()
    np.testing.assert_allclose(
        np.linalg.lstsq(np.column_stack([columns, np.ones(50)]), rest[:, 1])[0][:2], 0, atol=1e-12
    )


def test_columns_that_depend_on_each_other_are_a_least_squares_problem_like_any():
    rng = np.random.default_rng(0)
    n = 4000
    age, volume = rng.normal(62, 8, n), rng.normal(1.2e6, 1e5, n)
    site = rng.integers(1, 5, n).astype(float)
    scanner = np.where(site < 3, 1.0, 2.0)  # each site has one
    values = np.column_stack([site, age, volume, scanner])
    coding = fit_coding(ConfoundValues(("site", "age", "volume", "scanner"), (True, False, False, True), values))
    columns = coding.encode(values)
    features = rng.normal(size=(n, 3)) + columns[:, :1] + (columns[:, 4:5] - 62) / 8
    residualiser = fit_residualiser(features, columns)
    rest = residualiser.apply(features, columns)
    design = np.column_stack([np.ones(n), (columns - columns.mean(axis=0)) / columns.std(axis=0)])
    expected = features - design @ np.linalg.lstsq(design, features, rcond=1e-10)[0]
    np.testing.assert_allclose(rest - rest.mean(axis=0), expected, atol=1e-9)
    assert np.abs(residualiser.coefficients * columns.std(axis=0)[:, None]).max() < 2
    strange = coding.encode(np.array([[9.0, 62.0, 1.2e6, 2.0]]))  # of a site that training has not seen
    assert np.abs(residualiser.apply(np.zeros((1, 3)), strange)).max() < 5


def test_categories_are_matched_by_label():
    labels = ({"0": "Leeds", "1": "Oxford", "2": "York"},)
    coding = fit_coding(ConfoundValues(("site",), (True,), np.array([[0.0], [1], [2]]), labels))
    elsewhere = ConfoundValues(
        ("site",), (True,), np.array([[1.0], [0], [2], [np.nan]]), ({"0": "Bath", "1": "Leeds", "2": "York"},)
    )
    values, warnings = match_confounds(coding, elsewhere)
    shares = [1 / 3] * 3
    np.testing.assert_array_equal(coding.encode(values), [[1, 0, 0], shares, [0, 0, 1], shares])
    assert warnings == [
        "1 of 4 scans lack the confound site; the shares of its categories among those that the probe was fitted to "
        "are taken",
        "1 of 4 scans have a site that the probe was not fitted to ('Bath'); the shares of its categories there are "
        "taken",
    ]
    number = fit_coding(ConfoundValues(("age",), (False,), np.array([[50.0], [60.0]])))
    (missing,) = match_confounds(number, ConfoundValues(("age",), (False,), np.array([[np.nan]]), ({},)))[1]
    assert missing.endswith("; the mean of those that the probe was fitted to is taken")
    assert match_confounds(coding, ConfoundValues(("site",), (True,), np.array([[1.0]]), labels))[1] == []


def test_numbers_that_are_codes_become_categories_by_their_task():
    rng = np.random.default_rng(0)
    table = {"scanner": rng.integers(1, 4, 90), "y": rng.normal(size=90), "sex": rng.integers(0, 2, 90)}
    embeddings = make_embeddings(rng.normal(size=(90, 5)), table, variables={"scanner": {"confound": True}})
    numbers = read_confounds(embeddings, ["scanner", "sex"])
    assert numbers.categorical == (False, False)
    (warning,) = number_warnings(embeddings, numbers, {})
    assert "scanner has 3 different whole numbers" in warning
    assert "--task scanner=multiclass" in warning
    tasks = {"scanner": "multiclass"}
    codes = read_confounds(embeddings, ["scanner", "gender"], tasks)
    assert codes.categorical == (True, False)
    assert number_warnings(embeddings, codes, tasks) == []
    assert number_warnings(embeddings, numbers, {"scanner": "continuous"}) == []
    settings = ProbeSettings(repeats=1, confounds=("scanner",))
    linear, coded = (probe(embeddings, ["y"], tasks=of, settings=settings)[0] for of in ({}, tasks))
    embeddings.variables["scanner"] = {"task": "multiclass", "confound": True}
    assert coded.confound_metrics == probe(embeddings, ["y"], settings=settings)[0].confound_metrics
    assert coded.confound_metrics != linear.confound_metrics
    with pytest.raises(ValueError, match="'nominal' of 'scanner' is unknown"):
        read_confounds(embeddings, ["scanner"], {"scanner": "nominal"})


def test_sites_that_only_one_side_has_are_allowed():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(20), 3)
    embeddings = make_embeddings(
        rng.normal(size=(60, 5)), {"site": site, "y": rng.normal(size=60)}, variables={"site": {"task": "multiclass"}}
    )
    found = probe(embeddings, ["y"], settings=ProbeSettings(repeats=1, confounds=("site",)))[0]
    assert found.status == "skipped"
    assert found.reason == "20 columns of confounds are too many for 48 scans to train on; name fewer"
    embeddings.phenotypes["site"] = np.where(site < 18, site // 3, site + np.arange(60) % 2)  # four of few scans
    found = probe(embeddings, ["y"], settings=ProbeSettings(repeats=1, confounds=("site",)))[0]
    assert found.status == "ok"
    assert np.isfinite(found.confound_metrics["r"].score)


def test_a_confound_that_groups_hold_apart_is_refused_or_told():
    rng = np.random.default_rng(0)
    site, features, y = np.arange(90) % 9, rng.normal(size=(90, 3)), rng.normal(size=90)
    scanner = np.where(site < 6, site, 6)  # the last three sites have the same
    embeddings = make_embeddings(
        features,
        {"y": y, "site": site, "scanner": scanner},
        variables={"site": {"task": "multiclass"}, "scanner": {"task": "multiclass"}},
    )
    with pytest.raises(ValueError, match=r"confound 'site' cannot be removed: .* leave out the confound, or --groups"):
        probe(embeddings, ["y"], settings=ProbeSettings(confounds=("site",), groups="site"))
    settings = ProbeSettings(confounds=("scanner",), groups="site")
    assert probe(embeddings, ["y"], settings=settings)[0].status == "ok"
    told = doubts({"e": embeddings}, ["y"], tasks={}, settings=settings)
    assert [line for line in told if "confound" in line] == [
        "the confound scanner is not removed from 67% of the scans when they are tested: each of their values is of "
        "one group that is never split (9 groups by site), so nobody of these values is trained on"
    ]
    alone = make_embeddings(features, {"y": y, "who": np.arange(90)}, variables={"who": {"task": "multiclass"}})
    (found,) = probe(alone, ["y"], settings=ProbeSettings(confounds=("who",)))
    assert "90 columns of confounds are too many" in found.reason
    for others in (ProbeSettings(confounds=("scanner",)), ProbeSettings(groups="site")):
        assert not [line for line in doubts({"e": embeddings}, ["y"], tasks={}, settings=others) if "confound" in line]


def test_brain_volume_is_that_of_the_brain_in_any_space():
    voxels, scale = np.array([1.2e6, 1.3e6, 1.4e6]), np.array([1.2, 1.3, np.nan])
    scans = {"brain_voxels": voxels, "head_scale": scale}
    native = make_embeddings(np.zeros((3, 1)), {}, scans=scans)
    mni = make_embeddings(np.zeros((3, 1)), {}, scans=scans, space="MNI152")
    np.testing.assert_array_equal(read_confounds(native, ["brain_volume"]).values[:, 0], voxels)
    np.testing.assert_allclose(read_confounds(mni, ["brain_volume"]).values[:, 0], [1e6, 1e6, np.nan])
    np.testing.assert_array_equal(read_confounds(mni, ["head_scale"]).values[:, 0], scale)
    both = ["head_scale", "brain_volume"]
    assert read_confounds(mni, both).without("head_size").names == ()  # this volume is computed with the scale
    assert read_confounds(native, both).without("head_size").names == ("brain_volume",)
    assert read_confounds(mni, both).without("age").names == tuple(both)
    np.testing.assert_array_equal(read_confounds(mni, both).complete("age"), [True, True, False])
    assert read_confounds(mni, both).complete("head_size").all()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["height"], ["height", "gender", "brain_volume", "head_scale"]),
        (["sex", "gender"], ["gender", "twice"]),
        (["empty"], ["empty", "missing in every scan"]),
        (["endless"], ["endless", "infinite in 1 scans"]),
        (["brain_volume"], ["brain_volume", "MNI152", "head_scale"]),
    ],
)
def test_confounds_that_cannot_be_used_are_refused(names, words):
    table = {"gender": [0, 1, 1], "empty": [np.nan] * 3, "endless": [1, 2, np.inf]}
    scans = {"brain_voxels": np.ones(3), "head_scale": np.full(3, np.nan)}
    embeddings = make_embeddings(np.zeros((3, 1)), table, scans=scans, space="MNI152")
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_confounds(embeddings, names)
    assert all(word in str(caught.value) for word in words)
