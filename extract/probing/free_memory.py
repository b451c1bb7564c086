"""How much memory is left: of the machine, and of the job that this process is part of."""

from __future__ import annotations

from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take.

    Of the machine's memory that is what Linux calls available. SLURM and containers give a job less of it, by cgroups
    (of version 2, or 1), of which each may be within others. Files in the cache count as taken there: it is at least so
    much.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    free = [int(meminfo["MemAvailable"].split()[0]) << 10]
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # a kernel without them
        groups = []
    for _, controllers, path in groups:
        if controllers == "":
            base, most, taken = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, most, taken = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for folder in [base / path.strip("/"), *(base / path.strip("/")).parents]:
            try:  # "max" is no limit; seen from within a container a folder may be elsewhere
                free.append(int((folder / most).read_text()) - int((folder / taken).read_text()))
            except (OSError, ValueError):
                continue
    return max(0, min(free))
