"""A store -> embeddings: load, encode, gather with identity, phenotypes and provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from extract.embeddings import Embeddings
from extract.encoder import Encoder, describe
from extract.fast import choose_batch_size
from ingest.places import Place
from ingest.store import open_store, package_versions
from loaders import View, open_loader
from loaders.select import select_rows
from loaders.views import plan_picture

_IDENTITY = ["participant", "session", "modality", "brain_voxels", "head_scale"]


def extract(
    store: str | Place,
    encoder: Encoder,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    backend: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed the scans of a store.

    Parameters
    ----------
    store
        Path of the store.
    encoder
        See `extract.encoder.build_encoder`.
    rows
        Which scans, see `loaders.select.select_rows`; by default all that hold a volume.
    backend, threads
        See `loaders.open_loader`.
    batch_size
        Scans at a time; by default as many as are fast and go into the memory that is free.
    on_batch
        Called with the number of scans just embedded.

    Raises
    ------
    ValueError
        If the store holds no volume, has fewer slices than are wanted, or features are no finite numbers.
    """
    volumes = open_store(store)
    rows = select_rows(volumes, rows=rows)
    if not len(rows):
        raise ValueError(f"{store} holds no volume with status ok; see: ingest inspect {store}")
    cut = encoder.view not in (View.volume, View.triplanar)  # the loader reads no more than the slices of one plane
    view = encoder.view if cut else View.volume
    picture = plan_picture(volumes.grid.shape_zyx, volumes.slab, view, encoder.slices)
    if batch_size is None:
        batch_size = min(choose_batch_size(encoder, picture.shape, cut=cut), len(rows))
    parts: list[torch.Tensor] = []
    with open_loader(
        volumes, rows=rows, view=view, slices=encoder.slices, batch_size=batch_size, backend=backend,
        device=encoder.device, threads=threads,
    ) as loader:  # fmt: skip
        for batch in loader:
            images = batch.images
            if encoder.compiled and len(images) < batch_size:  # the last ones: nothing is compiled anew for their sake
                images = torch.cat([images, images.new_zeros((batch_size - len(images), *images.shape[1:]))])
            features = encoder(images, cut=cut)[: len(batch.rows)]
            if parts:  # a GPU is at work on this batch while we wait for the one before
                parts[-1] = parts[-1].cpu()
            parts.append(features)
            if on_batch:
                on_batch(len(batch.rows))
    features = torch.cat([part.cpu() for part in parts])
    strange = ~torch.isfinite(features).all(dim=1).numpy()
    if strange.any():
        raise ValueError(
            f"features of {strange.sum()} scans, the first of them row {rows[strange][0]}, are no finite numbers: "
            f"{encoder.weights.name} weights do not work in {encoder.precision}"
        )
    scans = volumes.scans[_IDENTITY].iloc[rows].reset_index(drop=True)
    scans.insert(0, "row", rows)
    return Embeddings(
        features=features.numpy(),
        scans=scans,
        phenotypes=volumes.phenotypes.iloc[rows].reset_index(drop=True),
        variables=volumes.variables,
        attrs={
            **describe(encoder),
            "backend": loader.backend,
            "store": {
                "path": str(volumes.path.absolute()),
                "id": volumes.attrs["store_id"],
                "grid": volumes.attrs["grid"],
            },
            "simulated": bool(volumes.attrs["simulated"]),
            "created_by": package_versions("torch", "torchvision", "zarr", "numpy"),
        },
    )
