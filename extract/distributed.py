"""The processes that ``torchrun`` starts, which share one extraction, or one training."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from ingest.errors import StoreError

#: A process that died is found out at once: its connections are closed, and torchrun ends the others. This is for those
#: that only take longer than others.
_PATIENCE = timedelta(days=7)

#: What gloo and nccl say of it.
_CLOSED = re.compile("connection (closed|reset)|gloo|nccl|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes
    ----------
    rank, size
        This is process number `rank` of so many. Number 0 writes the embeddings, and prints.
    local_rank
        Its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self, device: str) -> str:
        """Return the device of this process, each of which has a GPU of its own, and make that the current one.

        Raises
        ------
        ValueError
            If there are fewer GPUs than processes on this machine, or all are to work on one.
        """
        if self.size > 1 and re.fullmatch(r"cuda:\d+", device):
            raise ValueError(
                f"device is {device} for each of {self.size} processes; leave it out: each takes a GPU of its own"
            )
        if self.size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local_rank} of this machine has no GPU of its own, for there are "
                f"{torch.cuda.device_count()}; use --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    @contextlib.contextmanager
    def first_here(self) -> Iterator[None]:
        """Let process 0 run the block before the others; if it fails there, they end without a word."""
        if self.rank == 0:
            ended_well = False
            try:
                yield
                ended_well = True
            finally:
                self.tell(ended_well)
            return
        if not self.tell(None):
            raise SystemExit(1)
        yield

    def tell(self, what: Any) -> Any:
        """Return in every process what process 0 gives."""
        if self.size == 1:
            return what
        given = [what]
        with named_death():
            torch.distributed.broadcast_object_list(given, src=0)
        return given[0]

    def gather(self, what: Any) -> list[Any]:
        """Return in process 0, once all have come here, what each of them gives; in the others nothing."""
        if self.size == 1:
            return [what]
        given = [None] * self.size if self.rank == 0 else None
        with named_death():
            torch.distributed.gather_object(what, given, dst=0)
        return given or []

    def gather_all(self, what: Any) -> list[Any]:
        """Return in every process, once all have come here, what each of them gives."""
        return list(self.tell(self.gather(what)))


@contextlib.contextmanager
def join_group() -> Iterator[Group]:
    """Join the processes that torchrun has started, if it has: they are known by the variables RANK and WORLD_SIZE."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:
        yield Group()
        return
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )  # nccl: gradients of networks that are trained
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        rank = torch.distributed.get_rank()
        yield Group(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def named_death() -> Iterator[None]:
    """Say what it means that a connection to another process was closed."""
    try:
        yield
    except RuntimeError as error:
        if not _CLOSED.search(str(error)):
            raise
        raise StoreError(
            f"another process of this run has ended ({str(error).splitlines()[0][:200]}); see what it said, and run "
            "the same command again: it goes on with what is finished"
        ) from None
