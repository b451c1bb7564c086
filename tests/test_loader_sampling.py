"""Loaders on a store: which scans, in what order, shared by ranks, and exactly the rest of them after a stop."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_store import make_store

from ingest.store import VolumeStore, open_store, rows_of, write_phenotypes, write_scans
from loaders import Augmentation, Batch, Loader, open_loader
from loaders.select import balancing_weights, select_rows, strata_of

SCANS = 26
BAD = (4, 17)
OK = [row for row in range(SCANS) if row not in BAD]
BACKENDS = ["torch", "dali"]
SAMPLINGS = {
    "in order": {},
    "shuffle": {"shuffle": True, "seed": 3},
    "weights": {"weights": np.arange(len(OK)) % 4, "seed": 4},
    "balance": {"balance": "site", "seed": 5},
    "stratify": {"shuffle": True, "stratify": "sex", "seed": 6},
}


@pytest.fixture(scope="module")
def voxels(tmp_path_factory) -> np.ndarray:
    return make_store(tmp_path_factory.mktemp("same") / "s.zarr", SCANS, bad=BAD)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Return a store with phenotypes: age 50 and up, sex 0 and 1, site 1 to 3 (few of 3), and gaps in age."""
    path = tmp_path_factory.mktemp("sampling") / "s.zarr"
    make_store(path, SCANS, bad=BAD)
    row = np.arange(SCANS)
    rows = rows_of(open_store(path).scans)
    write_scans(path, [dataclasses.replace(scan, session=str(2 + i % 2)) for i, scan in enumerate(rows)])
    age = np.where(np.isin(row, [2, 9, 11]), np.nan, 50.0 + row)
    site = np.where(row < 12, 1.0, np.where(row < 22, 2.0, 3.0))
    write_phenotypes(path, pd.DataFrame({"age": age, "sex": row % 2, "site": site, "1st": row}), {})
    return path


@pytest.fixture(scope="module")
def store(path) -> VolumeStore:
    return open_store(path)


def visited(batches: list[Batch]) -> list[int]:
    """Return the rows that count."""
    return [int(row) for batch in batches for row in batch.rows[batch.valid]]


def visited_by_ranks(store: VolumeStore, world_size: int, state: dict | None = None, **options) -> list[int]:
    """Return what ranks visit in a pass, step by step."""
    passes = []
    for rank in range(world_size):
        with open_loader(store, rank=rank, world_size=world_size, backend="torch", threads=1, **options) as loader:
            if state is not None:
                loader.load_state_dict(state)
            passes.append(list(loader))
    assert len({len(batches) for batches in passes}) == 1
    return [row for step in zip(*passes, strict=True) for row in visited(list(step))]


def whole_pass(store: VolumeStore, epoch: int = 0, **options) -> list[int]:
    """Return the rows of a pass, in order."""
    with open_loader(store, backend="torch", threads=1, **options) as loader:
        loader.epoch = epoch
        return visited(list(loader))


# ---------------------------------------------------------------------------------------------- the order of a loader


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_order_is_the_same_for_any_backend_threads_batches_and_ranks(store, voxels, options):
    expected = whole_pass(store, **options)
    for backend, threads, batch_size in [("torch", 3, 7), ("dali", 2, 5), ("dali", 1, 16)]:
        with open_loader(store, backend=backend, threads=threads, batch_size=batch_size, **options) as loader:
            batches = list(loader)
        assert len(batches) == len(loader)
        assert visited(batches) == expected
        for batch in batches:
            np.testing.assert_array_equal(batch.images.numpy(), voxels[batch.rows])
            assert batch.participant == [f"p{row}" for row in batch.rows]
    for world_size, batch_size in [(2, 4), (3, 3)]:
        assert visited_by_ranks(store, world_size, batch_size=batch_size, **options) == expected
    if "weights" in options or "balance" in options:
        assert len(expected) == len(OK)
    else:
        assert sorted(expected) == OK
    assert (whole_pass(store, epoch=1, **options) != expected) == (options != {})


def test_each_pass_is_the_next_epoch_and_may_be_repeated(store):
    with open_loader(store, shuffle=True, seed=3, backend="torch") as loader:
        passes = [visited(list(loader)) for _ in range(3)]
        loader.epoch = 1
        assert visited(list(loader)) == passes[1]
    assert passes == [whole_pass(store, epoch=epoch, shuffle=True, seed=3) for epoch in range(3)]
    assert len({tuple(order) for order in passes}) == 3
    assert all(sorted(order) == OK for order in passes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_marked_and_holds_what_it_says(store, voxels, backend):
    counts = []
    for rank in range(5):
        with open_loader(store, batch_size=2, rank=rank, world_size=5, backend=backend, threads=1) as loader:
            *full, last = list(loader)  # 24 scans: 2 steps of 10, then 4 for 5 ranks
        assert all(batch.valid.all() and len(batch.rows) == 2 for batch in full)
        counts.append((len(full), len(last.rows), int(last.valid.sum())))
        for batch in [*full, last]:
            assert len(batch.rows) == len(batch.participant) == len(batch.images) == len(batch.valid)
            np.testing.assert_array_equal(batch.images.numpy(), voxels[batch.rows])
            assert batch.participant == [f"p{row}" for row in batch.rows]
    assert counts == [(2, 1, 1)] * 4 + [(2, 1, 0)]


def test_drop_last_leaves_out_what_does_not_fill_a_batch_on_every_rank(store):
    assert visited_by_ranks(store, 2, batch_size=5, drop_last=True) == OK[:20]
    assert visited_by_ranks(store, 2, batch_size=6, drop_last=True) == OK
    assert visited_by_ranks(store, 2, batch_size=13, drop_last=True) == []


# ------------------------------------------------------------------------------------------------- stopping, going on


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


# ------------------------------------------------------------------------------------------------------- augmentation


def pictures(loader: Loader) -> dict[int, torch.Tensor]:
    """Return the pictures of what is left of a pass by row."""
    return {int(row): image.clone() for batch in loader for row, image in zip(batch.rows, batch.images, strict=True)}


def test_an_augmented_scan_is_the_same_for_any_batch_rank_backend_and_after_a_stop(store):
    options = {
        "dtype": "float32", "mean": 0.2, "std": 0.3, "augmentation": Augmentation(noise=0.1, flip=0.5),
        "shuffle": True, "seed": 5, "threads": 1,
    }  # fmt: skip
    with open_loader(store, batch_size=9, backend="torch", **options) as loader:
        expected, other_epoch = pictures(loader), pictures(loader)
    assert sorted(expected) == OK
    assert not any(torch.equal(expected[row], other_epoch[row]) for row in OK)

    def check(found: dict[int, torch.Tensor]) -> None:
        assert all(torch.equal(image, expected[row]) for row, image in found.items())

    for backend, world_size, batch_size in [("dali", 1, 9), ("torch", 1, 4), ("torch", 2, 6)]:
        found = {}
        for rank in range(world_size):
            with open_loader(
                store, batch_size=batch_size, backend=backend, rank=rank, world_size=world_size, **options
            ) as loader:
                found.update(pictures(loader))
        assert sorted(found) == OK
        check(found)
    with open_loader(store, batch_size=5, backend="torch", **options) as loader:
        next(iter(loader))
        state = loader.state_dict()
    with open_loader(store, batch_size=3, backend="torch", **options) as loader:
        loader.load_state_dict(state)
        found = pictures(loader)
    assert len(found) == len(OK) - 5
    check(found)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_planes_of_augmented_volumes_are_those_of_the_whole(store, backend):
    options = {"dtype": "float32", "augmentation": Augmentation(), "batch_size": 4, "backend": backend, "threads": 1}
    planes = [np.array([1, 5]), np.array([0]), np.array([2, 3])]
    with open_loader(store, **options) as loader:
        whole = pictures(loader)
    with open_loader(store, planes=planes, **options) as loader:
        found = pictures(loader)
    assert sorted(found) == OK
    for row, volume in found.items():
        for axis, index in enumerate(planes):
            cuts = [one.index_select(axis, torch.from_numpy(index)) for one in (volume, whole[row])]
            torch.testing.assert_close(*cuts, atol=2e-6, rtol=0)
        assert not volume[0, 1, 0], "what nobody looks at is not made"


# --------------------------------------------------------------------------------------------------------- which scans


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, OK),
        ({"rows": [9, 2, 2, 0]}, [9, 2, 2, 0]),
        ({"rows": range(3)}, [0, 1, 2]),
        ({"rows": []}, []),
        ({"rows": np.empty(0)}, []),
        ({"rows": np.array([7, 3], dtype=np.uint16)}, [7, 3]),
        ({"rows": pd.Series([5, 1])}, [5, 1]),
        ({"rows": np.arange(SCANS) < 6}, [0, 1, 2, 3, 5]),  # a mask leaves out what holds no volume
        ({"rows": [False] * SCANS}, []),
        ({"known": ["age"]}, [row for row in OK if row not in (2, 9, 11)]),
        ({"known": ["sex", "age"], "rows": [9, 8, 2, 1]}, [8, 1]),
        ({"where": "age >= 70"}, [row for row in OK if row >= 20]),
        ({"where": "age >= 70 and sex == 1 and session == '3'"}, [21, 23, 25]),
        ({"where": "participant in ['p3', 'p4', 'p5']"}, [3, 5]),
        ({"where": "site == 3 or age < 52"}, [0, 1, 22, 23, 24, 25]),
        ({"where": "`1st` == 7"}, [7]),
        ({"where": "age > 1000"}, []),
        ({"where": "sex == 1", "rows": [9, 8, 3, 2]}, [9, 3]),
        ({"where": "sex == 1", "rows": np.arange(SCANS) < 4, "known": ["age"]}, [1, 3]),
    ],
)
def test_rows_are_selected(store, arguments, expected):
    selected = select_rows(store, **arguments)
    assert selected.tolist() == expected
    assert selected.dtype == np.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [0, 17]}, IndexError, "row 17 holds no volume: its status is bad_nifti; use rows with status ok"),
        ({"rows": [SCANS]}, IndexError, "row 26 is not in the store, which has rows 0 to 25"),
        ({"rows": [0, -1]}, IndexError, "row -1 is not in the store"),
        ({"rows": np.ones(5, bool)}, ValueError, r"the mask of rows has shape \(5,\), expected \(26,\)"),
        ({"rows": [1.0, 2.5]}, ValueError, "rows are float64, expected whole numbers, or a mask of bool"),
        ({"rows": pd.Series([True] * SCANS, dtype=object)}, ValueError, "rows are object, expected whole numbers"),
        ({"rows": ["p1"]}, ValueError, "rows are <U2, expected whole numbers"),
        ({"known": ["iq"]}, ValueError, "the store has no phenotype 'iq'; it has 1st, age, sex, site"),
        (
            {"where": "iq > 1"},
            ValueError,
            "'iq > 1' cannot be evaluated: name 'iq' is not defined; columns are brain_voxels, .*, sex, site",
        ),
        ({"where": "age >"}, ValueError, "'age >' cannot be evaluated: invalid syntax"),
        ({"where": "participant > 3"}, ValueError, "'participant > 3' cannot be evaluated: .*; columns are"),
        ({"where": ""}, ValueError, "'' cannot be evaluated"),
        ({"where": "age + 1"}, ValueError, "'age \\+ 1' is not true or false for each scan; for example: age >= 60"),
        ({"where": "1 < 2"}, ValueError, "'1 < 2' is not true or false for each scan"),
        ({"where": "old = age > 60"}, ValueError, "'old = age > 60' is not true or false for each scan"),
    ],
)
def test_selections_that_cannot_be_are_refused(store, arguments, error, message):
    with pytest.raises(error, match=message):
        select_rows(store, **arguments)


def test_a_loader_of_selected_scans_has_those(store, voxels):
    with open_loader(store, where="sex == 1", known=["age"], batch_size=100, backend="torch") as loader:
        (batch,) = loader
    assert batch.rows.tolist() == [row for row in OK if row % 2 and row not in (9, 11)]
    np.testing.assert_array_equal(batch.images.numpy(), voxels[batch.rows])
    with open_loader(store, where="age > 1000", shuffle=True, stratify="sex", backend="torch") as loader:
        assert len(loader) == len(list(loader)) == 0
        assert loader.state_dict()["position"] == 0


# ------------------------------------------------------------------------------------ strata, weights, what is refused


def test_strata_are_the_values_or_quantiles_and_missing_values_are_one():
    nan = np.nan
    assert strata_of(np.array([7.0, nan, 3, 7, nan])).tolist() == [1, -1, 0, 1, -1]
    assert strata_of(np.array([nan, nan])).tolist() == [-1, -1]
    assert strata_of(np.empty(0)).tolist() == []
    assert strata_of(np.arange(10.0)).tolist() == list(range(10))
    values = np.random.default_rng(0).permutation(1000.0 + np.arange(200))
    values[:20] = nan
    labels = strata_of(values)
    assert np.bincount(labels + 1).tolist() == [20] + [18] * 10
    assert all(values[labels == a].max() < values[labels == a + 1].min() for a in range(9))
    assert np.unique(strata_of(np.arange(30.0), bins=3)).tolist() == [0, 1, 2]
    many_zeros = strata_of(np.concatenate([np.zeros(100), np.arange(1.0, 21)]))
    assert len(np.unique(many_zeros[:100])) == 1
    assert np.unique(many_zeros[100:]).size > 1


def test_balancing_weights_make_every_stratum_as_likely():
    values = np.array([1.0, 1, 1, 1, 2, np.nan, np.nan, 3])
    weights = balancing_weights(values)
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25, 1, 0.5, 0.5, 1]
    values = np.random.default_rng(0).exponential(size=1000)
    weights, labels = balancing_weights(values), strata_of(values)
    np.testing.assert_allclose([weights[labels == label].sum() for label in range(10)], 1)


def test_a_balanced_loader_draws_each_site_as_often(store):
    site = store.phenotypes["site"].to_numpy()
    with open_loader(store, balance="site", batch_size=100, view="axial", slices=1, backend="torch") as loader:
        drawn = np.concatenate([batch.rows for _ in range(60) for batch in loader])
    counts = np.bincount(site[drawn].astype(int))[1:]
    expected = len(drawn) / 3
    assert ((counts - expected) ** 2 / expected).sum() < 2 + 5 * 2  # 2 degrees of freedom
    assert set(drawn) == set(OK)


def test_a_loader_with_weights_draws_in_proportion_and_those_of_weight_zero_never(store):
    weights = np.arange(len(OK)) % 4
    with open_loader(store, weights=weights, batch_size=100, view="axial", slices=1, backend="torch") as loader:
        drawn = np.concatenate([batch.rows for _ in range(60) for batch in loader])
    per_weight = np.bincount(weights[np.searchsorted(OK, drawn)], minlength=4)
    assert per_weight[0] == 0
    expected = len(drawn) * np.arange(1, 4) / 6
    assert ((per_weight[1:] - expected) ** 2 / expected).sum() < 2 + 5 * 2  # 2 degrees of freedom


def test_stratified_batches_have_each_sex_in_proportion(store):
    sex = store.phenotypes["sex"].to_numpy()
    share = sex[OK].mean()
    with open_loader(store, shuffle=True, stratify="sex", batch_size=5, backend="torch") as loader:
        for _ in range(3):
            batches = list(loader)
            assert sorted(visited(batches)) == OK
            assert all(abs(sex[batch.rows].sum() - share * len(batch.rows)) <= 1 for batch in batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 weights were given for 24 rows, expected one for each"),
        ({"weights": np.ones(SCANS)}, "26 weights were given for 24 rows"),
        ({"weights": [-1.0] + [1.0] * 23}, "weights must be finite, not negative, and not all zero"),
        ({"weights": [np.nan] + [1.0] * 23}, "weights must be finite"),
        ({"weights": [np.inf] + [1.0] * 23}, "weights must be finite"),
        ({"weights": np.zeros(24)}, "not all zero"),
        ({"weights": np.ones(24), "balance": "sex"}, "weights, balance and stratify exclude one another"),
        ({"balance": "sex", "stratify": "sex", "shuffle": True}, "exclude one another; give one of them"),
        ({"stratify": "sex"}, "stratify orders a shuffled epoch; it needs shuffle=True"),
        ({"stratify": "iq", "shuffle": True}, "the store has no phenotype 'iq'; it has 1st, age, sex, site"),
        ({"balance": "iq"}, "the store has no phenotype 'iq'"),
        ({"where": "iq > 1"}, "'iq > 1' cannot be evaluated"),
        ({"known": ["iq"]}, "the store has no phenotype 'iq'"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"rank": 1}, "rank is 1 and world_size None, expected both or neither"),
        ({"world_size": 2}, "rank is None and world_size 2, expected both or neither"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"on_error": "ignore"}, "on_error is 'ignore', expected raise or skip"),
        ({"deadline": 0}, "deadline is 0, expected a number of seconds above 0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"threads": 0}, "threads is 0, expected 1 or more"),
        ({"cache_bytes": 1000}, "a cache needs both cache_dir and cache_bytes"),
        ({"cache_dir": "somewhere"}, "a cache needs both"),
        ({"backend": "numpy"}, "backend 'numpy' is unknown, expected one of auto, dali, torch"),
        ({"device": "meta"}, "device is meta, expected cpu or cuda"),
        ({"view": "triplanar"}, "load volumes and cut them with loaders.slices_of"),
        ({"dtype": "float64"}, "dtype is float64, expected one of uint8, float32"),
        ({"augmentation": Augmentation()}, "uint8 pictures are not augmented"),
        ({"mean": 0.5}, "uint8 pictures are not normalised"),
        ({"channels": 2}, "channels is 2, expected None, 1 or 3"),
    ],
)
def test_settings_that_cannot_be_are_refused(store, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_loader(store, **arguments)


def test_a_store_without_phenotypes_says_so(tmp_path):
    make_store(tmp_path / "s.zarr", 3)
    with pytest.raises(ValueError, match="the store has no phenotype 'age'; it has none"):
        open_loader(tmp_path / "s.zarr", balance="age")
    assert select_rows(open_store(tmp_path / "s.zarr"), where="source == '1.nii.gz'").tolist() == [1]


# -------------------------------------------------------------------------------------------------- torch.distributed

RANK = """
import json, sys
import torch
from loaders import open_loader

store, meeting, rank, saved = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
with open_loader(store, batch_size=5, shuffle=True, seed=9, backend="torch", threads=1) as loader:
    report = {"of": [loader.sampling.rank, loader.sampling.world_size], "batches": len(loader), "rows": []}
    for batch in loader:
        sums = batch.images.long().sum()
        torch.distributed.all_reduce(sums)  # hangs unless every rank has as many batches
        report["rows"].append(batch.rows[batch.valid].tolist())
        if len(report["rows"]) == 1:
            report["state"] = loader.state_dict()
with open_loader(store, batch_size=2, shuffle=True, seed=9, backend="torch", threads=1) as loader:
    loader.load_state_dict(json.loads(saved))  # of a single process
    report["rest"] = [batch.rows[batch.valid].tolist() for batch in loader]
torch.distributed.destroy_process_group()
print(json.dumps(report))
"""


def test_ranks_of_a_process_group_share_each_pass(path, store, tmp_path):
    expected = whole_pass(store, shuffle=True, seed=9)
    with open_loader(store, batch_size=7, shuffle=True, seed=9, backend="torch") as loader:
        next(iter(loader))
        saved = json.dumps(loader.state_dict())
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(path), str(tmp_path / "meeting"), str(rank), saved],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1],
        )
        for rank in range(2)
    ]  # fmt: skip
    reports = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            reports.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    assert [report["of"] for report in reports] == [[0, 2], [1, 2]]
    assert [len(report["rows"]) for report in reports] == [report["batches"] for report in reports] == [3, 3]
    rows = [set(itertools.chain(*report["rows"])) for report in reports]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(OK)
    assert [
        row for step in zip(*(report["rows"] for report in reports), strict=True) for part in step for row in part
    ] == expected
    assert reports[0]["state"] == reports[1]["state"]
    assert [
        row for step in zip(*(report["rest"] for report in reports), strict=True) for part in step for row in part
    ] == expected[7:]
    assert visited_by_ranks(store, 1, reports[0]["state"], batch_size=4, shuffle=True, seed=9) == expected[10:]
