"""The benchmarks of fine-tuning compare like with like and write what they promise. What comes of it, no test says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from finetuning import TINY, make_brains, thin_networks  # noqa: F401 - the fixture makes networks small
from typer.testing import CliRunner

from benchmarks import finetune as speed
from benchmarks import finetune_cohort as cohort
from benchmarks import nulls, transfer
from benchmarks.__main__ import app
from benchmarks.made import make_store, make_volumes
from benchmarks.results import save
from extract.probing.results import Interval, OutOfFold, TargetResult
from finetune.settings import make_settings
from ingest.store import open_store

SMALL: dict[str, Any] = {name: value for name, value in TINY.items() if name not in ("target", "weights")}
SMALL |= {"slices": 2}
CASE = speed.Case("resnet18", "coronal", 2, 1.0, batch=2, steps=2, turns=1)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "store.zarr"
    make_store(path, make_volumes(3, (16, 24, 16)), 4, CASE.batch * (CASE.steps + 1 + speed._AHEAD))
    return open_store(path)


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """Return a store of 40 people with a phenotype that shows and some that do not."""
    path = tmp_path_factory.mktemp("brains") / "cohort.zarr"
    make_brains(path)
    return open_store(path)


def test_finetune(tmp_path, monkeypatch):
    solid = speed.Case("r3d_18", None, 1, 0.5, batch=2, steps=2, turns=1)
    monkeypatch.setitem(speed.CASES, "cpu", (replace(CASE, view="triplanar"), solid))
    done = CliRunner().invoke(
        app,
        ["finetune", "--shape", "16", "24", "16", "--steps", "1", "--turns", "1",
         "--directory", str(tmp_path / "d"), "--json", str(tmp_path / "r.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{speed.STORE}/{speed.MEMORY} at least 0.95" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    found = {result["name"]: result for result in report["results"]}
    assert report["results"][0]["name"] == "limit: arithmetic, float32"
    for case in (case.name for case in speed.CASES["cpu"]):
        for how in ("", ", augmented"):
            store, memory = (found[f"{case}{how}, {way}"]["value"] for way in (speed.STORE, speed.MEMORY))
            ratio = report["ratios"][f"{case}{how}: {speed.STORE}/{speed.MEMORY}"]
            assert ratio == pytest.approx(store / memory, rel=0.02)
        assert f"{case}, augmented: {speed.MEMORY}/{speed.BEFOREHAND}" in report["ratios"]
        assert 0 < found[f"{case}, {speed.MEMORY}"]["limit_share"] < 1
    assert str(tmp_path.parent) not in json.dumps(report["settings"])


def test_memory_gives_the_batches_of_the_loader(noise):
    training = speed.begin(CASE, noise, "cpu", True)
    with training.loader, speed.Augmenting(training, noise).open_decoded() as decoded:
        expected = speed._first_batches(training.loader)
        before = speed._first_batches(decoded)
        passing = iter(speed.Resident(decoded, before, speed.Augmenting(training, noise)))
        for want, plain in zip(expected, before, strict=True):
            given = next(passing)
            assert torch.equal(given.images, want.images)
            assert not torch.equal(given.images, plain.images)
            np.testing.assert_array_equal(given.rows, want.rows)


def test_a_training_with_other_losses_is_not_measured(noise, monkeypatch):
    monkeypatch.setattr(speed.Augmenting, "__call__", lambda _, images, number: images * (1 - number % 2))
    with pytest.raises(ValueError, match="losses of resnet18, 2 coronal slices, from memory, are"):
        speed.measure(CASE, noise, "cpu", True, {"backend": {}})


def test_operations_are_counted(noise):
    training = speed.begin(replace(CASE, model="resnet50", view="axial", slices=1), noise, "cpu", False)
    training.loader.close()
    training.network.seen = replace(training.network.seen, size=(224, 224))
    first = 64 * 3 * 49 * 112 * 112  # multiply-adds of the first convolution, whose input needs no gradient
    # Those of all by torchvision's own table, but for the classifier; each is two operations, and three times as many
    # with the gradients of inputs and of weights
    assert speed.count_operations(training, noise) == pytest.approx(6 * (4.089e9 - 2.048e6) - 2 * first, rel=0.001)


def test_cohort(brains, tmp_path):
    plan = cohort.CohortPlan(
        people=40, seed=1, common={**SMALL, "test": 0.4}, known={"target": "sex,age", "epochs": 3},
        null={"target": "site,coin", "epochs": 1},
    )  # fmt: skip
    told: list[str] = []
    report = cohort.demonstrate(brains, tmp_path / "runs", plan, "scratch", cohort.Clock(), told.append)
    assert [line.split(",")[0] for line in told[:3]] == [f"known: epoch {n} of 3" for n in (1, 2, 3)]
    names = {result.name for result in report.results}
    assert {
        f"{name}, {way}" for name in ("sex", "age", "site", "coin") for way in ("fine-tuned", "frozen probe")
    } == names
    assert sum(report.settings["people_of_parts"].values()) == 40
    values = {result.name: result for result in report.results}
    for name, gap in report.settings["tuned_minus_frozen"].items():
        tuned, frozen = (values[f"{name}, {way}"] for way in (cohort.TUNED, cohort.FROZEN))
        assert gap["value"] == pytest.approx(tuned.value - frozen.value, abs=2e-4)
        assert gap["low"] <= gap["value"] <= gap["high"]
    assert values["age, frozen probe"].value > 0.7, "the ball and the brightness show"
    assert set(report.settings["holds"]) >= {"sex AUC at least 0.98", "interval of coin holds chance"}
    save(report, tmp_path / "r.json")
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "r.json").read_text())["settings"])


def test_nulls(brains, tmp_path):
    plan = cohort.CohortPlan(
        people=40, seed=1, common={**SMALL, "test": 0.4}, known={}, null={"target": "coin,site", "epochs": 1}
    )
    told: list[str] = []
    report = nulls.measure_nulls(brains, tmp_path / "n", plan, probe_seeds=3, finetune_seeds=2, tell=told.append)
    assert [line.split(":")[0] for line in told] == [f"probe, seed {n}" for n in range(3)] + [
        f"fine-tuned, seed {n}" for n in range(2)
    ]
    assert {result.name for result in report.results} == {
        f"{way}, {name}" for way in ("probe", "fine-tuned") for name in ("coin", "site")
    }
    assert report.settings["summary"]["probe"]["intervals"] == 6
    assert report.settings["summary"]["fine-tuned"]["intervals"] == 4
    assert not (tmp_path / "n").exists()
    save(report, tmp_path / "r.json")
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "r.json").read_text())["settings"])


def test_phenotypes_are_exchanged_between_people():
    table = pd.DataFrame({"a": [1.0, 1, 2, 3, np.nan], "b": [10.0, 10, 20, 30, 40], "age": [5.0, 6, 7, 8, 9]})
    people = np.array(["x", "x", "y", "z", "w"])
    found = [nulls.exchange(table, people, ["a", "b"], seed) for seed in range(8)]
    for one in found:
        assert one["age"].equals(table["age"])
        assert one["b"][0] == one["b"][1], "a person's scans stay alike"
        assert sorted(one["b"][1:]) == [10, 20, 30, 40]
        assert one["a"].fillna(4).tolist() == (one["b"] / 10).tolist(), "what is of one person stays together"
    assert any(not one.equals(table) for one in found)
    assert found[3].equals(nulls.exchange(table, people, ["a", "b"], 3))


def test_a_linked_store_has_other_phenotypes_and_leaves_the_first_as_it_is(brains, tmp_path):
    table = brains.phenotypes.assign(age=7.0)
    linked = open_store(nulls.linked(brains, tmp_path / "l.zarr", table))
    assert (linked.phenotypes["age"] == 7).all()
    assert open_store(brains.path).phenotypes.equals(brains.phenotypes)
    assert linked.variables == brains.variables


def test_intervals_that_hold_chance_are_counted():
    intervals = [Interval(0.5, 0.4, 0.6, 0.5), Interval(0.7, 0.6, 0.8, 0.5), Interval(0.1, -0.1, 0.3, 0.0)]
    found = nulls.summarise([*intervals, Interval(np.nan, np.nan, np.nan, 0.5)], 1)
    assert (found["intervals"], found["hold_chance"], found["enough_hold_chance"]) == (3, 2, False)
    assert found["mean_auc"] == 0.6
    assert found["mean_width"] == pytest.approx(0.2667, abs=1e-4)
    assert not found["mean_auc_within_0.02"]
    assert nulls.summarise(intervals[:1], 1)["mean_auc_within_0.02"]


def _result(name: str, rows: list[int], truth: list[float], predicted: list[float]) -> TargetResult:
    at = np.argsort(rows)[::-1]  # in another order
    found = OutOfFold(np.array(truth)[at], np.array(predicted)[at], np.zeros(len(at)), np.array(rows)[at])
    return TargetResult(name, "continuous", "ok", len(rows), len(rows), metric="r", out_of_fold=found)


def test_methods_are_compared_on_the_scans_of_both():
    people = np.array(["a", "a", "b", "c", "d", "e"])
    one = _result("age", [0, 1, 2, 3, 5], [1, 2, 3, 4, 9], [1, 2, 3, 4, -9])
    other = _result("age", [1, 2, 3, 4, 0], [2, 3, 4, 7, 1], [2, 4, 3, 0, 1])
    found = cohort.compare(one, other, people)
    assert found.people == 3
    assert found.tuned.value == pytest.approx(1)
    assert found.frozen.value == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 4, 3])[0, 1])
    assert found.gap.value == pytest.approx(1 - found.frozen.value)
    assert found.chance == 0
    assert cohort.Score(0.2, 0.1, 0.3).holds(0.1)
    assert not cohort.Score(0.2, 0.1, 0.3).holds(0)


def test_a_cohort_is_simulated_once(tmp_path):
    store = cohort.prepare_cohort(tmp_path, 1, seed=3, layout="bids")
    assert (len(store.ok_rows), store.attrs["grid"]["space"], bool(store.attrs["simulated"])) == (1, "native", True)
    assert {path.name for path in (tmp_path / "cohort-3-bids").iterdir()} == {"cohort.zarr", "done.json"}
    again = cohort.prepare_cohort(tmp_path, 1, seed=3, layout="bids")
    assert again.attrs["store_id"] == store.attrs["store_id"]


def small_transfer() -> transfer.TransferPlan:
    return transfer.TransferPlan(
        cohort.Pretraining(40, 1, "bids", {**SMALL, "target": ("age",), "epochs": 1, "bootstrap": 0}),
        (transfer.CurvePlan("another cohort", 40, 2, (6, 12), {"target": ("sex",), "test": 0.4}),),
        {**SMALL, "validation": 0.0, "epochs": 1, "min_steps": 2, "bootstrap": 0},
        seeds=2,
    )


def test_transfer(brains, tmp_path):
    plan, clock = small_transfer(), cohort.Clock()
    stores = {"another cohort": brains}
    told: list[str] = []
    curves, words = transfer.make_curves(tmp_path / "t", plan, brains, stores, clock, told.append)
    assert len([line for line in told if line.startswith("another cohort")]) == 12
    report = transfer._report(plan, 1.0, transfer.plan_budget(plan, 1.0), clock, curves, words)
    found = transfer.Transfer(report, curves, words)
    names = {result.name for result in report.results}
    assert names == {
        f"another cohort, sex, {method}, {size} people"
        for method in ("transfer", "scratch", "probe")
        for size in (6, 12)
    }
    [curve] = report.settings["curves"]["another cohort"]
    assert {gap["from"] for gap in curve["differences"]} == {"scratch", "probe"}
    assert words["another cohort"][0].startswith("The weights are from a training for age on 2")
    transfer.write_chart(found, tmp_path / "out" / "c.png")
    assert (tmp_path / "out" / "c.png").read_bytes().startswith(b"\x89PNG")
    transfer.write_words(found, tmp_path / "out" / "w.md")
    assert "## another cohort\n\n* The weights are" in (tmp_path / "out" / "w.md").read_text()
    save(report, tmp_path / "out" / "r.json")
    text = (tmp_path / "out" / "r.json").read_text()
    assert str(tmp_path) not in json.dumps(json.loads(text)["settings"])
    before = (tmp_path / "t" / "another-cohort" / "transfer" / "n6" / "seed0" / "cell.json").stat().st_mtime_ns
    transfer.make_curves(tmp_path / "t", plan, brains, stores, clock, told.append)
    after = (tmp_path / "t" / "another-cohort" / "transfer" / "n6" / "seed0" / "cell.json").stat().st_mtime_ns
    assert before == after, "what is done is not done again"


def test_a_transfer_that_takes_too_long_does_not_begin(tmp_path):
    plan = replace(
        small_transfer(),
        curves=(*small_transfer().curves, transfer.CurvePlan(transfer.REAL, 32, None, (4,), {"target": ("gender",)})),
        common={**small_transfer().common, "scale": 0.1, "batch_size": 2, "micro_batch": 2},
    )
    told: list[str] = []
    with pytest.raises(ValueError, match="more than 0; let it be idle"):
        transfer.run_transfer(tmp_path, real=tmp_path / "none", plan=plan, minutes=0, tell=told.append)
    assert "left out; BRAIN_VOLUMES_DATA names the folder" in told[0]
    assert not any(transfer.REAL in line for line in told[1:])
    assert not list(Path(tmp_path).iterdir())


def test_a_budget_is_steps_times_slices():
    plan = replace(small_transfer(), common={**small_transfer().common, "slices": 3, "min_steps": 10, "test": 0.0})
    plan = replace(plan, curves=(replace(plan.curves[0], settings={"target": ("sex",), "test": 0.0}),))
    budget = transfer.plan_budget(plan, speed=2.0)["8 trainings, another cohort"]
    trained = 2 * 2 * (10 * 6 * 3 + 10 * 8 * 3)  # methods x seeds x (steps x scans x slices)
    looked_at = 2 * 2 * (6 + 12) * 3 + 40 * 3  # for the statistics of batch norms, and for the probe
    assert budget["slices"] == pytest.approx(trained + looked_at / 3, abs=0.01)
    assert budget["minutes"] == pytest.approx(budget["slices"] / 2 / 60 + 8 * transfer._AROUND_S / 60, abs=0.01)


def test_the_plans_are_settings_that_can_be():
    for own in (cohort.PLAN.known, cohort.PLAN.null):
        assert make_settings({**cohort.PLAN.common, **own}).target
    assert make_settings(transfer.PLAN.pretraining.settings).target == ("age",)
    for curve in transfer.PLAN.curves:
        settings = make_settings({**transfer.PLAN.common, **curve.settings})
        assert not settings.validation, "nobody but those who are counted"
        assert len(curve.sizes) >= 4
        assert max(curve.sizes) <= curve.people * (1 - settings.test)
    assert transfer.PLAN.seeds == 5
    assert sum(part["minutes"] for part in transfer.plan_budget(transfer.PLAN, 60.0).values()) < 60
