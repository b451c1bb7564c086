"""Volumes of a store, one call at a time: for pictures, tests, and notebooks. `open_loader` is for whole passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ingest.places import Place
from ingest.store import VolumeStore, open_store
from loaders.fetch import Buffer, ShardFetcher
from loaders.layout import check_layout
from loaders.output import Output, make_decoder
from loaders.select import check_rows
from loaders.threads import as_shard_error
from loaders.views import plan_picture


class VolumeReader:
    """Reads pictures of scans by their rows.

    Parameters
    ----------
    store
        A version-1 store, or its path.
    view, slices
        See `loaders.open_loader`.
    output
        Instead of those: what shall become of the pictures, on the CPU; by default bytes as they are stored.

    Raises
    ------
    StoreError
        If the store is of another format, or its shards are laid out otherwise than version 1 says.
    """

    def __init__(
        self,
        store: str | Place | VolumeStore,
        *,
        view: str = "volume",
        slices: int | Sequence[int] = 3,
        output: Output | None = None,
    ) -> None:
        self.store = store if isinstance(store, VolumeStore) else open_store(store)
        check_layout(self.store)
        if output is None:
            output = Output(plan_picture(self.store.grid.shape_zyx, self.store.slab, view, slices))
        self.picture = output.picture
        self._fetcher = ShardFetcher(self.store, self.picture.slabs)
        self._decoder = make_decoder(self.store, output, torch.device("cpu"))
        self._buffer = Buffer()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) of every volume, or (slice, height, width)."""
        return self.picture.shape

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return pictures as an array (scan, z, y, x) or (scan, slice, height, width), uint8 or as `output` says.

        Raises
        ------
        IndexError
            If a row holds no volume.
        CorruptShardError
            If a shard is damaged or missing.
        """
        wanted = check_rows(self.store, np.asarray(rows, dtype=np.int64).reshape(-1))
        out = np.empty((len(wanted), *self.shape), self._decoder.table.dtype)
        for row, picture in zip(wanted.tolist(), out, strict=True):
            try:
                self._decoder.decode(self._fetcher.fetch(row, self._buffer), picture)
            except (OSError, ValueError) as error:
                source = self.store.scans["source"][row]
                raise as_shard_error(error, f"row {row} ({source}) of {self.store.path}") from error
        return out

    def __enter__(self) -> VolumeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer = Buffer()
