"""The order of an epoch and its batches: every scan once, for any ranks and batch sizes, and exactly after a stop."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order import BatchPlan, Sampling, count_batches, epoch_order, plan_batches

SCANS = st.integers(0, 60)
BATCH_SIZES = st.integers(1, 9)
WORLD_SIZES = st.integers(1, 5)


def plans_of_ranks(
    order: np.ndarray, batch_size: int, world_size: int, *, drop_last: bool = False, start: int = 0
) -> list[list[BatchPlan]]:
    """Return the batches of each rank."""
    return [
        list(
            plan_batches(
                order, batch_size=batch_size, rank=rank, world_size=world_size, drop_last=drop_last, start=start
            )
        )
        for rank in range(world_size)
    ]


def taken(ranks: list[list[BatchPlan]], steps: int | None = None) -> np.ndarray:
    """Return the rows that count, step by step, and rank by rank within a step."""
    parts = [plan.rows[plan.valid] for step in list(zip(*ranks, strict=True))[:steps] for plan in step]
    return np.concatenate([np.empty(0, np.int64), *parts])


def shuffled(scans: int) -> np.ndarray:
    """Return rows such that none is the same as its position."""
    return epoch_order(np.arange(100, 100 + scans), shuffle=True, seed=8, epoch=2)


@settings(max_examples=300, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.booleans())
def test_ranks_together_visit_the_order_and_nothing_twice(scans, batch_size, world_size, drop_last):
    order = shuffled(scans)
    ranks = plans_of_ranks(order, batch_size, world_size, drop_last=drop_last)
    together = batch_size * world_size
    expected = scans - scans % together if drop_last else scans
    np.testing.assert_array_equal(taken(ranks), order[:expected])

    positions = [p for plans in ranks for plan in plans for p in plan.positions[plan.valid].tolist()]
    assert sorted(positions) == list(range(expected))
    for plans in ranks:
        for plan in plans:
            np.testing.assert_array_equal(plan.rows, order[plan.positions])  # of padding, too
            assert plan.rows.dtype == np.int64


@settings(max_examples=300, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.booleans())
def test_ranks_get_as_many_batches_of_the_same_sizes(scans, batch_size, world_size, drop_last):
    ranks = plans_of_ranks(shuffled(scans), batch_size, world_size, drop_last=drop_last)
    sizes = [[len(plan.rows) for plan in plans] for plans in ranks]
    assert all(of_rank == sizes[0] for of_rank in sizes)
    assert all(size == batch_size for size in sizes[0][:-1])
    assert len(sizes[0]) == count_batches(scans, batch_size, world_size=world_size, drop_last=drop_last)
    for rank in range(world_size):
        sampling = Sampling(
            np.arange(scans), batch_size=batch_size, rank=rank, world_size=world_size, drop_last=drop_last
        )
        assert len(sampling) == len(list(sampling.batches(0))) == len(sizes[0])


@settings(max_examples=300, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.booleans())
def test_only_the_last_batch_is_padded_and_by_one_scan_at_most(scans, batch_size, world_size, drop_last):
    ranks = plans_of_ranks(shuffled(scans), batch_size, world_size, drop_last=drop_last)
    for step, plans in enumerate(zip(*ranks, strict=True)):
        padding = [int((~plan.valid).sum()) for plan in plans]
        last = step == len(ranks[0]) - 1
        assert max(padding) <= (1 if last and not drop_last else 0)
        assert len({plan.end for plan in plans}) == 1
        in_group = np.concatenate([plan.positions for plan in plans])
        assert in_group.max() < plans[0].end  # padding is a scan of the same step


@settings(max_examples=300, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.lists(st.tuples(BATCH_SIZES, WORLD_SIZES, st.integers(0, 8)), max_size=4))
def test_going_on_with_other_ranks_and_batches_misses_and_repeats_nothing(scans, batch_size, world_size, stops):
    order = shuffled(scans)
    start, visited = 0, []
    for other_size, other_world, steps in stops:  # runs that are cut off after some steps
        ranks = plans_of_ranks(order, other_size, other_world, start=start)
        visited.append(taken(ranks, steps))
        if steps and ranks[0]:
            start = ranks[-1][:steps][-1].end
    visited.append(taken(plans_of_ranks(order, batch_size, world_size, start=start)))
    np.testing.assert_array_equal(np.concatenate(visited), order)


@settings(max_examples=200, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.integers(0, 8))
def test_going_on_with_drop_last_leaves_out_only_what_fills_no_batch(scans, batch_size, world_size, steps):
    order = shuffled(scans)
    first = plans_of_ranks(order, batch_size, world_size, drop_last=True)
    start = first[0][:steps][-1].end if steps and first[0] else 0
    rest = plans_of_ranks(order, batch_size, world_size, drop_last=True, start=start)
    visited = np.concatenate([taken(first, steps), taken(rest)])
    np.testing.assert_array_equal(visited, order[: scans - scans % (batch_size * world_size)])


@settings(max_examples=200, deadline=None)
@given(SCANS, BATCH_SIZES, WORLD_SIZES, st.booleans(), st.integers(0, 70))
def test_an_epoch_is_done_when_no_batch_follows(scans, batch_size, world_size, drop_last, start):
    sampling = Sampling(np.arange(scans), batch_size=batch_size, world_size=world_size, drop_last=drop_last)
    assert sampling.is_done(start) == (not list(sampling.batches(0, start)))


@settings(max_examples=100, deadline=None)
@given(SCANS, st.integers(0, 2**63), st.integers(0, 1000))
def test_a_shuffled_epoch_is_a_permutation(scans, seed, epoch):
    rows = np.arange(scans) * 3
    order = epoch_order(rows, shuffle=True, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == rows.tolist()
    np.testing.assert_array_equal(order, epoch_order(rows, shuffle=True, seed=seed, epoch=epoch))
    np.testing.assert_array_equal(rows, np.arange(scans) * 3)  # the caller's array is left alone
    np.testing.assert_array_equal(epoch_order(rows, shuffle=False, seed=seed, epoch=epoch), rows)


@pytest.mark.parametrize("how", ["shuffle", "weights", "strata"])
def test_orders_differ_by_seed_and_by_epoch(how):
    options = {"shuffle": {}, "weights": {"weights": np.ones(40)}, "strata": {"strata": np.arange(40) % 3}}[how]
    orders = {
        tuple(epoch_order(np.arange(40), shuffle=True, seed=seed, epoch=epoch, **options).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_a_permutation_takes_every_row_to_every_place():
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), epoch_order(np.arange(5), shuffle=True, seed=1, epoch=epoch)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 16 + 5 * np.sqrt(2 * 16)  # 16 degrees of freedom


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_stretches_of_a_stratified_epoch_have_the_strata_in_proportion(data):
    strata = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=120)))
    scans, seed = len(strata), data.draw(st.integers(0, 1000))
    order = epoch_order(np.arange(scans), shuffle=True, seed=seed, epoch=0, strata=strata)
    assert sorted(order.tolist()) == list(range(scans))
    labels = np.unique(strata)
    for label in labels:
        share = float((strata == label).mean())
        # How far the scans up to each place are off their number in proportion. Of a stretch between any two places it
        # is the difference. One scan, or of three strata and more what the others are off, too.
        off = np.concatenate([[0], np.cumsum(strata[order] == label)]) - share * np.arange(scans + 1)
        assert off.max() - off.min() <= 1 + share * max(0, len(labels) - 2) + 1e-9


def test_batches_of_two_strata_differ_by_one_scan_at_most():
    sick = np.arange(1000) % 4 == 0
    for epoch in range(20):
        order = epoch_order(np.arange(1000), shuffle=True, seed=0, epoch=epoch, strata=sick)
        for plan in plan_batches(order, batch_size=16):
            assert abs(sick[plan.rows].sum() - len(plan.rows) / 4) <= 1


def test_members_of_a_stratum_change_places():
    strata = np.repeat([0, 1], [30, 10])
    orders = [epoch_order(np.arange(40), shuffle=True, seed=0, epoch=epoch, strata=strata) for epoch in range(200)]
    first_sick = {int(order[strata[order] == 1][0]) for order in orders}
    assert first_sick == set(range(30, 40))
    assert len({int(np.flatnonzero(strata[order] == 1)[0]) for order in orders}) > 2  # nor is the pattern the same


def test_scans_are_drawn_in_proportion_to_their_weights():
    weights = np.array([0.0, 1, 2, 3, 0, 10, 0])
    drawn = [epoch_order(np.arange(7), shuffle=True, seed=0, epoch=e, weights=weights) for e in range(3000)]
    assert all(len(order) == 7 for order in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=7)
    assert not counts[weights == 0].any()
    expected = counts.sum() * weights / weights.sum()
    there = weights > 0
    chi_square = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert chi_square < 3 + 5 * np.sqrt(2 * 3)  # 3 degrees of freedom


class LargestDraw:
    """A generator that draws the largest number below 1, which meets every bound that rounding left below it."""

    def random(self, size: int) -> np.ndarray:
        return np.full(size, np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("seed", range(30))
def test_rounding_never_draws_a_scan_of_weight_zero(monkeypatch, seed):
    weights = np.append(np.random.default_rng(seed).random(50), 0.0)
    monkeypatch.setattr(np.random, "default_rng", lambda _: LargestDraw())
    order = epoch_order(np.arange(51), shuffle=True, seed=0, epoch=0, weights=weights)
    assert (order == 49).all()


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300, 1e308])
def test_weights_may_be_tiny_or_huge(scale):
    weights = np.array([1.0, 1, 1, 0]) * scale
    drawn = np.concatenate(
        [epoch_order(np.arange(4), shuffle=True, seed=0, epoch=e, weights=weights) for e in range(9)]
    )
    assert set(drawn.tolist()) == {0, 1, 2}


def test_an_empty_epoch_has_no_batches():
    for options in ({}, {"weights": np.empty(0)}, {"strata": np.empty(0, np.int64)}):
        sampling = Sampling(np.empty(0, np.int64), shuffle=True, **options)
        assert len(sampling) == 0
        assert list(sampling.batches(0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2, expected 0 <= rank < world_size"),
        ({"rank": -1}, "rank is -1 of world_size 1"),
        ({"rank": 0, "world_size": 0}, "rank is 0 of world_size 0"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(np.arange(3), **arguments)


def test_identity_is_that_of_the_order_and_not_of_batches_or_ranks():
    rows = np.arange(6)
    same = Sampling(rows, shuffle=True, seed=3).identity()
    assert Sampling(rows, True, 3, batch_size=2, rank=1, world_size=2, drop_last=True).identity() == same
    assert Sampling(rows.astype(np.int32), True, np.int64(3)).identity() == same
    assert json.loads(json.dumps(Sampling(rows, np.True_, np.int64(3)).identity())) == same
    others = [
        Sampling(rows, True, 4),
        Sampling(rows, False, 3),
        Sampling(rows[::-1], True, 3),
        Sampling(rows[:5], True, 3),
        Sampling(rows, True, 3, weights=np.ones(6)),
        Sampling(rows, True, 3, weights=np.arange(6.0)),
        Sampling(rows, True, 3, strata=rows % 2),
        Sampling(rows, True, 3, strata=rows % 3),
    ]
    identities = [tuple(other.identity().values()) for other in others]
    assert len({*identities, tuple(same.values())}) == len(others) + 1
