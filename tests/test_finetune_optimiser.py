"""What is trained and how fast: frozen stages and batch norms stay, each stage has its rate, rates grow and fall."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from finetuning import thin_networks as thin_networks  # a fixture of all tests here
from finetuning import tiny_settings
from scan_networks import HEADS, make_network, volumes

from finetune.network import ScanNetwork, check_model, stage_names
from finetune.optimiser import make_optimiser, make_schedule, trained_parameters
from finetune.settings import FinetuneSettings


def one_step(network: ScanNetwork, settings: FinetuneSettings, **forward) -> torch.Tensor:
    """Train for a step; return the outputs."""
    optimiser = make_optimiser(network, settings)
    network.train()
    outputs = network(volumes(), **forward)
    (outputs**2).sum().backward()
    optimiser.step()
    return outputs.detach()


@pytest.mark.parametrize("until", [None, "stem", "layer2", "layer4"])
def test_frozen_stages_stay_bit_by_bit_with_their_statistics(until):
    settings = tiny_settings(freeze_until=until, lr=1e-2)
    network = make_network(**settings.model_dump(include={"freeze_until"}))
    network.freeze(until, batch_norm=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    one_step(network, settings)
    frozen = stage_names()[: stage_names().index(until) + 1] if until else ()
    stage_of = {"conv1": "stem", "bn1": "stem", **{name: name for name in stage_names()}}
    for name, value in network.state_dict().items():
        first, second = name.split(".")[:2]
        stays = first == "encoder" and stage_of[second] in frozen
        assert torch.equal(value, before[name]) == stays, name
    assert not any(
        p.requires_grad for part in list(network.stages())[: len(frozen)] for m in part for p in m.parameters()
    )
    network.eval()
    network.train()
    one_step(network, settings)
    assert all(
        torch.equal(network.state_dict()[name], before[name])
        for name in before
        if stage_of.get(name.split(".")[1]) in frozen
    )


def test_an_unknown_stage_is_named():
    with pytest.raises(ValueError, match="freeze_until is 'layer9', expected one of stem, layer1, "):
        make_network().freeze("layer9", batch_norm=False)
    with pytest.raises(ValueError, match="model s3d can be extracted from but not fine-tuned"):
        check_model("s3d")


def test_frozen_batch_norms_keep_statistics_and_learn_their_scale():
    settings = tiny_settings(batch_norm="frozen", lr=1e-2)
    network = make_network()
    network.freeze(None, batch_norm=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    one_step(network, settings)
    for name, value in network.state_dict().items():
        statistic = name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, before[name]) == statistic, name


def test_each_stage_has_its_rate_and_vectors_do_not_decay():
    settings = tiny_settings(lr=1e-3, head_lr=5e-3, layer_decay=0.5, weight_decay=0.1, pool="attention")
    network = make_network(HEADS, pool="attention")
    optimiser = make_optimiser(network, settings)
    of = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(of) == len(list(network.parameters()))
    expected = {"conv1": 0.5**4, "bn1": 0.5**4, "layer1": 0.5**3, "layer2": 0.5**2, "layer3": 0.5, "layer4": 1}
    for name, parameter in network.named_parameters():
        part, second = name.split(".")[:2]
        rate = 1e-3 * expected[second] if part == "encoder" else 5e-3
        assert of[id(parameter)]["lr"] == pytest.approx(rate), name
        decays = name.endswith("weight") and "bn" not in name and "downsample.1" not in name
        assert of[id(parameter)]["weight_decay"] == (0.1 if decays else 0), name
    network.freeze("layer2", batch_norm=False)
    there = {id(p) for group in make_optimiser(network, settings).param_groups for p in group["params"]}
    assert there == set(map(id, trained_parameters(network)))


def test_the_rate_grows_and_falls_as_a_half_cosine():
    network = make_network()
    rates = tiny_settings(lr=1.0, layer_decay=0.5, head_lr=3.0)

    def factors(steps: int, warmup: float) -> list[float]:
        optimiser = make_optimiser(network, rates)
        schedule = make_schedule(optimiser, steps, warmup)
        found = []
        for _ in range(steps):
            assert optimiser.param_groups[0]["lr"] == pytest.approx(0.5**4 * optimiser.param_groups[-1]["lr"] / 3)
            found.append(optimiser.param_groups[-1]["lr"] / 3)
            optimiser.step()
            schedule.step()
        assert optimiser.param_groups[-1]["lr"] == pytest.approx(0)
        return found

    falling = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    np.testing.assert_allclose(factors(10, 0.2), [0.5, 1, *falling])
    np.testing.assert_allclose(factors(8, 0.0), falling)
    np.testing.assert_allclose(factors(1, 0.1), [1])
