"""Learning curves: fewer people to learn from, the same ones to be tested on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from embedded import make_embeddings

from extract.probing.compare import Probed, probe_all
from extract.probing.curves import curve_sizes, default_sizes, learning_curves
from extract.probing.printing import print_curves
from extract.probing.probe import probe
from extract.probing.results import TargetResult
from extract.probing.settings import ProbeSettings

SETTINGS = ProbeSettings(repeats=2, permutations=3)


@pytest.fixture(scope="module")
def cohort():
    """Return 150 scans of 120 people: 60 features know age faintly; of 40 people the score is known."""
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(120), np.arange(30)])
    age = rng.uniform(45, 80, 120)[people]
    features = rng.normal(size=(150, 60))
    features[:, :10] += (age[:, None] - 62) / 25
    rare = np.where(people < 40, rng.normal(size=120)[people], np.nan)
    return make_embeddings(
        features,
        {"age": age, "sex": (age > 62).astype(float), "rare": rare},
        people=people,
        variables={"age": {"task": "continuous"}, "sex": {"task": "binary"}},
    )


@pytest.fixture(scope="module")
def results(cohort):
    return probe(cohort, settings=SETTINGS)


@pytest.fixture(scope="module")
def curves(cohort, results):
    seen: list[TargetResult] = []
    found = learning_curves(cohort, results, [15, 30, 60, 500], settings=SETTINGS, on_target=seen.append)
    assert {result.p_value for result in seen} == {None}  # what is not drawn is not computed
    return found


def test_more_people_give_better_scores(curves):
    scores = [point.interval.score for point in curves["age"].points]
    assert scores == sorted(scores)
    assert scores[-1] - scores[0] > 0.1
    assert [point.people for point in curves["age"].points][:3] == [15, 30, 60]


def test_the_last_point_is_the_whole_probe(curves, results):
    for result in results:
        last = curves[result.name].points[-1]
        assert (last.people, last.interval) == (result.train_participants, result.headline)
        assert curves[result.name].metric == result.metric


def test_each_point_is_that_of_a_probe_with_so_many_people(cohort, curves):
    settings = ProbeSettings(repeats=2, train_people=30)
    (found,) = probe(cohort, ["age"], settings=settings)
    assert curves["age"].points[1].interval == found.headline
    assert curves["age"].points[1].people == found.train_participants == 30


def test_sizes_beyond_a_target_are_named_with_a_reason(curves):
    assert set(curves["age"].missing) == {500}
    assert "96 people can be trained on" in curves["age"].missing[500]
    assert set(curves["rare"].missing) == {60, 500}
    assert [point.people for point in curves["rare"].points] == [15, 30, 32]
    rows = curves["rare"].to_json()
    assert [row["train_participants"] for row in rows] == [15, 30, 32, 60, 500]
    assert rows[-1]["score"] is None
    assert {"score", "low", "high", "chance"} <= set(rows[0])
    json.dumps(rows, allow_nan=False)


def test_sizes_double_until_nearly_everyone():
    assert default_sizes(1000) == [50, 100, 200, 400, 800]
    assert default_sizes(440) == [50, 100, 200]
    assert default_sizes(120) == [25, 50, 100]  # of few people fewer, so that there is a curve
    assert default_sizes(60) == [12, 25, 50]
    assert default_sizes(31) == [12, 25]
    assert default_sizes(13) == []
    few = TargetResult("a", "binary", "ok", 9, 9, train_participants=90)
    lost = TargetResult("b", "binary", "skipped", 9, 9, train_participants=9000)
    assert curve_sizes([few, lost]) == [12, 25, 50]
    assert curve_sizes([lost]) == []
    assert curve_sizes([few], [70, 20]) == [20, 70]
    with pytest.raises(ValueError, match="each once"):
        curve_sizes([few], [20, 20])


def test_curves_of_nothing_are_empty(cohort):
    assert learning_curves(cohort, [TargetResult("age", "binary", "skipped", 0, 0)], [50]) == {}


def test_tasks_and_bins_go_with_their_targets_by_any_name(cohort):
    variables = {**cohort.variables, "gender": {"task": "binary"}}
    table = cohort.phenotypes.rename(columns={"sex": "gender"})
    named = replace(cohort, phenotypes=table.assign(rare=np.where(np.arange(150) < 50, table["rare"], np.nan)))
    named = replace(named, variables=variables)
    settings = ProbeSettings(repeats=1, bins={"age": (62.0,), "rare": 2}, confounds=("gender",))
    tasks = {"sex": "ordinal"}
    results = probe(named, ["age", "gender", "rare"], tasks=tasks, settings=settings)
    assert [result.status for result in results] == ["ok"] * 3
    found = learning_curves(named, results, [60], tasks=tasks, settings=settings)
    assert set(found["rare"].missing) == {60}  # its bins are not those of a target at this size
    assert {name: curve.metric for name, curve in found.items()} == {"age": "auc", "gender": "r", "rare": "auc"}
    (expected,) = probe(named, ["gender"], tasks=tasks, settings=ProbeSettings(repeats=1, train_people=60))
    assert found["gender"].points[0].interval == expected.headline


def test_progress_is_planned_and_ends_there(cohort):
    planned, seen = [], []
    probed = probe_all(
        {"emb": cohort}, ["age", "sex"], settings=ProbeSettings(repeats=1), curve=[],
        on_target=seen.append, on_plan=planned.append,
    )  # fmt: skip
    assert planned == [2, 8]
    assert len(seen) == 8
    assert [point.people for point in probed[0].curves["age"].points] == [12, 25, 50, 96]
    assert "curve" in probed[0].to_json()[0]
    assert "curve" not in probe_all({"emb": cohort}, ["age"], settings=ProbeSettings(repeats=1))[0].to_json()[0]


def test_a_curve_of_too_few_people_is_said_to_be_none(cohort, capsys):
    found = TargetResult("age", "continuous", "ok", 16, 16, metric="r", train_participants=13)
    curve = learning_curves(cohort, [found], curve_sizes([found]))
    print_curves([Probed("emb", cohort, [found], curve)])
    out, err = capsys.readouterr()
    assert (out, "at most 13 people can be trained on in each fold; give fewer: --curve=10" in err) == ("", True)
