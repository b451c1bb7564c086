"""A store as a `torch.utils.data.Dataset`, for code that insists on one. `open_loader` is several times faster."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ingest.places import Place
from ingest.store import VolumeStore, open_store
from loaders.augmentation import Augmentation
from loaders.output import Output, torch_dtype
from loaders.reader import VolumeReader
from loaders.select import select_rows
from loaders.views import Slices, plan_picture


class Sample(NamedTuple):
    """One scan; torch's collation makes a batch of several.

    Attributes
    ----------
    image
        Tensor (z, y, x) or (slice, height, width), with an axis of channels before the last three or two if asked for;
        of the view ``triplanar`` a tuple of three.
    row
        Of the store.
    participant
        Whose it is.
    """

    image: Any
    row: int
    participant: str


class VolumeDataset(Dataset[Sample]):
    """The scans of a store by number, for `torch.utils.data.DataLoader` with any sampler and number of workers.

    Parameters
    ----------
    store, rows, where, known, view, slices, dtype, mean, std, channels, augmentation, seed
        See `loaders.open_loader`. An augmentation depends on the seed, the epoch and the item's number alone.

    Attributes
    ----------
    rows
        int64, row of the store of each item.
    epoch
        Changes the augmentations; set it before each pass (workers that live on keep the old one).

    Raises
    ------
    ValueError, IndexError, StoreError
        As `loaders.open_loader`.
    """

    def __init__(
        self,
        store: str | Place | VolumeStore,
        *,
        rows: Sequence[int] | np.ndarray | None = None,
        where: str | None = None,
        known: str | Sequence[str] = (),
        view: str = "volume",
        slices: Slices = 3,
        dtype: str | torch.dtype = "uint8",
        mean: float = 0.0,
        std: float = 1.0,
        channels: int | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.store = store if isinstance(store, VolumeStore) else open_store(store)
        self.rows = select_rows(self.store, rows=rows, where=where, known=known)
        self.epoch = 0
        picture = plan_picture(self.store.grid.shape_zyx, self.store.slab, view, slices)
        self._output = Output(picture, torch_dtype(dtype), mean, std, channels, False, augmentation, seed)
        self._participants = self.store.scans["participant"].to_numpy()
        path = self.store.path  # workers may start when the program has changed its folder
        self._found = replace(self.store, path=path.absolute()) if isinstance(path, Path) else self.store
        self._reader: tuple[int, VolumeReader] | None = None
        self._open_reader()  # says at once if the store cannot be read

    def __len__(self) -> int:
        """Scans."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Read one scan."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Read the scans of a batch; torch's DataLoader calls this where it is there."""
        items = [operator.index(index) for index in indices]  # TypeError for what is no whole number
        if items and not (-len(self) <= min(items) and max(items) < len(self)):
            raise IndexError(f"items {items} were asked for, the dataset has {len(self)}")
        places = np.array(items, dtype=np.int64) % max(1, len(self))
        rows = self.rows[places]
        found = self._output.finish(self._open_reader().read_pictures(rows), self.epoch, places)
        images = zip(*found, strict=True) if isinstance(found, tuple) else found
        return [Sample(image, int(row), str(self._participants[row])) for image, row in zip(images, rows, strict=True)]

    def _open_reader(self) -> VolumeReader:
        """Return a reader of this process: one that was forked from it, or sent to it, may have none of its files."""
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = (os.getpid(), VolumeReader(self._found, output=self._output))
        return self._reader[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave the reader out, which is made again where the dataset arrives."""
        return {**self.__dict__, "_reader": None}
