"""Several scans in one call of compiled code: read, checked, decoded to their places in a batch.

Each return to Python takes its lock, which a program that feeds a GPU has better uses for. What is wrong with a scan is
not looked into here: it stays unsettled, and is loaded once more in Python, which has words for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np

from ingest.decode import OK
from loaders.decode import Decoder, decode_all, decode_by_table, decode_scaled, decode_slices, scratch_slab
from loaders.fetch import Buffer, Payload, ShardFetcher
from loaders.files import read_shard
from loaders.progress import Progress, begin, claim, settle
from loaders.threads import ScanGroup

UNREADABLE, STOPPED = -1, -(2**62)  # instead of how many bytes there are; others below 0: so many are needed


class Source(NamedTuple):
    """Where the scans of a group are, and what is wanted of each: see `loaders.files.read_shard`.

    Attributes
    ----------
    paths
        uint8 (scan, byte), each ends with a zero.
    """

    paths: np.ndarray
    all_slabs: int
    slabs: np.ndarray
    gap: int
    largest: int
    raw: int


def source_of(fetcher: ShardFetcher, rows: Sequence[int], raw: int = 0) -> Source:
    """Return where some scans are; `raw` is not 0 if slabs are to be checked."""
    return Source(fetcher.paths(rows), fetcher.all_slabs, fetcher.slabs, fetcher.gap, fetcher.largest, raw)


def decodes_groups(fetcher: ShardFetcher, decoder: Decoder) -> Callable[[ScanGroup, Buffer], None]:
    """Return what loads groups whose target is an array (scan, *picture), see `loaders.threads.ScanThreads`."""

    def load(group: ScanGroup, buffer: Buffer) -> None:
        batch = group.target
        if fetcher.compiled:
            kernel, *settings = _kernel(decoder, batch)
            source, index = source_of(fetcher, group.rows), np.empty((len(fetcher.slabs), 2), np.uint64)
            first = 0
            while first < len(group.rows):
                first, found = kernel(first, source, group.progress, buffer.memory, index, group.places, *settings)
                if found == STOPPED:
                    return
                buffer.reserve(-found)

        def write(payload: Payload, place: int, _: int) -> None:
            decoder.decode(payload, batch[place])

        load_one_by_one(group, lambda row, _: fetcher.fetch(row, buffer), write)

    return load


def load_one_by_one(
    group: ScanGroup, fetch: Callable[[int, int], Payload], write: Callable[[Payload, int, int], None]
) -> None:
    """Load what is not settled of a group, and note what is wrong with it.

    Parameters
    ----------
    fetch
        ``fetch(row, place)`` gets the bytes of a scan; it is what may hang.
    write
        ``write(payload, place, row)`` makes of them what is wanted.
    """
    for number in group.unsettled():
        row, place = group.rows[number], int(group.places[number])
        error: BaseException | None = None
        if not begin(group.progress, number):
            return
        try:
            payload = fetch(row, place)
        except BaseException as caught:
            error = caught
        if not claim(group.progress, number):
            return
        if error is None:
            try:
                write(payload, place, row)
            except BaseException as caught:
                error = caught
        if error is not None:
            group.errors[place] = error
        settle(group.progress, number, 0 if error is not None else len(payload.content))
        payload = error = None  # type: ignore[assignment]  # the error refers to this frame


def _kernel(decoder: Decoder, batch: np.ndarray) -> tuple[Any, ...]:
    """Return the compiled function for what is wanted, and its last arguments."""
    picture, scratch = decoder.picture, scratch_slab(decoder.slab_shape)
    if picture.planes:
        how = (picture.slabs, decoder.slices, decoder.depth, scratch, decoder.table)
        return _load_slices, how, batch.reshape(len(batch), -1)
    out = batch.reshape(len(batch), len(picture.slabs), -1)
    if batch.dtype == np.uint8:
        return _load_levels, out
    if batch.dtype == np.float32:
        return _load_scaled, scratch.reshape(-1), out, np.float32(decoder.gain), np.float32(decoder.bias)
    return _load_by_table, scratch.reshape(-1), out, decoder.table


@numba.njit(cache=True, nogil=True)
def read_next(number: int, source: Source, progress: Progress, buffer: np.ndarray, index: np.ndarray) -> int:
    """Read a scan of a group; return its bytes, or why there are none."""
    if not begin(progress, number):
        return STOPPED
    found = read_shard(
        source.paths[number], source.all_slabs, source.slabs, source.gap, source.largest, buffer, index, source.raw
    )
    if found < UNREADABLE:
        return found
    return found if claim(progress, number) else STOPPED


@numba.njit(cache=True, nogil=True)
def _load_levels(
    first: int, source: Source, progress: Progress, buffer: np.ndarray, index: np.ndarray, places: np.ndarray,
    out: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Load scans from the first on into `out`, uint8 (scan, slab, byte); return where it ended, and why."""
    for number in range(first, len(source.paths)):
        found = read_next(number, source, progress, buffer, index)
        if found < UNREADABLE:
            return number, found
        if found >= 0 and decode_all(buffer[:found], index, out[places[number]])[0] == OK:
            settle(progress, number, found)
    return len(source.paths), UNREADABLE


@numba.njit(cache=True, nogil=True)
def _load_scaled(
    first: int, source: Source, progress: Progress, buffer: np.ndarray, index: np.ndarray, places: np.ndarray,
    scratch: np.ndarray, out: np.ndarray, gain: float, bias: float,
) -> tuple[int, int]:  # fmt: skip
    """Load scans as `_load_levels` does into `out`, float32 (scan, slab, voxel)."""
    for number in range(first, len(source.paths)):
        found = read_next(number, source, progress, buffer, index)
        if found < UNREADABLE:
            return number, found
        if found >= 0 and decode_scaled(buffer[:found], index, scratch, out[places[number]], gain, bias)[0] == OK:
            settle(progress, number, found)
    return len(source.paths), UNREADABLE


@numba.njit(cache=True, nogil=True)
def _load_by_table(
    first: int, source: Source, progress: Progress, buffer: np.ndarray, index: np.ndarray, places: np.ndarray,
    scratch: np.ndarray, out: np.ndarray, table: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Load scans as `_load_levels` does into `out` (scan, slab, voxel), each grey level as the table says."""
    for number in range(first, len(source.paths)):
        found = read_next(number, source, progress, buffer, index)
        if found < UNREADABLE:
            return number, found
        if found >= 0 and decode_by_table(buffer[:found], index, scratch, out[places[number]], table)[0] == OK:
            settle(progress, number, found)
    return len(source.paths), UNREADABLE


@numba.njit(cache=True, nogil=True)
def _load_slices(
    first: int, source: Source, progress: Progress, buffer: np.ndarray, index: np.ndarray, places: np.ndarray,
    how: tuple[Any, ...], out: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Load scans as `_load_levels` does into `out` (scan, voxel), their slices."""
    for number in range(first, len(source.paths)):
        found = read_next(number, source, progress, buffer, index)
        if found < UNREADABLE:
            return number, found
        if found >= 0 and decode_slices(buffer[:found], index, *how, out[places[number]])[0] == OK:
            settle(progress, number, found)
    return len(source.paths), UNREADABLE
