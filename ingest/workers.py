"""Where the work of ingest happens: in this process, or on a dask cluster of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_IN_FLIGHT = 4  # per worker: enough to hide the scheduler's latency, few enough to stop at once


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    scheduler: str | None = None,
    *,
    lost: Callable[[Task], Result],
) -> Iterator[Result]:
    """Yield ``function(task)`` for each task, in the order in which they finish.

    Parameters
    ----------
    function
        A module-level function (or `functools.partial` of one), for it is sent to other processes.
    workers
        Processes of a local dask cluster with one thread each; 0 works in this process.
    scheduler
        Address of a dask cluster to use instead, such as ``tcp://10.0.0.1:8786``.
    lost
        What a task gives whose worker died, and the next one too, as often as dask tries (4 times).
    """
    if not tasks:
        return
    if scheduler is None and workers == 0:
        for task in tasks:
            yield function(task)
        return

    from distributed import Client, KilledWorker, LocalCluster, as_completed

    with ExitStack() as stack:
        if scheduler is None:
            count = min(workers, len(tasks))
            cluster = LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        else:
            client = stack.enter_context(Client(scheduler, timeout=30))
            client.wait_for_workers(1)
            count = max(1, sum(client.nthreads().values()))
        waiting = iter(tasks)
        task_of = {}
        running = as_completed()

        def start_next() -> None:
            task = next(waiting, None)
            if task is not None:
                future = client.submit(function, task, pure=False)
                task_of[future.key] = task
                running.add(future)

        for _ in range(count * _TASKS_IN_FLIGHT):
            start_next()
        for future in running:
            task = task_of.pop(future.key)
            try:
                yield future.result()
            except KilledWorker:
                yield lost(task)
            start_next()
