"""Shard bytes -> voxels. Every length and checksum is checked before its bytes are used.

Two implementations that give the same: `decode_shard` hands a whole shard to compiled code that lets go of Python's
lock once, and `decode_shard_slowly` goes slab by slab in Python. The lock is what matters: a slab takes 15 µs, and
threads that pass the lock to and fro that often are slower than a single one (600 against 810 volumes/s).
"""

from __future__ import annotations

import threading

import google_crc32c
import numba
import numpy as np
from numcodecs import lz4

from ingest.crc32c import HAS_CRC32C, crc32c, register
from ingest.shard import CRC_BYTES, SLAB_HEADER, index_bytes

OK, OUTSIDE, CHECKSUM, LENGTH, LZ4 = range(5)
#: What is wrong with a slab, in words.
FAULTS = {
    OUTSIDE: "lies outside the shard",
    CHECKSUM: "has a wrong checksum",
    LENGTH: "announces another length than its planes have",
    LZ4: "is no LZ4 block of its length",
}


def decode_shard_slowly(content: np.ndarray, slab: int, out: np.ndarray) -> None:
    """Decode a shard in plain Python: the reference, and what is used where no compiled decoder is found.

    Parameters
    ----------
    content
        uint8, the whole shard (see `ingest.shard`).
    slab
        Planes per slab.
    out
        uint8 (z, y, x), C-contiguous, written.

    Raises
    ------
    ValueError
        If the shard is damaged.
    """
    for number, (offset, nbytes) in enumerate(read_index(content, out.shape[0] // slab).tolist()):
        refuse(decode_slab_slowly(content, offset, nbytes, out[number * slab : (number + 1) * slab]), number)


def decode_slab_slowly(content: np.ndarray, offset: int, nbytes: int, out: np.ndarray) -> int:
    """Check a slab and decode it into `out`; return what is wrong with it, of `FAULTS`, or 0."""
    length = len(content)
    # in this order, so that no sum of two 64-bit numbers can wrap round
    if nbytes <= SLAB_HEADER + CRC_BYTES or nbytes > length or offset > length - nbytes:
        return OUTSIDE
    payload = content[offset : offset + nbytes]
    if not _checksum_is_right(payload):
        return CHECKSUM
    if int.from_bytes(payload[:SLAB_HEADER].tobytes(), "little") != out.nbytes:
        return LENGTH
    try:
        lz4.decompress(payload[:-CRC_BYTES], out)
    except RuntimeError:
        return LZ4
    return OK


def read_index(content: np.ndarray, slabs: int) -> np.ndarray:
    """Return offset and length of each slab, uint64 (slab, 2)."""
    tail = index_bytes(slabs)
    if len(content) < tail:
        raise ValueError(f"shard of {len(content)} bytes, shorter than its index of {tail}")
    index = content[len(content) - tail :]
    if not _checksum_is_right(index):
        raise ValueError("checksum of the index is wrong")
    return index[:-CRC_BYTES].view("<u8").reshape(slabs, 2)


def _checksum_is_right(data: np.ndarray) -> bool:
    """Compare the crc32c in the last 4 bytes of `data` with that of what precedes it."""
    expected = int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    return bool(google_crc32c.value(data[:-CRC_BYTES]) == expected)


def refuse(fault: int, slab: int) -> None:
    """Raise ValueError if something is wrong with a slab."""
    if fault != OK:
        raise ValueError(f"slab {slab} {FAULTS[fault]}")


# The very library that the slow path calls; by name, so that numba can keep the compiled code on disk.
#: Whether compiled code can call `lz4_decompress_safe` and `crc32c`.
COMPILED = register(lz4, "LZ4_decompress_safe", "LZ4_decompress_safe") and HAS_CRC32C
lz4_decompress_safe = numba.types.ExternalFunction(
    "LZ4_decompress_safe", numba.int32(numba.intp, numba.intp, numba.int32, numba.int32)
)


@numba.njit(cache=True, nogil=True)
def check_slab(content: np.ndarray, offset: int, nbytes: int, raw: int) -> int:
    """Return what is wrong with a slab of `raw` voxels, of `FAULTS`, or 0; its LZ4 block is not looked into."""
    length = np.int64(len(content))
    if offset < 0 or nbytes <= SLAB_HEADER + CRC_BYTES or nbytes > length or offset > length - nbytes:
        return OUTSIDE
    end = offset + nbytes - CRC_BYTES
    if crc32c(content.ctypes.data + offset, end - offset) != _uint32_at(content, end):
        return CHECKSUM
    return OK if _uint32_at(content, offset) == raw else LENGTH


@numba.njit(cache=True, nogil=True)
def decode_slab(content: np.ndarray, offset: int, nbytes: int, out: np.ndarray) -> int:
    """Check a slab and decode it into `out` (byte); return what is wrong with it, of `FAULTS`, or 0."""
    fault = check_slab(content, offset, nbytes, len(out))
    if fault != OK:
        return fault
    block = content.ctypes.data + offset + SLAB_HEADER
    got = lz4_decompress_safe(block, out.ctypes.data, nbytes - SLAB_HEADER - CRC_BYTES, len(out))
    return OK if got == len(out) else LZ4


@numba.njit(cache=True, nogil=True)
def _decode_slabs(content: np.ndarray, index: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Check and decode all slabs into `out` (slab, byte); return the first fault and its slab."""
    for number in range(len(index)):
        fault = decode_slab(content, np.int64(index[number, 0]), np.int64(index[number, 1]), out[number])
        if fault != OK:
            return fault, number
    return OK, 0


@numba.njit(cache=True, nogil=True)
def _uint32_at(content: np.ndarray, at: int) -> int:
    """Read four little-endian bytes."""
    low = np.int64(content[at]) | np.int64(content[at + 1]) << 8
    return int(low | np.int64(content[at + 2]) << 16 | np.int64(content[at + 3]) << 24)


def _decode_shard_compiled(content: np.ndarray, slab: int, out: np.ndarray) -> None:
    slabs = out.shape[0] // slab
    refuse(*_decode_slabs(content, read_index(content, slabs), out.reshape(slabs, -1)))


#: The decoder that readers use, with the parameters of `decode_shard_slowly`.
decode_shard = _decode_shard_compiled if COMPILED else decode_shard_slowly


class VolumePerThread(threading.local):
    """Memory to decode into, ``volume``: uint8 (z, y, x), of each thread its own."""

    def __init__(self, shape_zyx: tuple[int, int, int]) -> None:
        self.volume = np.empty(shape_zyx, np.uint8)
