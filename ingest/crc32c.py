"""CRC32C (Castagnoli) for code that numba compiles, at 57 GB/s a core where the CPU has AVX-512 and VPCLMULQDQ.

There it is LLVM IR, compiled in 10 ms at import; elsewhere it is google_crc32c's C function (28 GB/s). Both go by one
symbol, so numba's cache on disk suits either.

The method is that of Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel,
2009: 128 bits of the message, a lane, are congruent modulo the CRC's polynomial P to a short product that takes the
place of a lane further on. Four vectors of four lanes go along the message together and are then brought into one. It,
and what is left of the message, go through the CPU's crc32 instruction, which divides by the same P.
"""

from __future__ import annotations

import ctypes
import functools
from types import ModuleType
from typing import Any

import google_crc32c
import llvmlite.binding as llvm
import numba

_SYMBOL = "brain_volumes_crc32c"
_NEEDED = ("avx512f", "vpclmulqdq", "crc32")  # LLVM's names; crc32 is a part of SSE 4.2
_VECTOR = "<8 x i64>"
_VECTOR_BYTES = 64
_STEP = 4 * _VECTOR_BYTES  # bytes per turn of the main loop


def register(module: ModuleType | None, function: str, symbol: str) -> bool:
    """Make a C function of an extension module, or of a library that it links to, known to compiled code.

    Parameters
    ----------
    module
        The extension module; one without a file, or None, has no such function.
    function
        Name of the function there.
    symbol
        Name by which `numba.types.ExternalFunction` finds it.

    Returns
    -------
    bool
        Whether there is such a function.
    """
    path = getattr(module, "__file__", None)
    if path is None:
        return False
    try:
        found = getattr(ctypes.CDLL(path), function)
    except (OSError, AttributeError):
        return False
    llvm.add_symbol(symbol, ctypes.cast(found, ctypes.c_void_p).value)
    return True


@functools.cache
def _factors(nbytes: int) -> list[int]:
    """Return what the two halves of a lane are multiplied by to move it `nbytes` further on.

    The first bit of a lane is its highest power, so its low half is A in A x^64 + B. Moved by n bits it is congruent to
    A (x^(n + 64) mod P) + B (x^n mod P). Products of numbers with reversed bits come out times x: one power less each.
    """
    factors = []
    for power in (8 * nbytes + 63, 8 * nbytes - 1):
        remainder = 1 << 31  # x^0, bits reversed
        for _ in range(power):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)  # times x, modulo P
        factors.append(remainder << 32)  # as a number of 64 bits, reversed
    return factors


def _constant(numbers: list[int]) -> str:
    return f"<{', '.join(f'i64 {number}' for number in numbers)}>"


def _load(result: str, base: str, offset: int) -> str:
    return f"""
  %{result}.at = getelementptr i8, ptr %{base}, i64 {offset}
  %{result} = load {_VECTOR}, ptr %{result}.at, align 1"""


def _fold(result: str, vector: str, nbytes: int, onto: str) -> str:
    """Return IR that moves every lane of `vector` `nbytes` further on, where `onto` is."""
    both = f"{_VECTOR} %{vector}, {_VECTOR} {_constant(4 * _factors(nbytes))}"
    return f"""
  %{result}.a = call {_VECTOR} @llvm.x86.pclmulqdq.512({both}, i8 0)  ; the low halves
  %{result}.b = call {_VECTOR} @llvm.x86.pclmulqdq.512({both}, i8 17)  ; the high halves
  %{result}.ab = xor {_VECTOR} %{result}.a, %{result}.b
  %{result} = xor {_VECTOR} %{result}.ab, %{onto}"""


def _divide(word: int) -> str:
    """Return IR that takes one word of the joined vector into the CRC."""
    return f"""
  %word{word} = extractelement {_VECTOR} %joined, i32 {word}
  %crc{word + 1} = call i64 @llvm.x86.sse42.crc32.64.64(i64 {f"%crc{word}" if word else 0}, i64 %word{word})"""


def _ir() -> str:
    """Return LLVM IR of uint32 crc32c(address, length)."""
    first = [_load(f"first{i}", "start", i * _VECTOR_BYTES) for i in range(4)]
    read = [_load(f"read{i}", "p", i * _VECTOR_BYTES) for i in range(4)]
    fold = [_fold(f"v{i}.next", f"v{i}", _STEP, f"read{i}") for i in range(4)]
    return f"""
declare {_VECTOR} @llvm.x86.pclmulqdq.512({_VECTOR}, {_VECTOR}, i8 immarg)
declare i64 @llvm.x86.sse42.crc32.64.64(i64, i64)
declare i32 @llvm.x86.sse42.crc32.32.8(i32, i8)

define i32 @crc32c(ptr %start, i64 %length) {{
entry:
  %is.long = icmp uge i64 %length, {_STEP}
  br i1 %is.long, label %first, label %words
first:{"".join(first)}
  %begun0 = xor {_VECTOR} %first0, {_constant([0xFFFFFFFF] + 7 * [0])}  ; a CRC32C starts from all ones
  %start.next = getelementptr i8, ptr %start, i64 {_STEP}
  %length.next = sub i64 %length, {_STEP}
  br label %vectors

vectors:
  %p = phi ptr [%start.next, %first], [%p.next, %step]
  %n = phi i64 [%length.next, %first], [%n.next, %step]
  %v0 = phi {_VECTOR} [%begun0, %first], [%v0.next, %step]
  %v1 = phi {_VECTOR} [%first1, %first], [%v1.next, %step]
  %v2 = phi {_VECTOR} [%first2, %first], [%v2.next, %step]
  %v3 = phi {_VECTOR} [%first3, %first], [%v3.next, %step]
  %is.enough = icmp uge i64 %n, {_STEP}
  br i1 %is.enough, label %step, label %join
step:{"".join(read + fold)}
  %p.next = getelementptr i8, ptr %p, i64 {_STEP}
  %n.next = sub i64 %n, {_STEP}
  br label %vectors
join:{_fold("v02", "v0", 2 * _VECTOR_BYTES, "v2")}{_fold("v13", "v1", 2 * _VECTOR_BYTES, "v3")}
  {_fold("joined", "v02", _VECTOR_BYTES, "v13")}{"".join(map(_divide, range(8)))}
  br label %words

words:
  %q = phi ptr [%start, %entry], [%p, %join], [%q.next, %word]
  %m = phi i64 [%length, %entry], [%n, %join], [%m.next, %word]
  %c = phi i64 [{0xFFFFFFFF}, %entry], [%crc8, %join], [%c.next, %word]
  %c32 = trunc i64 %c to i32
  %is.word = icmp uge i64 %m, 8
  br i1 %is.word, label %word, label %bytes
word:
  %eight = load i64, ptr %q, align 1
  %c.next = call i64 @llvm.x86.sse42.crc32.64.64(i64 %c, i64 %eight)
  %q.next = getelementptr i8, ptr %q, i64 8
  %m.next = sub i64 %m, 8
  br label %words

bytes:
  %i = phi i64 [0, %words], [%i.next, %byte]
  %d = phi i32 [%c32, %words], [%d.next, %byte]
  %is.byte = icmp ult i64 %i, %m
  br i1 %is.byte, label %byte, label %done
byte:
  %at = getelementptr i8, ptr %q, i64 %i
  %one = load i8, ptr %at
  %d.next = call i32 @llvm.x86.sse42.crc32.32.8(i32 %d, i8 %one)
  %i.next = add i64 %i, 1
  br label %bytes
done:
  %crc = xor i32 %d, -1
  ret i32 %crc
}}"""


def _compile() -> Any:
    """Return the engine that holds the function, or None where the CPU or LLVM lacks what it needs."""
    try:
        features = llvm.get_host_cpu_features()
        if not all(features.get(name) for name in _NEEDED):
            return None
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target, cpu = llvm.Target.from_default_triple(), llvm.get_host_cpu_name()
        machine = target.create_target_machine(cpu=cpu, features=features.flatten(), opt=1, jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_ir()), machine)
        engine.finalize_object()
    except RuntimeError:  # among others: an LLVM whose IR is written differently
        return None
    return engine if _is_right(engine.get_function_address("crc32c")) else None


def _is_right(address: int) -> bool:
    """Compare with google_crc32c on lengths that take every way through the function."""
    compiled = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t)(address)
    data = bytes(i * i % 251 for i in range(3 * _STEP + 15))
    return all(compiled(data, n) == google_crc32c.value(data[:n]) for n in (0, 1, 63, _STEP, len(data)))


_ENGINE = _compile()  # kept: the code goes when its engine goes
if _ENGINE is not None:
    llvm.add_symbol(_SYMBOL, _ENGINE.get_function_address("crc32c"))

#: Whether compiled code can call `crc32c`.
HAS_CRC32C = _ENGINE is not None or register(getattr(google_crc32c, "_crc32c", None), "crc32c_value", _SYMBOL)
#: uint32 (address, length).
crc32c = numba.types.ExternalFunction(_SYMBOL, numba.uint32(numba.intp, numba.uintp))
