"""Where the work of ingest happens: threads of this process, local processes, or a dask cluster."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ingest.errors import SchedulerError
from ingest.memory import kept_memory

if TYPE_CHECKING:
    from distributed import Client

Task = TypeVar("Task")
Result = TypeVar("Result")

_CONNECT_S = 30.0  # in which a scheduler must answer
_IN_FLIGHT = 3  # batches per worker: enough to hide the scheduler's latency, few enough to stop at once
#: No profiler. And freed memory is kept, see `ingest.memory`, so dask must not wait for it to be given back.
_LOCAL_WORKERS = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}
#: A script for local workers. Ctrl-C goes to all processes of a terminal, where each worker would print a traceback;
#: it is for this process alone, which ends its workers, and that they were at work then is no news.
_DEAF_TO_CTRL_C = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
"""
_LARGEST_BATCH = 16  # tasks sent at once: dask spends some 10 ms of this process on each batch


def run_in_threads(function: Callable[[Task], Result], tasks: Sequence[Task], threads: int) -> Generator[Result]:
    """Yield ``function(task)`` for each task, in the order in which they finish.

    Threads do, for reading, inflating and the compiled loops all let go of Python's lock.
    """
    with kept_memory(), ThreadPoolExecutor(threads, thread_name_prefix="ingest") as pool:
        waiting = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            while True:
                for task in itertools.islice(waiting, 2 * threads - len(running)):
                    running.add(pool.submit(function, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_in_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int = 0,
    scheduler: str | None = None,
    memory_limit: int | None = None,
    lost: Callable[[Task], Result],
) -> Generator[Result]:
    """Yield ``function(task)`` for each task, in the order in which they finish, on a dask cluster.

    What workers log (of the logger ``ingest``) is logged in this process too.

    Parameters
    ----------
    function
        A module-level function (or `functools.partial` of one), for it is sent to other processes.
    workers
        Processes of a local cluster, with one thread each.
    scheduler
        Address of a cluster to use instead, such as ``tcp://10.0.0.1:8786``.
    memory_limit
        Bytes at which a local worker is stopped; None shares the machine's memory out.
    lost
        What a task gives that ends its worker, each time that dask tries it (4 times), with nothing else under way.

    Raises
    ------
    SchedulerError
        If nothing answers at the address.
    """
    if not tasks:
        return
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if scheduler is None:
            count = min(workers, len(tasks))
            limit = "auto" if memory_limit is None else memory_limit
            scripts = [*dask.config.get("distributed.worker.preload"), _DEAF_TO_CTRL_C]
            with dask.config.set(_LOCAL_WORKERS, **{"distributed.worker.preload": scripts}):
                cluster = LocalCluster(  # any free port: two runs on one machine must not quarrel about one
                    n_workers=count, threads_per_worker=1, memory_limit=limit, dashboard_address="127.0.0.1:0"
                )
            nanny = logging.getLogger("distributed.nanny")
            stack.callback(nanny.setLevel, nanny.level)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
            # That it kills workers in the end, if they are slow, is no news.
            stack.callback(nanny.setLevel, logging.ERROR)
        else:
            client = stack.enter_context(_connect(scheduler))
            client.wait_for_workers(1)
            count = max(1, sum(client.nthreads().values()))
        client.forward_logging("ingest")
        size = min(_LARGEST_BATCH, max(1, len(tasks) // (8 * count)))
        batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        work = partial(_run_batch, function)
        suspects: list[Task] = []
        for batch, results in _run_batches(client, work, batches):
            if results is None:
                suspects += batch  # one of them, or one that shared a worker with them, ends workers
            else:
                yield from results
        for batch, results in _run_batches(client, work, [[task] for task in suspects], at_once=1):
            yield lost(batch[0]) if results is None else results[0]


def check_scheduler(scheduler: str) -> None:
    """Raise SchedulerError if nothing answers at an address, before anything is begun that needs it."""
    _connect(scheduler).close()


def _connect(scheduler: str) -> Client:
    from distributed import Client

    try:
        return Client(scheduler, timeout=_CONNECT_S, set_as_default=False)  # which one that fails would stay
    except (OSError, OverflowError, ValueError) as error:  # nobody there, or no address
        where = scheduler if "://" in scheduler else f"tcp://{scheduler}"  # as dask reads it
        raise SchedulerError(
            f"no dask scheduler answers at {where}; expected tcp://HOST:PORT of one that runs, and can be reached from "
            "this machine"
        ) from error


def _run_batch(function: Callable[[Task], Result], batch: Sequence[Task]) -> list[Result]:
    with kept_memory():  # given back between batches: what dask sees of it would make it hold this worker back
        return [function(task) for task in batch]


def _run_batches(
    client: Client,
    work: Callable[[Sequence[Task]], list[Result]],
    batches: Sequence[Sequence[Task]],
    at_once: int | None = None,
) -> Iterator[tuple[Sequence[Task], list[Result] | None]]:
    """Yield each batch with its results, or None if its workers died.

    Workers may come and go; `at_once` batches are under way, by default some for each thread that is there.
    """
    from distributed import KilledWorker, as_completed

    waiting = iter(batches)
    batch_of: dict[str, Sequence[Task]] = {}
    running = as_completed(loop=client.loop)

    def start_more() -> None:
        wanted = at_once or _IN_FLIGHT * max(1, sum(client.nthreads().values()))
        for batch in itertools.islice(waiting, max(0, wanted - len(batch_of))):
            future = client.submit(work, batch, pure=False)
            batch_of[str(future.key)] = batch
            running.add(future)

    start_more()
    for future in running:
        batch = batch_of.pop(str(future.key))
        try:
            yield batch, future.result()
        except KilledWorker:
            yield batch, None
        start_more()
