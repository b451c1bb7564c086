"""A store -> embeddings: load, encode, gather with identity, phenotypes and provenance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from extract.embeddings import Embeddings
from extract.encoder import Encoder
from ingest.places import Place
from ingest.store import open_store, package_versions
from loaders import open_loader

_IDENTITY = ["participant", "session", "modality", "brain_voxels", "head_scale"]


def extract(
    store: str | Place,
    encoder: Encoder,
    *,
    backend: str = "auto",
    batch_size: int = 8,
    threads: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed every scan of a store that holds a volume, in the order of its rows.

    Parameters
    ----------
    store
        Path of the store.
    encoder
        See `extract.encoder.build_encoder`.
    backend, batch_size, threads
        See `loaders.open_loader`.
    on_batch
        Called with the number of scans just embedded.

    Raises
    ------
    ValueError
        If the store holds no volume.
    """
    volumes = open_store(store)
    rows = volumes.ok_rows
    if not len(rows):
        raise ValueError(f"{store} holds no volume with status ok; see: ingest inspect {store}")
    parts = []
    with open_loader(volumes, batch_size=batch_size, backend=backend, threads=threads) as loader:
        for batch in loader:
            parts.append(encoder(batch.images).numpy())
            if on_batch:
                on_batch(len(batch.rows))
    scans = volumes.scans[_IDENTITY].iloc[rows].reset_index(drop=True)
    scans.insert(0, "row", rows)
    return Embeddings(
        features=np.concatenate(parts),
        scans=scans,
        phenotypes=volumes.phenotypes.iloc[rows].reset_index(drop=True),
        variables=volumes.variables,
        attrs={
            "model": encoder.model,
            "weights": {"name": encoder.weights.name, "sha256": encoder.weights.sha256},
            "layer": "avgpool",
            "view": str(encoder.view),
            "slices": encoder.slices,
            "pooling": "mean over slices",
            "scale": encoder.scale,
            "input": {
                "rule": "stored / 255, minus mean, over std",
                "mean": encoder.weights.mean,
                "std": encoder.weights.std,
            },
            "precision": "float32",
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
