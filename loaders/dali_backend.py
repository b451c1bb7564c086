"""The DALI backend: on a GPU compressed slabs are copied there and inflated there; the CPU decodes nothing.

Without a GPU the pipeline is fed with decoded batches instead, for `inflate` is there for GPUs only.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorCPU

from loaders.decode import Decoder
from loaders.order import BatchPlan
from loaders.output import Output
from loaders.slots import MOST_BYTES, MOST_SLABS, QUEUE_DEPTH, SlotBatch, SlotRing
from loaders.timing import Timing
from loaders.torch_backend import finished_ahead
from loaders.views import Images, cut

_CPU = torch.device("cpu")


def inflated_on_gpu(
    batches: Iterator[tuple[BatchPlan, SlotBatch]],
    ring: SlotRing,
    decoder: Decoder,
    output: Output,
    epoch: int,
    timing: Timing,
    *,
    batch_size: int,
    device: torch.device,
) -> Generator[tuple[BatchPlan, Images]]:
    """Copy compressed slabs to the GPU, inflate them there, and yield the batches.

    Raises
    ------
    ValueError
        If a batch has more slabs than nvCOMP takes, or more bytes, see `inflate_arguments`.
    """
    slabs = len(decoder.picture.slabs)
    if batch_size * slabs > MOST_SLABS:
        raise ValueError(f"a batch of {batch_size} scans has {batch_size * slabs} slabs, at most {MOST_SLABS} can be "
                         "inflated at once; choose a smaller batch_size")  # fmt: skip
    planes, height, width = decoder.slab_shape
    plans: deque[tuple[BatchPlan, SlotBatch, tuple[Any, ...]]] = deque()

    def feed() -> list[list[Any]]:
        plan, batch = next(batches)
        ring.settle(batch)
        given = inflate_arguments(batch, len(plan.rows), device)
        plans.append((plan, batch, given))  # which the pipeline does not hold
        return [[argument] for argument in given]

    @pipeline_def(
        batch_size=1,  # all scans of a batch are one sample of DALI's: its Python works for every sample
        num_threads=1,
        device_id=device.index,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,  # counts references to its outputs: a batch is not overwritten while it is held
    )
    def volumes():  # type: ignore[no-untyped-def]  # DALI reads the body as a graph
        content, offsets, sizes = fn.external_source(
            source=feed, num_outputs=3, batch=True, no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1],
        )  # fmt: skip
        return _inflate(content, offsets, sizes, [planes, height, width])

    def inflated() -> Generator[tuple[BatchPlan, torch.Tensor]]:
        for outputs in _run(volumes()):
            plan, batch, _ = plans.popleft()
            ring.give_back(batch)  # `_run` has waited for this batch: its copies are done
            yield plan, _as_torch(outputs[0]).view(len(plan.rows), slabs * planes, height, width)
            del outputs

    def finish(plan: BatchPlan, planes: torch.Tensor) -> Images:
        images = output.finish(_cut(planes, decoder), epoch, plan.positions)
        # DALI writes to memory again when nobody refers to it, and knows nothing of what torch has put on a stream:
        # the consumer gets memory of torch's own. Slices were copied when they were cut.
        if isinstance(images, tuple) or images.untyped_storage().data_ptr() != planes.untyped_storage().data_ptr():
            return images
        return images.clone()

    if device.type == "cuda":
        yield from finished_ahead(inflated(), lambda there: there, finish, timing, device)
        return
    for plan, found in inflated():
        yield plan, finish(plan, found)


def _as_torch(batch: Any) -> torch.Tensor:
    """Return the only sample of a batch of DALI's as a tensor on the same memory."""
    tensor = batch[0]
    # The run has waited for this batch; asked about torch's stream, DALI would let that wait for the next one, too.
    return torch.from_dlpack(tensor if isinstance(tensor, TensorCPU) else tensor.__dlpack__(stream=-1))


def _inflate(content: Any, offsets: Any, sizes: Any, slab_shape: list[int]) -> Any:
    """Inflate slabs on the GPU; frames of slabs, uint8. (Tests without a GPU put a decoder of the CPU here.)"""
    return fn.decoders.inflate(
        content.gpu(),
        chunk_offsets=offsets,
        chunk_sizes=sizes,
        shape=slab_shape,
        dtype=types.UINT8,
        algorithm="LZ4",
        layout="DHW",
        sequence_axis_name="F",
    )


def inflate_arguments(batch: SlotBatch, scans: int, device: torch.device = _CPU) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return what `inflate` takes of so many scans: bytes, offsets, sizes. No byte is copied.

    Raises
    ------
    ValueError
        If there are more bytes than offsets can count.
    """
    nbytes = scans * batch.memory.shape[1]
    if nbytes > MOST_BYTES:
        raise ValueError(f"a batch of {scans} scans has slots of {nbytes} bytes, at most {MOST_BYTES} can be inflated "
                         "at once; choose a smaller batch_size")  # fmt: skip
    # DALI takes page-locked memory for that of the current device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        content = TensorCPU(batch.memory[:scans].reshape(-1), is_pinned=batch.pinned)
    starts = np.arange(scans, dtype=np.int32) * np.int32(batch.memory.shape[1])
    return content, (batch.offsets[:scans] + starts[:, np.newaxis]).reshape(-1), batch.sizes[:scans].reshape(-1)


def _cut(images: torch.Tensor, decoder: Decoder) -> tuple[torch.Tensor, ...]:
    """Cut the slices of each plane out of the slabs that were inflated; volumes are what they are."""
    slabs, depth = decoder.picture.slabs, decoder.slab_shape[0]
    found = []
    for plane in decoder.picture.planes:
        positions = plane.positions
        if plane.axis == 0:  # of which not all slabs may be there
            positions = np.searchsorted(slabs, positions // depth) * depth + positions % depth
        found.append(cut(images, plane.axis, positions))
    return tuple(found) or (images,)


def through_dali(
    batches: Iterator[tuple[BatchPlan, np.ndarray]],
    output: Output,
    epoch: int,
    timing: Timing,
    *,
    batch_size: int,
    threads: int,
) -> Generator[tuple[BatchPlan, Images]]:
    """Pass decoded batches through a pipeline on the CPU."""
    # The pipeline reads our memory without a copy, and runs ahead by its queue: what is in flight must stay alive.
    plans: deque[tuple[BatchPlan, np.ndarray]] = deque()
    kind = {"uint8": types.UINT8, "uint16": types.UINT16, "float32": types.FLOAT}[str(output.table(_CPU).dtype)]

    waited = 0.0  # within the pipeline, for batches

    def feed() -> np.ndarray:
        nonlocal waited
        asked = time.perf_counter()
        try:
            plan, array = next(batches)
        finally:
            waited += time.perf_counter() - asked
        plans.append((plan, array))
        return array

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def volumes():  # type: ignore[no-untyped-def]  # DALI reads the body as a graph
        return fn.external_source(source=feed, batch=True, no_copy=True, dtype=kind, ndim=len(output.picture.shape))

    started = time.perf_counter()
    for outputs in _run(volumes()):
        plan, array = plans.popleft()
        pictures = output.picture.split(torch.from_dlpack(outputs[0].as_tensor()))
        images = output.finish(pictures, epoch, plan.positions)
        timing.augment += time.perf_counter() - started - waited
        yield plan, images
        del images, pictures, outputs, array
        started, waited = time.perf_counter(), 0.0


def _run(pipeline: Any) -> Iterator[Any]:
    """Build a pipeline and yield its outputs, each when it is done."""
    pipeline.build()
    while True:
        try:
            outputs = pipeline.run()
        except StopIteration:
            return
        yield outputs
        del outputs
