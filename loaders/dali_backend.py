"""The DALI backend: on a GPU compressed slabs are copied there and inflated there; the CPU decodes nothing.

Without a GPU the pipeline is fed with decoded batches instead, for `inflate` is there for GPUs only.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorCPU

from ingest.decode import read_index
from ingest.shard import CRC_BYTES, SLAB_HEADER, encode_shard
from loaders.decode import Decoder
from loaders.fetch import Buffer, Payload
from loaders.order import BatchPlan
from loaders.output import Output
from loaders.timing import GpuStopwatch, Timing
from loaders.views import View, cut

logger = logging.getLogger("loaders")

QUEUE_DEPTH = 2
_CPU = torch.device("cpu")
_MOST_SLABS = 65_535  # of a batch, in nvCOMP


class Slot(Buffer):
    """Memory for the compressed slabs of a scan, and what `inflate` must know of them.

    Attributes
    ----------
    content
        uint8: bytes that hold the LZ4 blocks.
    offsets, sizes
        int32 (slab,): where the blocks are in `content`.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        super().__init__()
        self.content = self.memory
        self.offsets = self.sizes = np.empty(0, np.int32)

    def _allocate(self, nbytes: int) -> np.ndarray:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned).numpy()

    def hold(self, content: np.ndarray, index: np.ndarray) -> None:
        """Take bytes, which need not be this slot's own, and the index of the slabs in them."""
        self.content = content
        self.offsets = (index[:, 0] + np.uint64(SLAB_HEADER)).astype(np.int32)
        self.sizes = (index[:, 1] - np.uint64(SLAB_HEADER + CRC_BYTES)).astype(np.int32)


class SlotRing:
    """Slots that are used again when their scans were inflated.

    Parameters
    ----------
    decoder
        Checks what is read, and decodes what a GPU cannot.
    pinned
        Page-locked memory, from which a GPU copies by itself.
    """

    def __init__(self, decoder: Decoder, timing: Timing, *, pinned: bool) -> None:
        self._decoder = decoder
        self._timing = timing
        self._pinned = pinned
        self._free: list[Slot] = []

    def take(self, scans: int) -> list[Slot]:
        """Return slots that nobody uses."""
        return [self._free.pop() if self._free else Slot(pinned=self._pinned) for _ in range(scans)]

    def give_back(self, slots: Sequence[Slot]) -> None:
        """Let slots be used again."""
        self._free.extend(slots)

    def fill(self, payload: Payload, slot: Slot, row: int) -> None:
        """Check what was read into a slot; slabs that a GPU cannot inflate are decoded here, and packed again."""
        if payload.index[:, 1].all():
            self._decoder.check(payload)
            slot.hold(payload.content, payload.index)
            return
        if not self._timing.decoded_on_cpu:
            logger.warning("row %d has slabs that were left out, which a GPU cannot inflate: it is decoded here", row)
        self._timing.decoded_on_cpu += 1
        planes, height, width = self._decoder.slab_shape
        voxels = np.empty((len(payload.index) * planes, height, width), np.uint8)
        self._decoder.decode_slabs(payload, voxels)
        self._hold_voxels(voxels, slot)

    def blank(self, slots: list[Slot], place: int) -> None:
        """Exchange a slot for one with an empty picture: a read that hangs may still write into the old one."""
        planes, height, width = self._decoder.slab_shape
        slots[place] = Slot(pinned=self._pinned)
        voxels = np.zeros((len(self._decoder.picture.slabs) * planes, height, width), np.uint8)
        self._hold_voxels(voxels, slots[place])

    def _hold_voxels(self, voxels: np.ndarray, slot: Slot) -> None:
        planes = self._decoder.slab_shape[0]
        content = np.frombuffer(encode_shard(voxels, planes), np.uint8)
        memory = slot.reserve(len(content))[: len(content)]
        memory[:] = content
        slot.hold(memory, read_index(memory, len(voxels) // planes))


def inflated_on_gpu(
    batches: Iterator[tuple[BatchPlan, list[Slot]]],
    ring: SlotRing,
    decoder: Decoder,
    output: Output,
    epoch: int,
    timing: Timing,
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Generator[tuple[BatchPlan, torch.Tensor]]:
    """Copy compressed slabs to the GPU, inflate them there, and yield the batches.

    Raises
    ------
    ValueError
        If a batch has more slabs than nvCOMP takes.
    """
    slabs = len(decoder.picture.slabs)
    if batch_size * slabs > _MOST_SLABS:
        raise ValueError(f"a batch of {batch_size} scans has {batch_size * slabs} slabs, at most {_MOST_SLABS} can be "
                         "inflated at once; choose a smaller batch_size")  # fmt: skip
    planes, height, width = decoder.slab_shape
    plans: deque[tuple[BatchPlan, list[Slot]]] = deque()

    def feed() -> tuple[list[Any], list[np.ndarray], list[np.ndarray]]:
        plan, slots = next(batches)
        plans.append((plan, slots))
        return inflate_arguments(slots, device)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,  # counts references to its outputs: a batch is not overwritten while it is held
    )
    def volumes():  # type: ignore[no-untyped-def]  # DALI reads the body as a graph
        content, offsets, sizes = fn.external_source(
            source=feed, num_outputs=3, batch=True, no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1],
        )  # fmt: skip
        inflated = _inflate(content, offsets, sizes, [planes, height, width])
        # At once: frames of slabs are a layout that other operators take for a video.
        return fn.reshape(inflated, shape=[slabs * planes, height, width, 1], layout="DHWC")

    stopwatch = GpuStopwatch(device)
    # DALI writes to memory again when nobody refers to it, and knows nothing of what torch has put on its stream: a
    # batch is referred to until that has been done, and what the consumer gets is memory of torch's own.
    in_use: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
    try:
        for outputs in _run(volumes()):
            plan, slots = plans.popleft()
            inflated = _as_torch(outputs[0]).squeeze(-1)
            ring.give_back(slots)  # `_run` has waited for this batch: its copies are done
            with stopwatch.running() if inflated.is_cuda else contextlib.nullcontext():
                images = output.finish(_cut(inflated, decoder), epoch, plan.positions)
                if images.untyped_storage().data_ptr() == inflated.untyped_storage().data_ptr():
                    images = images.clone()
            if inflated.is_cuda:
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(device))
                in_use.append((done, inflated))
            while in_use and in_use[0][0].query():
                in_use.popleft()
            timing.augment += stopwatch.seconds()
            yield plan, images
            del images, inflated, outputs
    finally:
        for done, _ in in_use:
            done.synchronize()


def _as_torch(batch: Any) -> torch.Tensor:
    """Return a batch of DALI's as a tensor on the same memory; of samples that lie apart, as a copy."""
    try:
        tensor = batch.as_tensor()
        # The run has waited for this batch; asked about torch's stream, DALI would let that wait for the next one, too.
        return torch.from_dlpack(tensor if isinstance(tensor, TensorCPU) else tensor.__dlpack__(stream=-1))
    except RuntimeError:
        return torch.stack([torch.from_dlpack(batch[number]) for number in range(len(batch))])


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


def inflate_arguments(
    slots: Sequence[Slot], device: torch.device = _CPU
) -> tuple[list[Any], list[np.ndarray], list[np.ndarray]]:
    """Return what `inflate` takes of each scan: bytes, offsets, sizes. No byte is copied."""
    # DALI takes page-locked memory for that of the current device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        contents = [TensorCPU(slot.content, is_pinned=slot.pinned) for slot in slots]
    return contents, [slot.offsets for slot in slots], [slot.sizes for slot in slots]


def _cut(images: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """Cut slices out of the slabs that were inflated."""
    picture = decoder.picture
    if picture.view is View.volume:
        return images
    positions = picture.positions
    if picture.axis == 0:  # of which not all planes are there
        planes = decoder.slab_shape[0]
        positions = np.searchsorted(picture.slabs, positions // planes) * planes + positions % planes
    return cut(images, picture.axis, positions)


def through_dali(
    batches: Iterator[tuple[BatchPlan, np.ndarray]],
    output: Output,
    epoch: int,
    timing: Timing,
    *,
    batch_size: int,
    threads: int,
) -> Generator[tuple[BatchPlan, torch.Tensor]]:
    """Pass decoded batches through a pipeline on the CPU."""
    # The pipeline reads our memory without a copy, and runs ahead by its queue: what is in flight must stay alive.
    plans: deque[tuple[BatchPlan, np.ndarray]] = deque()
    kind = {"uint8": types.UINT8, "uint16": types.UINT16, "float32": types.FLOAT}[str(output.table(_CPU).dtype)]

    def feed() -> np.ndarray:
        plan, array = next(batches)
        plans.append((plan, array))
        return array[..., np.newaxis]

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def volumes():  # type: ignore[no-untyped-def]  # DALI reads the body as a graph
        return fn.external_source(source=feed, batch=True, no_copy=True, layout="DHWC", dtype=kind, ndim=4)

    for outputs in _run(volumes()):
        plan, array = plans.popleft()
        started = time.perf_counter()
        images = torch.from_dlpack(outputs[0].as_tensor()).squeeze(-1)
        images = output.finish(images, epoch, plan.positions)
        timing.augment += time.perf_counter() - started
        yield plan, images
        del images, outputs, array


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
