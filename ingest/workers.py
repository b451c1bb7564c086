"""Where the work of ingest happens: in this process, or on a dask cluster of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_IN_FLIGHT = 4  # per worker: enough to hide the scheduler's latency, few enough to stop at once


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield ``function(task)`` for each task, in the order in which they finish.

    Parameters
    ----------
    function
        A module-level function (or `functools.partial` of one), for it is sent to other processes.
    workers
        Processes of a local dask cluster with one thread each; 0 works in this process.
    """
    if workers == 0:
        for task in tasks:
            yield function(task)
        return

    from distributed import Client, LocalCluster, as_completed

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        waiting = iter(tasks)
        first = [task for _, task in zip(range(workers * _TASKS_IN_FLIGHT), waiting, strict=False)]
        running = as_completed(client.map(function, first, pure=False))
        for future in running:
            yield future.result()
            following = next(waiting, None)
            if following is not None:
                running.add(client.submit(function, following, pure=False))
