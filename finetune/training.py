"""Training: from a network and a loader to trained weights, going on where a checkpoint was."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from extract.distributed import Group
from extract.fast import to_host
from finetune.batch_norm import read_scans
from finetune.cohort import Cohort
from finetune.errors import NonFiniteLossError
from finetune.losses import loss_sums
from finetune.network import ScanNetwork
from finetune.optimiser import trained_parameters
from finetune.settings import FinetuneSettings
from finetune.steps import Steps
from loaders import Batch, Loader
from loaders.order import epoch_order

_SMALLEST_SCALE = 2.0**-10  # of float16: gradients that overflow even so are no accident


@dataclass
class Training:
    """A run under way.

    Attributes
    ----------
    network, wrapped
        What is trained, and what is called: the same, or by `DistributedDataParallel`.
    steps
        The plan.
    step
        Steps that are done.
    history
        A row per epoch that is done, see `finetune.results.RunResult`.
    best
        Epoch (``epoch``), ``step`` and ``value`` of the best validation so far, and the weights then (``state_dict``).
    waited
        Validations since then.
    loss_sum
        Of the losses of the steps of the epoch under way.
    seen, starved, elapsed
        Scans of the epoch under way, and its seconds: that it waited for scans, and in all.
    skipped
        By row, why scans could not be read.
    least
        Scans that the network must see at a time, see `finetune.build.fewest_scans`.
    """

    network: ScanNetwork
    wrapped: nn.Module
    optimiser: AdamW
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    loader: Loader
    cohort: Cohort
    settings: FinetuneSettings
    steps: Steps
    group: Group
    dtype: torch.dtype
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    waited: int = 0
    validated: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    starved: float = 0.0
    elapsed: float = 0.0
    skipped: dict[int, str] = field(default_factory=dict)
    least: int = 1

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.step // self.steps.per_epoch

    def rate(self, step: int) -> float:
        """Return the learning rate of the heads in a step."""
        return float(self.schedule.base_lrs[-1] * self.schedule.lr_lambdas[-1](step - 1))

    def state_dict(self) -> dict[str, Any]:
        """Return all that it takes to go on, of which torch reads the file again; in the middle of an epoch, too.

        All processes must ask for it together: it has the losses and skipped scans of each of them.
        """
        skipped = self.group.gather_all(self.skipped | self.loader.skipped)
        taken = (self.step % self.steps.per_epoch) * self.steps.batch
        return {
            "cohort": self.cohort.fingerprint(),
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": {**self.loader.state_dict(), "epoch": self.epoch, "position": taken},
            "rng": torch.get_rng_state(),
            "history": self.history,
            "best": self.best,
            "waited": self.waited,
            "validated": self.validated,
            "loss_sum": float(np.sum(self.group.gather_all(self.loss_sum))),
            "seen": self.seen,
            "starved": self.starved,
            "elapsed": self.elapsed,
            "skipped": {str(row): reason for some in skipped for row, reason in some.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was; its weights are loaded into the network by themselves."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"])
        for name in ("step", "history", "best", "waited", "validated", "loss_sum", "seen", "starved", "elapsed"):
            setattr(self, name, state[name])
        if self.group.rank:
            self.loss_sum = 0.0  # process 0 has that of all
        self.skipped = {int(row): reason for row, reason in state["skipped"].items()}


@dataclass(frozen=True)
class StepDone:
    """What a step was like: its number, and its loss (of many processes about)."""

    step: int
    loss: float


def train_epoch(training: Training, after_step: Callable[[StepDone], None]) -> None:
    """Train to the end of the epoch under way.

    Parameters
    ----------
    after_step
        Called after each step, which is counted by then.

    Raises
    ------
    NonFiniteLossError
        If a loss or gradient is not finite. On a GPU that is found out a step later, so as not to wait for it.
    """
    epoch, steps = training.epoch, training.steps
    order = _order(training)
    first = training.step % steps.per_epoch
    training.loader.set_epoch(epoch)
    batches = iter(training.loader)
    training.wrapped.train()
    before: _Pending | None = None
    begun = time.perf_counter()
    try:
        for number in range(first, steps.per_epoch):
            rows = order[number * steps.batch : (number + 1) * steps.batch]
            pending = _one_step(training, batches, rows)
            training.step += 1
            due = training.step % training.settings.checkpoint_every == 0  # what is kept must have been checked
            late = training.device.type == "cuda" and number + 1 < steps.per_epoch and not due
            settled = [one for one in (before, None if late else pending) if one is not None]
            for one in settled:
                _check(training, one)  # a GPU is waited for, which is a part of its time
            begun, before_that = time.perf_counter(), begun
            training.elapsed += begun - before_that
            for one in settled:
                after_step(StepDone(one.step, float(one.values[0]) * training.group.size))
            before = pending if late else None
    finally:
        batches.close()
        training.skipped |= training.loader.skipped


@dataclass(frozen=True)
class _Pending:
    """A step of which a GPU may still be at work.

    Attributes
    ----------
    values
        float32, on the CPU: the loss, the norm of the gradient, and the part of each target in the loss.
    there
        When it has come to pass, these have arrived.
    """

    step: int
    values: torch.Tensor
    there: torch.cuda.Event | None
    rows: np.ndarray


def _order(training: Training) -> np.ndarray:
    sampling = training.loader.sampling
    return epoch_order(
        sampling.rows, shuffle=sampling.shuffle, seed=sampling.seed, epoch=training.epoch,
        weights=sampling.weights, strata=sampling.strata,
    )  # fmt: skip


def _one_step(training: Training, batches: Iterator[Batch], rows: np.ndarray) -> _Pending:
    """Take the next batches of this process, and step once.

    Parameters
    ----------
    rows
        Of the step, of all processes: what their losses are divided by is known before any is computed, so that the
        sum of the gradients over batches and processes is that of one large batch. Scans that cannot be read are
        counted, too: who reads them finds that out later, and the result must not depend on the number of processes.
    """
    settings, group, device = training.settings, training.group, training.device
    torch.manual_seed(_seed_of(settings.seed, training.step, group.rank))
    counts = training.cohort.weights[rows].sum(axis=0)
    divisors = torch.from_numpy(np.where(counts > 0, counts, 1) * len(counts)).to(device, non_blocking=True)
    total = torch.zeros(len(counts), device=device)
    for number in range(training.steps.accumulate):
        asked = time.perf_counter()
        batch = next(batches)
        training.starved += time.perf_counter() - asked
        last = number + 1 == training.steps.accumulate
        with _without_exchange(training.wrapped, last):
            total += _backward(training, batch, divisors)
    parameters = trained_parameters(training.network)
    norm = torch.zeros((), device=device)
    if any(parameter.grad is not None for parameter in parameters):  # else no scan of the step could be read
        training.scaler.unscale_(training.optimiser)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if settings.clip is None else settings.clip)
        training.scaler.step(training.optimiser)
        training.scaler.update()
        training.optimiser.zero_grad(set_to_none=True)
    with warnings.catch_warnings():  # a scaler may have left the first step out
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        training.schedule.step()
    training.seen += len(rows)
    values, there = to_host(torch.cat([total.sum()[None], norm[None].to(total), total]))
    return _Pending(training.step + 1, values, there, rows)


def _backward(training: Training, batch: Batch, divisors: torch.Tensor) -> torch.Tensor:
    """Add the gradient of a batch; return its part of the loss of each target, (target,)."""
    device, network = training.device, training.network
    read = read_scans(batch, training.least)
    if read is None and training.group.size == 1 and not batch.valid.any():
        return torch.zeros(len(divisors), device=device)
    batch = batch if read is None else read  # or all, for each process must call the network, and with enough of them
    labels = torch.from_numpy(training.cohort.labels[batch.rows]).to(device, non_blocking=True)
    weights = torch.from_numpy(training.cohort.weights[batch.rows] * batch.valid[:, None]).to(device, non_blocking=True)
    with torch.autocast(device.type, training.dtype, enabled=training.dtype is not torch.float32):
        outputs = training.wrapped(batch.images, cut=network.seen.cut)
    losses = loss_sums(outputs, network.heads_info, network.head_slices, labels, weights) / divisors
    # Gradients are averaged over processes, whose losses are to be added.
    training.scaler.scale(losses.sum() * training.group.size).backward()
    return losses.detach()


def _without_exchange(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Let processes exchange gradients after their last batch of a step alone."""
    if last or not isinstance(wrapped, DistributedDataParallel):
        return contextlib.nullcontext()
    return wrapped.no_sync()


def _check(training: Training, done: _Pending) -> None:
    """Check what came of a step, and count it."""
    if done.there is not None:
        done.there.synchronize()
    loss, norm, *parts = done.values.tolist()
    scaled = training.scaler.is_enabled()
    overflows = scaled and not math.isfinite(norm) and training.scaler.get_scale() < _SMALLEST_SCALE
    if not math.isfinite(loss) or (not math.isfinite(norm) and not scaled) or overflows:
        by_target = dict(zip((head.name for head in training.network.heads_info), parts, strict=True))
        raise not_finite(training, done.step, loss, norm, by_target, done.rows)
    training.loss_sum += loss


def not_finite(
    training: Training, step: int, loss: float, norm: float, by_target: dict[str, float], rows: np.ndarray
) -> NonFiniteLossError:
    """Return the error of a step whose loss, gradient, or weights' predictions are not finite."""
    return NonFiniteLossError(
        step=step, loss=loss, norm=norm, by_target=by_target, rows=rows.tolist(), rate=training.rate(step),
        precision=str(training.dtype).removeprefix("torch."), clip=training.settings.clip,
    )  # fmt: skip


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random numbers of a step, of which dropout is made."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
