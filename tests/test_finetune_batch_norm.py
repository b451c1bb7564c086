"""Statistics of batch norms are those of the weights as they are, over the same scans each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from finetuning import TINY, make_brains, thin_networks  # noqa: F401 - a fixture of all tests here
from torch import nn

from extract.distributed import Group
from finetune.batch_norm import SCANS, choose_scans, update_statistics
from finetune.build import build_network, build_training, find_weights, open_scans
from finetune.cohort import read_cohort
from finetune.evaluate import predict_rows
from finetune.settings import make_settings
from ingest.store import open_store


@pytest.fixture
def store(tmp_path):
    make_brains(tmp_path / "s.zarr")
    return open_store(tmp_path / "s.zarr")


def prepare(store, **settings):
    chosen = make_settings(TINY | {"size": 32, "slices": 2} | settings)
    cohort = read_cohort(store, chosen)
    return build_training(store, chosen, cohort, build_network(chosen, cohort.heads, find_weights(chosen)), Group())


def first_norm(training) -> nn.BatchNorm2d:
    return training.network.encoder.bn1


def test_they_are_means_over_batches_of_what_the_weights_make_of_the_scans(store):
    training = prepare(store)
    rows = np.arange(16)
    inputs: list[torch.Tensor] = []
    handle = first_norm(training).register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().clone()))
    with open_scans(store, training, rows) as loader:
        update_statistics(training.network, loader)
    handle.remove()
    training.loader.close()
    training.network.eval()
    seen: list[torch.Tensor] = []
    handle = first_norm(training).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    predict_rows(training.network, store, rows, batch_size=16)
    handle.remove()
    torch.testing.assert_close(torch.cat(inputs), seen[0])
    means = torch.stack([one.mean((0, 2, 3)) for one in inputs]).mean(0)
    spreads = torch.stack([one.var((0, 2, 3)) for one in inputs]).mean(0)
    torch.testing.assert_close(first_norm(training).running_mean, means)
    torch.testing.assert_close(first_norm(training).running_var, spreads)


def test_what_was_before_does_not_matter_and_training_goes_on_as_it_was(store):
    training = prepare(store)
    norm = first_norm(training)
    kept = []
    for start in (0.0, 100.0):
        norm.running_mean.fill_(start)
        with open_scans(store, training, np.arange(8)) as loader:
            update_statistics(training.network, loader)
        kept.append(norm.running_mean.clone())
    training.loader.close()
    assert torch.equal(*kept)
    assert norm.momentum == 0.1
    assert training.network.training


def test_frozen_ones_stay(store):
    training = prepare(store, freeze_until="layer1")
    before = {name: value.clone() for name, value in training.network.named_buffers()}
    with open_scans(store, training, np.arange(8)) as loader:
        update_statistics(training.network, loader)
    training.loader.close()
    changed = {name for name, value in training.network.named_buffers() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.split(".")[1] in ("layer2", "layer3", "layer4") for name in changed)


def test_a_last_batch_of_one_small_slice_is_left_out(store):
    training = prepare(store, slices=1, size=24)
    with open_scans(store, training, np.arange(9)) as loader:  # 8 and 1
        update_statistics(training.network, loader)
    training.loader.close()
    assert all(torch.isfinite(value).all() for value in training.network.buffers())


def test_the_same_scans_are_chosen_each_time_and_not_all_of_many():
    rows = np.arange(0, 3000, 3)
    chosen = choose_scans(rows, 4)
    assert len(chosen) == SCANS
    assert np.array_equal(chosen, choose_scans(rows[::-1][::-1], 4))
    assert set(chosen) <= set(rows)
    assert np.array_equal(choose_scans(np.array([5, 2, 9]), 0), [2, 5, 9])
