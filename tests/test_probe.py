"""Probes: effects that are there are found, those that are not are not, and no person is on both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from extract.embeddings import Embeddings, write_embeddings
from extract.folds import class_strata, deal_folds, value_strata
from extract.linear import fit_softmax, leave_person_out_errors, logistic, ridge, rotate
from extract.probe import infer_task, probe, target_names
from extract.probe_cli import main


def make_embeddings(
    features: np.ndarray,
    phenotypes: dict[str, np.ndarray],
    *,
    people: np.ndarray | None = None,
    variables: dict[str, dict[str, object]] | None = None,
    simulated: bool = True,
) -> Embeddings:
    """Return embeddings as extract would write them."""
    n = len(features)
    people = np.arange(n) if people is None else people
    scans = pd.DataFrame(
        {
            "row": np.arange(n),
            "participant": [f"9{person:06d}" for person in people],
            "session": ["2"] * n,
            "modality": ["T1w"] * n,
        }
    )
    attrs = {"model": "resnet18", "weights": {"name": "random", "sha256": "0" * 64}, "simulated": simulated}
    table = pd.DataFrame({name: np.asarray(values, dtype=np.float64) for name, values in phenotypes.items()})
    return Embeddings(features.astype(np.float32), scans, table.reindex(range(n)), variables or {}, attrs)


@pytest.fixture(scope="module")
def cohort() -> Embeddings:
    """Return 120 scans of 100 people: sex and age shape the features, fluid intelligence does not."""
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(100), np.arange(20)])
    sex = rng.permutation(np.arange(100) % 2)[people].astype(float)
    age = rng.uniform(45, 80, 100)[people]
    smoking = rng.permutation(np.arange(100) % 3)[people].astype(float)
    features = rng.normal(size=(120, 40))
    features[:, 0] += 2 * sex
    features[:, 1:4] += (age[:, None] - 62) / 8
    features[:, 5:8] += 2 * np.eye(3)[smoking.astype(int)]
    age[:10] = np.nan
    return make_embeddings(
        features,
        {
            "site": rng.integers(1, 3, 120),
            "something": rng.normal(size=120),
            "smoking": smoking,
            "fluid_intelligence": rng.integers(0, 14, 120),
            "age": age,
            "gender": sex,
        },
        people=people,
        variables={
            "site": {"task": "multiclass", "confound": True},
            "gender": {"task": "binary", "labels": {"0": "female", "1": "male"}},
            "smoking": {"task": "multiclass", "labels": {"0": "never", "1": "previous", "2": "current"}},
            "age": {"task": "continuous", "units": "years"},
        },
    )


@pytest.fixture(scope="module")
def results(cohort) -> dict:
    return {result.name: result for result in probe(cohort, repeats=2)}


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
    once = probe(cohort, ["gender"], repeats=1)[0]
    assert once.headline.score == pytest.approx(np.mean(per_fold), abs=1e-12)
    assert results["age"].out_of_fold.predicted.shape == (110,)
    people = cohort.scans["participant"]
    assert pd.Series(found.fold).groupby(people).nunique().max() == 1


def test_features_that_know_the_person_do_not_score():
    plain, grouped = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        people = np.repeat(np.arange(60), 4)
        features = rng.normal(size=(60, 64))[people] + 0.1 * rng.normal(size=(240, 64))
        label = rng.permutation(np.arange(60) % 2)[people]
        splits = StratifiedKFold(5, shuffle=True, random_state=seed)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        plain.append(cross_val_score(model, features, label, cv=splits, scoring="roc_auc").mean())
        grouped.append(probe(make_embeddings(features, {"x": label}, people=people), repeats=2)[0].headline.score)
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
        (found,) = probe(embeddings, repeats=1)
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
        found = probe(make_embeddings(rng.normal(size=(80, 100)), {"x": rng.normal(size=80)}), repeats=3)[0]
        held.append(found.headline.holds_chance)
    assert np.mean(held) >= 0.9  # the plain corrected resampled t holds it in fewer than that


def test_same_seed_same_scores_whatever_else_is_asked_for(cohort, results):
    alone = probe(cohort, ["gender"], repeats=2)[0]
    assert alone.metrics == results["gender"].metrics
    np.testing.assert_array_equal(alone.out_of_fold.predicted, results["gender"].out_of_fold.predicted)
    assert probe(cohort, ["gender"], repeats=2, seed=1)[0].metrics != alone.metrics


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


@pytest.mark.parametrize("arguments", [{"folds": 1}, {"repeats": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(cohort, arguments):
    with pytest.raises(ValueError, match="expected 2 or more folds"):
        probe(cohort, **arguments)


@pytest.mark.parametrize(
    ("values", "labels", "task"),
    [
        ([3.0, 7.5], None, "binary"),
        ([0.0, 1.0, 2.0], {"0": "a", "1": "b", "2": "c"}, "multiclass"),
        ([0.0, 1.0, 2.0], None, "count"),
        ([-1.0, 0.0, 1.0], None, "continuous"),
        ([0.0, 0.5, 1.0], None, "continuous"),
        (range(11), None, "continuous"),
        ([], None, "continuous"),
    ],
)
def test_tasks_are_inferred(values, labels, task):
    assert infer_task(np.array(values, dtype=float), labels) == task


def test_a_task_can_be_named(cohort):
    found = probe(cohort, ["smoking"], tasks={"smoking": "ordinal"}, repeats=1)[0]
    assert (found.task, found.metric) == ("ordinal", "r")


def test_a_heavy_tailed_count_is_fitted_on_its_logarithm():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 20))
    counts = np.round(np.expm1(0.8 + 0.5 * features[:, 0] + 0.2 * rng.normal(size=200)).clip(0))
    counts[7] = 100  # one institution among households
    embeddings = make_embeddings(features, {"household_size": counts}, variables={"household_size": {"task": "count"}})
    found = probe(embeddings, repeats=2)[0]
    as_numbers = probe(embeddings, repeats=2, tasks={"household_size": "continuous"})[0]
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
        make_embeddings(np.full((40, 5), 0.1), {"x": np.arange(40) % 2, "y": np.arange(40)}), repeats=1
    )
    assert found.headline.score == 0.5
    assert regression.headline.score == 0


def test_features_that_are_no_numbers_are_refused(cohort):
    features = cohort.features.copy()
    features[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"row 7 .*participant 9000007"):
        probe(replace(cohort, features=features))


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
        predicted, _ = ridge(train, target, np.arange(60), test, penalty=penalty)
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
        probabilities, _ = logistic(train, codes, codes, test, penalty=penalty)
        # Two classes have two weight vectors here and one there, half as long together.
        model = LogisticRegression(C=(2 if classes == 2 else 1) / penalty, tol=1e-8, max_iter=5000)
        expected = model.fit(scaler.transform(train), codes).predict_proba(scaler.transform(test))
        np.testing.assert_allclose(probabilities, expected, atol=1e-4)


@pytest.mark.parametrize("effect", [0.0, 0.15, 0.6])
def test_logistic_penalty_is_the_best_of_all_penalties(effect):
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    train = rng.normal(size=(60, 200)) + effect * codes[:, None]
    inner = rng.permutation(np.arange(60) // 2 % 3)
    _, penalty = logistic(train, codes, inner, train[:1])
    standard, losses = StandardScaler().fit_transform(train), []
    for candidate in rotate(train).penalties:
        loss = 0.0
        for fold in range(3):
            out = inner == fold
            model = LogisticRegression(C=2 / candidate, tol=1e-7, max_iter=2000).fit(standard[~out], codes[~out])
            loss += log_loss(codes[out], model.predict_proba(standard[out]), normalize=False)
        losses.append(loss)
    assert losses[list(rotate(train).penalties).index(penalty)] < min(losses) + 0.01


def test_softmax_reaches_the_minimum():
    rng = np.random.default_rng(0)
    design = np.column_stack([rng.normal(size=(90, 7)), np.ones(90)])
    codes = np.arange(90) % 3
    weights = fit_softmax(design, codes, 2.0, tolerance=1e-8)
    logits = design @ weights
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    slope = design.T @ (probabilities - np.eye(3)[codes])
    slope[:-1] += 2.0 * weights[:-1]
    np.testing.assert_allclose(slope, 0, atol=1e-4)
    np.testing.assert_allclose(fit_softmax(design, codes, 2.0, weights, tolerance=1e-8), weights, atol=1e-6)


@pytest.mark.parametrize("features", [10, 80])
def test_rotation_keeps_distances_and_orders_nothing_anew(features):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, features)), rng.normal(size=(15, features))
    rotation = rotate(train)
    scaler = StandardScaler().fit(train)
    assert rotation.scores.shape[1] <= min(40, features)
    gram = scaler.transform(train) @ scaler.transform(train).T
    np.testing.assert_allclose(rotation.scores @ rotation.scores.T, gram, atol=1e-9)
    across = scaler.transform(test) @ scaler.transform(train).T
    np.testing.assert_allclose(rotation.apply(test) @ rotation.scores.T, across, atol=1e-9)


@pytest.mark.parametrize("features", [8, 70])
def test_leaving_a_person_out_is_what_refitting_without_them_gives(features):
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(25), np.arange(10), np.arange(5)])
    train = rng.normal(size=(40, features))
    target = train[:, 0] + rng.normal(size=40)
    penalties = np.array([0.5, 20.0, 1e3])
    standard = StandardScaler().fit_transform(train)
    expected = []
    for penalty in penalties:
        errors = np.empty(40)
        for person in range(25):
            out = people == person
            errors[out] = target[out] - Ridge(alpha=penalty).fit(standard[~out], target[~out]).predict(standard[out])
        expected.append(np.mean(errors**2))
    found = leave_person_out_errors(rotate(train), target, people, penalties)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_penalties_are_chosen_without_a_persons_other_scans(seed):
    # Features know the person and nothing else: leaving out scans would see a perfect effect and hardly shrink.
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(60), 3)
    train = rng.normal(size=(60, 60))[people] + 0.05 * rng.normal(size=(180, 60))
    target = rng.normal(size=60)[people]
    _, by_person = ridge(train, target, people, train[:1])
    _, by_scan = ridge(train, target, np.arange(180), train[:1])
    assert by_person > 100 * by_scan
    assert by_person in rotate(train).penalties


# ---- the command -----------------------------------------------------------------------------------------------------


def run_probe(*arguments: object) -> subprocess.CompletedProcess:
    program = "import sys; from extract.probe_cli import main; sys.argv[0] = 'probe'; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "160"})


@pytest.fixture(scope="module", params=[".zarr", ".h5"])
def path(request, cohort, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("emb") / f"emb{request.param}"
    write_embeddings(path, cohort)
    return path


def test_command_prints_a_json_document(path, cohort):
    done = run_probe(path, "--targets", "sex,age", "--task", "age=ordinal", "--repeats", 1, "--seed", 3, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    found = probe(cohort, ["sex", "age"], tasks={"age": "ordinal"}, repeats=1, seed=3)
    assert document == {
        "embeddings": path.name,
        "simulated": True,
        "model": "resnet18",
        "weights": {"name": "random", "sha256": "0" * 64},
        "folds": 5,
        "repeats": 1,
        "seed": 3,
        "targets": json.loads(json.dumps([result.to_json() for result in found])),
        "report": None,
    }
    assert {"name", "task", "n", "metric", "score", "low", "high", "chance"} <= set(document["targets"][0])


def test_command_prints_a_table_and_what_was_skipped(cohort, tmp_path):
    phenotypes = cohort.phenotypes.assign(empty=np.nan)[["gender", "age", "empty"]]
    write_embeddings(tmp_path / "emb.h5", replace(cohort, phenotypes=phenotypes))
    done = run_probe(tmp_path / "emb.h5", "--repeats", 1)
    assert done.returncode == 0  # nobody asked for the empty one by name
    assert "simulated data" in done.stdout
    assert "random weights" in done.stdout
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("age"))
    assert all(word in lines[first] for word in ("continuous", "110", " r ", " to "))
    assert " R2 " in lines[first + 1]
    assert " MAE " in lines[first + 2]
    assert done.stderr.strip() == "skipped: empty: every value is missing"


def test_command_fails_if_a_named_target_was_skipped(cohort, tmp_path):
    attrs = {**cohort.attrs, "simulated": False}
    phenotypes = cohort.phenotypes.assign(empty=np.nan)
    write_embeddings(tmp_path / "emb.h5", replace(cohort, phenotypes=phenotypes, attrs=attrs))
    done = run_probe(tmp_path / "emb.h5", "--targets", "gender, empty", "--repeats", 1)
    assert done.returncode == 1
    assert "gender" in done.stdout
    assert "simulated" not in done.stdout


def test_command_writes_a_report_into_a_new_folder(cohort, tmp_path):
    write_embeddings(tmp_path / "emb.h5", cohort)
    report = tmp_path / "new" / "report.html"
    done = run_probe(tmp_path / "emb.h5", "--targets", "sex", "--repeats", 1, "--report", report)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {report}"
    assert "gender" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--targets", "height"], 1, ["height", "smoking"]),
        (["--targets", "age", "--task", "age=linear"], 1, ["linear", "continuous"]),
        (["--task", "age"], 2, ["NAME=KIND"]),
        (["--store", "x.zarr"], 2, ["--report"]),
        (["--folds", "1"], 2, ["2"]),
    ],
)
def test_command_refuses_what_it_cannot_do(cohort, tmp_path, monkeypatch, capsys, arguments, code, words):
    write_embeddings(tmp_path / "emb.h5", cohort)
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "emb.h5"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (code, "")
    assert all(word in err for word in words)
    if code == 1:
        assert len(err.strip().splitlines()) == 1


def test_command_names_a_missing_file(tmp_path):
    missing = run_probe(tmp_path / "none.h5")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no embeddings at")
    assert len(missing.stderr.splitlines()) == 1


def test_command_names_what_is_no_embedding_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "emb.csv").write_text("1,2\n")
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "emb.csv")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert ".zarr, .h5" in capsys.readouterr().err
