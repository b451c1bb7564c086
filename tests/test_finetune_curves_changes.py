"""What changes between two calls of one curve: weights, scans, people who withdraw."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from curve_store import CURVE, PEOPLE, make_cohort, make_weights, trainings
from torchvision.models import resnet18

from extract.embeddings import read_tables
from finetune.checkpoints import checkpoint_of, write_checkpoint
from finetune.curves import run_curve
from finetune.curves.frozen import embed_once
from finetune.curves.planning import make_plan, read_plan
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from finetune.settings import FinetuneSettings
from ingest.errors import StoreBusyError, StoreError
from ingest.lock import store_lock
from ingest.shard import shard_path
from ingest.store import open_store, rows_of, write_scans
from ingest.withdraw import withdraw
from loaders import View


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("curve") / "cohort.zarr")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FinetuneSettings:
    return trainings(make_weights(tmp_path_factory.mktemp("weights") / "w.pth"))


def test_a_curve_is_of_one_network(store, settings, tmp_path):
    volumes, weights = open_store(store), tmp_path / "w.pth"
    chosen = settings.model_copy(update={"weights": str(weights)})
    torch.save(resnet18().state_dict(), weights)
    plan, _ = make_plan(volumes, tmp_path / "c", chosen, CURVE)
    assert read_plan(tmp_path / "c") == plan
    assert plan.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    torch.save(resnet18().state_dict(), weights)
    with pytest.raises(StoreError, match=r"was begun with other weights than w\.pth has now \(sha256 "):
        make_plan(volumes, tmp_path / "c", chosen, CURVE)
    alone = CURVE.model_copy(update={"methods": ("scratch",)})
    assert make_plan(volumes, tmp_path / "c", chosen, alone)[0].weights_sha256 == plan.weights_sha256


def test_nobody_is_removed_while_a_curve_is_made(store, settings, tmp_path):
    people = tmp_path / "w.csv"
    people.write_text("9000001\n")
    curve, refused = tmp_path / "c", []

    def try_to(progress):
        if not refused:
            with pytest.raises(StoreBusyError, match="is being written by process"):
                withdraw(people, [curve])
            refused.append(progress)

    with store_lock(curve / "people", shared=True):  # as another process that works here
        run_curve(store, curve, settings, CURVE.model_copy(update={"methods": ("probe",)}), on_progress=try_to)
        assert refused
        with pytest.raises(StoreBusyError):
            withdraw(people, [curve])
    assert withdraw(people, [curve]).clean
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".lock"] == []


def test_probes_see_scans_as_they_are_now(store, settings, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    sound = shard_path(copy, 5).read_bytes()
    shard_path(copy, 5).write_bytes(b"damaged")
    volumes = open_store(copy)
    assert 5 not in embed_once(volumes, tmp_path, settings).scans["row"].tolist()
    shard_path(copy, 5).write_bytes(sound)
    assert 5 not in embed_once(volumes, tmp_path, settings).scans["row"].tolist()
    found = embed_once(volumes, tmp_path, settings, again=True)
    assert found.scans["row"].tolist() == list(range(PEOPLE + 3))
    assert read_tables(tmp_path / "embeddings.zarr").attrs["precision"] == "float32"
    elsewhere = settings.model_copy(update={"precision": "bfloat16"})  # as on a machine with a GPU
    np.testing.assert_array_equal(embed_once(volumes, tmp_path, elsewhere).features, found.features)
    rows = rows_of(volumes.scans)
    rows[8] = replace(rows[8], source_mtime=1.0)  # ingested anew
    shutil.copy(shard_path(copy, 9), shard_path(copy, 8))
    write_scans(copy, rows)
    now = embed_once(open_store(copy), tmp_path, elsewhere)
    assert read_tables(tmp_path / "embeddings.zarr").attrs["precision"] == "float32"
    np.testing.assert_allclose(now.features[8], found.features[9], rtol=1e-4, atol=1e-5)


def test_a_curve_tells_that_its_weights_know_people_of_the_store(store, settings, tmp_path):
    volumes, weights = open_store(store), tmp_path / "run.pt"
    head = Head("sex", "binary", ("female", "male"), frequencies=(0.5, 0.5))
    network = ScanNetwork("resnet18", Input(View.axial, 1, None, (32, 32), 1.0, (0.5,) * 3, (0.5,) * 3), [head])
    about = {"store": {"id": volumes.attrs["store_id"]}, "epoch": 2}
    write_checkpoint(weights, checkpoint_of(network, settings, about))
    chosen = settings.model_copy(update={"weights": str(weights)})
    plan, _ = make_plan(volumes, tmp_path / "c", chosen, CURVE)
    (note,) = [note for note in plan.notes if "was trained on people of this store" in note]
    assert note.startswith("of the weights: run.pt (epoch 2)")
    weights.unlink()
    assert make_plan(volumes, tmp_path / "c", chosen, CURVE)[0].notes == plan.notes
    alone = CURVE.model_copy(update={"methods": ("scratch",)})
    assert note not in make_plan(volumes, tmp_path / "c", chosen, alone)[0].notes
