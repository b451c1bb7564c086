"""States of a loader: going on from one gives exactly the rest, and that of another order is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from sampled_store import OK, SAMPLINGS, visited, visited_by_ranks, whole_pass
from sampled_store import path as path  # a fixture
from sampled_store import store as store  # a fixture

from loaders import open_loader


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(("batch_size", "steps"), [(4, 0), (4, 1), (5, 3), (7, 4), (24, 1)])
def test_going_on_from_a_state_gives_the_rest_exactly(store, options, batch_size, steps):
    expected, following = whole_pass(store, epoch=1, **options), whole_pass(store, epoch=2, **options)
    with open_loader(store, batch_size=batch_size, backend="torch", **options) as loader:
        loader.epoch = 1
        done = visited(list(itertools.islice(loader, steps)))
        state = json.loads(json.dumps(loader.state_dict()))
    finished = len(done) == len(expected)
    rest = following if finished else expected[len(done) :]
    assert (state["epoch"], state["position"]) == ((2, 0) if finished else (1, len(done)))
    for world_size, other_size in [(1, batch_size), (1, 3), (2, 5), (3, 2)]:
        assert visited_by_ranks(store, world_size, state, batch_size=other_size, **options) == rest
    with open_loader(store, batch_size=3, backend="torch", **options) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert visited(list(loader)) == rest
        assert visited(list(loader)) == whole_pass(store, epoch=3 if finished else 2, **options)


def test_going_on_from_several_ranks_on_one(store):
    expected = whole_pass(store, shuffle=True, seed=7)
    done, states = [], []
    for rank in range(3):
        with open_loader(store, batch_size=2, rank=rank, world_size=3, shuffle=True, seed=7, backend="torch") as loader:
            done += visited(list(itertools.islice(loader, 2)))
            states.append(loader.state_dict())
    assert states[0] == states[1] == states[2]  # that of one rank is enough
    assert sorted(done) == sorted(expected[:12])
    assert visited_by_ranks(store, 1, states[0], batch_size=5, shuffle=True, seed=7) == expected[12:]


def test_states_at_the_ends_of_a_pass(store):
    with open_loader(store, batch_size=6, shuffle=True, seed=1, backend="torch") as loader:
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 0)
        places = []
        for _ in loader:
            state = loader.state_dict()
            places.append((state["epoch"], state["position"]))
        assert places == [(0, 6), (0, 12), (0, 18), (1, 0)]  # in the last batch nothing is left of the pass
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
        iterator = iter(loader)
        next(iterator)
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 6)
        del iterator  # the loop is broken off
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 6)
        assert visited(list(loader)) == whole_pass(store, epoch=2, shuffle=True, seed=1)
        assert loader.state_dict()["epoch"] == 3


def test_a_pass_whose_last_batch_is_there_is_done_with_drop_last_too(store):
    """Whoever counts batches, as Lightning does, does not ask for the one after the last."""
    with open_loader(store, batch_size=7, drop_last=True, shuffle=True, backend="torch") as loader:
        list(itertools.islice(loader, len(loader)))
        state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)


def test_a_state_of_which_no_batch_is_left_leads_to_the_next_pass(store):
    with open_loader(store, batch_size=4, shuffle=True, backend="torch") as loader:
        list(itertools.islice(loader, 5))
        state = loader.state_dict()
    assert state["position"] == 20
    with open_loader(store, batch_size=6, drop_last=True, shuffle=True, backend="torch") as loader:
        loader.load_state_dict(state)
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
        assert visited(list(loader)) == whole_pass(store, epoch=1, shuffle=True)


def test_another_epoch_after_loading_a_state_begins_at_its_start(store):
    with open_loader(store, batch_size=4, shuffle=True, backend="torch") as loader:
        list(itertools.islice(loader, 2))
        state = loader.state_dict()
        loader.load_state_dict(state)
        loader.epoch = 5
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (5, 0)
        assert visited(list(loader)) == whole_pass(store, epoch=5, shuffle=True)


def test_a_loader_goes_back_to_a_state_of_its_own(store):
    with open_loader(store, batch_size=4, shuffle=True, backend="torch") as loader:
        first = visited(list(itertools.islice(loader, 2)))
        state = loader.state_dict()
        list(loader)
        loader.load_state_dict(state)
        rest = visited(list(loader))
    assert first + rest == whole_pass(store, shuffle=True)


def test_numbers_of_numpy_do_not_get_into_the_state(store):
    with open_loader(
        store, batch_size=np.int64(4), shuffle=np.True_, seed=np.int64(2), rank=np.int64(0), world_size=np.int64(2),
        backend="torch",
    ) as loader:  # fmt: skip
        loader.epoch = np.int64(3)
        next(iter(loader))
        state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["epoch"], state["position"]) == (3, 8)
    assert {type(value) for value in state.values()} == {int, bool}  # torch.load(weights_only=True) takes them


def test_setting_the_epoch_gives_up_a_pass_that_was_left(store):
    with open_loader(store, batch_size=4, shuffle=True, backend="torch") as loader:
        next(iter(loader))
        loader.set_epoch(7)
        state = loader.state_dict()
        assert (state["epoch"], state["position"]) == (7, 0)
        expected = visited(list(loader))
        loader.load_state_dict(state)
        assert visited(list(loader)) == expected == whole_pass(store, epoch=7, shuffle=True)
        iterator = iter(loader)
        next(iterator)
        loader.epoch = 2
        next(iterator)  # that pass is under way after all
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (8, 8)
        assert loader.epoch == 2
        with pytest.raises(ValueError, match="epoch is -1, expected 0 or more"):
            loader.set_epoch(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": -5}, "the state's position is -5, expected 0 to 24"),
        ({"position": 25}, "the state's position is 25, expected 0 to 24"),
        ({"position": 1.5}, "the state's position is 1.5, expected a whole number, 0 to 24"),
        ({"epoch": -1}, "the state's epoch is -1, expected 0 or more"),
        ({"epoch": None}, "the state's epoch is None, expected a whole number"),
    ],
)
def test_a_state_of_no_place_is_refused(store, change, message):
    with open_loader(store, backend="torch", threads=1) as loader:
        state = loader.state_dict()
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict({**state, **change})
        (name,) = change
        del state[name]
        with pytest.raises(ValueError, match=f"the state's {name} is None, expected a whole number"):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, "saved with seed 1, this loader has 2; open it with the same rows, seed and sampling"),
        ({"shuffle": False}, "saved with shuffle True"),
        ({"rows": OK[:-1]}, "saved with scans 24, this loader has 23"),
        ({"rows": OK[::-1]}, "saved with digest"),
        ({"weights": np.ones(len(OK))}, "saved with digest"),
        ({"stratify": "sex"}, "saved with digest"),
    ],
)
def test_a_state_of_another_order_is_refused(store, options, message):
    with open_loader(store, shuffle=True, seed=1, backend="torch", threads=1) as loader:
        state = loader.state_dict()
    with open_loader(store, **{"shuffle": True, "seed": 1, "backend": "torch", "threads": 1, **options}) as loader:
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
        with pytest.raises(ValueError, match="state of version 2, expected 1"):
            loader.load_state_dict({**state, "version": 2})
        with pytest.raises(ValueError, match="state of version None, expected 1"):
            loader.load_state_dict({})
        assert (loader.epoch, loader.state_dict()["position"]) == (0, 0)  # as if nothing had been loaded
