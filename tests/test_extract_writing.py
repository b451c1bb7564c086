"""While a block of embeddings is written the network goes on, and processes agree on how many scans it gets."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_store import make_store

import extract.resume
from extract import Encoder, build_encoder, open_embeddings
from extract.blocks import parts_path
from extract.distributed import Group
from extract.resume import _fitting_all, _Plan, extract_to
from ingest.errors import StoreError
from ingest.store import open_store

SCANS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("writing") / "s.zarr"
    make_store(path, SCANS)
    return path


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(weights="random", scale=0.25, view="axial", slices=1, device="cpu")


def test_the_network_does_not_wait_for_the_disk(store, encoder, tmp_path, monkeypatch):
    write = extract.resume.write_block
    encoded = threading.Semaphore(0)
    blocks: list[int] = []

    def slow(parts: Path, number: int, *rest: Any) -> None:
        blocks.append(number)
        if number < 2:  # of three: as slow as the network is with the next block
            for _ in range(8):
                assert encoded.acquire(timeout=60), "nothing was encoded while this block was written"
        write(parts, number, *rest)

    monkeypatch.setattr(extract.resume, "write_block", slow)
    seen = 0

    def on_batch(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen > 8:  # the first block's are before any is written
            encoded.release()

    extract_to(tmp_path / "e.npz", store, encoder, batch_size=1, on_batch=on_batch)
    assert blocks == [0, 1, 2]
    monkeypatch.undo()
    extract_to(tmp_path / "same.npz", store, encoder, batch_size=1)
    assert np.array_equal(open_embeddings(tmp_path / "e.npz").features, open_embeddings(tmp_path / "same.npz").features)


@pytest.mark.parametrize("at", [0, 2])
def test_a_block_that_cannot_be_written_ends_the_run(store, encoder, tmp_path, monkeypatch, at):
    write = extract.resume.write_block

    def full(parts: Path, number: int, *rest: Any) -> None:
        if number == at:
            raise StoreError("no room")
        write(parts, number, *rest)

    monkeypatch.setattr(extract.resume, "write_block", full)
    with pytest.raises(StoreError, match="no room"):
        extract_to(tmp_path / "e.npz", store, encoder, batch_size=1)
    assert parts_path(tmp_path / "e.npz").is_dir()
    assert not (tmp_path / "e.npz").exists()


class Others(Group):
    """A process of two, of which the other can take 3 scans."""

    def gather_all(self, what: Any) -> list[Any]:
        return [what, 3]


@pytest.mark.parametrize(
    ("before", "device", "expected"),
    [(0, "cpu", 3), (0, "cuda", 3), (2, "cuda", 2), (5, "cuda", 3), (5, "cpu", 5)],
)
def test_all_processes_take_as_many_scans_as_fit_everywhere(store, encoder, monkeypatch, before, device, expected):
    monkeypatch.setattr(extract.resume, "fitting_batch_size", lambda *given: min(8, given[-1]))
    plan = _Plan(np.arange(20), before, 0, {})
    there = replace(encoder, device=torch.device(device))
    assert _fitting_all(plan, open_store(store), there, "torch", Others(0, 2)) == expected


def test_few_scans_that_are_left_do_not_make_batches_small(store, encoder, monkeypatch):
    monkeypatch.setattr(extract.resume, "fitting_batch_size", lambda *given: min(256, given[-1]))
    there = replace(encoder, device=torch.device("cuda"))
    assert _fitting_all(_Plan(np.arange(3), 64, 0, {}), open_store(store), there, "torch", Group()) == 64
    assert _fitting_all(_Plan(np.arange(3), 0, 0, {}), open_store(store), there, "torch", Group()) == 3


def test_volumes_are_not_inflated_beside_a_3d_network(store, monkeypatch):
    asked = []

    def note(*_: object, backend: str, **__: object) -> None:
        asked.append(backend)
        raise StoreError("seen")

    monkeypatch.setattr("extract.run.open_loader", note)
    for model, backend in (("r3d_18", "auto"), ("r3d_18", "dali"), ("resnet18", "auto")):
        encoder = build_encoder(model, weights="random", device="cpu")
        with pytest.raises(StoreError, match="seen"):
            extract.extract(store, encoder, backend=backend, batch_size=1)
    assert asked == ["torch", "dali", "auto"]
