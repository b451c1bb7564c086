"""Where the time of an extraction goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from loaders import timing as loading


@dataclass
class Timing:
    """Seconds of an extraction, so far or in all; of several processes the sum.

    Attributes
    ----------
    scans
        That were embedded.
    elapsed
        Since the first scan was asked for.
    read, decode
        Of all threads of the loader together, see `loaders.Timing`. They go on while the network computes.
    copy
        To a GPU, by its own clock.
    wait
        The network waited for scans.
    compute
        The network computed; on a GPU by its own clock.
    write
        Features were written.
    threads
        Of the loader.
    """

    scans: int = 0
    elapsed: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    wait: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    threads: int = 0

    @property
    def busy(self) -> float:
        """Share of the time in which the network computed, 0 to 1."""
        return min(1.0, self.compute / self.elapsed) if self.elapsed else 0.0

    @contextlib.contextmanager
    def adding(self, what: str) -> Iterator[None]:
        """Add the seconds of the body to one of the attributes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.perf_counter() - started)

    def take(self, loader: loading.Timing) -> None:
        """Take over what a loader has measured."""
        self.read, self.decode, self.copy, self.threads = loader.read, loader.decode, loader.copy, loader.threads

    def to_json(self) -> dict[str, float]:
        """Return the seconds of each stage."""
        stages = ("read", "decode", "copy", "wait", "compute", "write")
        return {stage: round(getattr(self, stage), 6) for stage in stages} | {"threads": self.threads}

    def in_words(self) -> str:
        """Return one line for people."""
        if not self.elapsed:
            return ""
        parts = [f"network busy {self.busy:.0%} of the time", f"waiting for scans {self.wait / self.elapsed:.0%}"]
        parts.append(f"writing {self.write / self.elapsed:.0%}")
        meanwhile = f"reading {self.read:.1f} s, decoding {self.decode:.1f} s"
        meanwhile += f", copying {self.copy:.1f} s" if self.copy else ""
        return f"{', '.join(parts)}; meanwhile {self.threads} threads: {meanwhile}"


def add_up(timings: Sequence[Timing]) -> Timing:
    """Return the sums over processes."""
    return Timing(**{field.name: sum(getattr(one, field.name) for one in timings) for field in fields(Timing)})


class ComputeClock:
    """Times the network: on a GPU by its own clock and without waiting for it, else by the clock."""

    def __init__(self, device: torch.device, timing: Timing) -> None:
        self._timing = timing
        self._gpu = loading.GpuStopwatch(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the body, or what it puts on the GPU's current stream."""
        if self._gpu is None:
            with self._timing.adding("compute"):
                yield
            return
        with self._gpu.running():
            yield
        self.settle()

    def settle(self) -> None:
        """Count what a GPU has ended."""
        if self._gpu is not None:
            self._timing.compute += self._gpu.seconds()
