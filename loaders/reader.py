"""Volumes of a store, one call at a time: for pictures, tests, and notebooks. `open_loader` is for whole passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ingest.places import Place
from ingest.store import VolumeStore, open_store
from loaders.errors import as_shard_error, describe_scan
from loaders.fetch import Buffer, ShardFetcher
from loaders.layout import check_layout
from loaders.output import Output, make_decoder
from loaders.select import as_rows
from loaders.views import Slices, as_images, plan_picture


class VolumeReader:
    """Reads pictures of scans by their rows; several threads may share one.

    Parameters
    ----------
    store
        A version-1 store, or its path.
    view, slices
        See `loaders.open_loader`.
    output
        Instead of those: what threads make of the pictures, by default bytes as they are stored. They come as they are
        decoded: with the scale of a floating `dtype` (of half precision as its bits, uint16; with an augmentation from
        0 to 1, not normalised), but without augmentation and channels, which are `Output.finish`'s part.

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
        slices: Slices = 3,
        output: Output | None = None,
    ) -> None:
        self.store = store if isinstance(store, VolumeStore) else open_store(store)
        check_layout(self.store)
        if output is None:
            output = Output(plan_picture(self.store.grid.shape_zyx, self.store.slab, view, slices))
        self.picture = output.picture
        self._fetcher = ShardFetcher(self.store, self.picture.slabs)
        self._decoder = make_decoder(self.store, output, torch.device("cpu"))

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) of every volume, or (slice, height, width); of the view ``triplanar`` (voxel,) of all slices."""
        return self.picture.shape

    def read(self, rows: Sequence[int] | np.ndarray) -> Any:
        """Return pictures as an array (scan, z, y, x) or (scan, slice, height, width), uint8 or as `output` says.

        Of the view ``triplanar`` they are a tuple of three arrays.

        Parameters
        ----------
        rows
            Row numbers, or a mask (bool, one for each row of the store), as for `loaders.open_loader`.

        Raises
        ------
        IndexError
            If a row holds no volume.
        ValueError
            For rows that are no whole numbers, or a mask of another length.
        CorruptShardError
            If a shard is damaged or missing.
        """
        return as_images(tuple(one.numpy() for one in self.read_pictures(rows)))

    def read_pictures(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return the pictures of each plane as tensors; see `read`."""
        wanted, buffer = as_rows(self.store, rows), Buffer()  # one for each call: threads may share a reader
        out = np.empty((len(wanted), *self.picture.shape), self._decoder.table.dtype)
        for row, picture in zip(wanted.tolist(), out, strict=True):
            try:
                self._decoder.decode(self._fetcher.fetch(row, buffer), picture)
            except (OSError, ValueError) as error:
                raise as_shard_error(error, describe_scan(self.store, row)) from error
        return self.picture.split(torch.from_numpy(out))

    def __enter__(self) -> VolumeReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file stays open between calls."""
