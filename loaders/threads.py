"""Threads that load scans, and are given up when a read hangs.

They are daemons, which `concurrent.futures` has not: a thread that waits for a dead server for ever must keep neither a
batch nor the end of the program waiting. Of whoever gave them work they know nothing, so that a loader that nobody
holds any more is freed, and they with it.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loaders.errors import SlowReadError
from loaders.fetch import Buffer
from loaders.progress import give_up_late, new_progress, stop

logger = logging.getLogger("loaders")

_MOST_GIVEN_UP = 64  # reads that hang at a time, before the storage is taken for dead
_SECONDS_TO_STOP = 2.0  # a scan takes milliseconds; whoever needs longer hangs
_WAITING, _RUNNING, _DONE = range(3)
_numbers = itertools.count()


class ScanGroup:
    """Some scans of a batch, which one thread loads one after the other.

    Attributes
    ----------
    rows, places
        Of the scans in the store, and int64 in the batch.
    target
        The batch, or whatever it is made of.
    progress
        How far the thread is, see `loaders.progress`.
    errors
        What is wrong with scans, by place.
    """

    __slots__ = ("batch", "errors", "places", "progress", "rows", "state", "target", "thread")

    def __init__(self, rows: Sequence[int], places: Sequence[int], target: Any) -> None:
        self.rows, self.places = list(rows), np.array(places, np.int64)
        self.target = target
        self.progress = new_progress(len(self.rows))
        self.errors: dict[int, BaseException] = {}
        self.batch: BatchGroups
        self.thread: threading.Thread | None = None  # that works on it
        self.state = _WAITING

    def unsettled(self) -> list[int]:
        """Return the numbers of the scans that are neither loaded nor known to be bad."""
        return np.flatnonzero(~self.progress.settled).tolist()


class BatchGroups:
    """The scans of a batch, all of them under way.

    Attributes
    ----------
    remaining
        Groups that are not done.
    finished
        When the last of them was done, by `time.perf_counter`.
    """

    def __init__(self, groups: Sequence[ScanGroup]) -> None:
        self.groups: list[ScanGroup] = []
        self.remaining = 0
        self.finished = time.perf_counter()
        for group in groups:
            self.add(group)

    def add(self, group: ScanGroup) -> None:
        """Take another group."""
        group.batch = self
        self.groups.append(group)
        self.remaining += 1


class _Work:
    """What threads share with those who give them work, and all that they hold while they wait for it."""

    def __init__(self, load: Callable[[ScanGroup, Buffer], None], threads: int) -> None:
        self.load = load
        self.threads = threads
        self.queue: queue.SimpleQueue[ScanGroup | None] = queue.SimpleQueue()
        self.changed = threading.Condition()
        self.closed = False
        self.read_seconds = self.write_seconds = 0.0
        self.bytes_read = 0
        self.given_up = 0  # reads that hang

    def end(self) -> None:
        """Let each thread end after the scan that it has; takes no lock, for Python may call it at any moment."""
        self.closed = True
        for _ in range(self.threads):
            self.queue.put(None)

    def finish(self, group: ScanGroup) -> None:
        """Called with the lock held."""
        group.state = _DONE
        group.target = group.thread = None
        read, written = group.progress.seconds.tolist()
        self.read_seconds += read
        self.write_seconds += written
        self.bytes_read += int(group.progress.nbytes[0])
        group.batch.remaining -= 1
        if not group.batch.remaining:
            group.batch.finished = time.perf_counter()
            self.changed.notify_all()


class ScanThreads:
    """Loads groups of scans in the order in which they come.

    The threads end when this object is closed, or when nobody holds it any more.

    Parameters
    ----------
    threads
        How many at a time.
    load
        ``load(group, buffer)`` loads the scans of a group, settles each, and notes what is wrong with it; `buffer` is
        the thread's own. What it refers to lives as long as the threads: this object must not be among it.
    deadline
        Seconds that a read may take.
    describe
        Names a row in errors.
    """

    def __init__(
        self,
        threads: int,
        load: Callable[[ScanGroup, Buffer], None],
        *,
        deadline: float,
        describe: Callable[[int], str],
    ) -> None:
        self.threads = threads
        self.deadline = deadline
        self._describe = describe
        self._process = os.getpid()
        self._work = _Work(load, threads)
        self._alive: set[threading.Thread] = set()
        self._end = weakref.finalize(self, self._work.end)
        self._end.atexit = False  # daemons need no end then
        for _ in range(threads):
            self._start_thread()

    def totals(self) -> tuple[float, float, int]:
        """Return seconds of reading and of writing, of all threads together, and bytes read, since the beginning."""
        return self._work.read_seconds, self._work.write_seconds, self._work.bytes_read

    def check_process(self) -> None:
        """Refuse to work in a process that was forked: it has no threads, and would wait for ever.

        Raises
        ------
        ValueError
            If this is not the process that started them.
        """
        if os.getpid() != self._process:
            raise ValueError(
                f"the loader was opened in process {self._process} and is used in process {os.getpid()}, which has "
                "none of its threads; open it in the worker that uses it, or use VolumeDataset"
            )

    def submit(self, batch: BatchGroups) -> None:
        """Start the groups of a batch."""
        self.check_process()
        if self._work.closed:
            raise ValueError("the loader is closed; open another one")
        for group in batch.groups:
            self._work.queue.put(group)

    def wait(self, batch: BatchGroups) -> None:
        """Wait until all groups of a batch are done; those whose reads hang are given up.

        Raises
        ------
        SlowReadError
            If so many reads hung that the storage must be taken for dead.
        """
        self.check_process()
        with self._work.changed:
            while batch.remaining:
                if self._work.closed:
                    raise ValueError("the loader was closed while a batch was waited for")
                # Not for ever, even where nothing hangs: Python hands Ctrl-C to a waiting thread only now and then.
                self._work.changed.wait(min(1.0, self.deadline / 4))
                if batch.remaining:
                    self._give_up_late(batch)

    def cancel(self, batch: BatchGroups) -> None:
        """Take back what has not started; a scan that has is written into memory that its thread holds itself."""
        if os.getpid() != self._process:
            return  # a thread may have held the lock at the moment of the fork: here nobody would let go of it
        with self._work.changed:
            for group in batch.groups:
                if group.state == _WAITING:
                    self._work.finish(group)
                else:
                    stop(group.progress)

    def close(self) -> None:
        """Stop the threads, without waiting for those that hang."""
        self._end()
        end = time.perf_counter() + _SECONDS_TO_STOP
        for thread in list(self._alive):
            thread.join(timeout=max(0.0, end - time.perf_counter()))

    def _start_thread(self, first: ScanGroup | None = None) -> None:
        name = f"decode-{next(_numbers)}"
        thread = threading.Thread(target=_work_until_the_end, args=(self._work, first), name=name, daemon=True)
        self._alive.add(thread)
        thread.start()

    def _give_up_late(self, batch: BatchGroups) -> None:
        """Called with the lock held."""
        for group in list(batch.groups):
            if group.state != _RUNNING or (late := give_up_late(group.progress, self.deadline)) is None:
                continue
            message = (
                f"{self._describe(group.rows[late])} cannot be read: no answer within {self.deadline:g} s; look at the "
                "storage, or set another deadline"
            )
            if self._work.given_up >= _MOST_GIVEN_UP:
                raise SlowReadError(f"{message} ({self._work.given_up + 1} reads hang: the storage does not answer)")
            self._work.given_up += 1
            logger.warning("%s", message)
            if group.thread is not None:
                self._alive.discard(group.thread)
            group.errors[int(group.places[late])] = SlowReadError(message)
            others = [number for number in group.unsettled() if number != late]
            rest = None
            if others:
                rest = ScanGroup([group.rows[n] for n in others], group.places[others].tolist(), group.target)
                batch.add(rest)
            self._work.finish(group)
            # In place of the one that hangs, which ends if it ever comes back. It begins with what that one has left:
            # behind the groups of later batches, which may hang too, it would wait for those.
            self._start_thread(rest)


def _work_until_the_end(work: _Work, group: ScanGroup | None) -> None:
    own = Buffer()
    while group is not None or (group := work.queue.get()) is not None:
        if not _load(work, group, own):
            return
        group = None  # while it waits for the next one, a thread keeps no batch alive


def _load(work: _Work, group: ScanGroup, own: Buffer) -> bool:
    """Load a group; False if that took too long, and another thread has taken this one's place."""
    with work.changed:
        if group.state != _WAITING or work.closed:
            return True
        group.state, group.thread = _RUNNING, threading.current_thread()
    error: BaseException | None = None
    try:
        work.load(group, own)
    except BaseException as caught:
        error = caught
    with work.changed:
        if group.state == _DONE:
            work.given_up -= 1
            return False
        if error is None and not group.progress.settled.all():  # of a batch that nobody waits for any more
            error = RuntimeError(f"scans of rows {group.rows} were not loaded")
        if error is not None:  # no scan is to blame for it
            group.errors |= {int(group.places[number]): error for number in group.unsettled()}
        work.finish(group)
    del group, error  # the error refers to this frame: it must not refer to a batch, nor to the error
    return True
