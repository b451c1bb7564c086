"""Results of a finished run: scores of every task, history, predictions, and that they are read again as they were."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from finetuning import call_command, contents, make_brains, run_tiny, thin
from finetuning import store as store  # a fixture
from finetuning import table as table  # a fixture
from finetuning import thin_networks as thin_networks  # a fixture of all tests here

from extract.probing.results import TargetResult
from finetune.checkpoints import load_run
from finetune.evaluate import predict_rows, score_head
from finetune.heads import Head
from finetune.predictions import truth_of
from finetune.results import RunResult, read_result
from finetune.run import finetune
from finetune.settings import make_settings, read_settings
from ingest.errors import StoreError
from ingest.store import open_store

ALL = "sex,age,site,education,drinks,coin"


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> RunResult:
    """A run for all targets, some of whose labels are missing."""
    run_dir = tmp_path_factory.mktemp("runs") / "all"
    with thin():
        return run_tiny(
            store, run_dir, target=ALL, epochs=4, lr=1e-2, pool="attention", slices=2, validate_every=4, test=0.3,
            validation=0.25, clip=None, class_weights="balanced",
        )  # fmt: skip


def test_every_task_has_its_scores(finished):
    metrics = {one.name: (one.task, set(one.metrics)) for one in finished.test}
    classes, values = {"auc", "balanced_accuracy"}, {"r", "r2", "mae"}
    assert metrics == {
        "sex": ("binary", classes), "age": ("continuous", values), "site": ("multiclass", classes),
        "education": ("ordinal", values), "drinks": ("count", values), "coin": ("binary", classes),
    }  # fmt: skip
    for one in finished.test + finished.validation:
        assert one.status == "ok", one.reason
        for interval in one.metrics.values():
            assert interval.low <= interval.score <= interval.high


def test_history_tells_of_each_epoch_and_the_best_is_that_of_the_least_loss(finished):
    history = finished.history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["step"] for row in history] == [finished.steps // 4 * k for k in (1, 2, 3, 4)]
    validated = [row["epoch"] for row in history if "validation_loss" in row]
    apart = math.ceil(4 / (finished.steps // 4))
    assert validated == sorted({*range(apart, 5, apart), 4}), "at least 4 steps apart, and in the end"
    best = min((row for row in history if "validation_loss" in row), key=lambda row: row["validation_loss"])
    assert finished.best_epoch == best["epoch"]
    assert best["sex_auc"] == finished.validation[0].headline.score
    headlines = [best[f"{one.name}_{one.metric}"] for one in finished.validation]
    assert best["validation_score"] == pytest.approx(np.mean(headlines))
    for row in history:
        assert 0 <= row["starved"] <= 1
        assert row["seconds"] > 0
    with open(finished.run_dir / "epochs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{name: float(v) for name, v in line.items() if v} for line in lines] == history


def assert_same_target(found: TargetResult, expected: TargetResult) -> None:
    assert replace(found, out_of_fold=None) == replace(expected, out_of_fold=None)
    for name in ("truth", "predicted", "fold", "rows"):
        np.testing.assert_array_equal(getattr(found.out_of_fold, name), getattr(expected.out_of_fold, name))


def test_a_result_is_read_again_as_it_was(finished):
    again = read_result(finished.run_dir, load_run(finished.run_dir).heads)
    empty = {"test": [], "validation": []}
    assert replace(again, **empty) == replace(finished, **empty)
    for part in ("test", "validation"):
        for one, other in zip(getattr(again, part), getattr(finished, part), strict=True):
            assert_same_target(one, other)
    document = json.loads(json.dumps(again.to_json(), allow_nan=False))
    assert [target["name"] for target in document["targets"]] == ALL.split(",")


def test_predictions_are_those_of_the_best_weights(finished, store, table):
    run = load_run(finished.run_dir)
    assert run.attrs["epoch"] == finished.best_epoch
    resolved = run.attrs["resolved"]
    assert resolved == finished.resolved
    ranges = resolved.pop("augmentation")
    assert (ranges["rotation_deg"], ranges["translation_mm"], ranges["flip"]) == (10, 5, 0)
    assert resolved == {
        "weights": "scratch", "view": "axial", "precision": "float32", "device": "cpu", "micro_batch": 4, "processes": 1
    }  # fmt: skip
    assert run.settings == make_settings(read_settings(finished.run_dir / "settings.yaml"))
    predictions = pd.read_parquet(finished.run_dir / "predictions.parquet")
    assert (predictions["part"].value_counts() == pd.Series(finished.scans)[["validation", "test"]]).all()
    outputs = predict_rows(run.network, open_store(store), predictions["row"].to_numpy(), threads=1)
    for head, place in zip(run.heads, run.network.head_slices, strict=True):
        predicted = head.predict(outputs.values[:, place])
        truth = table[head.name].to_numpy()[predictions["row"]]
        np.testing.assert_array_equal(truth_of(predictions, head), truth)
        if head.labels:
            written = predictions[[f"{head.name}={label}" for label in head.labels]].to_numpy()
        else:
            written = predictions[head.name].to_numpy()
        np.testing.assert_allclose(written, predicted, rtol=1e-5, atol=1e-5)
    codes = table["sex"].to_numpy()[predictions["row"]]
    assert predictions["true sex"].fillna("").tolist() == [{0: "female", 1: "male"}.get(code, "") for code in codes]
    earlier = predictions.assign(**{"true sex": codes})
    np.testing.assert_array_equal(truth_of(earlier, run.heads[0]), codes)
    part = predictions["part"] == "test"
    people = predictions["participant"][part].to_numpy()
    age = score_head(
        run.heads[1], predictions["true age"][part].to_numpy(), predictions["age"][part].to_numpy(), people
    )
    assert age.metrics["mae"].score == pytest.approx(finished.test[1].metrics["mae"].score)
    split = pd.read_csv(finished.run_dir / "split.csv").set_index("participant")["part"]
    assert (split[predictions["participant"]].to_numpy() == predictions["part"]).all()


def test_counts_are_scored_as_probes_score_them():
    rng = np.random.default_rng(0)
    truth, people = rng.poisson(3, 80).astype(float), np.arange(80)
    predicted = truth * rng.uniform(0.3, 2, 80)
    count = score_head(Head("n", "count", mean=1.3, std=0.5, typical=3.2), truth, predicted, people)
    value = score_head(Head("n", "continuous", typical=1.3), np.log1p(truth), np.log1p(predicted), people)
    for name in ("r", "r2"):
        assert count.metrics[name] == value.metrics[name]
    assert count.metrics["mae"].score == pytest.approx(np.abs(truth - predicted).mean())


def test_families_are_drawn_as_wholes():
    """Four of a family say the same: as people they would make the interval half as wide."""
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(30), 4)
    truth, predicted = rng.normal(size=(2, 30))[:, family]
    head = Head("age", "continuous")
    found, narrow = (
        score_head(head, truth, predicted, np.arange(120), units=units, bootstrap=500) for units in (family, None)
    )
    assert found.participants == narrow.participants == 120
    once = score_head(head, truth[::4], predicted[::4], np.arange(30), bootstrap=500)
    assert found.metrics["r"].low == pytest.approx(once.metrics["r"].low)
    assert found.metrics["r"].high == pytest.approx(once.metrics["r"].high)
    of_people, of_families = (one.metrics["r"].high - one.metrics["r"].low for one in (narrow, found))
    assert of_people < 0.7 * of_families


@pytest.mark.parametrize("classes", [2, 3])
def test_a_perfect_score_of_few_people_is_no_certainty(classes):
    """The exact interval of as many successes as people of the smallest class (Clopper & Pearson)."""
    truth = np.array([0] * 5 + [1] * 7 + [2] * 9)[: 12 if classes == 2 else 21]
    people = np.append(0, np.arange(len(truth) - 1))  # one of the five has two scans
    head = Head("sex", "multiclass", labels=tuple("abc"[:classes]), frequencies=(1 / classes,) * classes)
    found = score_head(head, truth.astype(float), np.eye(classes)[truth], people, bootstrap=100)
    for interval in found.metrics.values():
        assert (interval.score, interval.high) == (1, 1)
        assert interval.low == pytest.approx(0.025 ** (1 / 4))
    unknown = score_head(head, truth.astype(float), np.eye(classes)[truth], people, bootstrap=0)
    assert all(math.isnan(interval.low) for interval in unknown.metrics.values())


def test_balanced_classes_are_taken_as_equally_likely(finished):
    heads = {head.name: head for head in load_run(finished.run_dir).heads}
    assert heads["sex"].frequencies == (0.5, 0.5)
    np.testing.assert_allclose(heads["site"].frequencies, [1 / 3] * 3)


def test_a_finished_run_is_returned_as_it_is(finished, store, tmp_path, monkeypatch):
    before = contents(finished.run_dir)
    settings = make_settings(read_settings(finished.run_dir / "settings.yaml"))
    steps: list = []
    again = finetune(str(store), finished.run_dir, settings, report=False, on_progress=steps.append)
    assert steps == []
    assert again.history == finished.history
    assert contents(finished.run_dir) == before
    free = settings.model_copy(update={"threads": 2, "micro_batch": 2, "checkpointing": True})
    assert finetune(str(store), finished.run_dir, free, report=False).steps == finished.steps
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_bytes((finished.run_dir / "split.csv").read_bytes())
    moved = settings.model_copy(update={"split": str(elsewhere)})  # as of a curve whose folder is somewhere else by now
    assert finetune(str(store), finished.run_dir, moved, report=False).steps == finished.steps
    elsewhere.write_text(elsewhere.read_text().replace(",test", ",train", 1))
    with pytest.raises(ValueError, match=r"all was begun with split None, not .*elsewhere\.csv"):
        finetune(str(store), finished.run_dir, moved, report=False)
    with pytest.raises(ValueError, match=r"all was begun with lr 0\.01, not 0\.02; use the same settings to go on"):
        finetune(str(store), finished.run_dir, settings.model_copy(update={"lr": 0.02}), report=False)
    assert call_command(monkeypatch, store, finished.run_dir, "--target", "age") == 1
    make_brains(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="was begun with another store"):
        finetune(str(tmp_path / "other.zarr"), finished.run_dir, settings, report=False)
    assert contents(finished.run_dir) == before
