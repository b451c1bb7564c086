"""The DALI backend: decoded batches go through a DALI pipeline, where its operators can work on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

_QUEUE_DEPTH = 2


def through_dali(batches: Iterator[np.ndarray], batch_size: int, threads: int) -> Iterator[torch.Tensor]:
    """Pass batches through a DALI pipeline on the CPU.

    Parameters
    ----------
    batches
        Arrays uint8 (scan, z, y, x).
    batch_size
        Scans in the largest of them.
    threads
        Of the pipeline.

    Yields
    ------
    torch.Tensor
        uint8 (scan, z, y, x), in memory of its own.
    """
    # The pipeline reads our memory without a copy, and runs ahead by its queue: what is in flight must stay alive.
    in_flight: deque[np.ndarray] = deque(maxlen=_QUEUE_DEPTH + 2)

    def feed() -> np.ndarray:
        in_flight.append(next(batches))
        return in_flight[-1][..., np.newaxis]

    # The dynamic executor counts references to its outputs, so that a batch is not overwritten while it is held.
    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=_QUEUE_DEPTH, exec_dynamic=True
    )
    def volumes():  # type: ignore[no-untyped-def]  # DALI reads the body as a graph
        return fn.external_source(source=feed, batch=True, no_copy=True, layout="DHWC", dtype=types.UINT8, ndim=4)

    pipeline = volumes()
    pipeline.build()
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return
        yield torch.from_dlpack(output.as_tensor()).squeeze(-1)
