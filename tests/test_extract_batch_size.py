"""How many scans a network gets at a time: few on a CPU, as many as go into the memory of a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import SHAPE, make_store

from extract import Encoder, build_encoder, fast
from extract.fast import Numbers, batch_size_for, choose_batch_size
from ingest.store import open_store
from loaders import opening
from loaders.opening import room_to_inflate
from loaders.slots import MOST_SLABS
from loaders.views import plan_picture


@pytest.fixture
def store_of_volumes(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", 2)
    return tmp_path / "s.zarr"


@pytest.mark.parametrize(
    ("free", "per_scan", "expected"),
    [(10_000, 1000, 7), (10_000, 100_000, 1), (0, 1, 1), (80 << 30, 1 << 20, 256), (80 << 30, 0, 256)],
)
def test_as_many_scans_as_go_into_memory(free, per_scan, expected):
    assert batch_size_for(free, per_scan) == expected


def test_a_cpu_takes_few_scans():
    encoder = build_encoder(weights="random", device="cpu")
    assert choose_batch_size(encoder, plan_picture(SHAPE, 1, "triplanar")) == fast.CPU_SCANS
    encoder = build_encoder("r3d_18", weights="random", device="cpu")
    assert choose_batch_size(encoder, plan_picture(SHAPE, 1)) == fast.CPU_VOLUMES


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, 7), (1 << 40, 27), (1 << 20, 1)])
def test_one_scan_is_tried_on_a_gpu(monkeypatch, free, expected):
    """With a GPU that is made up: the trial takes 80 MB."""
    shape = (160, 192, 160)
    encoder = build_encoder(weights="random", device="cpu")
    tried = []
    zeros = torch.zeros
    numbers = {"memory_allocated": 5_000_000, "max_memory_allocated": 85_000_000, "mem_get_info": (free, 1 << 41)}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, **_: zeros(size, dtype=dtype))
    encoder = replace(encoder, device=torch.device("cuda"), compiled=lambda _: pytest.fail("compiled"))

    def call(self: Encoder, scan: torch.Tensor, **_: object) -> None:
        tried.append((self.compiled, scan.shape))
        torch.mm(torch.empty(16 * scan.numel(), 1, device="meta"), torch.empty(1, 1, device="meta"))

    monkeypatch.setattr(Encoder, "__call__", call)
    assert choose_batch_size(encoder, plan_picture(shape, 1)) == expected
    assert tried == [(None, (1, *shape))]
    assert choose_batch_size(encoder, plan_picture(shape, 1), held=free) == 1


@pytest.mark.parametrize(
    ("model", "settings", "per_voxel"),
    [
        ("r3d_18", {}, 16),  # 64 channels, at half the rows and columns
        ("r2plus1d_18", {}, 36),  # 144 channels there
        ("resnet18", {"view": "axial", "slices": 2}, 16),
        ("resnet18", {"view": "axial", "slices": 2, "size": (64, 96)}, 64),
    ],
)
def test_the_largest_tensor_is_found(model, settings, per_voxel):
    encoder = build_encoder(model, weights="random", device="cpu", **settings)
    scans = torch.zeros((2, 8, 32, 48), dtype=torch.uint8)
    voxels = scans[:, : encoder.slices if encoder.view != "volume" else None].numel()
    with Numbers(scans.numel()) as numbers:
        encoder(scans)
    assert numbers.most == per_voxel * voxels


def test_a_picture_that_is_made_small_may_be_the_largest():
    encoder = build_encoder("r3d_18", weights="random", device="cpu", scale=0.25)
    scans = torch.zeros((1, 64, 64, 64), dtype=torch.uint8)
    with Numbers(scans.numel()) as numbers:
        encoder(scans)
    assert numbers.most == scans.numel()


def test_what_is_inflated_takes_memory_and_has_limits(store_of_volumes, monkeypatch):
    store = open_store(store_of_volumes)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(opening, "choose_backend", lambda backend, *_: (backend, gpu))
    volume = plan_picture(store.grid.shape_zyx, store.slab)
    raw = int(np.prod(store.grid.shape_zyx))
    assert room_to_inflate(store, volume, "torch", gpu) == (sys.maxsize, 0)
    most, held = room_to_inflate(store, volume, "dali", gpu)
    assert most == MOST_SLABS // len(volume.slabs)
    assert 5 * raw < held < 6 * raw
    axial = plan_picture(store.grid.shape_zyx, store.slab, "axial", 1)
    assert room_to_inflate(store, axial, "dali", gpu)[1] < held / 2, "of which one slab is inflated"


@pytest.mark.gpu
def test_the_batch_fills_the_memory_of_a_gpu_and_no_more():
    encoder = build_encoder("r3d_18", weights="random", device="cuda")
    shape = (160, 192, 160)
    batch_size = choose_batch_size(encoder, plan_picture(shape, 1))
    assert 1 <= batch_size <= fast.MOST_SCANS
    volumes = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, device="cuda")
    alone = encoder(volumes)
    for features in encoder(volumes.expand(batch_size, *shape)):  # the last as the first: no index has overflowed
        torch.testing.assert_close(features, alone[0], rtol=0.05, atol=0.02)
