"""`Loader`: goes over a store pass after pass, and knows where it is."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from ingest.store import VolumeStore
from loaders.batches import BatchPool, loaded_batches
from loaders.cache import ShardCache
from loaders.checks import as_whole
from loaders.errors import describe_scan
from loaders.fetch import Buffer, ShardFetcher
from loaders.groups import decodes_groups
from loaders.order import BatchPlan, Sampling
from loaders.output import Output, make_decoder
from loaders.progress import stop
from loaders.slots import SlotRing, fills_slots
from loaders.threads import ScanGroup, ScanThreads
from loaders.timing import Timing
from loaders.views import Images, each

_NO_DATASET = (
    "a loader makes the batches itself, in threads of this process: iterate over it, or give a DataLoader a "
    "loaders.VolumeDataset"
)


@dataclass  # not frozen: Lightning sets the fields when it moves a batch to a device
class Batch:
    """Some scans.

    Attributes
    ----------
    images
        Tensor (scan, z, y, x), or (scan, slice, height, width); RAS. With channels (scan, channel, z, y, x), or
        (scan, slice, channel, height, width). Of the view ``triplanar`` a tuple of three: axial, coronal, sagittal.
    rows
        int64 (scan,), their rows in the store.
    participant
        Whose they are.
    valid
        bool (scan,). False for scans that count for nothing: the shard cannot be read (``on_error="skip"``), and the
        picture is black, or what an augmentation makes of that (noise); or the scan only fills up the last batch of a
        rank.
    """

    images: Any
    rows: np.ndarray
    participant: list[str]
    valid: np.ndarray

    def __repr__(self) -> str:
        """Say how many scans of what kind; the voxels would fill a notebook."""
        shapes = " and ".join(" x ".join(map(str, images.shape)) for images in each(self.images))
        first = each(self.images)[0]
        kind = f"{str(first.dtype).removeprefix('torch.')} on {first.device}"
        return f"Batch({int(self.valid.sum())} scans that count, images {shapes} {kind})"


class Loader:
    """Goes over a store once per ``for`` loop; made by `open_loader`.

    Attributes
    ----------
    sampling
        The scans of every pass and how they are put in order.
    epoch
        Number of the next pass. A shuffled loader takes another order in each; set it to repeat one. A pass that was
        left is given up by that; one that `load_state_dict` has led into goes on if it is that of this epoch.
    timing
        Where the time of the last pass, or the one under way, went.
    skipped
        By row, why scans were left out (``on_error="skip"``), since the loader was opened.
    backend, device
        What was chosen.
    """

    batch_sampler = None  # Lightning asks for it where there is a sampler

    def __init__(
        self,
        store: VolumeStore,
        sampling: Sampling,
        output: Output,
        *,
        backend: str,
        device: torch.device,
        threads: int,
        skip_errors: bool,
        deadline: float,
        cache: ShardCache | None = None,
    ) -> None:
        self.store = store
        self.sampling = sampling
        self.backend = backend
        self.device = device
        self._epoch = 0
        self.timing = Timing(threads=threads)
        self.skipped: dict[int, str] = {}
        self._output = output
        self._skip_errors = skip_errors
        self._under_way: tuple[int, int] | None = None  # epoch of the pass under way, and how many scans are done
        self._resume: tuple[int, int] | None = None  # the same of a pass to go on with, which another loader began
        self._participants = store.scans["participant"].to_numpy()
        self._decoder = make_decoder(store, output, device)
        self._fetcher = ShardFetcher(store, output.picture.slabs, cache, self._decoder.check)
        self._inflates = _inflates(backend, device)
        if backend == "dali":
            importlib.import_module("loaders.dali_backend")  # takes half a second, which is none of the first pass
        self._describe = functools.partial(describe_scan, store)
        largest = min(sampling.batch_size, max(len(sampling.rows), 1))
        pinned, one = device.type == "cuda", (1, *output.picture.shape)
        if self._inflates:
            self._ring = SlotRing(largest, self._decoder, self.timing, pinned=pinned)
            load = fills_slots(self._fetcher, self._decoder, self._ring)
        else:
            self._pool = BatchPool((largest, *one[1:]), self._decoder.table.dtype, pinned=pinned)
            load = decodes_groups(self._fetcher, self._decoder)
        if self._fetcher.compiled:  # is compiled, or loaded, before any deadline runs
            target = self._ring.one() if self._inflates else np.empty(one, self._decoder.table.dtype)
            group = ScanGroup([-1], [0], target)
            load(group, Buffer())
            stop(group.progress)  # for iterators that are left when Python ends, which compiles nothing any more
        self._threads = ScanThreads(threads, load, deadline=deadline, describe=self._describe)

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.sampling)

    def __getitem__(self, index: object) -> NoReturn:
        """Refuse to be a dataset, as torch's DataLoader takes it for."""
        raise TypeError(_NO_DATASET)

    def __reduce__(self) -> NoReturn:
        """Refuse to be sent to another process."""
        raise TypeError(_NO_DATASET)

    @property
    def sampler(self) -> Loader:
        """The loader itself: Lightning tells the samplers of loaders which epoch begins."""
        return self

    @property
    def epoch(self) -> int:
        """Number of the next pass."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = as_whole("epoch", epoch, 0)
        self._under_way = None

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch, as setting `epoch` does; so Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Generator[Batch]:
        self._threads.check_process()  # before anything waits: DALI's threads are not there either
        epoch, start = self._next()
        self._epoch, self._resume = epoch + 1, None
        self._under_way = epoch, start
        timing = self.timing
        timing.reset()
        before = self._threads.totals()
        begun = time.perf_counter()
        batches = self._images(self.sampling.batches(epoch, start), epoch)
        try:
            for plan, images in batches:
                timing.scans += int(plan.valid.sum())
                timing.batches += 1
                timing.bytes_out += sum(one.numel() * one.element_size() for one in each(images))
                timing.elapsed = time.perf_counter() - begun
                now = self._threads.totals()
                timing.read, timing.decode = now[0] - before[0], now[1] - before[1]
                timing.bytes_read = now[2] - before[2]
                self._under_way = epoch, int(plan.end)
                yield Batch(images, plan.rows, self._participants[plan.rows].tolist(), plan.valid)
                del images
                self._threads.check_process()
            self._under_way = None
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is, to be given to `load_state_dict`; plain numbers and text.

        The scans of batches that the loop has got count as done. It says nothing of ranks and batch sizes, and may be
        loaded where those are others.
        """
        epoch, position = self._not_done(*(self._under_way or self._next()))
        return {"version": 1, "epoch": epoch, "position": position, **self.sampling.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was: the next ``for`` loop begins there.

        Raises
        ------
        ValueError
            If that loader went over other scans, or in another order, or the state is none.
        """
        if state.get("version") != 1:
            raise ValueError(f"state of version {state.get('version')!r}, expected 1")
        for name, value in self.sampling.identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state was saved with {name} {state.get(name)!r}, this loader has {value!r}; open it with the "
                    "same rows, seed and sampling"
                )
        epoch = as_whole("the state's epoch", state.get("epoch"), 0)
        position = as_whole("the state's position", state.get("position"), 0, len(self.sampling.rows))
        self._resume = self._not_done(epoch, position)
        self.epoch = self._resume[0]

    def _next(self) -> tuple[int, int]:
        """Return where the next pass begins: its epoch, and how many of its scans are done."""
        return self._resume if self._resume and self._resume[0] == self._epoch else (self._epoch, 0)

    def _not_done(self, epoch: int, position: int) -> tuple[int, int]:
        """Return a place in the passes, or the start of the next one if none of this loader's batches follows."""
        return (epoch + 1, 0) if position and self.sampling.is_done(position) else (epoch, position)

    def _images(self, plans: Iterator[BatchPlan], epoch: int) -> Generator[tuple[BatchPlan, Images]]:
        skipped = self.skipped if self._skip_errors else None
        timing, output = self.timing, self._output
        # Augmenting on the CPU takes longer than loading, and memory for a batch of its own. So does DALI.
        busy = output.augmentation is not None or self.backend == "dali"
        ahead = 3 if self.device.type == "cuda" else 1 if busy and not self._inflates else 2
        # Groups enough for all threads, in the batches that are under way, and some more; of remote scans each is
        # waited for by itself
        several = -(-3 * self._threads.threads // (2 * ahead))
        most_groups = several if self._fetcher.compiled else self.sampling.batch_size
        if self._inflates:
            from loaders.dali_backend import inflated_on_gpu

            loaded = loaded_batches(
                plans, self._threads, self._ring.take, self._describe, timing,
                ahead=ahead, most_groups=most_groups, skipped=skipped, blank=self._ring.blank,
            )  # fmt: skip
            return inflated_on_gpu(
                loaded, self._ring, self._decoder, output, epoch, timing,
                batch_size=self.sampling.batch_size, device=self.device,
            )  # fmt: skip
        loaded = loaded_batches(
            plans, self._threads, self._pool.take, self._describe, timing,
            ahead=ahead, most_groups=most_groups, skipped=skipped,
            blank=lambda batch, place: batch[place].fill(self._decoder.table[0]),
        )  # fmt: skip
        if self.backend == "dali":
            from loaders.dali_backend import through_dali

            threads = self._threads.threads
            return through_dali(loaded, output, epoch, timing, batch_size=self.sampling.batch_size, threads=threads)
        if self.device.type == "cuda":
            from loaders.torch_backend import on_gpu

            return on_gpu(loaded, output, epoch, timing, self.device)
        from loaders.torch_backend import on_cpu

        return on_cpu(loaded, output, epoch, timing)

    def close(self) -> None:
        """Stop the threads; they also end when nobody holds the loader any more."""
        self._threads.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _inflates(backend: str, device: torch.device) -> bool:
    """Tell whether compressed bytes go to the GPU and are inflated there."""
    return backend == "dali" and device.type == "cuda"
