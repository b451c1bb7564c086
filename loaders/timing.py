"""Where the time of a pass went."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch


@dataclass
class Timing:
    """Seconds of a pass, so far or in all.

    Attributes
    ----------
    scans, batches
        That were yielded.
    elapsed
        From the first request to the last batch.
    read, decode
        Of all threads together: getting compressed bytes; checking, decoding, cutting, scaling them (on a GPU that
        inflates: checking them).
    threads
        How many of those there are.
    copy
        To a GPU, by its own clock; DALI's copies are a part of its pipeline and not seen.
    augment
        Scaling and augmenting batches outside the threads; on a GPU by its own clock. Without a GPU, DALI's pipeline
        too: building and running it.
    starved
        The consumer waited for a batch.
    idle
        The threads waited for the consumer: all that may be loaded ahead was.
    bytes_read, bytes_out
        Compressed bytes that were read, and of the pictures.
    decoded_on_cpu
        Scans that a GPU could not inflate.
    """

    scans: int = 0
    batches: int = 0
    elapsed: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    threads: int = 1
    copy: float = 0.0
    augment: float = 0.0
    starved: float = 0.0
    idle: float = 0.0
    bytes_read: int = 0
    bytes_out: int = 0
    decoded_on_cpu: int = 0

    def reset(self) -> None:
        """Begin anew, with as many threads."""
        for field in fields(self):
            if field.name != "threads":
                setattr(self, field.name, field.default)

    @property
    def scans_per_second(self) -> float:
        """Scans over elapsed seconds."""
        return self.scans / self.elapsed if self.elapsed else 0.0


class GpuStopwatch:
    """Times work on the current stream of a GPU, by default the current one, by its clock, without waiting for it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._laps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what the body puts on the stream."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        yield
        end.record(stream)
        self._laps.append((begin, end))

    def seconds(self) -> float:
        """Return the seconds of what has ended since the last call."""
        total = 0.0
        while self._laps and self._laps[0][1].query():
            begin, end = self._laps.popleft()
            total += begin.elapsed_time(end) / 1000
        return total
