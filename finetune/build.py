"""From settings to what is trained: the network with its weights, what feeds it, what changes it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from extract.distributed import Group
from extract.encoder import choose_device
from extract.fast import choose_precision
from extract.inputs import as_crop, as_size, pictures_of, target_size
from extract.models import check_picture, family_of
from extract.weights import Weights, load_weights
from finetune.cohort import Cohort
from finetune.evaluate import what_to_augment, what_to_load
from finetune.heads import Head
from finetune.memory import most_scans
from finetune.network import Input, ScanNetwork, check_model
from finetune.optimiser import make_optimiser, make_schedule
from finetune.settings import FinetuneSettings
from finetune.steps import plan_steps
from finetune.training import Training
from ingest.store import VolumeStore
from loaders import Augmentation, Loader, open_loader
from loaders.views import View, plan_picture

#: How far scans that were brought into a standard space are moved unless told. There shape shows as position: shifts of
#: millimetres hide differences of millimetres, and a network has nothing to learn from angles that it never meets.
STANDARD_SPACE = {"rotation_deg": 2.0, "translation_mm": 1.0, "scale": 0.01}


def make_input(settings: FinetuneSettings, weights: Weights) -> Input:
    """Return what a network sees; ValueError for a model, view or size that do not go together."""
    check_model(settings.model)
    solid = family_of(settings.model).axes == 3
    if solid and settings.view is not None:
        raise ValueError(f"view {settings.view} does not go with {settings.model}, which sees volumes; leave it out")
    view = View.volume if solid else View(settings.view or "triplanar")
    size = as_size(settings.size, 3 if solid else 2)
    return Input(view, settings.slices, as_crop(settings.crop), size, settings.scale, weights.mean, weights.std)


def build_network(settings: FinetuneSettings, heads: Sequence[Head], weights: Weights) -> ScanNetwork:
    """Make a network on the CPU; what is new of it is drawn by the seed."""
    seen = make_input(settings, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = ScanNetwork(
            settings.model, seen, heads,
            pool=settings.pool, dropout=settings.dropout, checkpointing=settings.checkpointing,
        )  # fmt: skip
    if weights.state_dict is not None:
        network.encoder.load_state_dict({**network.encoder.state_dict(), **weights.state_dict})
    return network


def find_weights(settings: FinetuneSettings) -> Weights:
    """Return the weights to begin with, see `extract.weights.load_weights`; ``scratch`` are none."""
    check_model(settings.model)
    name = "random" if settings.weights == "scratch" else settings.weights
    return load_weights(settings.model, name, settings.weights_dir)


def check_volumes(network: ScanNetwork, shape_zyx: tuple[int, int, int]) -> None:
    """Raise ValueError if a network does not take stored volumes of a shape."""
    seen = network.seen
    meta = torch.empty((1, *shape_zyx), dtype=torch.uint8, device="meta")
    for picture in pictures_of(meta, seen.view, seen.slices, seen.crop, cut=False):
        check_picture(network.model, target_size(picture.shape[2:], seen.scale, seen.size), ["avgpool"])


def build_training(
    store: VolumeStore, settings: FinetuneSettings, cohort: Cohort, network: ScanNetwork, group: Group
) -> Training:
    """Put together a run that has not begun. The caller closes its loader.

    Raises
    ------
    ValueError
        If a device, a precision or a stage is not there, or processes cannot share a batch.
    """
    device = choose_device(group.device(settings.device))
    dtype = choose_precision(settings.precision, device)
    network.to(device)
    network.to(memory_format=torch.channels_last_3d if network.seen.view is View.volume else torch.channels_last)
    network.freeze(settings.freeze_until, batch_norm=settings.batch_norm == "frozen")
    network.train()
    view, slices = what_to_load(network.seen, store.grid.shape_zyx)
    picture = plan_picture(store.grid.shape_zyx, store.slab, view, slices)
    rows = cohort.rows_of("train")
    most = min(group.gather_all(settings.micro_batch or most_scans(network, picture.shape, dtype)))
    steps = plan_steps(len(rows), settings, most, group.size)
    if steps.warning is not None:
        cohort.warnings.append(steps.warning)
    wrapped: nn.Module = network
    if group.size > 1:
        if device.type == "cuda":
            network.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(network.encoder)
            network.freeze(settings.freeze_until, batch_norm=settings.batch_norm == "frozen")
        wrapped = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    optimiser = make_optimiser(network, settings)
    augmentation = make_augmentation(settings, store.attrs["grid"]["space"])
    planes = None if augmentation is None else what_to_augment(network.seen, store.grid.shape_zyx)
    loader = open_loader(
        store, rows=rows, view=view, slices=slices, batch_size=steps.micro, shuffle=True, seed=settings.seed,
        dtype="uint8" if augmentation is None else "float32", augmentation=augmentation, planes=planes,
        backend=settings.backend, device=device, threads=settings.threads, on_error=settings.on_error,
        rank=group.rank, world_size=group.size,
    )  # fmt: skip
    return Training(
        network, wrapped, optimiser, make_schedule(optimiser, steps.total, settings.warmup),
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        loader, cohort, settings, steps, group, dtype,
    )  # fmt: skip


def make_augmentation(settings: FinetuneSettings, space: str) -> Augmentation | None:
    """Return the augmentation of the settings, beside the defaults for the space that scans are in.

    Raises
    ------
    ValueError
        For an unknown part, naming the nearest one.
    """
    if isinstance(settings.augmentation, str):
        return None
    known = [part.name for part in dataclasses.fields(Augmentation) if part.name != "crop"]
    for name in settings.augmentation:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f", expected one of {', '.join(known)}"
            raise ValueError(f"augmentation {name!r} is unknown{hint}")
    given: dict[str, Any] = {**({} if space == "native" else STANDARD_SPACE), **settings.augmentation}
    return Augmentation(**given)


def open_part(store: VolumeStore, training: Training, part: str) -> Loader | None:
    """Open a loader of this process's share of a part; None if that is empty."""
    group = training.group
    rows = training.cohort.rows_of(part)[group.rank :: group.size]
    return open_scans(store, training, rows) if len(rows) else None


def open_scans(store: VolumeStore, training: Training, rows: np.ndarray) -> Loader:
    """Open a loader of some rows, as stored and in order, for this process alone."""
    settings = training.settings
    view, slices = what_to_load(training.network.seen, store.grid.shape_zyx)
    return open_loader(
        store, rows=rows, view=view, slices=slices, batch_size=2 * training.steps.micro, backend=settings.backend,
        device=training.device, threads=settings.threads, on_error=settings.on_error, rank=0, world_size=1,
    )  # fmt: skip
