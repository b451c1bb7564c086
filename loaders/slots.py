"""Page-locked memory for the compressed slabs of a batch, from which a GPU copies them, and where they are in it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numba
import numpy as np
import torch

from ingest.decode import read_index
from ingest.encode import encode_shard
from ingest.shard import CRC_BYTES, SLAB_HEADER
from loaders.decode import Decoder
from loaders.fetch import Buffer, Payload, ShardFetcher
from loaders.groups import STOPPED, Source, load_one_by_one, read_next, source_of
from loaders.progress import Progress, settle
from loaders.threads import ScanGroup
from loaders.timing import Timing

logger = logging.getLogger("loaders")

QUEUE_DEPTH = 2  # batches that are inflated ahead
MOST_SLABS = 65_535  # of a batch, in nvCOMP
MOST_BYTES = 2**31 - 1  # of a batch: its offsets are int32
_LIKELY = 0.6  # of its voxels, at most, are a scan's compressed bytes; more have larger slots made
_ROUNDED = 64 << 10  # bytes, to which slots are rounded up


def to_inflate(slabs: int, slab_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return how many scans can be inflated at a time, and how many bytes of a GPU each takes until it is used."""
    raw = slabs * int(np.prod(slab_shape))
    most = max(1, min(MOST_SLABS // slabs, MOST_BYTES // max(1, raw)))  # what does not compress is a little larger
    return most, (QUEUE_DEPTH + 2) * raw + (QUEUE_DEPTH + 1) * int(_LIKELY * raw)


class SlotBatch:
    """The compressed slabs of a batch.

    Attributes
    ----------
    memory
        uint8 (scan, byte): a slot for each scan.
    offsets, sizes
        int32 (scan, slab): where the LZ4 blocks are in their slots.
    larger
        By place, what does not fit into its slot.
    """

    def __init__(self, scans: int, slabs: int, slot: int, *, pinned: bool) -> None:
        self.pinned = pinned
        self.memory = self._allocate(scans, slot)
        self.offsets, self.sizes = np.zeros((2, scans, slabs), np.int32)
        self.larger: dict[int, np.ndarray] = {}

    def _allocate(self, scans: int, slot: int) -> np.ndarray:
        # A GPU copies what is page-locked by itself, and faster.
        return torch.empty((scans, slot), dtype=torch.uint8, pin_memory=self.pinned).numpy()

    def hold(self, place: int, content: np.ndarray, index: np.ndarray) -> None:
        """Take the bytes of a scan, which may be in its slot already, and the index of the slabs in them."""
        slot = self.memory[place]
        if len(content) > len(slot):
            self.larger[place] = content.copy()
        elif content.ctypes.data != slot.ctypes.data:
            slot[: len(content)] = content
        self.offsets[place] = index[:, 0] + np.uint64(SLAB_HEADER)
        self.sizes[place] = index[:, 1] - np.uint64(SLAB_HEADER + CRC_BYTES)

    def move(self, slot: int) -> None:
        """Exchange the memory for another one with the same bytes: a read that hangs may still write into this."""
        memory = self._allocate(len(self.memory), slot)
        memory[:, : self.memory.shape[1]] = self.memory
        for place in [place for place, content in self.larger.items() if len(content) <= slot]:
            content = self.larger.pop(place)
            memory[place, : len(content)] = content
        self.memory = memory


class SlotRing:
    """Batches of slots that are used again when they were inflated.

    Parameters
    ----------
    scans
        Of the largest batch.
    decoder
        Checks what is read, and decodes what a GPU cannot.
    pinned
        Page-locked memory.
    """

    def __init__(self, scans: int, decoder: Decoder, timing: Timing, *, pinned: bool) -> None:
        self._scans, self._decoder, self._timing, self._pinned = scans, decoder, timing, pinned
        self._slabs = len(decoder.picture.slabs)
        self._free: list[SlotBatch] = []
        self.slot = 0
        self.enlarge(int(_LIKELY * self._slabs * np.prod(decoder.slab_shape)))

    def enlarge(self, nbytes: int) -> None:
        """Make slots of at least so many bytes from now on."""
        self.slot = max(self.slot, -(-nbytes // _ROUNDED) * _ROUNDED)
        self._free.clear()

    def take(self, scans: int) -> SlotBatch:
        """Return slots that nobody uses, for so many scans or more."""
        assert scans <= self._scans
        return self._free.pop() if self._free else SlotBatch(self._scans, self._slabs, self.slot, pinned=self._pinned)

    def one(self) -> SlotBatch:
        """Return a small slot that is not one of the ring's."""
        return SlotBatch(1, self._slabs, 0, pinned=False)

    def give_back(self, batch: SlotBatch) -> None:
        """Let slots be used again."""
        if batch.memory.shape[1] == self.slot:
            self._free.append(batch)

    def settle(self, batch: SlotBatch) -> None:
        """Bring a batch whose scans are all there into one piece, and have slots be as large as it takes."""
        if batch.larger:
            self.enlarge(max(map(len, batch.larger.values())) * 9 // 8)
            batch.move(self.slot)

    def fill(self, payload: Payload, batch: SlotBatch, place: int, row: int) -> None:
        """Check what was read of a scan; slabs that a GPU cannot inflate are decoded here, and packed again."""
        if payload.index[:, 1].all():
            self._decoder.check(payload)
            batch.hold(place, payload.content, payload.index)
            return
        if not self._timing.decoded_on_cpu:
            logger.warning("row %d has slabs that were left out, which a GPU cannot inflate: it is decoded here", row)
        self._timing.decoded_on_cpu += 1
        planes, height, width = self._decoder.slab_shape
        voxels = np.empty((len(payload.index) * planes, height, width), np.uint8)
        self._decoder.decode_slabs(payload, voxels)
        self._hold_voxels(voxels, batch, place)

    def blank(self, batch: SlotBatch, place: int) -> None:
        """Let a scan be an empty picture."""
        planes, height, width = self._decoder.slab_shape
        batch.move(batch.memory.shape[1])
        self._hold_voxels(np.zeros((self._slabs * planes, height, width), np.uint8), batch, place)

    def _hold_voxels(self, voxels: np.ndarray, batch: SlotBatch, place: int) -> None:
        planes = self._decoder.slab_shape[0]
        content = np.frombuffer(encode_shard(voxels, planes), np.uint8)
        batch.larger.pop(place, None)
        batch.hold(place, content, read_index(content, len(voxels) // planes))


class _Slot(Buffer):
    """The slot of a scan, as memory to read to; what is too much for it gets memory of its own."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory


def fills_slots(fetcher: ShardFetcher, decoder: Decoder, ring: SlotRing) -> Callable[[ScanGroup, Buffer], None]:
    """Return what loads groups whose target is a `SlotBatch`, see `loaders.threads.ScanThreads`."""
    raw = int(np.prod(decoder.slab_shape))

    def load(group: ScanGroup, _: Buffer) -> None:
        batch: SlotBatch = group.target
        if fetcher.compiled:
            source, index = source_of(fetcher, group.rows, raw), np.empty((len(fetcher.slabs), 2), np.uint64)
            if not _load_compressed(
                source, group.progress, batch.memory, index, group.places, batch.offsets, batch.sizes
            ):
                return
        load_one_by_one(
            group,
            lambda row, place: fetcher.fetch(row, _Slot(batch.memory[place])),
            lambda payload, place, row: ring.fill(payload, batch, place, row),
        )

    return load


@numba.njit(cache=True, nogil=True)
def _load_compressed(
    source: Source, progress: Progress, memory: np.ndarray, index: np.ndarray, places: np.ndarray,
    offsets: np.ndarray, sizes: np.ndarray,
) -> bool:  # fmt: skip
    """Read and check scans into their slots, see `SlotBatch`; False if the work was stopped."""
    for number in range(len(source.paths)):
        place = places[number]
        found = read_next(number, source, progress, memory[place], index)
        if found == STOPPED:
            return False
        there = found > 0
        for slab in range(len(index)):
            there = there and index[slab, 1] != 0  # what is left out cannot be inflated
        if there:
            for slab in range(len(index)):
                offsets[place, slab] = np.int32(index[slab, 0] + np.uint64(SLAB_HEADER))
                sizes[place, slab] = np.int32(index[slab, 1] - np.uint64(SLAB_HEADER + CRC_BYTES))
            settle(progress, number, found)
    return True
