"""Runs that go wrong: damaged scans are told, and a loss that is not finite ruins no checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from finetuning import SCANS, TINY, call_command, make_brains, run_tiny, tiny_settings
from finetuning import store as store  # a fixture
from finetuning import table as table  # a fixture
from finetuning import thin_networks as thin_networks  # a fixture of all tests here

from extract.checkpoints import LAST
from finetune.cohort import read_cohort
from finetune.errors import NonFiniteLossError
from finetune.split import PARTS
from ingest.shard import shard_path
from ingest.store import open_store
from loaders.errors import ShardError


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
