"""Several processes, started as users do by torchrun, train what one does on the same batches; none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from finetuning import (
    assert_same_run,
    gradients_of,
    make_brains,
    run_tiny,
    stopped_gradients,
    thin,
    thin_networks,  # noqa: F401
    tiny_settings,
)

from extract.checkpoints import LAST
from extract.distributed import Group, join_group
from finetune.checkpoints import load_run
from finetune.evaluate import predict_rows
from finetune.run import finetune
from ingest.shard import shard_path
from ingest.store import open_store

DAMAGED = 7
#: What does not depend on how batches are cut: without dropout, and with batch norms as they are.
SAME: dict[str, Any] = {
    "target": "sex,age", "dropout": 0, "batch_norm": "frozen", "class_weights": "balanced", "lr": 1e-3,
    "checkpoint_every": 2, "pool": "attention", "slices": 2, "test": 0.3, "clip": None,
}  # fmt: skip

#: By name of the run, its settings for two processes.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {**SAME, "micro_batch": 2},  # of the four scans of a step that each process has
    "few": {**SAME, "batch_size": 64, "micro_batch": 3, "train_people": 15, "epochs": 3},  # no multiple of anything
    "statistics": {"target": "sex", "epochs": 1, "dropout": 0},  # of batch norms
    "interrupted": {**SAME, "micro_batch": 2},
    "killed": {**SAME, "micro_batch": 2},
}

#: What torchrun starts: all the runs, in the last of which the second process dies.
SCRIPT = """
import contextlib, json, os, signal, sys
from pathlib import Path
import torch
from finetuning import thin
from extract.distributed import join_group
from finetune import cli, run
import extract.distributed
from finetune.settings import make_settings, read_settings

store, folder = map(Path, sys.argv[1:])

def settings(name):
    return make_settings(read_settings(folder / f"{name}.yaml"))

def interrupt(progress):
    if progress.step == 3:
        raise KeyboardInterrupt

def die(progress):
    if progress.step == 3 and group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

with thin(), join_group() as group:
    assert group.gather_all(f"of {group.rank}") == ["of 0", "of 1"]
    assert group.gather(group.rank) == ([] if group.rank else [0, 1])
    assert torch.distributed.get_backend() == "gloo"
    run._write_report = lambda *_: None
    extract.distributed.join_group = lambda: contextlib.nullcontext(group)
    sys.argv = ["finetune", str(store), str(folder / "whole"), "--config", str(folder / "whole.yaml"), "--json"]
    try:
        cli.main()
    except SystemExit as ended:
        (folder / f"code{group.rank}").write_text(str(ended.code))
    for name in ("few", "statistics"):
        run.finetune(str(store), folder / name, settings(name), group=group, report=False)
    try:
        run.finetune(str(store), folder / "interrupted", settings("interrupted"), group=group, on_progress=interrupt)
    except KeyboardInterrupt:
        run.finetune(str(store), folder / "interrupted", settings("interrupted"), group=group, report=False)
    run.finetune(str(store), folder / "killed", settings("killed"), group=group, report=False, on_progress=die)
"""


@dataclass(frozen=True)
class Done:
    """What two processes left behind."""

    store: Path
    folder: Path
    returned: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("two")
    store = folder / "s.zarr"
    make_brains(store, without={"age": range(3, 30, 4), "sex": [3, 4, 5]})  # of row 3 nothing is known
    shard_path(store, DAMAGED).write_bytes(b"damaged")
    for name, changes in RUNS.items():
        (folder / f"{name}.yaml").write_text(tiny_settings(**changes).to_yaml())
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(store), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    returned = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    with thin():
        run_tiny(store, folder / "one", **{**RUNS["whole"], "micro_batch": 8})
    return Done(store, folder, returned)


def test_two_processes_train_what_one_does(done):
    """With missing labels, two targets, weighted classes, accumulated gradients and a scan that is damaged."""
    assert (done.folder / "whole" / "results.json").exists(), done.returned.stderr
    assert_same_run(done.folder / "whole", done.folder / "one", tolerance=1e-5)


def test_batches_that_are_no_multiple_are_shared_too(done, tmp_path):
    result = run_tiny(done.store, tmp_path / "one", **{**RUNS["few"], "micro_batch": 64})
    assert result.scans["train"] % 2, "so one process has a scan more"
    assert_same_run(done.folder / "few", tmp_path / "one", tolerance=1e-5)


def test_the_first_process_speaks_for_all(done):
    (line,) = done.returned.stdout.splitlines()
    document = json.loads(line)
    assert [target["name"] for target in document["targets"]] == ["sex", "age"]
    assert list(document["skipped"]) == [str(DAMAGED)]
    codes = [(done.folder / f"code{rank}").read_text() for rank in (0, 1)]
    assert codes == ["1", "0"], "a scan is damaged, which is told once"
    assert done.returned.stderr.count(f"skipped: row {DAMAGED}") == 1


def test_all_validate_and_test_with_the_statistics_that_are_kept(done):
    """Without SyncBatchNorm, which is for GPUs, each process has batch norms of its own."""
    run = load_run(done.folder / "statistics")
    predictions = pd.read_parquet(done.folder / "statistics" / "predictions.parquet")
    outputs = predict_rows(run.network, open_store(done.store), predictions["row"].to_numpy(), threads=1)
    np.testing.assert_allclose(predictions["sex=male"], run.heads[0].predict(outputs.values)[:, 1], rtol=1e-5)


def test_interrupted_they_go_on(done):
    assert_same_run(done.folder / "interrupted", done.folder / "one", tolerance=1e-5)


def test_one_that_dies_ends_the_others_and_one_alone_can_go_on(done, tmp_path):
    run_dir, settings = done.folder / "killed", tiny_settings(**RUNS["killed"])
    assert done.returned.returncode != 0
    assert not (run_dir / "results.json").exists()
    assert torch.load(run_dir / LAST, weights_only=True)["attrs"]["step"] == 2
    alone = stopped_gradients(done.store, tmp_path / "r", settings, step=3)
    for gradient, same in zip(gradients_of(run_dir), alone, strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)
    steps: list[int] = []
    finetune(str(done.store), run_dir, settings, report=False, on_progress=lambda told: steps.append(told.step))
    assert steps[0] == 3
    assert_same_run(run_dir, done.folder / "one", tolerance=1e-5)
    assert not list(done.folder.glob("*.lock"))


@dataclass(frozen=True)
class Three(Group):
    """The first of three processes, which does not wait for the others."""

    size: int = 3

    def tell(self, what):
        return what

    def gather(self, what):
        return [what]


def test_processes_that_cannot_share_a_batch_say_so(done, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 8, which 3 processes cannot share evenly"):
        finetune(str(done.store), tmp_path / "r", tiny_settings(), group=Three(), report=False)
    assert list(tmp_path.iterdir()) == []


def test_on_gpus_gradients_go_by_nccl_and_objects_by_gloo(monkeypatch):
    backends = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with join_group() as group:
            assert (group.rank, group.size) == (1, 2)
    assert backends == ["cpu:gloo,cuda:nccl", "gloo"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_group() as group:
        assert group == Group()
        assert group.gather_all("it") == ["it"]
    assert len(backends) == 2
