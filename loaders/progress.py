"""How far a thread is with its scans: written by compiled code, and watched by another thread.

Compiled code has let go of Python's lock, and with it of all of Python's other locks. What decides whether a scan is
still wanted when its bytes are there at last is one number, changed by the processor's compare-and-exchange: the thread
that reads goes on to write only if nobody has given it up before.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types
from numba.core.typing import signature
from numba.extending import intrinsic

_NOT_BEGUN, _STOPPED = -1, -2  # else twice the number of the scan, and one more once it is written
_MONOTONIC = 1  # the clock of `time.perf_counter`

_clock_gettime = numba.types.ExternalFunction("clock_gettime", numba.int32(numba.int32, numba.intp))


class Progress(NamedTuple):
    """How far a thread is with some scans.

    Attributes
    ----------
    state
        int64 (1,).
    started
        float64 (1,), when the scan under way was begun, by `time.perf_counter`.
    settled
        bool (scan,): loaded, or known to be bad.
    seconds
        float64 (2,), of reading and of writing.
    nbytes
        int64 (1,), that were read.
    """

    state: np.ndarray
    started: np.ndarray
    settled: np.ndarray
    seconds: np.ndarray
    nbytes: np.ndarray


def new_progress(scans: int) -> Progress:
    """Return the progress of work that has not begun."""
    state, settled = np.full(1, _NOT_BEGUN, np.int64), np.zeros(scans, np.bool_)
    return Progress(state, np.zeros(1), settled, np.zeros(2), np.zeros(1, np.int64))


def give_up_late(progress: Progress, deadline: float) -> int | None:
    """Give up a scan that has been read for longer than `deadline` seconds; return its number, or None."""
    state = int(progress.state[0])
    if state < 0 or state % 2 or time.perf_counter() - progress.started[0] <= deadline:
        return None
    return state // 2 if exchange(progress.state, state, _STOPPED) else None


def stop(progress: Progress) -> None:
    """Let the thread end with the scan that it has."""
    while not exchange(progress.state, int(progress.state[0]), _STOPPED):
        pass


@intrinsic
def _exchange(_: Any, array: Any, _expected: Any, _new: Any) -> Any:
    """Set the first number of an array if it is `expected`; tell whether it was."""

    def generate(context: Any, builder: Any, called: Any, args: Any) -> Any:
        data = context.make_array(called.args[0])(context, builder, args[0]).data
        return builder.extract_value(builder.cmpxchg(data, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return signature(types.boolean, array, types.int64, types.int64), generate


@numba.njit(cache=True, nogil=True)
def exchange(state: np.ndarray, expected: int, new: int) -> bool:
    """Set a state if it is `expected`; tell whether it was."""
    return _exchange(state, np.int64(expected), np.int64(new))


@numba.njit(cache=True, nogil=True)
def now() -> float:
    """Return the seconds of `time.perf_counter`."""
    timespec = np.empty(2, np.int64)
    _clock_gettime(_MONOTONIC, timespec.ctypes.data)
    seconds: float = timespec[0] + timespec[1] * 1e-9
    return seconds


@numba.njit(cache=True, nogil=True)
def begin(progress: Progress, number: int) -> bool:
    """Begin to read a scan, or do so again; False if the work was stopped."""
    progress.started[0] = now()
    state = progress.state[0]
    return state != _STOPPED and exchange(progress.state, state, 2 * number)


@numba.njit(cache=True, nogil=True)
def claim(progress: Progress, number: int) -> bool:
    """Go on to write a scan, whose reading then is over; False if it was given up."""
    progress.seconds[0] += now() - progress.started[0]
    progress.started[0] = now()
    return exchange(progress.state, 2 * number, 2 * number + 1)


@numba.njit(cache=True, nogil=True)
def settle(progress: Progress, number: int, nbytes: int) -> None:
    """Note that a scan is written."""
    progress.seconds[1] += now() - progress.started[0]
    progress.nbytes[0] += nbytes
    progress.settled[number] = True
