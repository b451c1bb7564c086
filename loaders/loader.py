"""`open_loader`: batches of volumes from a store, in order or shuffled, through DALI or plain torch."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from ingest.places import Place
from ingest.store import VolumeStore
from loaders.order import epoch_order, split_batches
from loaders.pool import BatchPool
from loaders.reader import VolumeReader

BACKENDS = ("auto", "dali", "torch")
_AHEAD = 2  # batches being decoded while one is in use


@dataclass(frozen=True)
class Batch:
    """Some scans.

    Attributes
    ----------
    images
        uint8 (scan, z, y, x), RAS.
    rows
        int64 (scan,), their rows in the store.
    participant
        Whose they are.
    """

    images: torch.Tensor
    rows: np.ndarray
    participant: list[str]


class Loader:
    """Iterates over a store once per ``for`` loop; made by `open_loader`.

    Attributes
    ----------
    epoch
        Number of the next pass. A shuffled loader takes another order in each; set it to repeat one.
    """

    def __init__(
        self,
        reader: VolumeReader,
        rows: np.ndarray,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        backend: str,
        drop_last: bool,
    ) -> None:
        self.reader = reader
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.backend = backend
        self.drop_last = drop_last
        self.epoch = 0
        self._participants = reader.store.scans["participant"].to_numpy()
        self._pool = BatchPool((min(batch_size, max(len(rows), 1)), *reader.shape))

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        order = epoch_order(self.rows, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)
        self.epoch += 1
        batches = split_batches(order, self.batch_size, drop_last=self.drop_last)
        decoded = self._decoded(batches)
        if self.backend == "dali":
            from loaders.dali_backend import through_dali

            images = through_dali(decoded, self.batch_size, self.reader.threads)
        else:
            images = (torch.from_numpy(array) for array in decoded)
        for rows, tensor in zip(batches, images, strict=True):
            yield Batch(tensor, rows, self._participants[rows].tolist())

    def _decoded(self, batches: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield decoded batches in order while the next ones are being decoded."""
        waiting = iter(batches)
        running: deque[tuple[np.ndarray, list[Future[None]]]] = deque()

        def start_next() -> None:
            rows = next(waiting, None)
            if rows is not None:
                array = self._pool.take(len(rows))
                running.append((array, self.reader.submit(rows, array)))

        try:
            for _ in range(_AHEAD):
                start_next()
            while running:
                array, futures = running.popleft()
                for future in futures:
                    future.result()
                start_next()
                yield array
        finally:  # the consumer stopped early, or a shard is damaged: nobody may write into memory that is given back
            for _, futures in running:
                for future in futures:
                    future.cancel()
                for future in futures:
                    if not future.cancelled():
                        future.exception()

    def close(self) -> None:
        """Stop the reader's threads."""
        self.reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_loader(
    store: str | Place | VolumeStore,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 16,
    shuffle: bool = False,
    seed: int = 0,
    backend: str = "auto",
    threads: int | None = None,
    drop_last: bool = False,
) -> Loader:
    """Open a store for iteration.

    Parameters
    ----------
    store
        Path of a store, or an open one.
    rows
        Rows to visit, each of status ``ok``; by default all of those.
    batch_size
        Scans per batch; the last batch may have fewer.
    shuffle
        Visit the rows in an order that depends on `seed` and the epoch alone.
    backend
        ``dali`` (a DALI pipeline; needs nvidia-dali), ``torch``, or ``auto``: DALI where it and a GPU are at hand. The
        pixels are the same.
    threads
        Threads that read and decode; by default one per core, at most 8.
    drop_last
        Leave out a last batch that is not full.

    Raises
    ------
    ValueError
        For a batch size below 1, an unknown backend, or ``dali`` where DALI is not installed.
    IndexError
        If a row holds no volume.

    Examples
    --------
    >>> with open_loader("out.zarr", batch_size=8, shuffle=True, seed=1) as loader:  # doctest: +SKIP
    ...     for batch in loader:
    ...         batch.images  # uint8 tensor (8, 160, 192, 160)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    chosen = choose_backend(backend)
    reader = VolumeReader(store, threads=threads)
    wanted = reader.store.ok_rows if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    reader.check_rows(wanted)
    return Loader(
        reader, wanted, batch_size=batch_size, shuffle=shuffle, seed=seed, backend=chosen, drop_last=drop_last
    )


def choose_backend(backend: str) -> str:
    """Turn ``auto`` into ``dali`` or ``torch``, and refuse what is not there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown, expected one of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend == "dali" and not installed:
        raise ValueError("backend 'dali' needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use backend 'torch'")
    if backend == "auto":
        return "dali" if installed and torch.cuda.is_available() else "torch"
    return backend
