"""How much memory is left: of the machine, and of the job that this process is part of."""

from __future__ import annotations

from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take.

    Of the machine's memory that is what Linux calls available. SLURM and containers give a job less of it, by cgroups
    (of version 2, or 1), of which each may be within others; what they keep of files that were read they give back.

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
            base, most, taken, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, most, taken = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        for folder in [base / path.strip("/"), *(base / path.strip("/")).parents]:
            try:  # "max" is no limit; seen from within a container a folder may be elsewhere
                left = int((folder / most).read_text()) - int((folder / taken).read_text())
                free.append(left + _of(cached, folder / "memory.stat"))
            except (OSError, ValueError):
                continue
    return max(0, min(free))


def _of(name: str, statistics: Path) -> int:
    """Return a number of a file of lines ``name number``; 0 if it is not there."""
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
