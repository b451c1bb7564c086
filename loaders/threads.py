"""Threads that load scans, and are given up when a read hangs.

They are daemons, which `concurrent.futures` has not: a thread that waits for a dead server for ever must keep neither a
batch nor the end of the program waiting.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from loaders.errors import CorruptShardError, ShardError, SlowReadError
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


class ScanThreads:
    """Runs tasks in the order in which they come.

    Parameters
    ----------
    threads
        How many at a time.
    read
        ``read(row, buffer)`` gets the bytes of a scan; it is what may hang.
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
        self._read, self._write, self._describe = read, write, describe
        self._queue: queue.SimpleQueue[ScanTask | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._given_up = 0
        self._closed = False
        self._alive: set[threading.Thread] = set()
        #: Seconds of all threads together, and bytes.
        self.read_seconds = self.write_seconds = 0.0
        self.bytes_read = 0
        for _ in range(threads):
            self._start_thread()

    def submit(self, batch: BatchTasks) -> None:
        """Start the tasks of a batch."""
        if self._closed:
            raise ValueError("the loader is closed; open another one")
        for task in batch.tasks:
            self._queue.put(task)

    def wait(self, batch: BatchTasks) -> None:
        """Wait until all tasks of a batch are done; those whose reads hang are given up.

        Raises
        ------
        SlowReadError
            If so many reads hung that the storage must be taken for dead.
        """
        with self._changed:
            while batch.remaining:
                if self._closed:
                    raise ValueError("the loader was closed while a batch was waited for")
                # Not for ever, even where nothing hangs: Python hands Ctrl-C to a waiting thread only now and then.
                self._changed.wait(min(1.0, self.deadline / 4))
                if batch.remaining:
                    self._give_up_late(batch)

    def cancel(self, batch: BatchTasks) -> None:
        """Take back what has not started; what has, goes on to write into memory that it holds itself."""
        with self._changed:
            for task in batch.tasks:
                if task.state == _WAITING:
                    self._finish(task, None)

    def close(self) -> None:
        """Stop the threads, without waiting for those that hang."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self.threads):
            self._queue.put(None)
        end = time.perf_counter() + _SECONDS_TO_STOP
        for thread in list(self._alive):
            thread.join(timeout=max(0.0, end - time.perf_counter()))

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"decode-{next(_numbers)}", daemon=True)
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
                self._finish(task, SlowReadError(message))
                self._start_thread()  # in place of the one that hangs, which ends if it ever comes back

    def _finish(self, task: ScanTask, error: BaseException | None) -> None:
        """Called with the lock held."""
        task.state, task.error = _DONE, error
        task.target = task.thread = None
        task.batch.remaining -= 1
        if not task.batch.remaining:
            task.batch.finished = time.perf_counter()
            self._changed.notify_all()

    def _work(self) -> None:
        own = Buffer()
        while (task := self._queue.get()) is not None:
            with self._changed:
                if task.state != _WAITING or self._closed:
                    continue
                task.state, task.started = _READING, time.perf_counter()
                task.thread = threading.current_thread()
                target = task.target
            buffer = target if isinstance(target, Buffer) else own
            error: BaseException | None = None
            started, read = task.started, 0.0
            nbytes = 0
            try:
                payload = self._read(task.row, buffer)
                nbytes = len(payload.content)
                read = time.perf_counter()
                with self._changed:
                    if task.state != _READING:  # it was given up: another thread has taken this one's place
                        return
                    task.state = _WRITING
                self._write(payload, target, task.row)
            except BaseException as caught:
                error = caught
            ended = time.perf_counter()
            with self._changed:
                if task.state == _DONE:
                    return
                read = read or ended
                self.read_seconds += read - started
                self.write_seconds += ended - read
                self.bytes_read += nbytes
                self._finish(task, error)
            del target, task, error


def as_shard_error(error: BaseException, scan: str) -> ShardError:
    """Return what went wrong with a scan in words that name it; an error that no scan is to blame for is raised."""
    if isinstance(error, ShardError):
        return error
    if not isinstance(error, (OSError, ValueError)):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    wrapped = CorruptShardError(f"{scan} cannot be read: {text}; ingest its source again, or leave the row out")
    wrapped.__cause__ = error
    return wrapped
