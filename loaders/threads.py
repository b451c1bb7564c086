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

from loaders.errors import SlowReadError
from loaders.fetch import Buffer, Payload

logger = logging.getLogger("loaders")

_MOST_GIVEN_UP = 64  # reads that hang, all in all, before the storage is taken for dead
_SECONDS_TO_STOP = 2.0  # a scan takes milliseconds; whoever needs longer hangs
_WAITING, _READING, _WRITING, _DONE = range(4)
_numbers = itertools.count()


class ScanTask:
    """One scan on its way into a batch."""

    __slots__ = ("batch", "error", "place", "row", "started", "state", "target", "thread")

    def __init__(self, row: int, place: int, target: Any) -> None:
        self.row = row
        self.place = place  # in the batch
        self.target = target
        self.batch: BatchTasks
        self.thread: threading.Thread | None = None  # that works on it
        self.state = _WAITING
        self.started = 0.0
        self.error: BaseException | None = None


class BatchTasks:
    """The scans of a batch, all of them under way.

    Attributes
    ----------
    remaining
        Tasks that are not done.
    finished
        When the last of them was done, by `time.perf_counter`.
    """

    def __init__(self, tasks: Sequence[ScanTask]) -> None:
        self.tasks = tasks
        self.remaining = len(tasks)
        self.finished = time.perf_counter()
        for task in tasks:
            task.batch = self


class _Work:
    """What threads share with those who give them work, and all that they hold while they wait for it."""

    def __init__(
        self, read: Callable[[int, Buffer], Payload], write: Callable[[Payload, Any, int], None], threads: int
    ) -> None:
        self.read, self.write = read, write
        self.threads = threads
        self.queue: queue.SimpleQueue[ScanTask | None] = queue.SimpleQueue()
        self.changed = threading.Condition()
        self.closed = False
        self.read_seconds = self.write_seconds = 0.0
        self.bytes_read = 0

    def end(self) -> None:
        """Let each thread end after the scan that it has; takes no lock, for Python may call it at any moment."""
        self.closed = True
        for _ in range(self.threads):
            self.queue.put(None)

    def finish(self, task: ScanTask, error: BaseException | None) -> None:
        """Called with the lock held."""
        task.state, task.error = _DONE, error
        task.target = task.thread = None
        task.batch.remaining -= 1
        if not task.batch.remaining:
            task.batch.finished = time.perf_counter()
            self.changed.notify_all()


class ScanThreads:
    """Runs tasks in the order in which they come.

    The threads end when this object is closed, or when nobody holds it any more.

    Parameters
    ----------
    threads
        How many at a time.
    read
        ``read(row, buffer)`` gets the bytes of a scan; it is what may hang. What it and `write` refer to lives as long
        as the threads: this object must not be among it.
    write
        ``write(payload, target, row)`` makes of them what is wanted.
    deadline
        Seconds that a read may take.
    describe
        Names a row in errors.
    """

    def __init__(
        self,
        threads: int,
        read: Callable[[int, Buffer], Payload],
        write: Callable[[Payload, Any, int], None],
        *,
        deadline: float,
        describe: Callable[[int], str],
    ) -> None:
        self.threads = threads
        self.deadline = deadline
        self._describe = describe
        self._process = os.getpid()
        self._work = _Work(read, write, threads)
        self._given_up = 0
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

    def submit(self, batch: BatchTasks) -> None:
        """Start the tasks of a batch."""
        self.check_process()
        if self._work.closed:
            raise ValueError("the loader is closed; open another one")
        for task in batch.tasks:
            self._work.queue.put(task)

    def wait(self, batch: BatchTasks) -> None:
        """Wait until all tasks of a batch are done; those whose reads hang are given up.

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

    def cancel(self, batch: BatchTasks) -> None:
        """Take back what has not started; what has, goes on to write into memory that it holds itself."""
        if os.getpid() != self._process:
            return  # a thread may have held the lock at the moment of the fork: here nobody would let go of it
        with self._work.changed:
            for task in batch.tasks:
                if task.state == _WAITING:
                    self._work.finish(task, None)

    def close(self) -> None:
        """Stop the threads, without waiting for those that hang."""
        self._end()
        end = time.perf_counter() + _SECONDS_TO_STOP
        for thread in list(self._alive):
            thread.join(timeout=max(0.0, end - time.perf_counter()))

    def _start_thread(self) -> None:
        name = f"decode-{next(_numbers)}"
        thread = threading.Thread(target=_work_until_the_end, args=(self._work,), name=name, daemon=True)
        self._alive.add(thread)
        thread.start()

    def _give_up_late(self, batch: BatchTasks) -> None:
        """Called with the lock held."""
        now = time.perf_counter()
        for task in batch.tasks:
            if task.state == _READING and now - task.started > self.deadline:
                self._given_up += 1
                message = (
                    f"{self._describe(task.row)} cannot be read: no answer within {self.deadline:g} s; look at the "
                    "storage, set another deadline, or skip such scans by on_error='skip'"
                )
                if self._given_up > _MOST_GIVEN_UP:
                    raise SlowReadError(f"{message} ({self._given_up} reads hang: the storage does not answer)")
                logger.warning("%s", message)
                if task.thread is not None:
                    self._alive.discard(task.thread)
                self._work.finish(task, SlowReadError(message))
                self._start_thread()  # in place of the one that hangs, which ends if it ever comes back


def _work_until_the_end(work: _Work) -> None:
    own = Buffer()
    while (task := work.queue.get()) is not None:
        if not _load(work, task, own):
            return
        del task  # while it waits for the next one, a thread keeps no batch alive


def _load(work: _Work, task: ScanTask, own: Buffer) -> bool:
    """Read and write a scan; False if that took too long, and another thread has taken this one's place."""
    with work.changed:
        if task.state != _WAITING or work.closed:
            return True
        task.state, task.started = _READING, time.perf_counter()
        task.thread = threading.current_thread()
        target = task.target
    buffer = target if isinstance(target, Buffer) else own
    error: BaseException | None = None
    started, read = task.started, 0.0
    nbytes = 0
    try:
        payload = work.read(task.row, buffer)
        nbytes = len(payload.content)
        read = time.perf_counter()
        with work.changed:
            if task.state != _READING:
                return False
            task.state = _WRITING
        work.write(payload, target, task.row)
    except BaseException as caught:
        error = caught
    ended = time.perf_counter()
    with work.changed:
        if task.state == _DONE:
            return False
        read = read or ended
        work.read_seconds += read - started
        work.write_seconds += ended - read
        work.bytes_read += nbytes
        work.finish(task, error)
    del buffer, target, task, error  # the error refers to this frame: it must not refer to a batch, nor to the error
    return True
