"""Runs from a store to scores: what is learnt, what is kept, what is told, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from finetuning import (
    PEOPLE,
    SCANS,
    TINY,
    assert_same_run,
    call_command,
    gradients_of,
    make_brains,
    run_tiny,
    stop_after,
    stopped_gradients,
    thin,
    thin_networks,  # noqa: F401
    tiny_settings,
)
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from extract.distributed import Group
from extract.errors import WeightsUnavailableError
from extract.models import parameter_shapes
from extract.probing.results import TargetResult
from finetune.batch_norm import update_statistics
from finetune.build import build_network, build_training, check_scale, find_weights, without_effect
from finetune.checkpoints import BEST, LAST, load_run
from finetune.cohort import read_cohort
from finetune.errors import NonFiniteLossError
from finetune.evaluate import predict_rows, score_head
from finetune.heads import Head
from finetune.predictions import truth_of
from finetune.printing import epoch_lines
from finetune.results import RunResult, read_result
from finetune.run import Progress, finetune
from finetune.settings import make_settings, read_settings
from finetune.split import PARTS
from finetune.training import Training, _backward, _one_step
from ingest.errors import StoreBusyError, StoreError
from ingest.lock import store_lock
from ingest.shard import shard_path
from ingest.store import open_store, write_phenotypes
from loaders import Batch, open_loader
from loaders.errors import ShardError
from loaders.order import epoch_order

ALL = "sex,age,site,education,drinks,coin"
MISSING = {"age": [1, 5, 40], "site": range(6, PEOPLE, 5), "sex": [2]}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """What is known of the scans of a store, whose place is ``attrs["path"]``."""
    path = tmp_path_factory.mktemp("brains") / "s.zarr"
    table = make_brains(path, without=MISSING)
    table.attrs["path"] = path
    return table


@pytest.fixture(scope="module")
def store(table) -> Path:
    return table.attrs["path"]


@pytest.fixture
def damaged(tmp_path) -> Callable[..., Path]:
    """Make a store of which some scans are damaged."""

    def make(*rows: int) -> Path:
        path = tmp_path / "damaged.zarr"
        if not path.exists():
            make_brains(path)
        for row in rows:
            shard_path(path, row).write_bytes(b"damaged")
        return path

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_can_be_learnt_is_learnt_and_noise_is_not(store, tmp_path):
    result = run_tiny(
        store, tmp_path / "r", target="sex,coin", epochs=10, lr=1e-2, augmentation="none", test=0.4, validation=0
    )
    sex, coin = result.test
    assert sex.headline.score == 1
    assert 0.2 < coin.headline.score < 0.8
    assert coin.headline.low < 0.5 < coin.headline.high


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


def test_score_tells_the_best_epoch_if_it_is_asked(store, tmp_path):
    result = run_tiny(store, tmp_path / "r", target="age", monitor="score", epochs=5, lr=1e-2)
    scores = [row["age_r"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmax(scores))
    assert load_run(tmp_path / "r").attrs["step"] == result.history[result.best_epoch - 1]["step"]
    assert torch.load(tmp_path / "r" / LAST, weights_only=True)["attrs"]["step"] == result.steps


def test_it_stops_when_nothing_gets_better(store, tmp_path):
    result = run_tiny(store, tmp_path / "r", target="coin", epochs=40, patience=2, lr=3e-2)
    assert result.stopped == "early"
    losses = [row["validation_loss"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses))
    assert result.epochs == len(losses) == result.best_epoch + 2 < 40


def test_without_parts_to_validate_and_test_the_last_weights_are_kept(store, tmp_path, monkeypatch, capsys):
    result = run_tiny(store, tmp_path / "r", validation=0, test=0)
    monkeypatch.setattr("finetune.run._write_report", lambda *_: None)
    assert call_command(monkeypatch, store, tmp_path / "r", "--threads", 2) == 0, "nothing else was asked for"
    assert "0 for test" in capsys.readouterr().out
    assert call_command(monkeypatch, store, tmp_path / "r", "--threads", 2, "--epochs", 3) == 1
    assert "r was begun with epochs 2, not 3" in capsys.readouterr().err
    assert (result.best_epoch, result.people) == (2, {"train": PEOPLE, "validation": 0, "test": 0})
    assert [one.status for one in result.test + result.validation] == ["skipped"] * 2
    assert all("validation_loss" not in row for row in result.history)
    best, last = (torch.load(tmp_path / "r" / name, weights_only=True)["state_dict"] for name in (BEST, LAST))
    assert all(torch.equal(best[name], last[name]) for name in best)
    assert len(read_result(tmp_path / "r", load_run(tmp_path / "r").heads).history) == 2


def test_some_scans_and_some_people(store, tmp_path, table):
    result = run_tiny(store, tmp_path / "r", where="session == '2' and age > 45", train_people=9, epochs=1, min_steps=3)
    assert result.people["train"] == result.scans["train"] == 9
    old = (table["age"][:PEOPLE] > 45) & ~table["sex"][:PEOPLE].isna()
    split = pd.read_csv(tmp_path / "r" / "split.csv")
    assert len(split) == old.sum()
    assert result.steps == result.epochs == 3, "a batch of the nine each"
    seen = pd.read_parquet(tmp_path / "r" / "predictions.parquet")["row"]
    assert old[seen].all()


#: What does not depend on how batches are cut.
SAME = {"target": "sex,age", "batch_norm": "frozen", "dropout": 0, "class_weights": "balanced", "lr": 1e-3}


def test_a_step_is_that_of_plain_torch(store, tmp_path, table):
    """All scans at once, the loss written out, an optimiser of torch."""
    settings = tiny_settings(
        **SAME, augmentation="none", clip=0.3, weight_decay=0.1, layer_decay=0.5, head_lr=2e-3, warmup=0
    )
    with pytest.raises(KeyboardInterrupt):
        finetune(
            str(store), tmp_path / "r", settings.model_copy(update={"checkpoint_every": 1}),
            report=False, on_progress=stop_after(2),
        )  # fmt: skip
    volumes = open_store(store)
    cohort = read_cohort(volumes, settings)
    train = cohort.rows_of("train")
    rows = epoch_order(train, shuffle=True, seed=0, epoch=0)[:8]
    network = build_network(settings, cohort.heads, find_weights(settings)).eval()
    with open_loader(volumes, rows=rows, batch_size=8) as loader:
        images = next(iter(loader)).images
    outputs = network(images)
    sex, age = (torch.tensor(table[name].to_numpy()[rows]) for name in ("sex", "age"))
    males, ages = table["sex"][train].mean(), table["age"][train]
    count = torch.where(sex == 1, 0.5 / males, 0.5 / (1 - males))[~sex.isnan()]
    chances = torch.sigmoid(outputs[:, 0])[~sex.isnan()]
    entropy = -torch.where(sex[~sex.isnan()] == 1, chances.log(), (1 - chances).log())
    standard = (age - ages.mean()) / ages.std(ddof=0)
    squares = (outputs[:, 1] - standard)[~age.isnan()] ** 2
    assert 0 < age.isnan().sum() < 8, "some labels are missing"
    (0.5 * (entropy * count).sum() / count.sum() + 0.5 * squares.mean()).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 0.3)
    depths = {"conv1": 4, "bn1": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0}
    for name, parameter in network.named_parameters():
        rate = 1e-3 * 0.5 ** depths[name.split(".")[1]] if name.startswith("encoder") else 2e-3
        decay = 0.1 if parameter.ndim > 1 else 0
        torch.optim.AdamW([parameter], lr=rate, weight_decay=decay).step()
    found = torch.load(tmp_path / "r" / LAST, weights_only=True)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    gradients = [parameter.grad for parameter in network.parameters()]
    total = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    kept = sum(float((average / 0.1).square().sum()) for average in gradients_of(tmp_path / "r")) ** 0.5
    assert total == pytest.approx(kept, rel=1e-3)


def test_accumulating_gradients_is_one_large_batch(store, tmp_path):
    run_tiny(store, tmp_path / "one", **SAME, micro_batch=8)
    run_tiny(store, tmp_path / "many", **SAME, micro_batch=2)
    assert_same_run(tmp_path / "many", tmp_path / "one", tolerance=1e-5)
    few = {**SAME, "batch_size": 32, "train_people": 17, "checkpoint_every": 1, "clip": None}
    whole = stopped_gradients(store, tmp_path / "whole", tiny_settings(**few, micro_batch=32), step=2)
    parts = stopped_gradients(store, tmp_path / "parts", tiny_settings(**few, micro_batch=4), step=2)
    for gradient, same in zip(parts, whole, strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)


def test_checkpointing_gives_the_same_run(store, tmp_path):
    run_tiny(store, tmp_path / "plain", freeze_until="layer1", view="triplanar", epochs=1)
    run_tiny(store, tmp_path / "again", freeze_until="layer1", view="triplanar", epochs=1, checkpointing=True)
    assert_same_run(tmp_path / "again", tmp_path / "plain")


def test_bfloat16_runs_on_a_cpu(store, tmp_path):
    plain = run_tiny(store, tmp_path / "plain", epochs=1)
    rough = run_tiny(store, tmp_path / "rough", epochs=1, precision="bfloat16")
    assert rough.history[0]["train_loss"] != plain.history[0]["train_loss"]
    assert rough.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=0.1)


def test_volumes_are_learnt_by_a_3d_network(store, tmp_path):
    result = run_tiny(
        store, tmp_path / "r", model="r3d_18", view=None, epochs=3, lr=1e-2, augmentation="none", test=0.4,
        validation=0, batch_size=4, dropout=0,
    )  # fmt: skip
    assert result.test[0].headline.score == 1
    run = load_run(tmp_path / "r")
    assert run.network.seen.view == "volume"
    assert run.network.encoder.stem[0].weight.ndim == 5
    seen = pd.read_parquet(tmp_path / "r" / "predictions.parquet")
    outputs = predict_rows(run.network, open_store(store), seen["row"].to_numpy(), threads=1)
    np.testing.assert_allclose(seen["sex=male"], run.heads[0].predict(outputs.values)[:, 1], rtol=1e-5)


def test_weights_of_a_run_are_where_another_one_begins(store, tmp_path):
    parameter_shapes.cache_clear()  # of the network as it is without `ThinBlock`
    run_tiny(store, tmp_path / "first", epochs=1)
    run_tiny(store, tmp_path / "next", target="age", epochs=1, weights=str(tmp_path / "first"), freeze_until="layer4")
    parameter_shapes.cache_clear()
    first, following = (load_run(tmp_path / name) for name in ("first", "next"))
    encoder = first.network.encoder.state_dict()
    for name, value in following.network.encoder.state_dict().items():
        assert torch.equal(value, encoder[name]) or name.endswith("num_batches_tracked")
    weights = following.attrs["weights"]
    assert (weights["name"], weights["sha256"]) == ("first/best.pt (epoch 1)", first.sha256)
    assert "was trained on people of this store" in weights["notes"][0]
    assert first.attrs["weights"]["name"] == "scratch"


def test_damaged_scans_are_left_out_and_told(damaged, tmp_path, monkeypatch, capsys):
    part_of = read_cohort(open_store(damaged()), tiny_settings()).split.part_of
    rows = [next(row for row in range(SCANS) if part_of[f"p{row:02}"] == part) for part in PARTS]
    store = damaged(*rows)
    given = {**TINY, "epochs": 1}
    del given["tensorboard"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    arguments = [store, tmp_path / "r", *flags, "--no-tensorboard", "--json"]
    monkeypatch.setattr("finetune.run._write_report", lambda *_: None)
    assert call_command(monkeypatch, *arguments) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["skipped"].keys() == set(map(str, rows))
    assert shown.err.count("skipped: ") == 3
    for row in rows:
        assert f"skipped: row {row}: row {row} ({row}.nii.gz)" in shown.err
    predictions = pd.read_parquet(tmp_path / "r" / "predictions.parquet")
    assert not set(rows) & set(predictions["row"])
    assert call_command(monkeypatch, *arguments) == 1, "so it is told when it is asked for again"
    assert capsys.readouterr().err == shown.err


def test_a_damaged_scan_is_an_error_if_asked(damaged, tmp_path):
    store = damaged(*range(SCANS))
    with pytest.raises(ShardError, match=r"row \d+ \(\d+\.nii\.gz\) of .*damaged.zarr"):
        run_tiny(store, tmp_path / "r", on_error="raise")
    assert not (tmp_path / "r" / "results.json").exists()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_is_explained_and_the_last_good_checkpoint_kept(
    store, tmp_path, monkeypatch, capsys, clip
):
    run = tmp_path / "r"
    wild = {"lr": 1e30, "warmup": 0, "clip": clip, "checkpoint_every": 1, "target": "sex,age"}
    with pytest.raises(
        NonFiniteLossError, match=r"step 2: the loss of (sex|sex, age) is (nan|inf).* a lower --lr"
    ) as error:
        run_tiny(store, run, **wild)
    assert ("--clip 1" in str(error.value)) == (clip is None)
    rate = 1e30 * 0.5 * (1 + math.cos(math.pi / 6))
    assert f"learning rate {rate:.3g}" in str(error.value)
    last = torch.load(run / LAST, weights_only=True)
    assert last["attrs"]["step"] == 1
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
    assert not (run / "results.json").exists()
    assert call_command(monkeypatch, store, run) == 1, "it goes on, and ends the same way"
    shown = capsys.readouterr().err
    assert "error: step 2: the loss of sex" in shown
    assert "Traceback" not in shown
    assert [f.name for f in run.parent.glob("*.lock")] == []


@pytest.mark.parametrize("validation", [0.15, 0])
def test_predictions_that_are_not_finite_are_no_scores(store, tmp_path, validation):
    """The last step may be the one that ruins it."""
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*a lower --lr"):
        run_tiny(
            store, tmp_path / "r", lr=1e30, warmup=0, epochs=1, batch_size=32, micro_batch=8, validation=validation,
            augmentation="none",
        )  # fmt: skip
    assert not (tmp_path / "r" / "results.json").exists()


def test_a_folder_that_is_no_run_is_left_alone(store, tmp_path):
    for name, text in (("precious.txt", "x"), ("settings.yaml", "colour: green"), ("results.json", "{}")):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="is no folder of a run"):
                finetune(str(store), folder, tiny_settings(), overwrite=overwrite, report=False)
        assert contents(folder) == {name: text.encode(), "tensorboard/events": b"mine"}
    (tmp_path / "file").write_text("x")
    with pytest.raises((StoreError, OSError)):
        run_tiny(store, tmp_path / "file")
    before = contents(store)
    with pytest.raises(StoreError, match="is no folder of a run"):
        finetune(str(store), store, tiny_settings(), overwrite=True, report=False)
    assert contents(store) == before
    assert list(tmp_path.glob("*.lock")) == list(store.parent.glob("*.lock")) == []


def test_nothing_is_left_of_a_run_that_cannot_begin(store, tmp_path):
    wrong: list[dict] = [{"target": "height"}, {"weights": "nowhere.pt"}, {"slices": 9}, {"freeze_until": "layer9"}]
    for changes in [*wrong, {"augmentation": {"zoom": 1}}, {"device": "cuda:99"}]:
        with pytest.raises((ValueError, WeightsUnavailableError)):
            run_tiny(store, tmp_path / "r", **changes)
        assert list(tmp_path.iterdir()) == []


def test_overwrite_begins_anew(store, tmp_path):
    first = run_tiny(store, tmp_path / "r", seed=1, epochs=1, tensorboard=True)
    (tmp_path / "r" / "mine.txt").write_text("kept")
    again = finetune(str(store), tmp_path / "r", tiny_settings(seed=2, epochs=1), overwrite=True, report=False)
    assert again.history[0]["train_loss"] != first.history[0]["train_loss"]
    assert not (tmp_path / "r" / "tensorboard").exists()
    assert (tmp_path / "r" / "mine.txt").read_text() == "kept"
    run_tiny(store, tmp_path / "fresh", seed=2, epochs=1)
    assert_same_run(tmp_path / "r", tmp_path / "fresh")
    before = contents(tmp_path / "r")
    with pytest.raises(ValueError, match="freeze_until"):
        finetune(str(store), tmp_path / "r", tiny_settings(freeze_until="layer9"), overwrite=True, report=False)
    assert contents(tmp_path / "r") == before, "nothing is given up for what cannot begin"


def test_one_process_at_a_time(store, tmp_path, monkeypatch, capsys):
    with store_lock(tmp_path / "r"):
        with pytest.raises(StoreBusyError, match=r"r is being written by process \d+"):
            run_tiny(store, tmp_path / "r")
        assert call_command(monkeypatch, store, tmp_path / "r", "--target", "sex") == 1
        assert "is being written by process" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def prepared(store: Path, **changes: Any) -> Training:
    """Return what is trained, without training it."""
    settings, volumes = tiny_settings(**changes), open_store(store)
    cohort = read_cohort(volumes, settings)
    network = build_network(settings, cohort.heads, find_weights(settings))
    check_scale(network.seen, volumes.grid.shape_zyx)
    training = build_training(volumes, settings, cohort, network, Group())
    training.loader.close()
    return training


def test_scans_that_cannot_be_read_are_seen_by_nothing(store):
    training = prepared(store, dropout=0, slices=2)
    rows = training.cohort.rows_of("train")[:4]
    images = torch.randint(0, 256, (4, 2, 24, 24), dtype=torch.uint8)
    divisors = torch.ones(1)

    def gradients(images: torch.Tensor, rows: np.ndarray, valid: list[bool]) -> list[torch.Tensor]:
        training.network.zero_grad()
        _backward(training, Batch(images, rows, ["p"] * len(rows), np.array(valid)), divisors)
        return [p.grad for p in training.network.parameters() if p.grad is not None]

    expected = gradients(images[[0, 2]], rows[[0, 2]], [True, True])
    images[[1, 3]] = 0
    found = gradients(images, rows, [True, False, True, False])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    before = training.network.encoder.bn1.running_mean.clone()
    assert gradients(images, rows, [False] * 4) == []
    unread = Batch(images, rows, ["p"] * 4, np.zeros(4, bool))
    done = _one_step(training, iter([unread] * 2), training.cohort.rows_of("train")[:8])
    assert done.values.tolist() == [0, 0, 0]
    assert torch.equal(training.network.encoder.bn1.running_mean, before)
    whole, some = (
        Batch(images[[0, 2]], rows[[0, 2]], ["p"] * 2, np.ones(2, bool)),
        replace(unread, valid=rows != rows[1]),
    )
    some.valid[3] = False
    kept = []
    for batches in ([whole], [some, unread]):
        update_statistics(training.network, batches)
        kept.append(training.network.encoder.bn1.running_var.clone())
    assert torch.equal(*kept)
    training.group = SimpleNamespace(size=2)  # which waits for the other one's
    assert all(not gradient.any() for gradient in gradients(images, rows, [False] * 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1, "micro_batch": 1}, r"seen 1 at a time.*--batch-size.*--batch-norm frozen"),
        ({"batch_size": 32, "micro_batch": 4, "train_people": 17, "where": "session == '2'"}, "the last ones 1, and"),
        ({"scale": 0.0001}, r"scale is 0\.0001, which leaves 1 x 1 of 24 x 24 .* use --scale 0\.334 or more"),
        ({"model": "r3d_18", "view": None, "pool": "attention"}, "pool attention does not go with r3d_18"),
    ],
)
def test_a_network_that_cannot_be_trained_so_is_told_before(store, changes, message):
    with pytest.raises(ValueError, match=message):
        prepared(store, **changes)


def test_small_batches_are_taken_where_batch_norms_have_enough_to_see(store):
    for changes in ({"slices": 2}, {"batch_norm": "frozen"}, {"size": 40}):
        assert prepared(store, batch_size=1, micro_batch=1, **changes).least == 1
    assert prepared(store).least == 2
    assert prepared(store, scale=0.334).least == 2


def test_settings_without_effect_are_told():
    classes, values = Head("sex", "binary", ("f", "m")), Head("age", "continuous")
    found = without_effect(
        tiny_settings(
            model="r3d_18", view=None, class_weights="balanced", freeze_until="stem", batch_norm="frozen",
        ),
        [values],
    )  # fmt: skip
    words = ("slices is 1", "class_weights is balanced", "freeze_until is stem", "batch_norm is frozen")
    assert [line.startswith(word) for line, word in zip(found, words, strict=True)] == [True] * 4
    assert without_effect(tiny_settings(class_weights="balanced"), [values, classes]) == []


def test_weights_that_are_none_are_named_as_here():
    assert find_weights(tiny_settings(weights="random")).state_dict is None
    with pytest.raises(ValueError, match="weights are scratch, but weights_dir is w; leave one of them out"):
        find_weights(tiny_settings(weights="random", weights_dir="w"))
    with pytest.raises(
        WeightsUnavailableError, match=r"no weights 'none\.pt' for r3d_18: expected kinetics, scratch, or"
    ):
        find_weights(tiny_settings(weights="none.pt", model="r3d_18"))


def test_a_line_tells_of_each_epoch_where_no_bar_can_be_shown():
    told = io.StringIO()
    tell = epoch_lines(Console(file=told, width=20))
    done = Progress(6, 12, 1, 2, 0.61, {"loss": 0.7, "sex": 0.8}, 0, 0)
    tell(done)
    tell(replace(done, ended={"scans_per_second": 31.04}))
    tell(replace(done, step=12, epoch=2, ended={"scans_per_second": 30.0}))
    first, last = told.getvalue().splitlines()
    assert first == "epoch 1/2, loss 0.610, validation loss 0.700, sex 0.800, 31.0 scans/s, 0:00:00 left"
    assert last == "epoch 2/2, loss 0.610, validation loss 0.700, sex 0.800, 30.0 scans/s"


def logged(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_has_each_step_once_also_of_a_run_that_was_interrupted(store, tmp_path):
    settings = tiny_settings(tensorboard=True, checkpoint_every=4)

    for last in (2, 5):  # before there is a checkpoint, and after the first one
        with pytest.raises(KeyboardInterrupt):
            finetune(str(store), tmp_path / "r", settings, report=False, on_progress=stop_after(last))
    result = finetune(str(store), tmp_path / "r", settings, report=False)
    losses = logged(tmp_path / "r", "train/loss")
    assert [step for step, _ in losses] == list(range(1, result.steps + 1))
    mean = np.mean([loss for _, loss in losses[:3]])
    assert result.history[0]["train_loss"] == pytest.approx(mean, rel=1e-5)
    found = dict(logged(tmp_path / "r", "epoch/validation_loss"))
    assert found == pytest.approx({row["step"]: row["validation_loss"] for row in result.history})


def test_phenotypes_that_have_changed_are_found_out(tmp_path):
    make_brains(tmp_path / "s.zarr")
    settings = tiny_settings(target="age", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(tmp_path / "s.zarr"), tmp_path / "r", settings, report=False, on_progress=stop_after(2))
    table = open_store(tmp_path / "s.zarr")
    write_phenotypes(tmp_path / "s.zarr", table.phenotypes.assign(age=table.phenotypes["age"] * 2), table.variables)
    with pytest.raises(StoreError, match=r"r was begun with other values of age.*--overwrite"):
        finetune(str(tmp_path / "s.zarr"), tmp_path / "r", settings, report=False)
