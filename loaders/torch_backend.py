"""The torch backend: decoded batches as tensors, on a GPU by asynchronous copies from page-locked memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator

import numpy as np
import torch

from loaders.order import BatchPlan
from loaders.output import Output
from loaders.timing import GpuStopwatch, Timing


def on_cpu(
    batches: Iterator[tuple[BatchPlan, np.ndarray]], output: Output, epoch: int, timing: Timing
) -> Generator[tuple[BatchPlan, torch.Tensor]]:
    """Yield batches that stay in the memory of the host."""
    for plan, array in batches:
        images = torch.from_numpy(array)
        del array
        started = time.perf_counter()
        images = output.finish(images, epoch, plan.positions)
        timing.augment += time.perf_counter() - started
        yield plan, images
        del images  # else this frame would hold memory that the consumer has let go of


def on_gpu(
    batches: Iterator[tuple[BatchPlan, np.ndarray]], output: Output, epoch: int, timing: Timing, device: torch.device
) -> Generator[tuple[BatchPlan, torch.Tensor]]:
    """Yield batches on a GPU. While the consumer works on one, the next is copied, on a stream of its own.

    Parameters
    ----------
    batches
        In page-locked memory.
    """
    stream = torch.cuda.Stream(device)
    copies, augments = GpuStopwatch(), GpuStopwatch()
    ready: deque[tuple[BatchPlan, torch.Tensor, torch.cuda.Event]] = deque()
    # A copy reads the host's memory after this code has gone on: it is held until the copy has ended.
    copying: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()

    def start(plan: BatchPlan, array: np.ndarray) -> None:
        with torch.cuda.stream(stream):
            copied, done = torch.cuda.Event(), torch.cuda.Event()
            with copies.running():
                images = torch.from_numpy(array).to(device, non_blocking=True)
            copied.record()
            with augments.running():
                images = output.finish(images, epoch, plan.positions)
            done.record()
        copying.append((copied, array))
        ready.append((plan, images, done))

    def settle() -> None:
        while copying and copying[0][0].query():
            copying.popleft()
        timing.copy += copies.seconds()
        timing.augment += augments.seconds()

    def hand_over() -> tuple[BatchPlan, torch.Tensor]:
        plan, images, done = ready.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        images.record_stream(current)  # its memory was made on the other stream
        return plan, images

    try:
        for plan, array in batches:
            start(plan, array)
            del array
            settle()
            if len(ready) > 1:
                yield hand_over()
        while ready:
            yield hand_over()
    finally:
        stream.synchronize()
        settle()
