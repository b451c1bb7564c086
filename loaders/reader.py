"""Shards -> voxels: positioned reads and threads that decode LZ4 slabs straight into the caller's array."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ingest.decode import decode_shard
from ingest.errors import StoreError
from ingest.places import Place
from ingest.shard import shard_path
from ingest.store import VolumeStore, open_store

_INNER_CODECS = ["bytes", "numcodecs.lz4", "crc32c"]
_INDEX_CODECS = ["bytes", "crc32c"]


class CorruptShardError(StoreError):
    """A shard whose bytes are not what was written; names the scan."""


class VolumeReader:
    """Reads whole volumes of a store, several at a time.

    Parameters
    ----------
    store
        A version-1 store, or its path.
    threads
        Threads that read and decode; by default one per core, at most 8.

    Raises
    ------
    StoreError
        If the store is of another format, or its shards are laid out otherwise than version 1 says.
    """

    def __init__(self, store: str | Place | VolumeStore, *, threads: int | None = None) -> None:
        self.store = store if isinstance(store, VolumeStore) else open_store(store)
        _check_layout(self.store)
        self.threads = threads or min(8, len(os.sched_getaffinity(0)))
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._local = threading.local()

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the store."""
        return self.store.attrs

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) of every volume."""
        return self.store.grid.shape_zyx

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return volumes as an array (scan, z, y, x) of uint8.

        Raises
        ------
        IndexError
            If a row holds no volume.
        CorruptShardError
            If a shard is damaged or missing.
        """
        out = np.empty((len(rows), *self.shape), np.uint8)
        for future in self.submit(rows, out):
            future.result()
        return out

    def submit(self, rows: Sequence[int] | np.ndarray, out: np.ndarray) -> list[Future[None]]:
        """Start decoding `rows` into ``out[0]``, ``out[1]``, ... and return a future for each.

        Parameters
        ----------
        out
            uint8 (scan, z, y, x), C-contiguous; its content is defined when all futures are done.
        """
        self.check_rows(rows)
        return [self._executor.submit(self._decode, int(row), out[i]) for i, row in enumerate(rows)]

    def check_rows(self, rows: Sequence[int] | np.ndarray) -> None:
        """Raise IndexError if a row is out of range or holds no volume."""
        status = self.store.scans["status"]
        for row in rows:
            if not 0 <= row < len(status):
                raise IndexError(f"row {row} is not in the store, which has rows 0 to {len(status) - 1}")
            if status[row] != "ok":
                raise IndexError(f"row {row} holds no volume: its status is {status[row]}; use rows with status ok")

    def close(self) -> None:
        """Stop the threads; work that has not started is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> VolumeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, row: int, out: np.ndarray) -> None:
        try:
            path = shard_path(self.store.path, row)
            content = self._read_file(path) if isinstance(path, Path) else np.frombuffer(path.read_bytes(), np.uint8)
            decode_shard(content, self.store.slab, out)
        except (OSError, ValueError) as error:
            source = self.store.scans["source"][row]
            raise CorruptShardError(
                f"row {row} ({source}) of {self.store.path} cannot be read: {error}; "
                "ingest its source again, or leave the row out"
            ) from error

    def _read_file(self, path: Path) -> np.ndarray:
        """Read a file into this thread's buffer; valid until the thread's next read."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            buffer = getattr(self._local, "buffer", None)
            if buffer is None or len(buffer) < size:
                buffer = self._local.buffer = np.empty(size + size // 4, np.uint8)
            done = 0
            while done < size:
                count = os.preadv(descriptor, [buffer[done:size].data], done)
                if count == 0:
                    raise ValueError(f"the file ends after {done} of {size} bytes")
                done += count
            return buffer[:size]
        finally:
            os.close(descriptor)


def _check_layout(store: VolumeStore) -> None:
    """Check that the shards are what `decode_shard` expects."""
    meta = json.loads((store.path / "volumes" / "zarr.json").read_text())
    sharding = meta["codecs"][0]["configuration"]
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
        raise StoreError(f"{store.path}/volumes is laid out as {found}, expected {expected}; ingest it again")
    if meta["data_type"] != "uint8":
        raise StoreError(f"{store.path} holds {meta['data_type']} voxels, this package reads uint8; ingest it again")
