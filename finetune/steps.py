"""How the scans of an epoch become optimiser steps, and steps the batches of each process."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class Steps:
    """A plan of the training.

    Attributes
    ----------
    batch
        Scans of a step, of all processes together.
    micro
        ... that a process sees at a time.
    accumulate
        Times that it does so in a step, at most.
    per_epoch
        Steps of an epoch; what is left over of the scans waits for the next one, which has another order.
    epochs
        In all.
    most
        Scans that a process could see at a time.
    """

    batch: int
    micro: int
    accumulate: int
    per_epoch: int
    epochs: int
    most: int

    @property
    def warning(self) -> str | None:
        """What to say of a batch that does not divide into parts of a size that devices like; None for most."""
        if 2 * self.micro >= self.most:
            return None
        return (
            f"a step's {self.accumulate * self.micro} scans of each process are taken {self.micro} at a time, though "
            f"{self.most} would fit, for they divide into no larger parts: --batch-size {self.rounded} would be faster"
        )

    @property
    def rounded(self) -> int:
        """The nearest batch that processes take in parts as large as they can."""
        processes = self.batch // (self.accumulate * self.micro)
        parts = max(1, round(self.accumulate * self.micro / self.most))
        return processes * parts * self.most

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.per_epoch * self.epochs


def plan_steps(scans: int, settings: FinetuneSettings, most: int, processes: int = 1) -> Steps:
    """Plan the steps of a run; what a step sees does not depend on the number of processes or the memory of devices.

    Parameters
    ----------
    scans
        To train on.
    most
        Scans that a device takes at a time.

    Raises
    ------
    ValueError
        If the processes cannot share a batch evenly.
    """
    batch = min(settings.batch_size, scans)
    if settings.batch_size % processes:
        raise ValueError(
            f"batch_size is {settings.batch_size}, which {processes} processes cannot share evenly; expected a "
            f"multiple of {processes}"
        )
    share = -(-batch // processes)
    limit = min(share, settings.micro_batch or most)
    if batch == scans:  # the end of the only step is that of the epoch, and may be smaller
        micro = -(-share // -(-share // limit))
    else:
        micro = next(size for size in range(limit, 0, -1) if share % size == 0)
    per_epoch = max(1, scans // batch)
    epochs = max(settings.epochs, -(-settings.min_steps // per_epoch))
    return Steps(batch, micro, -(-share // micro), per_epoch, epochs, limit)
