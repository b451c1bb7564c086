"""What is trained: heads and losses against slow references, stages that stay, rates, checkpointing, views, steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from finetuning import SHAPE, thin_networks, tiny_settings  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from extract.inputs import pictures_of, slices_to_load
from extract.probing.targets import Target
from extract.weights import Weights
from finetune.build import build_network, check_volumes
from finetune.evaluate import what_to_augment
from finetune.heads import Head, make_head
from finetune.losses import class_weights, loss_sums, scan_weights
from finetune.network import GatedAttention, ScanNetwork, check_model, stage_names
from finetune.optimiser import make_optimiser, make_schedule, trained_parameters
from finetune.settings import FinetuneSettings
from finetune.steps import plan_steps
from loaders.order import Sampling
from loaders.views import View, cut

NO_WEIGHTS = Weights("random", "", None, (0.4, 0.45, 0.5), (0.2, 0.22, 0.24))
SEX = Head("sex", "binary", ("f", "m"), frequencies=(0.25, 0.75))
SITE = Head("site", "multiclass", ("a", "b", "c"), outputs=3, frequencies=(0.2, 0.3, 0.5))
INCOME = Head("income", "ordinal", outputs=3, typical=3.0, levels=(1.0, 2.0, 4.0, 5.5))
AGE = Head("age", "continuous", units="years", mean=60.0, std=8.0, typical=60.0)
DRINKS = Head("drinks", "count", mean=1.2, std=0.6, typical=3.0)
HEADS = (SEX, SITE, INCOME, AGE, DRINKS)


def make_network(heads=(SEX, AGE), **changes) -> ScanNetwork:
    return build_network(tiny_settings(dropout=0, **changes), heads, NO_WEIGHTS)


def solid(**changes) -> FinetuneSettings:
    return tiny_settings(model="r3d_18", dropout=0, **changes).model_copy(update={"view": None})


def volumes(scans: int = 4, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randint(0, 256, (scans, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def slow_loss(head: Head, outputs: np.ndarray, label: float) -> float:
    """Return the loss of a scan, from the definition."""
    if head.task == "binary":
        return softplus(-outputs[0]) if label == 1 else softplus(outputs[0])
    if head.task == "multiclass":
        return math.log(sum(math.exp(x - outputs[int(label)]) for x in outputs))
    if head.task == "ordinal":
        each = [softplus(-x) if label > step else softplus(x) for step, x in enumerate(outputs)]
        return sum(each) / len(each)
    return (outputs[0] - label) ** 2


def test_losses_are_those_of_a_slow_reference():
    rng = np.random.default_rng(0)
    widths = [head.outputs for head in HEADS]
    ends = np.cumsum(widths)
    columns = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    outputs = rng.normal(0, 4, (30, ends[-1])).astype(np.float32)
    labels = np.stack(
        [rng.integers(0, 2, 30), rng.integers(0, 3, 30), rng.integers(0, 4, 30), *rng.normal(0, 1, (2, 30))]
    )
    labels = labels.T.astype(np.float32)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    weights = np.where(np.isnan(labels), 0, rng.uniform(0.5, 2, labels.shape)).astype(np.float32)
    found = loss_sums(torch.tensor(outputs), HEADS, columns, torch.tensor(labels), torch.tensor(weights))
    for number, (head, place) in enumerate(zip(HEADS, columns, strict=True)):
        known = np.flatnonzero(weights[:, number])
        expected = sum(weights[k, number] * slow_loss(head, outputs[k, place], labels[k, number]) for k in known)
        np.testing.assert_allclose(found[number], expected, rtol=1e-5)


def test_labels_that_are_not_known_have_no_gradient():
    outputs = torch.randn(4, 1, requires_grad=True)
    labels = torch.tensor([[1.0], [math.nan], [0.0], [math.nan]])
    loss_sums(outputs, [SEX], [slice(0, 1)], labels, (~labels.isnan()).float()).sum().backward()
    assert (outputs.grad[:, 0] != 0).tolist() == [True, False, True, False]


def test_balanced_classes_count_the_same():
    labels = np.array([0, 0, 0, 1, np.nan, 2, 2], np.float32)
    weights = class_weights(SITE, labels, balanced=True)
    np.testing.assert_allclose(weights, [6 / 9, 6 / 3, 6 / 6])
    scans = scan_weights(SITE, labels, weights)
    assert scans[4] == 0
    known = ~np.isnan(labels)
    np.testing.assert_allclose([scans[labels == k].sum() for k in range(3)], [2, 2, 2], rtol=1e-6)
    assert scans[known].mean() == pytest.approx(1)
    assert class_weights(SITE, labels, balanced=False).tolist() == [1, 1, 1]
    assert scan_weights(AGE, labels, class_weights(AGE, labels, balanced=True)).tolist() == known.astype(float).tolist()


def target(values: np.ndarray, task: str, labels: list[str] | None = None) -> Target:
    return Target("it", task, values.astype(np.float64), labels or [])


VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=20).filter(
    lambda v: np.std(v) > 1e-3 * max(map(abs, v))
)
COUNTS = st.lists(st.integers(0, 10**6), min_size=3, max_size=20).filter(lambda v: len(set(v)) > 1)


@given(values=VALUES)
def test_values_come_back(values):
    values = np.array(values)
    head = make_head(target(values, "continuous"), np.ones(len(values), bool))
    encoded = head.encode(np.append(values, np.nan))
    assert np.isnan(encoded[-1])
    assert encoded[:-1].mean() == pytest.approx(0, abs=1e-3)
    assert encoded[:-1].std() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(head.predict(encoded[:-1, None]), values, atol=2e-6 * np.abs(values).max())
    assert head.typical == pytest.approx(values.mean())


@given(values=COUNTS)
def test_counts_come_back_and_none_is_negative(values):
    values = np.array(values)
    head = make_head(target(values, "count"), np.ones(len(values), bool))
    np.testing.assert_allclose(head.predict(head.encode(values)[:, None]), values, rtol=1e-4, atol=1e-4)
    wild = head.predict(np.array([[-1e30], [1e30], [np.float32(-5)]], np.float32))
    assert (wild >= 0).all()
    assert np.isfinite(wild).all()


@given(
    values=st.lists(st.sampled_from([-2.0, 0.5, 1.0, 7.0]), min_size=3, max_size=20).filter(lambda v: len(set(v)) > 1)
)
def test_levels_come_back(values):
    values = np.array(values)
    head = make_head(target(values, "ordinal"), np.ones(len(values), bool))
    places = head.encode(np.append(values, np.nan))
    assert np.isnan(places[-1])
    assert [head.levels[int(place)] for place in places[:-1]] == values.tolist()
    sure = np.where(places[:-1, None] > np.arange(head.outputs), 40, -40).astype(np.float32)
    np.testing.assert_allclose(head.predict(sure), values)


def test_the_expected_level_is_the_sum_over_levels_of_their_probabilities():
    outputs = np.sort(np.random.default_rng(0).normal(0, 2, (50, 3)))[:, ::-1].astype(np.float32)
    above = 1 / (1 + np.exp(-outputs.astype(np.float64)))
    edges = np.concatenate([np.ones((50, 1)), above, np.zeros((50, 1))], axis=1)
    probabilities = edges[:, :-1] - edges[:, 1:]
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(INCOME.predict(outputs), probabilities @ np.array(INCOME.levels))


def test_probabilities_are_such_whatever_comes():
    outputs = np.array([[0.0], [3.0], [-1e4], [1e4]], np.float32)
    found = SEX.predict(outputs)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[:, 1], [0.5, 1 / (1 + math.exp(-3)), 0, 1], atol=1e-12)
    wide = SITE.predict(np.array([[1e4, 0, -1e4], [1, 2, 3]], np.float32))
    np.testing.assert_allclose(wide[0], [1, 0, 0])
    np.testing.assert_allclose(wide[1], np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum())


def test_a_head_knows_its_training_part_alone():
    values = np.array([0, 0, 0, 1, 1, 1, np.nan])
    train = np.array([True, True, True, True, False, False, True])
    head = make_head(target(values, "binary", ["f", "m"]), train)
    assert (head.labels, head.frequencies, head.outputs) == (("f", "m"), (0.75, 0.25), 1)
    assert make_head(target(values, "binary", ["f", "m"]), train, balanced=True).frequencies == (0.5, 0.5)
    ages = np.array([50.0, 60, 70, 80, 900, 1000, np.nan])
    head = make_head(target(ages, "continuous"), train)
    assert (head.mean, head.typical) == (65, 65)
    assert head.std == pytest.approx(np.std([50, 60, 70, 80]))
    assert Head.from_json(head.to_json()) == head
    with pytest.raises(ValueError, match="this is no head of a network"):
        Head.from_json({"nome": "sex"})


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ([0, 0, 1], "binary", "nobody of the training part has it 'm'"),
        ([5, 5, 9], "continuous", "everybody of the training part has it 5"),
        ([np.nan, np.nan, 9], "continuous", "nobody of the training part has a value"),
        ([1e17, 1e17 + 16, 9], "count", r"everybody of the training part has it 1e\+17"),
    ],
)
def test_what_cannot_be_learnt_is_named(values, task, message):
    labels = ["f", "m"] if task == "binary" else None
    with pytest.raises(ValueError, match=message):
        make_head(target(np.array(values), task, labels), np.array([True, True, False]))


def test_a_new_network_says_of_anybody_what_is_known_of_all():
    network = make_network(HEADS)
    given = network.outputs(torch.zeros(1, 512)).detach().numpy()
    of = {head.name: head.predict(given[:, place]) for head, place in zip(HEADS, network.head_slices, strict=True)}
    np.testing.assert_allclose(of["sex"][0], SEX.frequencies, rtol=1e-5)
    np.testing.assert_allclose(of["site"][0], SITE.frequencies, rtol=1e-5)
    assert of["age"][0] == pytest.approx(60)
    assert of["income"][0] == pytest.approx(np.mean(INCOME.levels)), "an even share at each level"
    assert network.head_slices == [slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 8), slice(8, 9)]


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
@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
def test_slices_that_the_loader_cuts_are_those_of_volumes(view, changes):
    settings = tiny_settings(view=view, slices=2, dropout=0, **changes)
    network = build_network(settings, [SEX], NO_WEIGHTS).eval()
    images = volumes()
    positions = slices_to_load(SHAPE, View(view), 2, settings.crop)
    pictures = cut(images, ["axial", "coronal", "sagittal"].index(view), positions)
    with torch.inference_mode():
        whole = network(images)
        torch.testing.assert_close(network(pictures, cut=True), whole)
        torch.testing.assert_close(network(images.float() / 255), whole)
    assert network.seen.cut


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


@given(
    scans=st.integers(1, 60),
    share=st.integers(1, 24),
    processes=st.integers(1, 4),
    micro=st.none() | st.integers(1, 12),
    most=st.integers(1, 12),
    min_steps=st.integers(0, 20),
)
def test_steps_see_the_same_scans_however_many_processes_share_them(scans, share, processes, micro, most, min_steps):
    batch = share * processes
    settings = tiny_settings(batch_size=batch, micro_batch=min(micro, batch) if micro else None, min_steps=min_steps)
    steps = plan_steps(scans, settings, most, processes)
    alone = plan_steps(scans, settings, most)
    assert (steps.batch, steps.per_epoch, steps.epochs) == (alone.batch, alone.per_epoch, alone.epochs)
    assert steps.batch == min(batch, scans)
    assert steps.micro <= (min(micro, batch) if micro else most)
    assert steps.total >= max(min_steps, steps.per_epoch * settings.epochs)
    assert steps.epochs == settings.epochs or (steps.epochs - 1) * steps.per_epoch < min_steps
    rows = np.arange(100, 100 + scans)
    ranks = [Sampling(rows, batch_size=steps.micro, rank=rank, world_size=processes) for rank in range(processes)]
    batches = [list(rank.batches(0)) for rank in ranks]
    for number in range(steps.per_epoch):
        seen = [
            plan.rows[plan.valid]
            for of_rank in batches
            for plan in of_rank[number * steps.accumulate : (number + 1) * steps.accumulate]
        ]
        assert sorted(np.concatenate(seen)) == rows[number * steps.batch : (number + 1) * steps.batch].tolist()
    assert {len(of_rank[: steps.per_epoch * steps.accumulate]) for of_rank in batches} == {
        steps.per_epoch * steps.accumulate
    }


@pytest.mark.parametrize(
    ("batch", "processes", "advised"),
    [(13, 1, 16), (26, 1, 24), (26, 2, 32), (16, 1, None), (14, 1, None), (5, 1, None)],
)
def test_a_batch_that_does_not_divide_is_warned_of(batch, processes, advised):
    steps = plan_steps(1000, FinetuneSettings(batch_size=batch), 8, processes)
    if advised is None:
        assert steps.warning is None
    else:
        assert f"are taken {steps.micro} at a time, though 8 would fit" in steps.warning
        assert steps.warning.endswith(f"--batch-size {advised} would be faster")
        assert plan_steps(1000, FinetuneSettings(batch_size=advised), 8, processes).warning is None


def test_few_scans_are_taken_many_at_a_time():
    """Batch norms want more than one: a number of scans without divisors must not be taken one by one."""
    steps = plan_steps(17, FinetuneSettings(batch_size=32), most=8)
    assert (steps.batch, steps.micro, steps.accumulate, steps.per_epoch) == (17, 6, 3, 1)


def test_processes_that_cannot_share_a_batch_are_told():
    with pytest.raises(
        ValueError, match="batch_size is 8, which 3 processes cannot share evenly; expected a multiple of 3"
    ):
        plan_steps(100, tiny_settings(batch_size=8), 8, 3)
