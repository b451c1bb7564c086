"""From settings to what is trained: the network with its weights, what feeds it, what changes it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from extract.distributed import Group
from extract.errors import WeightsUnavailableError
from extract.fast import choose_precision
from extract.inputs import as_crop, as_size, pictures_of, target_size
from extract.models import check_picture, family_of, outline
from extract.weights import Weights, load_weights
from finetune.cohort import Cohort
from finetune.evaluate import what_to_augment, what_to_load
from finetune.heads import Head
from finetune.memory import most_scans
from finetune.network import NORMS, Input, ScanNetwork, check_model
from finetune.optimiser import make_optimiser, make_schedule
from finetune.settings import FinetuneSettings
from finetune.steps import Steps, plan_steps
from finetune.training import Training
from ingest.store import VolumeStore
from loaders import Augmentation, Loader, open_loader
from loaders.device import choose_device
from loaders.opening import room_to_inflate
from loaders.views import View, plan_picture

#: How far scans that were brought into a standard space are moved unless told. There shape shows as position: shifts of
#: millimetres hide differences of millimetres, and a network has nothing to learn from angles that it never meets.
STANDARD_SPACE = {"rotation_deg": 2.0, "translation_mm": 1.0, "scale": 0.01}

_LEAST = 8  # voxels along an axis of what is seen, unless there are fewer


def make_input(settings: FinetuneSettings, weights: Weights) -> Input:
    """Return what a network sees; ValueError for a model, view or size that do not go together."""
    check_model(settings.model)
    solid = family_of(settings.model).axes == 3
    if solid and settings.view is not None:
        raise ValueError(f"view {settings.view} does not go with {settings.model}, which sees volumes; leave it out")
    if solid and settings.pool != "mean":
        raise ValueError(f"pool {settings.pool} does not go with {settings.model}, which sees no slices; leave it out")
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
    """Return the weights to begin with, see `extract.weights.load_weights`; ``scratch`` are its ``random`` ones."""
    check_model(settings.model)
    given, pretrained = settings.weights, family_of(settings.model).pretrained
    if given == "scratch":
        if settings.weights_dir is not None:
            raise ValueError(f"weights are scratch, but weights_dir is {settings.weights_dir}; leave one of them out")
        return load_weights(settings.model, "random")
    if given is not None and given != pretrained and not os.path.exists(given):
        raise WeightsUnavailableError(
            f"no weights {given!r} for {settings.model}: expected {pretrained}, scratch, or the path of a file or a run"
        )
    try:
        return load_weights(settings.model, given, settings.weights_dir)
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(str(error).replace("--weights random", "--weights scratch")) from None


def without_effect(settings: FinetuneSettings, heads: Sequence[Head]) -> list[str]:
    """Return in words which settings change nothing, or nothing that was meant, a line each."""
    found = []
    if family_of(settings.model).axes == 3 and settings.slices != FinetuneSettings.model_fields["slices"].default:
        found.append(f"slices is {settings.slices}, which changes nothing: {settings.model} sees volumes")
    if settings.class_weights == "balanced" and not any(head.labels for head in heads):
        names = ", ".join(head.name for head in heads)
        found.append(f"class_weights is balanced, which changes nothing: there are no classes of {names}")
    if settings.weights == "scratch" and settings.freeze_until is not None:
        found.append(
            f"freeze_until is {settings.freeze_until}, but weights are scratch: those stages stay as they were drawn"
        )
    if settings.weights == "scratch" and settings.batch_norm == "frozen":
        found.append("batch_norm is frozen, but weights are scratch, which come with no statistics of any picture")
    return found


def check_settings(settings: FinetuneSettings, heads: Sequence[Head], store: VolumeStore) -> None:
    """Raise ValueError if settings do not go together, or with the volumes of a store, without any weights at hand."""
    network = build_network(settings, heads, load_weights(settings.model, "random"))
    check_volumes(network, store.grid.shape_zyx)
    check_scale(network.seen, store.grid.shape_zyx)
    network.freeze(settings.freeze_until, batch_norm=settings.batch_norm == "frozen")
    make_augmentation(settings, store.attrs["grid"]["space"])
    choose_precision(settings.precision, choose_device(settings.device))


def check_volumes(network: ScanNetwork, shape_zyx: tuple[int, int, int]) -> None:
    """Raise ValueError if a network does not take stored volumes of a shape."""
    for _, _, size in _pictures(network.seen, shape_zyx):
        check_picture(network.model, size, ["avgpool"])


def check_scale(seen: Input, shape_zyx: tuple[int, int, int]) -> None:
    """Raise ValueError if pictures are made so small by their scale that hardly anything is left of them."""
    pictures = [] if seen.size is not None else _pictures(seen, shape_zyx)
    least = max((_LEAST / n for _, lengths, _ in pictures for n in lengths if n >= _LEAST), default=0.0)
    for _, lengths, size in pictures:
        if any(n >= _LEAST > left for n, left in zip(lengths, size, strict=True)):
            small, whole = (" x ".join(map(str, one)) for one in (size, lengths))
            raise ValueError(
                f"scale is {seen.scale:g}, which leaves {small} of {whole} voxels, expected {_LEAST} or more along "
                f"each axis; use --scale {math.ceil(1000 * least) / 1000:g} or more"
            )


def fewest_scans(network: ScanNetwork, shape_zyx: tuple[int, int, int]) -> int:
    """Return how many scans a network must see at a time while it is trained: of one small slice it may be two.

    Its last layers may be a single position, of which a batch norm knows no variance.
    """
    if not any(module.training for module in network.encoder.modules() if isinstance(module, NORMS)):
        return 1
    encoder = outline(network.model)
    for name, module in encoder.named_modules():
        if isinstance(module, NORMS):
            module.train(network.encoder.get_submodule(name).training)
    try:
        for slices, _, size in _pictures(network.seen, shape_zyx):
            encoder(torch.empty((slices, 3, *size), device="meta"))
    except ValueError:  # of a batch norm
        return 2
    return 1


def _check_steps(steps: Steps, least: int, processes: int) -> None:
    """Raise ValueError if a batch has fewer scans than the network must see at a time."""
    last = -(-steps.batch // processes) - (steps.accumulate - 1) * steps.micro
    if min(steps.micro, last) < least:
        raise ValueError(
            f"the {steps.batch} scans of a step are seen {steps.micro} at a time, the last ones {last}, and of one "
            "scan so small batch norms know no variance; use a larger --batch-size or --micro-batch, larger pictures, "
            "more --slices, or --batch-norm frozen"
        )


def _pictures(seen: Input, shape_zyx: tuple[int, int, int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Return what is seen of a volume of each plane: the number of slices, their lengths, and those that they get."""
    meta = torch.empty((1, *shape_zyx), dtype=torch.uint8, device="meta")
    pictures = pictures_of(meta, seen.view, seen.slices, seen.crop, cut=False)
    shapes = [(picture.shape[1], tuple(picture.shape[2:])) for picture in pictures]
    return [(slices, lengths, target_size(lengths, seen.scale, seen.size)) for slices, lengths in shapes]


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
    augmentation = make_augmentation(settings, store.attrs["grid"]["space"])
    view, slices = what_to_load(network.seen, store.grid.shape_zyx, augmented=augmentation is not None)
    picture = plan_picture(store.grid.shape_zyx, store.slab, view, slices)
    rows = cohort.rows_of("train")
    most, held = room_to_inflate(store, picture, settings.backend, device)
    most = min(group.gather_all(settings.micro_batch or min(most, most_scans(network, picture, held, dtype))))
    steps = plan_steps(len(rows), settings, most, group.size)
    least = fewest_scans(network, store.grid.shape_zyx)
    if group.size == 1 or device.type != "cuda":  # processes whose batch norms know of each other have more
        _check_steps(steps, least, group.size)
    if steps.warning is not None:
        cohort.warnings.append(steps.warning)
    wrapped: nn.Module = network
    if group.size > 1:
        if device.type == "cuda":
            network.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(network.encoder)
            network.freeze(settings.freeze_until, batch_norm=settings.batch_norm == "frozen")
        wrapped = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    optimiser = make_optimiser(network, settings)
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
        loader, cohort, settings, steps, group, dtype, least=least,
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


def resolved_of(training: Training, store: VolumeStore) -> dict[str, Any]:
    """Return what was chosen where settings leave it open, as plain values: see `finetune.results.RunResult`."""
    augmentation = make_augmentation(training.settings, store.attrs["grid"]["space"])
    ranges = None if augmentation is None else dataclasses.asdict(augmentation)
    if ranges is not None:
        ranges.pop("crop")  # which is no part of the settings
    return {
        "view": str(training.network.seen.view),
        "precision": str(training.dtype).removeprefix("torch."),
        "device": training.device.type,
        "micro_batch": training.steps.micro,
        "processes": training.group.size,
        "augmentation": ranges,
    }


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
