"""The torch backend: decoded batches as tensors, on a GPU by asynchronous copies from page-locked memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from loaders.order import BatchPlan
from loaders.output import Output
from loaders.timing import GpuStopwatch, Timing
from loaders.views import Images, each


def on_cpu(
    batches: Iterator[tuple[BatchPlan, np.ndarray]], output: Output, epoch: int, timing: Timing
) -> Generator[tuple[BatchPlan, Images]]:
    """Yield batches that stay in the memory of the host."""
    for plan, array in batches:
        pictures = output.picture.split(torch.from_numpy(array))
        del array
        started = time.perf_counter()
        images = output.finish(pictures, epoch, plan.positions)
        del pictures
        timing.augment += time.perf_counter() - started
        yield plan, images
        del images  # else this frame would hold memory that the consumer has let go of


def on_gpu(
    batches: Iterator[tuple[BatchPlan, np.ndarray]], output: Output, epoch: int, timing: Timing, device: torch.device
) -> Generator[tuple[BatchPlan, Images]]:
    """Yield batches on a GPU.

    Parameters
    ----------
    batches
        In page-locked memory.
    """
    yield from finished_ahead(
        batches,
        lambda array: torch.from_numpy(array).to(device, non_blocking=True),
        lambda plan, images: output.finish(output.picture.split(images), epoch, plan.positions),
        timing,
        device,
    )


def finished_ahead(
    batches: Iterator[tuple[BatchPlan, Any]],
    bring: Callable[[Any], torch.Tensor],
    finish: Callable[[BatchPlan, torch.Tensor], Images],
    timing: Timing,
    device: torch.device,
) -> Generator[tuple[BatchPlan, Images]]:
    """Finish batches on a GPU. While the consumer works on one, the next is finished, on a stream of its own.

    Parameters
    ----------
    bring, finish
        Put on the stream what brings pictures to the GPU, and what makes a batch of them, in memory of torch's own.
        What it is made of is held until that is done.
    """
    stream = torch.cuda.Stream(device)
    copies, augments = GpuStopwatch(), GpuStopwatch()
    ready: deque[tuple[BatchPlan, Images, torch.cuda.Event]] = deque()
    # A GPU reads memory after this code has gone on.
    in_use: deque[tuple[torch.cuda.Event, Any]] = deque()

    def start(plan: BatchPlan, source: Any) -> None:
        with torch.cuda.stream(stream):
            done = torch.cuda.Event()
            with copies.running():
                brought = bring(source)
            with augments.running():
                images = finish(plan, brought)
            done.record()
        in_use.append((done, source))
        ready.append((plan, images, done))

    def settle() -> None:
        while in_use and in_use[0][0].query():
            in_use.popleft()
        timing.copy += copies.seconds()
        timing.augment += augments.seconds()

    def hand_over() -> tuple[BatchPlan, Images]:
        plan, images, done = ready.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for pictures in each(images):
            pictures.record_stream(current)  # their memory was made on the other stream
        return plan, images

    try:
        for plan, source in batches:
            start(plan, source)
            del source
            settle()
            if len(ready) > 1:
                yield hand_over()
        while ready:
            yield hand_over()
    finally:
        stream.synchronize()
        settle()
