"""Is a store laid out as the readers expect?"""

from __future__ import annotations

import json

from ingest.errors import StoreError
from ingest.store import VolumeStore

_INNER_CODECS = ["bytes", "numcodecs.lz4", "crc32c"]
_FIX = "ingest its source into a new store"
_INDEX_CODECS = ["bytes", "crc32c"]


def check_layout(store: VolumeStore) -> None:
    """Check that the shards are what `loaders.fetch` and `loaders.decode` expect.

    Raises
    ------
    StoreError
        If they are not, with what was found.
    """
    meta = json.loads((store.path / "volumes" / "zarr.json").read_text())
    sharding = meta["codecs"][0].get("configuration", {})  # of what is no sharding, there may be none
    found = (
        [c["name"] for c in sharding.get("codecs", [])],
        [c["name"] for c in sharding.get("index_codecs", [])],
        sharding.get("index_location", "end"),
        tuple(meta["chunk_grid"]["configuration"]["chunk_shape"]),
        tuple(sharding.get("chunk_shape", ())),
    )
    depth, height, width = store.grid.shape_zyx
    expected = (_INNER_CODECS, _INDEX_CODECS, "end", (1, depth, height, width), (1, store.slab, height, width))
    if found != expected:
        raise StoreError(f"{store.path}/volumes is laid out as {found}, expected {expected}; {_FIX}")
    if meta["data_type"] != "uint8":
        raise StoreError(f"{store.path} holds {meta['data_type']} voxels, this package reads uint8; {_FIX}")
