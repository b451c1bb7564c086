"""Runs from a store to scores: what is learnt, when they end, from which scans and weights, and what is told."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from finetuning import PEOPLE, call_command, run_tiny, stop_after, tiny_settings
from finetuning import store as store  # a fixture
from finetuning import table as table  # a fixture
from finetuning import thin_networks as thin_networks  # a fixture of all tests here
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from extract.checkpoints import BEST, LAST
from extract.models import parameter_shapes
from finetune.checkpoints import load_run
from finetune.evaluate import predict_rows
from finetune.printing import epoch_lines
from finetune.results import read_result
from finetune.run import Progress, finetune
from ingest.store import open_store


def test_what_can_be_learnt_is_learnt_and_noise_is_not(store, tmp_path):
    result = run_tiny(
        store, tmp_path / "r", target="sex,coin", epochs=10, lr=1e-2, augmentation="none", test=0.4, validation=0
    )
    sex, coin = result.test
    assert sex.headline.score == 1
    assert 0.2 < coin.headline.score < 0.8
    assert coin.headline.low < 0.5 < coin.headline.high


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
