"""Probes: effects that are there are found, those that are not are not, and no person is on both sides."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from embedded import make_cohort, make_embeddings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from extract.embeddings import Embeddings
from extract.probing.compare import Probed
from extract.probing.linear import ridge
from extract.probing.method import NO_INTERVAL
from extract.probing.printing import print_skipped
from extract.probing.probe import probe, target_names
from extract.probing.results import Interval
from extract.probing.scores import corrected_interval, paired_interval
from extract.probing.settings import ProbeSettings
from extract.probing.targets import infer_task


@pytest.fixture(scope="module")
def cohort() -> Embeddings:
    return make_cohort()


@pytest.fixture(scope="module")
def results(cohort) -> dict:
    return {result.name: result for result in probe(cohort, settings=ProbeSettings(repeats=2))}


# ---- scores of known effects, and of none ----------------------------------------------------------------------------


def test_effects_that_are_there_are_found(results):
    sex, age, smoking = results["gender"], results["age"], results["smoking"]
    assert sex.headline.score > 0.8
    assert sex.headline.low > 0.5
    assert sex.metrics["balanced_accuracy"].low > 0.5
    assert age.headline.score > 0.7
    assert age.metrics["r2"].low > 0
    assert age.metrics["mae"].high < age.metrics["mae"].chance
    assert smoking.headline.low > 0.5
    assert (
        smoking.metrics["balanced_accuracy"].low > smoking.metrics["balanced_accuracy"].chance == pytest.approx(1 / 3)
    )
    assert all(found.low <= found.score <= found.high for r in results.values() for found in r.metrics.values())


def test_what_is_known_of_a_target_comes_with_its_scores(results):
    sex, age = results["gender"], results["age"]
    assert (sex.metric, sex.labels, sex.n, sex.participants) == ("auc", ["female", "male"], 120, 100)
    assert (age.metric, age.labels, age.units) == ("r", [], "years")
    assert set(sex.metrics) == {"auc", "balanced_accuracy"}
    assert set(age.metrics) == {"r", "r2", "mae"}
    assert "logistic" in sex.method
    assert "ridge" in age.method
    assert "5 folds" in age.method


def test_scores_of_folds_are_printed_repeat_by_repeat(results):
    for found in results.values():
        printed = found.to_json()["fold_scores"]
        assert set(printed) == set(found.metrics)
        for name, scores in printed.items():
            assert [len(repeat) for repeat in scores] == [5, 5]
            assert np.mean(scores) == pytest.approx(found.metrics[name].score, rel=1e-5, abs=1e-6)
            np.testing.assert_allclose(np.ravel(scores), found.fold_scores[name], rtol=1e-5)


def test_missing_values_are_left_out_of_their_target_alone(results, cohort):
    present = cohort.phenotypes["age"].notna()
    assert results["age"].n == present.sum() == 110
    assert results["age"].participants == cohort.scans["participant"][present].nunique()
    assert len(results["age"].out_of_fold.truth) == 110
    assert results["smoking"].n == 120


def test_out_of_fold_predictions_are_of_the_first_repeat(results, cohort):
    found = results["gender"].out_of_fold
    np.testing.assert_array_equal(found.truth, cohort.phenotypes["gender"])
    np.testing.assert_allclose(found.predicted.sum(axis=1), 1)
    assert set(found.fold) == set(range(5))
    per_fold = [roc_auc_score(found.truth[found.fold == k], found.predicted[found.fold == k, 1]) for k in range(5)]
    once = probe(cohort, ["gender"], settings=ProbeSettings(repeats=1))[0]
    assert once.headline.score == pytest.approx(np.mean(per_fold), abs=1e-12)
    assert results["age"].out_of_fold.predicted.shape == (110,)
    people = cohort.scans["participant"]
    assert pd.Series(found.fold).groupby(people).nunique().max() == 1


def test_features_that_know_the_person_do_not_score():
    plain, grouped = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        people = np.repeat(np.arange(60), 4)
        features = rng.normal(size=(60, 64))[people] + 0.1 * rng.normal(size=(240, 64))
        label = rng.permutation(np.arange(60) % 2)[people]
        splits = StratifiedKFold(5, shuffle=True, random_state=seed)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        plain.append(cross_val_score(model, features, label, cv=splits, scoring="roc_auc").mean())
        grouped.append(
            probe(make_embeddings(features, {"x": label}, people=people), settings=ProbeSettings(repeats=2))[
                0
            ].headline.score
        )
    assert min(plain) > 0.9
    assert 0.4 < np.mean(grouped) < 0.6


@pytest.mark.parametrize(("task", "cohorts"), [("binary", 40), ("multiclass", 40), ("continuous", 150), ("count", 150)])
def test_scores_of_nothing_are_at_chance(task, cohorts):
    excess: dict[str, list[float]] = {}
    for seed in range(cohorts):
        rng = np.random.default_rng(seed)
        values = {
            "binary": rng.permutation(np.arange(60) % 2),
            "multiclass": rng.permutation([0] * 30 + [1] * 18 + [2] * 12),
            "continuous": rng.normal(size=60),
            "count": rng.poisson(2, 60),
        }[task]
        embeddings = make_embeddings(rng.normal(size=(60, 10)), {"x": values}, variables={"x": {"task": task}})
        (found,) = probe(embeddings, settings=ProbeSettings(repeats=1))
        for name in {"auc", "balanced_accuracy", "r"} & set(found.metrics):
            excess.setdefault(name, []).append(found.metrics[name].score - found.metrics[name].chance)
    assert excess
    for values in excess.values():
        error = np.std(values) / np.sqrt(cohorts)
        assert abs(np.mean(values)) < 4 * error < 0.07  # pooled predictions would be further below chance than that


def test_interval_holds_chance_when_there_is_nothing():
    held = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = probe(
            make_embeddings(rng.normal(size=(80, 100)), {"x": rng.normal(size=80)}), settings=ProbeSettings(repeats=3)
        )[0]
        held.append(found.headline.holds_chance)
    assert np.mean(held) >= 0.9  # the plain corrected resampled t holds it in fewer than that


def test_the_interval_of_a_rare_class_counts_its_people():
    # In simulations of nothing it held chance in 91 %, and in 75 % where scores were counted as those of everybody.
    rng = np.random.default_rng(0)
    age, ill = rng.integers(50, 70, 100), np.arange(100) < 4
    embeddings = make_embeddings(rng.normal(size=(100, 10)), {"ill": ill, "age": age})
    (found,) = probe(embeddings, ["ill"], settings=ProbeSettings(confounds=("age",)))
    (alone,) = probe(make_embeddings(age[:, None], {"ill": ill}), ["ill"])
    assert (found.smallest_class, found.effective_groups) == (4, 4)
    scores, others = found.fold_scores["auc"], alone.fold_scores["auc"]
    assert len(scores) == 10
    counted = {"chance": 0.5, "bounds": (0, 1), "groups": 4.0}
    assert found.headline == corrected_interval(scores, found.test_to_train, **counted)
    assert found.confound_metrics["auc"] == alone.headline
    apart = corrected_interval(scores - others, found.test_to_train, chance=0, groups=4.0)
    assert found.gains["auc"] == paired_interval(found, alone, "auc") == apart


def test_the_interval_of_two_folds_counts_their_scores_as_one():
    scores = np.array([0.50, 0.54, 0.60, 0.62, 0.41, 0.43])
    several = {"chance": 0.5, "bounds": (0, 1)}
    as_one = corrected_interval(scores.reshape(3, 2).mean(axis=1), 1.0, **several)
    found = corrected_interval(scores, 1.0, folds=2, **several)
    assert (found.score, found.low, found.high) == pytest.approx((as_one.score, as_one.low, as_one.high))
    apart = corrected_interval(scores, 1.0, **several)
    assert apart.low > found.low, "two scores of the same pairs were counted twice"
    assert corrected_interval(scores[:2], 1.0, folds=2, **several) == Interval(0.52, 0, 1, 0.5)


def test_two_groups_give_no_interval(capsys):
    rng = np.random.default_rng(0)
    site = np.arange(80) % 2
    embeddings = make_embeddings(rng.normal(size=(80, 4)), {"y": rng.normal(size=80), "site": site})
    (found,) = probe(embeddings, ["y"], settings=ProbeSettings(groups="site"))
    assert len(found.fold_scores["r"]) == 2
    assert (found.headline.low, found.headline.high) == (-1, 1)
    assert "give no interval" in found.method
    print_skipped([Probed("e", embeddings, [found])])
    assert capsys.readouterr().err == f"y: {NO_INTERVAL}\n"


def test_perfect_scores_are_as_certain_as_there_are_groups():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(10), 20)
    ill = site % 2
    embeddings = make_embeddings(10 * ill[:, None] + rng.normal(size=(200, 3)), {"ill": ill, "site": site})
    (found,) = probe(embeddings, ["ill"], settings=ProbeSettings(groups="site"))
    assert found.smallest_class == 5
    assert (found.headline.score, found.headline.low) == (1, pytest.approx(0.025 ** (1 / 5)))


def test_scores_do_not_depend_on_the_order_of_phenotypes():
    rng = np.random.default_rng(0)
    common = rng.normal(size=120)
    table = {
        "weight": common + 0.5 * rng.normal(size=120) + 80,
        "age": 60 + 5 * common + 3 * rng.normal(size=120),
        "iq": 0.5 * rng.normal(size=120) - common,
        "bmi": 0.3 * common + rng.normal(size=120),
    }
    features = rng.normal(size=(120, 10)) + common[:, None] * (np.arange(10) == 0)
    orders = list(itertools.permutations(table))[::5]
    scores = {
        probe(make_embeddings(features, {name: table[name] for name in order}), ["age"], settings=ProbeSettings())[
            0
        ].headline.score
        for order in orders
    }
    assert len(scores) == 1


def test_same_seed_same_scores_whatever_else_is_asked_for(cohort, results):
    alone = probe(cohort, ["gender"], settings=ProbeSettings(repeats=2))[0]
    assert alone.metrics == results["gender"].metrics
    np.testing.assert_array_equal(alone.out_of_fold.predicted, results["gender"].out_of_fold.predicted)
    assert probe(cohort, ["gender"], settings=ProbeSettings(repeats=2, seed=1))[0].metrics != alone.metrics


def test_regressions_of_the_same_scans_share_folds_and_each_scores_as_alone(cohort, monkeypatch):
    phenotypes = cohort.phenotypes.assign(late=cohort.phenotypes["something"].where(np.arange(120) >= 30))
    embeddings = replace(cohort, phenotypes=phenotypes)
    names, settings = ["age", "fluid_intelligence", "something", "late"], ProbeSettings(repeats=1)
    fitted = []
    monkeypatch.setattr(
        "extract.probing.cross_validation.ridge",
        lambda x, y, *of, **by: fitted.append(y.shape) or ridge(x, y, *of, **by),
    )
    together = {found.name: found for found in probe(embeddings, names, settings=settings)}
    assert len(fitted) == 15  # five folds of each of three sets of scans
    assert sum(targets == 2 for _, targets in fitted) == 5
    for name in names:
        (alone,) = probe(embeddings, [name], settings=settings)
        assert alone.metrics["r"].score == pytest.approx(together[name].metrics["r"].score, abs=1e-9)
        np.testing.assert_array_equal(alone.out_of_fold.fold, together[name].out_of_fold.fold)
    shared = together["fluid_intelligence"].out_of_fold
    np.testing.assert_array_equal(shared.fold, together["something"].out_of_fold.fold)
    np.testing.assert_array_equal(together["late"].out_of_fold.rows, np.arange(30, 120))


# ---- targets and tasks -----------------------------------------------------------------------------------------------


def test_targets_are_all_but_confounds_the_known_ones_first(cohort, results):
    assert list(results) == ["gender", "age", "fluid_intelligence", "smoking", "something"]
    assert target_names(cohort, ["site", "sex"]) == ["site", "gender"]  # a confound only when it is named


@pytest.mark.parametrize(
    ("targets", "tasks", "words"),
    [
        (["height"], {}, ["height", "smoking", "gender"]),
        ([], {}, ["one or more"]),
        (["sex", "gender"], {}, ["once"]),
        (["age"], {"age": "regression"}, ["regression", "continuous", "ordinal"]),
        (["age"], {"sex": "binary"}, ["gender", "not among"]),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(cohort, targets, tasks, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        probe(cohort, targets, tasks=tasks)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        {"folds": 1},
        {"repeats": 0},
        {"seed": -1},
        {"permutations": -1},
        {"bootstrap": -5},
        {"kinship": 0},
        {"train_people": 9},
        {"confounds": ("age", "age")},
        {"bins": {"age": 1}},
        {"bins": {"age": ()}},
        {"bins": {"age": (50, 40)}},
        {"bins": {"age": (50, float("nan"))}},
    ],
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        ProbeSettings(**arguments)


@pytest.mark.parametrize(
    ("values", "labels", "task"),
    [
        ([3.0, 7.5], None, "binary"),
        ([0.0, 1.0, 2.0], {"0": "a", "1": "b", "2": "c"}, "multiclass"),
        ([0.0, 1.0, 2.0], None, "count"),
        ([1.0, 2.0, 5.0], None, "count"),
        ([11025.0, 11026.0, 11028.0], None, "continuous"),
        ([-1.0, 0.0, 1.0], None, "continuous"),
        ([0.0, 0.5, 1.0], None, "continuous"),
        (range(11), None, "continuous"),
        (range(12), {str(code): f"group {code}" for code in range(12)}, "multiclass"),
        (range(12), {"0": "none", "11": "more than 10"}, "continuous"),  # labels of some codes among numbers
        (range(101), {str(code): f"place {code}" for code in range(101)}, "continuous"),
        ([], None, "continuous"),
    ],
)
def test_tasks_are_inferred(values, labels, task):
    assert infer_task(np.array(values, dtype=float), labels) == task


def test_a_task_can_be_named(cohort):
    found = probe(cohort, ["smoking"], tasks={"smoking": "ordinal"}, settings=ProbeSettings(repeats=1))[0]
    assert (found.task, found.metric) == ("ordinal", "r")


def test_a_heavy_tailed_count_is_fitted_on_its_logarithm():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 20))
    counts = np.round(np.expm1(0.8 + 0.5 * features[:, 0] + 0.2 * rng.normal(size=200)).clip(0))
    counts[7] = 100  # one institution among households
    embeddings = make_embeddings(features, {"household_size": counts}, variables={"household_size": {"task": "count"}})
    found = probe(embeddings, settings=ProbeSettings(repeats=2))[0]
    as_numbers = probe(embeddings, tasks={"household_size": "continuous"}, settings=ProbeSettings(repeats=2))[0]
    assert found.headline.score > as_numbers.headline.score
    assert found.headline.low > 0.6
    mae = found.metrics["mae"]
    assert mae.score < mae.chance
    assert found.out_of_fold.predicted.min() >= 0
    np.testing.assert_array_equal(found.out_of_fold.truth, counts)  # in people, not in logarithms


@pytest.mark.parametrize(
    ("values", "task", "reason"),
    [
        (np.full(40, np.nan), "continuous", "every value is missing"),
        (np.full(40, 0.1), "continuous", "constant: every value is 0.1"),
        (np.ones(40), "binary", "constant"),
        (np.where(np.arange(40) < 19, np.arange(40), np.nan), "continuous", "19 participants have a value"),
        (np.arange(40) < 3, "binary", "class 'male' has 3 participants, at least 4"),
        (np.arange(40), "multiclass", "has 1 participants"),
        (np.arange(40) % 3, "binary", "3 different values are not binary"),
        (np.arange(40) - 1, "count", "-1, is no count"),
        (np.where(np.arange(40) == 3, np.inf, np.arange(40)), "continuous", "1 values are infinite"),
        (np.arange(40) * 1e300, "continuous", "values reach 3.9e+301, expected between"),
        (np.arange(40) * 1e-90, "continuous", "values reach 3.9e-89, expected between"),
    ],
)
def test_what_cannot_be_probed_is_skipped_with_a_reason(values, task, reason):
    features = np.random.default_rng(0).normal(size=(40, 5))
    labels = {"0": "female", "1": "male"}
    embeddings = make_embeddings(features, {"x": values}, variables={"x": {"task": task, "labels": labels}})
    seen = []
    (found,) = probe(embeddings, on_target=seen.append)
    assert (found.status, seen) == ("skipped", [found])
    assert reason in found.reason
    assert json.loads(json.dumps(found.to_json()))["score"] is None


def test_few_people_of_a_class_get_fewer_folds():
    rng = np.random.default_rng(0)
    embeddings = make_embeddings(rng.normal(size=(40, 5)), {"x": np.arange(40) < 6})
    (found,) = probe(embeddings)
    assert (found.status, set(found.out_of_fold.fold)) == ("ok", {0, 1, 2})
    assert "3 folds" in found.method


def test_features_that_say_nothing_score_chance():
    (found, regression) = probe(
        make_embeddings(np.full((40, 5), 0.1), {"x": np.arange(40) % 2, "y": np.arange(40)}),
        settings=ProbeSettings(repeats=1),
    )
    assert found.headline.score == 0.5
    assert regression.headline.score == 0


def test_features_that_are_no_numbers_are_refused(cohort):
    features = cohort.features.copy()
    features[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"row 7 .*participant 9000007"):
        probe(replace(cohort, features=features))
