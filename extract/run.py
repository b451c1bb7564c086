"""A store -> embeddings: load, encode, gather with identity, phenotypes and provenance."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from extract.embeddings import SCAN_COLUMNS, Embeddings
from extract.encoder import Encoder, describe
from extract.fast import choose_batch_size, memory_for, to_host
from extract.timing import ComputeClock, Timing
from extract.weights import about_store
from ingest.places import Place
from ingest.store import VolumeStore, open_store, package_versions
from loaders import open_loader
from loaders.opening import choose_backend, room_to_inflate
from loaders.select import select_rows
from loaders.views import Images, View, as_images, each, plan_picture


@dataclass(frozen=True)
class Encoded:
    """A batch of scans.

    Attributes
    ----------
    rows
        int64 (scan,), rows of the store.
    features
        float32 (scan, feature).
    skipped
        By row, why others of the batch were left out.
    """

    rows: np.ndarray
    features: np.ndarray
    skipped: dict[int, str]


def extract(
    store: str | Place,
    encoder: Encoder,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    backend: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    on_batch: Callable[[Timing], None] | None = None,
) -> Embeddings:
    """Embed the scans of a store in memory. For a file, of a store of any size, see `extract.resume.extract_to`.

    Parameters
    ----------
    store
        Path of the store.
    encoder
        See `extract.encoder.build_encoder`.
    rows
        Which scans, see `loaders.select.select_rows`; by default all that hold a volume.
    backend, threads
        See `loaders.open_loader`; but ``auto`` takes ``torch`` for whole volumes.
    batch_size
        Scans at a time; by default as many as are fast and go into the memory that is free.
    on_batch
        Called after each batch with where the time went so far.

    Raises
    ------
    ValueError
        If the store holds no volume, has fewer slices than are wanted, or features are no finite numbers.
    """
    volumes = open_store(store)
    rows = wanted_rows(volumes, rows)
    if batch_size is None:
        batch_size = fitting_batch_size(volumes, encoder, backend, len(rows))
    timing = Timing()
    batches = []
    for batch in encode(volumes, encoder, rows, batch_size=batch_size, backend=backend, threads=threads, timing=timing):
        batches.append(batch.features)
        if on_batch:
            on_batch(timing)
    return Embeddings(
        features=np.concatenate(batches),
        scans=scans_table(volumes, rows),
        phenotypes=volumes.phenotypes.iloc[rows].reset_index(drop=True),
        variables=volumes.variables,
        attrs=provenance(volumes, encoder, backend),
    )


def encode(
    volumes: VolumeStore,
    encoder: Encoder,
    rows: np.ndarray,
    *,
    batch_size: int,
    backend: str,
    threads: int | None,
    timing: Timing,
    on_error: str = "raise",
) -> Generator[Encoded]:
    """Yield the features of scans, batch after batch, in the order of `rows`.

    Parameters
    ----------
    rows
        int64 (scan,); the last batch may have fewer than `batch_size`.
    timing
        Is kept up to date.
    on_error
        See `loaders.open_loader`.

    Raises
    ------
    ValueError
        If features are no finite numbers; ShardError if a scan cannot be read. Neither of a scan that is to be
        skipped, unless it is so for all that a batch could read.
    """
    encoder.check(volumes.grid.shape_zyx)
    slices = encoder.slices_to_load(volumes.grid.shape_zyx)
    clock = ComputeClock(encoder.device, timing)
    begun = time.perf_counter()
    waiting: _Batch | None = None
    with ExitStack() as stack:
        stack.enter_context(memory_for(encoder.device))
        loader = stack.enter_context(open_loader(
            volumes, rows=rows, view=encoder.view, slices=slices, batch_size=batch_size,
            backend=_backend_for(encoder, backend), device=encoder.device, threads=threads, on_error=on_error,
            rank=0, world_size=1,
        ))  # fmt: skip
        batches = iter(loader)
        while True:
            with timing.adding("wait"):
                batch = next(batches, None)
            if batch is None:
                break
            images = batch.images
            if encoder.compiled and len(batch.rows) < batch_size:  # the last ones: for them nothing is compiled anew
                images = _filled(images, batch_size)
            with clock.running():
                features = encoder(images, cut=bool(slices))[: len(batch.rows)]
            reasons = {row: loader.skipped[row] for row in batch.rows[~batch.valid].tolist()}
            started = _Batch(batch.rows, *to_host(features), reasons)
            if waiting:  # a GPU is at work on this batch while the one before is written
                yield _finish(waiting, encoder, timing, skip=on_error == "skip")
            waiting = started
            timing.take(loader.timing)
            timing.elapsed = time.perf_counter() - begun
        if waiting:
            yield _finish(waiting, encoder, timing, skip=on_error == "skip")
        clock.settle()
        timing.elapsed = time.perf_counter() - begun


def _filled(images: Images, scans: int) -> Images:
    """Return pictures of so many scans, the last of which are black."""
    black = (one.new_zeros((scans - len(one), *one.shape[1:])) for one in each(images))
    return as_images(tuple(map(torch.cat, zip(each(images), black, strict=True))))


@dataclass(frozen=True)
class _Batch:
    """Features on their way to the host; they are there when `fetched` has happened, or already without one."""

    rows: np.ndarray
    features: torch.Tensor
    fetched: torch.cuda.Event | None
    skipped: dict[int, str]


def _finish(batch: _Batch, encoder: Encoder, timing: Timing, *, skip: bool) -> Encoded:
    """Wait for the features of a batch, and leave out scans that could not be read or, if asked to, encoded."""
    if batch.fetched is not None:
        batch.fetched.synchronize()
    features, skipped = batch.features.numpy(), dict(batch.skipped)
    there = ~np.isin(batch.rows, list(skipped))
    strange = there & ~np.isfinite(features).all(axis=1)
    if strange.any():
        reason = f"no finite numbers: {encoder.weights.name} weights do not work in {encoder.precision}"
        if not skip or (strange == there).all():
            first = batch.rows[strange][0]
            raise ValueError(f"features of {strange.sum()} scans, the first of them row {first}, are {reason}")
        skipped |= dict.fromkeys(batch.rows[strange].tolist(), f"features are {reason}")
        there &= ~strange
    timing.scans += int(there.sum())
    return Encoded(batch.rows[there], features[there], skipped)


def wanted_rows(volumes: VolumeStore, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Return which scans to embed, int64; ValueError if there are none."""
    if rows is not None and not len(rows):
        raise ValueError("rows is empty, expected one scan or more; leave it out for all that hold a volume")
    wanted = select_rows(volumes, rows=rows)
    if not len(wanted):
        raise ValueError(f"{volumes.path} holds no volume with status ok; see: ingest inspect {volumes.path}")
    return wanted


def fitting_batch_size(volumes: VolumeStore, encoder: Encoder, backend: str, scans: int) -> int:
    """Return how many of some scans to encode at a time; ValueError if the encoder does not take such volumes."""
    encoder.check(volumes.grid.shape_zyx)
    shape = volumes.grid.shape_zyx
    picture = plan_picture(shape, volumes.slab, encoder.view, encoder.slices_to_load(shape))
    most, held = room_to_inflate(volumes, picture, _backend_for(encoder, backend), encoder.device)
    return min(choose_batch_size(encoder, picture, held), most, scans)


def _backend_for(encoder: Encoder, backend: str) -> str:
    """Return what `loaders.open_loader` is asked for.

    What inflates on a GPU is in the way of its network there. A 3D one is so slow that a sixth of a core decodes all
    that it can take (205 volumes/s, r3d_18 on an H100).
    """
    return "torch" if backend == "auto" and encoder.view is View.volume else backend


def scans_table(volumes: VolumeStore, rows: np.ndarray) -> pd.DataFrame:
    """Return the ``scans/`` columns of embeddings."""
    scans = volumes.scans[list(SCAN_COLUMNS)].iloc[rows].reset_index(drop=True)
    scans.insert(0, "row", rows)
    return scans


def provenance(volumes: VolumeStore, encoder: Encoder, backend: str) -> dict[str, Any]:
    """Return the attributes of embeddings."""
    return {
        **describe(encoder),
        "backend": choose_backend(_backend_for(encoder, backend), encoder.device, encoder.view)[0],
        "store": {
            "path": str(volumes.path.absolute()),
            "id": volumes.attrs["store_id"],
            "grid": volumes.attrs["grid"],
        },
        "simulated": bool(volumes.attrs["simulated"]),
        "skipped": [],
        "notes": about_store(encoder.weights, volumes),
        "created_by": package_versions("torch", "torchvision", "zarr", "numpy"),
    }
