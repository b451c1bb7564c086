"""The memory of a batch is used again as soon as nobody holds it, in whatever way, and never before."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_store import make_store

from ingest.store import VolumeStore, open_store
from loaders import open_loader
from loaders.batches import BatchPool

BACKENDS = ["torch", "dali"]
DTYPES = ["uint8", "float32", "float16", "bfloat16"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> VolumeStore:
    path = tmp_path_factory.mktemp("memory") / "s.zarr"
    make_store(path, 5)
    return open_store(path)


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda images: images,
    "a part": lambda images: images[:, -1:],
    "another shape": lambda images: images.movedim(-1, 1).flatten(2)[..., 3:],
    "its bits": lambda images: images.view(torch.uint8),
    "numpy": lambda images: images.numpy() if images.dtype is not torch.bfloat16 else images.view(torch.int16).numpy(),
    "a part of numpy": lambda images: images.view(torch.uint8).numpy()[1:, ::2].T,
    "its memory": lambda images: memoryview(images.view(torch.uint8).numpy()),
    "dlpack": lambda images: torch.from_dlpack(torch.utils.dlpack.to_dlpack(images)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [None, 3])
def test_memory_is_not_used_again_while_somebody_holds_it(store, backend, dtype, channels):
    settings: dict[str, Any] = {"dtype": dtype, "channels": channels, "view": "volume"}
    with open_loader(store, batch_size=2, shuffle=True, backend=backend, threads=2, **settings) as loader:
        held: list[tuple[str, Any, bytes]] = []
        for number, batch in enumerate(itertools.chain(loader, loader, loader)):
            name = list(HOLDERS)[number % len(HOLDERS)]
            images = batch.images if channels is None else batch.images[:, 1]
            holder = HOLDERS[name](images)
            held.append((name, holder, content(holder)))
            del batch, images, holder
        assert len(held) >= len(HOLDERS)
        gc.collect()
        for _ in itertools.chain(loader, loader, loader):
            for name, holder, before in held:
                assert content(holder) == before, name


def content(holder: Any) -> bytes:
    if isinstance(holder, torch.Tensor):
        return holder.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(holder.tobytes())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_used_again_when_nobody_holds_it(store, backend, dtype, monkeypatch):
    allocated: list[int] = []
    allocate = BatchPool._allocate

    def note(pool: BatchPool) -> np.ndarray:
        memory = allocate(pool)
        allocated.append(memory.ctypes.data)  # its address: who keeps the memory itself, keeps it from being used
        return memory

    monkeypatch.setattr(BatchPool, "_allocate", note)
    with open_loader(store, batch_size=1, backend=backend, dtype=dtype, threads=2) as loader:
        addresses = set()
        for batch in itertools.chain(*[loader] * 6):
            addresses.add(batch.images.data_ptr())
    assert 1 <= len(allocated) <= 5
    if backend == "torch":  # DALI copies batches to memory of its own
        assert addresses == set(allocated)
