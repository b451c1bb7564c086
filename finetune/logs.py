"""What can be watched: a CSV file with a row per epoch, and TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ingest.writing import write_whole

TENSORBOARD = "tensorboard"


class Log(Protocol):
    """Takes numbers as they come."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Take one."""

    def flush(self) -> None:
        """Write down what was taken."""


class _Silent:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Forget it."""

    def flush(self) -> None:
        """Do nothing."""


def write_epochs(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Write the rows of all epochs so far as CSV; what was not measured in one is empty."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8", newline=""))


@contextmanager
def tensorboard(folder: Path | None, step: int) -> Iterator[Log]:
    """Log for TensorBoard; of a run that goes on after a step, what was logged later is taken back.

    Parameters
    ----------
    folder
        None for no log.
    """
    if folder is None:
        yield _Silent()
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    writer = SummaryWriter(str(folder), purge_step=step + 1)
    try:
        yield writer
    finally:
        writer.close()
