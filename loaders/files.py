"""Reading shards from files by compiled code: one call that lets go of Python's lock, instead of eight.

Between system calls Python takes its lock back, and threads that pass it to and fro that often spend more time on it
than on reading three slices. `loaders.fetch` does the same in Python, and is asked whenever anything is wrong here: it
knows what to say of it.
"""

from __future__ import annotations

import os

import numba
import numpy as np

from ingest.crc32c import crc32c
from ingest.decode import OK, check_slab
from ingest.shard import CRC_BYTES, INDEX_ENTRY

_FAILED = -1
_CHECKED = 256 << 10  # bytes that are read at a time and then checked
_ABSENT = np.uint64(2**64 - 1)
_SEEK_END, _O_CLOEXEC = 2, os.O_CLOEXEC

_open = numba.types.ExternalFunction("open", numba.int32(numba.intp, numba.int32))
_close = numba.types.ExternalFunction("close", numba.int32(numba.int32))
_lseek = numba.types.ExternalFunction("lseek", numba.int64(numba.int32, numba.int64, numba.int32))
_pread = numba.types.ExternalFunction("pread", numba.intp(numba.int32, numba.intp, numba.uintp, numba.int64))


@numba.njit(cache=True, nogil=True)
def read_shard(
    path: np.ndarray, all_slabs: int, slabs: np.ndarray, gap: int, largest: int, buffer: np.ndarray, index: np.ndarray,
    raw: int,
) -> int:  # fmt: skip
    """Read the slabs of a shard that are wanted.

    Parameters
    ----------
    path
        uint8, its bytes end with a zero.
    all_slabs
        How many the shard has.
    slabs
        int64, those wanted.
    gap
        Bytes between two slabs that are read rather than left out.
    largest
        Bytes that the file may have.
    buffer
        uint8, the bytes go there.
    index
        uint64 (slab wanted, 2): written, where in `buffer` each slab begins, and its bytes; 0 for slabs left out.
    raw
        Voxels of a slab if slabs are to be checked, each right after it was read: it then is in the processor's cache,
        from which a whole shard would drive it. 0 if not.

    Returns
    -------
    int
        Bytes in `buffer`; -1 if anything is wrong; if `buffer` is too small, the bytes that it needs, negative.
    """
    descriptor = _open(path.ctypes.data, _O_CLOEXEC)
    if descriptor < 0:
        return _FAILED
    size = _lseek(descriptor, 0, _SEEK_END)
    tail = all_slabs * INDEX_ENTRY + CRC_BYTES
    whole = len(slabs) == all_slabs and raw == 0
    if size < tail or size > largest:
        found = _FAILED
    elif len(buffer) < (size if whole else tail):
        found = -size if whole else -tail
    elif whole:
        found = _read(descriptor, buffer, 0, size, 0)
        if found > 0 and not _parse(buffer, size - tail, all_slabs, slabs, index):
            found = _FAILED
    else:
        found = _read(descriptor, buffer, 0, tail, size - tail)
        if found > 0:
            found = _FAILED
            if _parse(buffer, 0, all_slabs, slabs, index):
                found = _read_runs(descriptor, buffer, index, gap, size, raw)
    _close(descriptor)
    return found


@numba.njit(cache=True, nogil=True)
def _read(descriptor: int, buffer: np.ndarray, at: int, nbytes: int, offset: int) -> int:
    """Read so many bytes from `offset` of the file to `at` of the buffer; return them, or -1."""
    done = 0
    while done < nbytes:
        count = _pread(descriptor, buffer.ctypes.data + at + done, nbytes - done, offset + done)
        if count <= 0:
            return _FAILED
        done += count
    return done


@numba.njit(cache=True, nogil=True)
def _parse(buffer: np.ndarray, at: int, all_slabs: int, slabs: np.ndarray, index: np.ndarray) -> bool:
    """Check the index at `at` of the buffer and write the entries that are wanted to `index`."""
    nbytes = all_slabs * INDEX_ENTRY
    expected = np.uint32(0)
    for byte in range(CRC_BYTES):
        expected |= np.uint32(buffer[at + nbytes + byte]) << np.uint32(8 * byte)
    if crc32c(buffer.ctypes.data + at, nbytes) != expected:
        return False
    for number in range(len(slabs)):
        for part in range(2):
            value = np.uint64(0)
            first = at + slabs[number] * INDEX_ENTRY + 8 * part
            for byte in range(8):
                value |= np.uint64(buffer[first + byte]) << np.uint64(8 * byte)
            index[number, part] = value
        if index[number, 1] == 0:
            return False
        if index[number, 0] == _ABSENT and index[number, 1] == _ABSENT:
            index[number] = 0
    return True


@numba.njit(cache=True, nogil=True)
def _read_runs(descriptor: int, buffer: np.ndarray, index: np.ndarray, gap: int, size: int, raw: int) -> int:
    """Read the slabs of an index in stretches, one after the other, and write to it where they are then."""
    most = _CHECKED if raw else size
    at, number = np.int64(0), 0
    while number < len(index):
        if index[number, 1] == 0:
            number += 1
            continue
        start = np.int64(index[number, 0])
        end, last = start, number
        while last < len(index):
            begin, nbytes = np.int64(index[last, 0]), np.int64(index[last, 1])
            if nbytes == 0:
                last += 1
                continue
            if begin < 0 or nbytes < 0 or nbytes > size or begin > size - nbytes:
                return _FAILED
            if last > number and (not end <= begin <= end + gap or end - start >= most):
                break
            end = begin + nbytes
            last += 1
        if at + end - start > len(buffer):
            return int(-(at + end - start))
        if _read(descriptor, buffer, at, end - start, start) < 0:
            return _FAILED
        for slab in range(number, last):
            if index[slab, 1] != 0:
                moved = np.int64(index[slab, 0]) - start + at
                index[slab, 0] = np.uint64(moved)
                if raw and check_slab(buffer, moved, np.int64(index[slab, 1]), raw) != OK:
                    return _FAILED
        at += end - start
        number = last
    return int(at)
