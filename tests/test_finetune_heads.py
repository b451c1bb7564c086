"""Heads and losses against slow references: labels come back, classes count alike, unknown labels for nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_networks import AGE, HEADS, INCOME, SEX, SITE

from extract.probing.targets import Target
from finetune.heads import Head, make_head
from finetune.losses import class_weights, loss_sums, scan_weights


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
