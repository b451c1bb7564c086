"""Batch arrays that are used again once nobody holds them: no page faults, and no batch overwritten in use."""

from __future__ import annotations

import threading
import weakref

import numpy as np


class BatchPool:
    """Hands out uninitialised arrays and takes their memory back when the last reference to them is gone.

    Parameters
    ----------
    shape
        Of the largest batch, (scan, z, y, x).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, scans: int) -> np.ndarray:
        """Return an uint8 array (scans, z, y, x); a tensor made of it by ``torch.from_numpy`` keeps it alive."""
        with self._lock:
            memory = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
        # A new buffer object, so that views made by others refer to `batch` and not past it to `memory`.
        batch = np.frombuffer(memory.data, np.uint8, count=scans * int(np.prod(self._shape[1:])))
        weakref.finalize(batch, self._give_back, memory)
        return batch.reshape(scans, *self._shape[1:])

    def _give_back(self, memory: np.ndarray) -> None:
        with self._lock:
            self._free.append(memory)
