"""Passes of a loader: the same scans in the same order, and augmented alike, for any backend, batches and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampled_store import OK, SAMPLINGS, visited, visited_by_ranks, whole_pass
from sampled_store import path as path  # a fixture
from sampled_store import store as store  # a fixture
from sampled_store import voxels as voxels  # a fixture

from loaders import Augmentation, Loader, open_loader

BACKENDS = ["torch", "dali"]


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
