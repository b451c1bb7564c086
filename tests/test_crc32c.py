"""The compiled CRC32C gives what google_crc32c gives, reads no byte too many, and steps aside on other CPUs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import google_crc32c
import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import crc32c

RNG = np.random.default_rng(0)
RANDOM = RNG.integers(0, 256, 8192, dtype=np.uint8)


def checksum(data: np.ndarray) -> int:
    """Call whatever compiled code calls."""
    address = llvm.address_of_symbol("brain_volumes_crc32c")
    return ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)(address)(data.ctypes.data, len(data))


def python(program: str, *arguments: object, **environment: str) -> str:
    """Run a program in a process of its own; return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_this_cpu_gets_the_fast_one():
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in ("avx512f", "vpclmulqdq", "crc32")):
        pytest.skip("no AVX-512 or VPCLMULQDQ here")
    assert crc32c._ENGINE is not None
    assert crc32c.HAS_CRC32C


def test_the_known_value():
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert checksum(np.zeros(0, np.uint8)) == 0


def test_every_length_at_every_alignment():
    start = -RANDOM.ctypes.data % 64
    for length in range(5001):
        at = start + 7 * length % 64
        data = RANDOM[at : at + length]
        assert checksum(data) == google_crc32c.value(data.tobytes()), (length, at)
    for offset in range(64):
        for length in (63, 255, 256, 257, 511, 512, 1023, 4099):
            data = RANDOM[start + offset : start + offset + length]
            assert checksum(data) == google_crc32c.value(data.tobytes()), (length, offset)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=5000), offset=st.integers(0, 63))
def test_any_bytes(data, offset):
    room = np.empty(len(data) + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    room[start : start + len(data)] = np.frombuffer(data, np.uint8)
    assert checksum(room[start : start + len(data)]) == google_crc32c.value(data)


def test_a_large_buffer_and_a_flipped_bit():
    data = RNG.integers(0, 256, 20_000_003, dtype=np.uint8)
    right = google_crc32c.value(data)
    assert checksum(data) == right
    for at in (0, 1_234_567, len(data) - 1):
        data[at] ^= 4
        assert checksum(data) != right
        data[at] ^= 4
    assert checksum(data) == right


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by Linux's numbers")
def test_no_byte_before_or_behind_is_read():
    python(
        """
        import ctypes, mmap
        import llvmlite.binding, numpy as np, google_crc32c
        import ingest.crc32c

        address = llvmlite.binding.address_of_symbol("brain_volumes_crc32c")
        crc = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)(address)
        page = mmap.PAGESIZE
        room = np.frombuffer(mmap.mmap(-1, 3 * page), np.uint8)
        inside = room[page : 2 * page]
        inside[:] = np.random.default_rng(0).integers(0, 256, page, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (room[:page], room[2 * page :]):
            assert libc.mprotect(ctypes.c_void_p(guard.ctypes.data), ctypes.c_size_t(page), 0) == 0
        for length in range(page + 1):
            for data in (inside[:length], inside[page - length :]):
                assert crc(data.ctypes.data, length) == google_crc32c.value(data.tobytes())
        """
    )


DECODE = """
    import sys
    import llvmlite.binding as llvm, numba, numpy as np

    numba.njit(lambda: 0)  # numba itself asks for the features here, once
    features = llvm.get_host_cpu_features
    if sys.argv[1] == "other CPU":
        llvm.get_host_cpu_features = dict
    from ingest import crc32c, decode
    from ingest.encode import encode_shard

    llvm.get_host_cpu_features = features
    assert decode.decode_shard is not decode.decode_shard_slowly
    volume = np.random.default_rng(0).integers(0, 9, (8, 64, 64), dtype=np.uint8)
    shard, out = np.frombuffer(encode_shard(volume, 4), np.uint8).copy(), np.empty_like(volume)
    decode.decode_shard(shard, 4, out)
    assert (out == volume).all()
    shard[100] ^= 1
    try:
        decode.decode_shard(shard, 4, out)
    except ValueError as error:
        assert "slab 0 has a wrong checksum" in str(error)
    else:
        raise AssertionError("a flipped bit was not seen")
    print(crc32c._ENGINE is not None, sum(decode._decode_slabs.stats.cache_hits.values()))
    """


def test_another_cpu_gets_googles_from_the_same_compiled_code(tmp_path):
    fast = str(crc32c._ENGINE is not None)
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(DECODE, "this CPU", **cache).split() == [fast, "0"]
    assert python(DECODE, "other CPU", **cache).split() == ["False", "1"]
    assert python(DECODE, "this CPU", **cache).split() == [fast, "1"]


def test_a_wrong_one_is_not_used(monkeypatch):
    monkeypatch.setattr(google_crc32c, "value", lambda _: 1)
    assert crc32c._compile() is None


def test_an_llvm_that_cannot_read_it_is_not_asked_to_run_it(monkeypatch):
    monkeypatch.setattr(crc32c, "_ir", lambda: "no LLVM IR")
    assert crc32c._compile() is None


def test_neither_can_be_had(monkeypatch):
    monkeypatch.setattr(llvm, "get_host_cpu_features", dict)
    assert crc32c._compile() is None
    assert not crc32c.register(None, "crc32c_value", "unused")
    assert not crc32c.register(np, "no_such_function", "unused")
