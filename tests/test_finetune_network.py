"""The network that is trained: what it sees of a scan, how planes and slices are put together, checkpointing, seeds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from finetuning import SHAPE, tiny_settings
from finetuning import thin_networks as thin_networks  # a fixture of all tests here
from scan_networks import AGE, HEADS, INCOME, NO_WEIGHTS, SEX, SITE, make_network, solid, volumes
from torch import nn

from extract.inputs import pictures_of, slices_to_load
from finetune.build import build_network, check_volumes
from finetune.evaluate import what_to_augment
from finetune.network import GatedAttention, ScanNetwork
from loaders.views import View, as_images, cut, plan_picture


def test_a_new_network_says_of_anybody_what_is_known_of_all():
    network = make_network(HEADS)
    given = network.outputs(torch.zeros(1, 512)).detach().numpy()
    of = {head.name: head.predict(given[:, place]) for head, place in zip(HEADS, network.head_slices, strict=True)}
    np.testing.assert_allclose(of["sex"][0], SEX.frequencies, rtol=1e-5)
    np.testing.assert_allclose(of["site"][0], SITE.frequencies, rtol=1e-5)
    assert of["age"][0] == pytest.approx(60)
    assert of["income"][0] == pytest.approx(np.mean(INCOME.levels)), "an even share at each level"
    assert network.head_slices == [slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 8), slice(8, 9)]


@pytest.mark.parametrize("crop", [None, (13, 16, 11)])
def test_of_three_planes_no_more_is_augmented_than_is_seen(crop):
    seen = make_network([SEX], view="triplanar", slices=3, crop=crop).seen
    images = torch.rand(2, 18, 20, 16) + 0.1
    planes = what_to_augment(seen, (18, 20, 16))
    only = torch.zeros_like(images)
    for axis, index in enumerate(planes, start=1):
        only.index_copy_(axis, torch.from_numpy(index), images.index_select(axis, torch.from_numpy(index)))
    assert (only == 0).float().mean() > 0.5
    for part, whole in zip(*(pictures_of(i, seen.view, 3, crop, cut=False) for i in (only, images)), strict=True):
        assert torch.equal(part, whole)
    assert what_to_augment(make_network([SEX], view="axial").seen, (18, 20, 16)) is None


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_batch_norms_see_all_planes_at_once(model):
    network = make_network([SEX], model=model, view="triplanar").double().train()
    alike = [torch.rand(scans, 1, 64, 48).double() for scans in (2, 3)]  # as one tensor, which only these can be
    together, planes = copy.deepcopy(network), copy.deepcopy(network)
    expected = together.encode(torch.cat(alike))
    found = torch.cat(planes.encode_planes(alike))
    torch.testing.assert_close(found, expected)
    for one, other in ((expected, together), (found, planes)):
        (one**2).sum().backward()
        other.eval()
    for (name, value), other in zip(together.state_dict().items(), planes.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)
    for (name, p), other in zip(together.encoder.named_parameters(), planes.encoder.parameters(), strict=True):
        torch.testing.assert_close(other.grad, p.grad, msg=name)
    different = [torch.rand(2, 1, *shape).double() for shape in ((64, 48), (48, 56), (40, 64))]
    planes.train()
    norm = planes.encoder.bn1
    norm.momentum = 1.0
    planes.encode_planes(different)
    with torch.no_grad():
        stem = [planes.encoder.conv1(planes._prepare(plane)).movedim(1, -1).reshape(-1, 64) for plane in different]
    torch.testing.assert_close(norm.running_mean, torch.cat(stem).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.cat(stem).var(dim=0))
    planes.eval()
    for one, plane in zip(planes.encode_planes(different), different, strict=True):
        torch.testing.assert_close(one, planes.encode(plane))


@pytest.mark.parametrize("kind", ["triplanar", "volume", "frozen"])
def test_checkpointing_changes_nothing(kind):
    until = "layer1" if kind == "frozen" else None
    settings = solid() if kind == "volume" else tiny_settings(view="triplanar", slices=2, pool="attention", dropout=0)
    images = volumes(2, (8, 8, 8)) if kind == "volume" else volumes()

    def trained(checkpointing: bool) -> tuple[torch.Tensor, ScanNetwork]:
        network = build_network(settings.model_copy(update={"checkpointing": checkpointing}), [SEX, AGE], NO_WEIGHTS)
        network.freeze(until, batch_norm=False)
        network.train()
        calls = []
        network.encoder.layer3[0].conv1.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in range(1 if kind == "volume" else 2):
            outputs = network(images)
            (outputs**2).sum().backward()
        seen = {"volume": 1, "triplanar": 6, "frozen": 6}[kind]
        assert len(calls) == seen * (1 + checkpointing), "activations were computed again"
        return outputs, network

    plain, expected = trained(False)
    outputs, network = trained(True)
    assert torch.equal(outputs, plain)
    for (name, value), other in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for (name, p), other in zip(network.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None), name
        assert p.grad is None or torch.equal(p.grad, other.grad), name
    network.eval()
    assert torch.equal(network(images), expected.eval()(images))


def test_attention_is_a_weighted_mean_of_slices_in_any_order():
    torch.manual_seed(0)
    attention = GatedAttention(6)
    slices = torch.randn(3, 5, 6)
    pooled = attention(slices)
    for scan in range(3):
        score = [
            attention.weight(torch.tanh(attention.value(one)) * torch.sigmoid(attention.gate(one)))
            for one in slices[scan]
        ]
        shares = torch.softmax(torch.cat(score), 0)
        expected = sum(share * one for share, one in zip(shares, slices[scan], strict=True))
        torch.testing.assert_close(pooled[scan], expected)
    torch.testing.assert_close(attention(slices[:, [3, 1, 4, 0, 2]]), pooled)
    torch.testing.assert_close(attention(slices[:, :1]), slices[:, 0])
    assert make_network(pool="attention").attention is not None
    with pytest.raises(ValueError, match="pool attention does not go with r3d_18, which sees no slices"):
        build_network(solid(pool="attention"), [SEX], NO_WEIGHTS)


@pytest.mark.parametrize("changes", [{}, {"crop": "2,20,18", "scale": 0.5}, {"size": "10,30"}])
@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal", "triplanar"])
def test_slices_that_the_loader_cuts_are_those_of_volumes(view, changes):
    settings = tiny_settings(view=view, slices=2, dropout=0, **changes)
    network = build_network(settings, [SEX], NO_WEIGHTS).eval()
    images = volumes()
    planes = plan_picture(SHAPE, 1, view, slices_to_load(SHAPE, View(view), 2, settings.crop)).planes
    pictures = as_images(tuple(cut(images, plane.axis, plane.positions) for plane in planes))
    with torch.inference_mode():
        whole = network(images)
        torch.testing.assert_close(network(pictures, cut=True), whole)
        torch.testing.assert_close(network(images.float() / 255), whole)
    assert network.seen.cut == (view != "triplanar"), "of three planes there may be volumes, too"


def test_a_network_sees_what_torchvision_would():
    network = make_network([SEX], view="triplanar", slices=1).eval()
    images = volumes()
    with torch.inference_mode():
        planes = [images[:, SHAPE[0] // 2], images[:, :, SHAPE[1] // 2], images[:, :, :, SHAPE[2] // 2]]
        each = []
        for grey in planes:
            rgb = grey.flip(1)[:, None].float().expand(-1, 3, -1, -1) / 255
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (NO_WEIGHTS.mean, NO_WEIGHTS.std))
            each.append(network.encoder((rgb - mean) / std))
        torch.testing.assert_close(network.features(images), torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)
    assert not network.seen.cut


def test_bfloat16_gives_float32_that_is_near():
    network = make_network(HEADS).eval()
    with torch.inference_mode():
        plain = network(volumes())
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(volumes())
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, plain)
    torch.testing.assert_close(rough, plain, rtol=0.05, atol=0.05)


def test_pictures_that_do_not_go_with_a_network_are_refused():
    with pytest.raises(ValueError, match="view axial does not go with r3d_18"):
        build_network(tiny_settings(model="r3d_18"), [SEX], NO_WEIGHTS)
    with pytest.raises(ValueError, match="crop is 9 x 9 x 9, expected no more than the 4 x 24 x 24"):
        check_volumes(make_network(crop="9,9,9"), SHAPE)
    with pytest.raises(ValueError, match="slices"):
        check_volumes(make_network(slices=5), SHAPE)


def test_the_seed_makes_the_same_network():
    first, same, other = (make_network(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
    assert not torch.equal(first["heads.0.weight"], other["heads.0.weight"])
    assert isinstance(make_network().heads[0], nn.Linear)
