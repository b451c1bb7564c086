"""How many scans a network gets at a time: few on a CPU, as many as go into the memory of a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_store import SHAPE

from extract import build_encoder, fast
from extract.fast import batch_size_for, choose_batch_size
from loaders.views import plan_picture


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
    monkeypatch.setattr(type(encoder), "__call__", lambda self, scan, **_: tried.append((self.compiled, scan.shape)))
    assert choose_batch_size(encoder, plan_picture(shape, 1)) == expected
    assert tried == [(None, (1, *shape))]


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
