"""Killed at any moment, interrupted, damaged: a run that goes on ends bit by bit as one that was left alone.

BRAIN_VOLUMES_KILLS sets how many random kills are tried of each kind (3 unless told).
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extracting import DIED
from finetuning import (
    Server,
    assert_same_run,
    call_command,
    make_brains,
    run_tiny,
    stop_after,
    thin,
    thin_networks,  # noqa: F401
    tiny_settings,
)
from full_disk import full_disk

from extract.checkpoints import LAST
from extract.errors import WeightsUnavailableError
from finetune.checkpoints import load_run, write_checkpoint
from finetune.cohort import read_cohort
from finetune.export import export_run
from finetune.folder import FREE, begin_folder, check_folder
from finetune.results import read_result
from finetune.run import finetune
from finetune.split import read_split
from ingest.errors import StoreError
from ingest.shard import shard_path
from ingest.store import open_store

KILLS = int(os.environ.get("BRAIN_VOLUMES_KILLS", "3"))

#: With all that has a state: dropout, augmentation, batch norms that are trained, steps of several micro-batches, an
#: end that depends on the validation, and scans that are skipped.
SETTINGS: dict[str, Any] = {
    "target": "sex,age", "micro_batch": 4, "epochs": 4, "patience": 1, "lr": 2e-2, "dropout": 0.5,
    "freeze_until": "stem", "pool": "attention", "slices": 2,
}  # fmt: skip
DAMAGED = 7


@pytest.fixture(scope="module")
def killing(tmp_path_factory) -> Iterator[tuple[Server, Path, Path]]:
    """Give a server, a store, and a run that was left alone, in a folder whose files are in memory."""
    folder = tmp_path_factory.mktemp("killing")
    make_brains(folder / "s.zarr", without={"age": [3, 9]})
    shard_path(folder / "s.zarr", DAMAGED).write_bytes(b"damaged")
    with thin():
        result = run_tiny(folder / "s.zarr", folder / "alone", **SETTINGS)
    assert list(result.skipped) == [DAMAGED]
    assert result.stopped == "early", "by far, whatever the last digits of a machine are"
    server = Server(folder / "s.zarr")
    yield server, folder / "s.zarr", folder / "alone"
    server.close()


def prepare(run_dir: Path, **changes: Any) -> Path:
    """Write the settings of a run for the server."""
    settings = tiny_settings(**{**SETTINGS, **changes})
    run_dir.with_name(f"{run_dir.name}.yaml").write_text(settings.to_yaml())
    return run_dir


def assert_nothing_is_left(run_dir: Path) -> None:
    there = {"settings.yaml", "split.csv", "epochs.csv", "results.json", "predictions.parquet", "best.pt", LAST}
    assert {f.name for f in run_dir.iterdir()} == there
    assert not run_dir.with_name(f"{run_dir.name}.lock").exists()


def test_in_another_process_it_is_the_same(killing, tmp_path):
    server, store, alone = killing
    assert server.run(store, prepare(tmp_path / "r")) == 0
    assert_same_run(tmp_path / "r", alone)
    assert_nothing_is_left(tmp_path / "r")


def test_dead_before_every_change_of_names(killing, tmp_path):
    """A run of one epoch, so that all of them are tried."""
    server, store, _ = killing
    few = {"target": "sex", "pool": "mean", "slices": 1, "epochs": 1, "batch_size": 16, "micro_batch": 8}
    few |= {"checkpoint_every": 1, "bootstrap": 0}
    assert server.run(store, prepare(tmp_path / "alone", **few)) == 0
    died = 0
    for step in range(1, 100):
        run_dir = prepare(tmp_path / f"{step}", **few)
        code = server.run(store, run_dir, die_at=step)
        assert code in (0, DIED)
        died += code == DIED
        assert server.run(store, run_dir) == 0
        assert_same_run(run_dir, tmp_path / "alone")
        assert_nothing_is_left(run_dir)
        if code == 0:
            break
    assert died >= 10


class Died(BaseException):
    pass


def test_dead_while_it_begins_anew(killing, tmp_path, monkeypatch):
    """What there is of the run before is whole, or not used; the folder can always be begun anew."""
    _, store, alone = killing
    before, other = (tiny_settings(**SETTINGS, seed=seed) for seed in (0, 5))
    split = read_cohort(open_store(store), other).split
    died = 0
    for step in range(1, 40):
        run_dir = tmp_path / f"{step}"
        shutil.copytree(alone, run_dir)
        (run_dir / "tensorboard").mkdir()
        (run_dir / "tensorboard" / "events").touch()
        with monkeypatch.context() as patch:
            die_at(step, patch)
            try:
                begin_folder(run_dir, other, split, overwrite=True)
            except Died:
                died += 1
        check_folder(run_dir, other, overwrite=True)
        there = {f.name for f in run_dir.iterdir() if not f.name.endswith(".tmp")}
        if "results.json" in there:
            assert there >= {"settings.yaml", "split.csv", "epochs.csv", "predictions.parquet", "best.pt"}
        try:
            check_folder(run_dir, other, overwrite=False)
        except ValueError:
            check_folder(run_dir, before, overwrite=False)
            assert "results.json" in there or LAST not in there, "it would go on with the weights of a finished run"
        else:
            assert there <= {"settings.yaml", "split.csv"}
            assert "split.csv" not in there or read_split(run_dir / "split.csv") == split
        if died < step:
            break
    assert died == 11


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the change of names number `step`, and all that follow, not come about."""
    count = 0

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= step:
                raise Died
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("every", [1, 3])
def test_killed_at_random_moments(killing, tmp_path, every):
    server, store, alone = killing
    started = time.perf_counter()
    assert server.run(store, prepare(tmp_path / "again", checkpoint_every=every)) == 0
    whole = time.perf_counter() - started
    rng = random.Random(every)
    kills = finished = went_on = 0
    while kills < KILLS or not went_on:  # and none has left a checkpoint behind
        run_dir = prepare(tmp_path / f"r{finished}", checkpoint_every=every)
        while (code := server.run(store, run_dir, kill_after=rng.uniform(0, whole))) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            went_on += (run_dir / LAST).exists()
            if kills >= KILLS:
                assert server.run(store, run_dir) == 0
                break
        assert_same_run(run_dir, alone)
        assert_nothing_is_left(run_dir)
        finished += 1


def test_it_goes_on_in_another_way(killing, tmp_path):
    """With frozen batch norms and without dropout nothing but rounding depends on how it is computed."""
    _, store, _ = killing
    same = {**SETTINGS, "patience": None, "epochs": 2, "dropout": 0, "batch_norm": "frozen", "lr": 1e-3}
    run_tiny(store, tmp_path / "alone", **same)
    settings = tiny_settings(**same, checkpoint_every=2)
    ways = {3: {"micro_batch": 2, "checkpoint_every": 1}, 5: {"checkpointing": True, "threads": 2}}
    for steps, way in ways.items():
        with pytest.raises(KeyboardInterrupt):
            finetune(str(store), tmp_path / "r", settings, report=False, on_progress=stop_after(steps))
        settings = settings.model_copy(update=way)
    finetune(str(store), tmp_path / "r", settings, report=False)
    assert_same_run(tmp_path / "r", tmp_path / "alone", tolerance=1e-5)


CHANGED: dict[str, Any] = {
    "target": "age", "task": {"age": "count"}, "where": "age > 41", "model": "resnet34", "weights": "imagenet",
    "weights_dir": "w", "view": "coronal", "slices": 3, "crop": "4,20,20", "size": "24", "scale": 0.5, "pool": "mean",
    "dropout": 0.1, "validation": 0.2, "test": 0.1, "split": "s.csv", "groups": "site", "train_people": 9, "epochs": 6,
    "min_steps": 9, "validate_every": 2, "patience": 3, "monitor": "score", "batch_size": 4, "lr": 1e-4,
    "head_lr": 1e-4, "layer_decay": 0.5, "weight_decay": 0.1, "warmup": 0.2, "clip": None, "freeze_until": "layer1",
    "batch_norm": "frozen", "class_weights": "balanced", "augmentation": "none", "precision": "bfloat16", "seed": 1,
    "bootstrap": 49,
}  # fmt: skip


def test_another_setting_is_refused_by_name(killing, tmp_path):
    _, store, _ = killing
    with pytest.raises(KeyboardInterrupt):
        finetune(str(store), tmp_path / "r", tiny_settings(**SETTINGS), report=False, on_progress=stop_after(1))
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for name, value in CHANGED.items():
        with pytest.raises(ValueError, match=rf"r was begun with {name} .*--overwrite begins the run anew"):
            run_tiny(store, tmp_path / "r", **{**SETTINGS, name: value})
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    known = set(type(tiny_settings()).model_fields)
    assert known - set(CHANGED) - {"kinship"} == set(FREE), "each setting is checked here, or may be another one"


@pytest.mark.usefixtures("thin_networks")
def test_a_run_goes_on_without_the_file_it_began_with(killing, tmp_path):
    _, store, alone = killing
    given = tmp_path / "w.pt"
    export_run(alone, given)
    settings = tiny_settings(**{**SETTINGS, "weights": str(given), "checkpoint_every": 1})
    finetune(str(store), tmp_path / "whole", settings, report=False)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(store), tmp_path / "r", settings, report=False, on_progress=stop_after(2))
    given.unlink()
    with pytest.raises(WeightsUnavailableError, match=r"w\.pt"):
        finetune(str(store), tmp_path / "new", settings, report=False)
    finetune(str(store), tmp_path / "r", settings, report=False)
    assert_same_run(tmp_path / "r", tmp_path / "whole")
    assert "was trained on people of this store" in load_run(tmp_path / "r").attrs["weights"]["notes"][0]


def test_a_checkpoint_of_another_store_is_refused(killing, tmp_path):
    _, store, _ = killing
    settings = tiny_settings(**SETTINGS, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(store), tmp_path / "r", settings, report=False, on_progress=stop_after(2))
    make_brains(tmp_path / "other.zarr", without={"age": [3, 9]})
    with pytest.raises(ValueError, match="r was begun with another store; give that one"):
        finetune(str(tmp_path / "other.zarr"), tmp_path / "r", settings, report=False)


@pytest.mark.usefixtures("thin_networks")
def test_a_last_checkpoint_that_is_not_of_the_run_is_refused(killing, tmp_path):
    _, store, alone = killing
    settings = tiny_settings(**SETTINGS)
    whole = torch.load(alone / LAST, weights_only=True)
    attrs = {**whole["attrs"], "store": {**whole["attrs"]["store"]}}
    run_dir = tmp_path / "r"
    begin_folder(run_dir, settings, read_split(alone / "split.csv"), overwrite=False)

    def refused(model: dict[str, Any], message: str, **content: Any) -> None:
        write_checkpoint(run_dir / LAST, {**whole, "attrs": attrs, "training": {}, "model": model, **content})
        with pytest.raises(StoreError, match=message):
            finetune(str(store), run_dir, settings, report=False)

    model = whole["model"]
    refused(
        {**model, "name": "resnet34"},
        r"last\.pt is not of this run, but of a network with model resnet34, not resnet18",
    )
    refused({**model, "pool": "mean"}, r"with pool mean, not attention; .*--overwrite begins the run anew")
    refused({**model, "input": {**model["input"], "view": "coronal"}}, "with view coronal, not axial")
    refused({**model, "heads": model["heads"][:1]}, "it is not of sex, age")
    refused(model, r"last\.pt is no complete checkpoint of this run: .*Missing key.*--overwrite", state_dict={})
    refused(model, r"last\.pt is no complete checkpoint of this run: no 'optimiser'; --overwrite")
    (run_dir / LAST).write_bytes((alone / LAST).read_bytes()[:2000])
    with pytest.raises(StoreError, match=r"it is damaged, .*torch\.save; --overwrite begins the run anew$"):
        finetune(str(store), run_dir, settings, report=False)


# Ctrl-C may come between the opening of a file and the block that closes it: then it closes when nobody holds it.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_interrupted_it_leaves_nothing_running_and_goes_on(killing, tmp_path, monkeypatch, capsys):
    _, store, _ = killing
    long = {**SETTINGS, "checkpoint_every": 1, "epochs": 400, "patience": None}
    run_dir = prepare(tmp_path / "r", **long)
    threads = set(threading.enumerate())

    def press() -> None:
        while not (run_dir / LAST).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests run in the background ignore it
    pressing.start()
    try:
        assert call_command(monkeypatch, store, run_dir, "--config", f"{run_dir}.yaml") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    pressing.join()
    gc.collect()
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lock"))
    assert set(threading.enumerate()) <= threads
    step = torch.load(run_dir / LAST, weights_only=True)["attrs"]["step"]
    seen: list[int] = []

    def stop(progress) -> None:
        seen.append(progress.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(store), run_dir, tiny_settings(**long), report=False, on_progress=stop)
    assert step <= seen[0] <= step + 1 < 400


def test_a_disk_that_is_full_is_named(tmp_path):
    write_checkpoint(tmp_path / "last.pt", {"weights": torch.ones(3)})
    with full_disk(), pytest.raises(StoreError, match=r"last\.pt cannot be written: .*File too large"):
        write_checkpoint(tmp_path / "last.pt", {"weights": torch.ones(1 << 18)})
    assert torch.load(tmp_path / "last.pt", weights_only=True)["weights"].tolist() == [1, 1, 1]
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_result_that_is_damaged_is_named(killing, tmp_path):
    _, _, alone = killing
    heads = load_run(alone).heads
    for name in ("predictions.parquet", "results.json"):
        for f in alone.iterdir():
            (tmp_path / f.name).write_bytes(f.read_bytes() if f.name != name else f.read_bytes()[:40])
        with pytest.raises(ValueError, match=r"is damaged: .*; --overwrite begins the run anew"):
            read_result(tmp_path, heads)
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=f"is no finished run: there is no {name}"):
            read_result(tmp_path, heads)
    with pytest.raises(ValueError, match=r"last\.pt is of a run that is finished, but results\.json is not there"):
        run_tiny(killing[1], tmp_path, **SETTINGS)
