"""Where the time of a pass went."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        To the GPU, by its own clock.
    finish
        Scaling and augmenting batches outside the threads, and DALI's part.
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
    finish: float = 0.0
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
