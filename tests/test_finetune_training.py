"""Training: a step is that of plain torch however a batch is cut, and what cannot be trained so is told before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import assert_same_run, gradients_of, run_tiny, stop_after, stopped_gradients, tiny_settings
from finetuning import store as store  # a fixture
from finetuning import table as table  # a fixture
from finetuning import thin_networks as thin_networks  # a fixture of all tests here

from extract.checkpoints import LAST
from extract.distributed import Group
from extract.errors import WeightsUnavailableError
from finetune.batch_norm import update_statistics
from finetune.build import build_network, build_training, check_scale, find_weights, without_effect
from finetune.cohort import read_cohort
from finetune.heads import Head
from finetune.run import finetune
from finetune.training import Training, _backward, _one_step
from ingest.store import open_store
from loaders import Batch, open_loader
from loaders.order import epoch_order

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
