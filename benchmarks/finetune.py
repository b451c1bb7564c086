"""Scans a second of training from a store, against the same training fed from memory and the limit of the arithmetic.

Every way goes through the loop of ``finetune`` itself (`finetune.training.train_epoch`), with the same network,
optimiser, weights to begin with and random numbers; the benchmark checks that all have the same losses. They take turns
in one run, and a ratio is the median of those of each turn.

What memory holds is decoded scans, on a GPU in its own memory: what a training could keep there at best. Augmentation
is drawn anew for each scan in each epoch, whatever a training is fed by, so with it each batch from memory is augmented
just before its step, by the loader's own code. A third way is fed with pictures that were augmented beforehand, which
no training can have: it tells what augmentation itself costs.

The first step of a turn is not counted: by its end a loader is as far ahead as it will be in the middle of a long
epoch, and there are scans enough for it to stay so until the last step ends. With ``device="cuda"`` networks and
batches are those of a GPU; with a small `shape` the benchmark itself is tried.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import arithmetic_speed
from benchmarks.made import DIFFERENT, SHAPE, make_store, make_volumes
from benchmarks.results import Report, Result, failure
from extract.distributed import Group
from extract.fast import memory_for
from extract.probing.groups import read_groups
from finetune.build import build_network, build_training, find_weights, make_augmentation
from finetune.cohort import Cohort, as_table
from finetune.evaluate import what_to_augment, what_to_load
from finetune.heads import Head
from finetune.settings import make_settings
from finetune.split import Split
from finetune.training import StepDone, Training, train_epoch
from ingest.store import DEFAULT_SLAB, VolumeStore, open_store, package_versions
from loaders import Batch, Loader, open_loader
from loaders.output import Output
from loaders.views import as_images, each, plan_picture

MEMORY, STORE, BEFOREHAND = "from memory", "from the store", "augmented beforehand"
PLAIN, AUGMENTED = "", ", augmented"

_KEPT = 4  # batches in memory, over and over
_AHEAD = 3  # batches of the store beyond those that a turn takes, so that its loader never comes to an end
TARGET = 0.95  # of the speed from memory
_TOLERANCE = {"cpu": 1e-3, "cuda": 0.05}  # of losses: sums of a GPU in bfloat16 come in any order


@dataclass(frozen=True)
class Case:
    """A training that is measured: `batch` scans a step, `steps` of them counted in each of `turns`."""

    model: str
    view: str | None
    slices: int
    scale: float
    batch: int
    steps: int
    turns: int

    @property
    def name(self) -> str:
        """What it is called."""
        if self.view is None:
            return f"{self.model}, volumes" + (f" at scale {self.scale:g}" if self.scale != 1 else "")
        return f"{self.model}, {'3 x ' if self.view == 'triplanar' else ''}{self.slices} {self.view} slices"


#: By device. A GPU sees whole volumes, and batches that keep it busy.
CASES = {
    "cpu": (
        Case("resnet18", "axial", 3, 1.0, batch=8, steps=5, turns=3),
        Case("resnet18", "triplanar", 3, 1.0, batch=2, steps=5, turns=3),
        Case("r3d_18", None, 1, 0.5, batch=1, steps=2, turns=2),
    ),
    "cuda": (
        Case("resnet18", "axial", 9, 1.0, batch=64, steps=50, turns=3),
        Case("resnet18", "triplanar", 3, 1.0, batch=64, steps=40, turns=3),
        Case("r3d_18", None, 1, 1.0, batch=8, steps=12, turns=3),
    ),
}


@dataclass
class Measured:
    """What the turns of one way were like: scans a second, and the share of the time without scans."""

    speeds: list[float] = field(default_factory=list)
    starved: list[float] = field(default_factory=list)


def run_finetune(
    directory: Path,
    *,
    device: str = "cpu",
    shape: tuple[int, int, int] = SHAPE,
    steps: int | None = None,
    turns: int | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Report:
    """Measure training.

    Parameters
    ----------
    directory
        Holds the store, which is made anew and removed.
    shape
        (z, y, x) of a volume.
    steps, turns
        Instead of those of `CASES`.
    on_report
        Called with what there is, after each case.

    Returns
    -------
    Report
        ``settings["failures"]`` has what did not work, such as a way that has other losses, with its traceback.
    """
    where = torch.device(device)
    cases = [replace(c, steps=steps or c.steps, turns=turns or c.turns) for c in CASES[where.type]]
    scans = max(case.batch * (case.steps + 1 + _AHEAD) for case in cases)
    path = directory / "store.zarr"
    packed = make_store(path, make_volumes(min(scans, DIFFERENT), shape), slab=DEFAULT_SLAB, scans=scans)
    store = open_store(path)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    peak = arithmetic_speed(where, dtype)
    limit = f"limit: arithmetic, {str(dtype).removeprefix('torch.')}"
    results = [Result(limit, round(peak / 1e9, 1), "GFLOP/s", round(peak / 1e9, 1), round(peak / 1e9, 1))]
    settings: dict[str, Any] = {
        "device": "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where),
        "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "shape_zyx": list(shape), "packed_megabytes": round(packed / 1e6, 3), "scans": scans,
        "cases": {case.name: vars(case) for case in cases},
        "gflops_per_scan": {}, "starved": {}, "backend": {}, "target": TARGET, "failures": {},
        "versions": package_versions("torch", "torchvision", "nvidia-dali-cuda130"),
    }  # fmt: skip
    ratios: dict[str, float] = {}
    for case in cases:
        for how in (PLAIN, AUGMENTED):
            try:
                found, flops = measure(case, store, device, how == AUGMENTED, settings)
            except Exception as error:
                settings["failures"][f"{case.name}{how}"] = failure(error)
                continue
            settings["gflops_per_scan"][case.name] = round(flops / 1e9, 2)
            for way, measured in found.items():
                name = f"{case.name}{how}, {way}"
                share = round(median(measured.speeds) * flops / peak, 3)
                starved = median(measured.starved)
                settings["starved"][name] = round(starved, 4)
                note = f"waits {starved:.1%} of the time" if way == STORE else ""
                results.append(_result(name, measured.speeds, share, note))
            ratios[f"{case.name}{how}: {STORE}/{MEMORY}"] = _ratio(found[STORE], found[MEMORY])
            if BEFOREHAND in found:
                ratios[f"{case.name}{how}: {MEMORY}/{BEFOREHAND}"] = _ratio(found[MEMORY], found[BEFOREHAND])
            if on_report is not None:
                on_report(Report("finetune", settings, list(results), dict(ratios)))
    shutil.rmtree(path)
    return Report("finetune", settings, results, ratios)


def _result(name: str, speeds: list[float], share: float, note: str) -> Result:
    value, low, high = (round(speed, 3) for speed in (median(speeds), min(speeds), max(speeds)))
    return Result(name, value, "scans/s", low, high, limit_share=share, note=note)


def _ratio(one: Measured, other: Measured) -> float:
    return round(median(a / b for a, b in zip(one.speeds, other.speeds, strict=True)), 3)


def measure(
    case: Case, store: VolumeStore, device: str, augmented: bool, settings: dict[str, Any]
) -> tuple[dict[str, Measured], float]:
    """Train in turns; return what each way was like, the limit first, and the operations of a scan.

    Parameters
    ----------
    settings
        Of the report: the loader's backend is noted there.

    Raises
    ------
    ValueError
        If losses differ between the ways.
    """
    with ExitStack() as stack:
        training = begin(case, store, device, augmented)
        stack.enter_context(memory_for(training.device))  # as a run does
        stack.callback(training.loader.close)
        settings["backend"][case.name] = training.loader.backend
        ways: dict[str, Training] = {}
        if augmented:
            ways[BEFOREHAND] = _fed(training, Resident(training.loader, _first_batches(training.loader)))
            finish = Augmenting(training, store)
            with finish.open_decoded() as decoded:
                ways[MEMORY] = _fed(training, Resident(decoded, _first_batches(decoded), finish))
        else:
            ways[MEMORY] = _fed(training, Resident(training.loader, _first_batches(training.loader)))
        ways[STORE] = training
        start = {name: value.clone() for name, value in training.network.state_dict().items()}
        others = copy.deepcopy((training.optimiser.state_dict(), training.schedule.state_dict()))
        found = {way: Measured() for way in ways}
        expected: list[float] = []
        for _ in range(case.turns):
            for way, one in ways.items():
                one.network.load_state_dict(start)
                one.optimiser.load_state_dict(copy.deepcopy(others[0]))
                one.schedule.load_state_dict(copy.deepcopy(others[1]))
                losses = _turn(one, found[way])[: min(_KEPT, case.steps)]
                expected = expected or losses
                if not np.allclose(losses, expected, rtol=_TOLERANCE[training.device.type]):
                    raise ValueError(
                        f"losses of {case.name}, {way}, are {losses}, expected {expected} as of the others"
                    )
        return found, count_operations(training, store)


def begin(case: Case, store: VolumeStore, device: str, augmented: bool) -> Training:
    """Put together a training with labels of no meaning, by which it takes as long as by others."""
    settings = make_settings({
        "target": "label", "model": case.model, "weights": "scratch", "view": case.view, "slices": case.slices,
        "scale": case.scale, "batch_size": case.batch, "micro_batch": case.batch, "epochs": 1, "device": device,
        "augmentation": {} if augmented else "none", "checkpoint_every": 1 << 30, "on_error": "raise",
    })  # fmt: skip
    rows = np.asarray(store.ok_rows)
    labels = np.random.default_rng(0).integers(0, 2, (len(store.scans), 1)).astype(np.float32)
    head = Head("label", "binary", ("a", "b"), frequencies=(0.5, 0.5))
    groups = read_groups(as_table(store, rows), None)
    part = np.full(len(rows), "train", dtype=object)
    cohort = Cohort(rows, groups, [], Split({}), part, [head], labels, np.ones_like(labels), [])
    network = build_network(settings, cohort.heads, find_weights(settings))
    training = build_training(store, settings, cohort, network, Group())
    training.steps = replace(training.steps, per_epoch=case.steps + 1)  # the loader has more than that
    return training


def _fed(training: Training, loader: Any) -> Training:
    """Return a training of the same network that another loader feeds."""
    return replace(training, loader=loader)


def _turn(training: Training, measured: Measured) -> list[float]:
    """Train for a turn, and return the losses of its steps."""
    training.step = 0
    ends: list[float] = []
    waits: list[float] = []  # so far
    losses: list[float] = []

    def after_step(step: StepDone) -> None:
        ends.append(time.perf_counter())
        waits.append(training.starved)
        losses.append(step.loss)

    train_epoch(training, after_step)
    seconds = ends[-1] - ends[0]
    measured.speeds.append(training.steps.batch * (len(ends) - 1) / seconds)
    measured.starved.append((waits[-1] - waits[0]) / seconds)
    return losses


def _first_batches(loader: Loader) -> list[Batch]:
    """Return the first batches of the first epoch, in memory of their own."""
    loader.set_epoch(0)
    passing = iter(loader)
    taken = [batch for batch, _ in zip(passing, range(_KEPT), strict=False)]
    passing.close()
    kept = [as_images(tuple(one.clone() for one in each(batch.images))) for batch in taken]
    return [Batch(images, one.rows, one.participant, one.valid) for images, one in zip(kept, taken, strict=True)]


class Resident:
    """Gives batches that lie in memory, over and over, in the place of a loader.

    Parameters
    ----------
    loader
        Of which they are the first ones.
    finish
        What is done to each before it is given: ``finish(images, number)``, by default nothing.
    """

    def __init__(
        self, loader: Loader, batches: list[Batch], finish: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    ) -> None:
        self.sampling, self.batches, self.finish = loader.sampling, batches, finish
        self.skipped: dict[int, str] = {}
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take note of an epoch, of which it has the first batches in any case."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        for number in count():
            batch = self.batches[number % len(self.batches)]
            if self.finish is None:
                yield batch
            else:
                yield Batch(self.finish(batch.images, number), batch.rows, batch.participant, batch.valid)


class Augmenting:
    """Augments decoded batches as the loader of a training does, in the first epoch."""

    def __init__(self, training: Training, store: VolumeStore) -> None:
        self.store, self.loader, self.batch = store, training.loader, training.steps.batch
        self.view, self.slices = what_to_load(training.network.seen, store.grid.shape_zyx, augmented=True)
        picture = plan_picture(store.grid.shape_zyx, store.slab, self.view, self.slices)
        augmentation = make_augmentation(training.settings, store.attrs["grid"]["space"])
        planes = what_to_augment(training.network.seen, store.grid.shape_zyx)
        self.output = Output(
            picture, torch.float32, augmentation=augmentation, seed=training.settings.seed, planes=planes
        )

    def open_decoded(self) -> Loader:
        """Open a loader of the same batches as they are before: scaled already on a CPU, and bytes on a GPU."""
        sampling, device = self.loader.sampling, self.loader.device
        return open_loader(
            self.store, rows=sampling.rows, view=self.view, slices=self.slices, batch_size=self.batch, shuffle=True,
            seed=sampling.seed, dtype="float32" if device.type == "cpu" else "uint8", device=device,
            backend=self.loader.backend, rank=0, world_size=1,
        )  # fmt: skip

    def __call__(self, images: torch.Tensor, number: int) -> torch.Tensor:
        """Augment the batch of a number."""
        augmented = self.output.finish((images,), 0, number * self.batch + np.arange(len(images)))
        assert isinstance(augmented, torch.Tensor)
        return augmented


def count_operations(training: Training, store: VolumeStore) -> float:
    """Return the floating-point operations that a scan takes in training, forward and backward, but for the heads."""
    view, slices = what_to_load(training.network.seen, store.grid.shape_zyx)
    picture = plan_picture(store.grid.shape_zyx, store.slab, view, slices)
    images = torch.empty((2, *picture.shape), device="meta")
    network = copy.deepcopy(training.network).to("meta")
    with FlopCounterMode(display=False) as counter:
        network.features(as_images(picture.split(images)), cut=network.seen.cut).sum().backward()
    return counter.get_total_flops() / len(images)
