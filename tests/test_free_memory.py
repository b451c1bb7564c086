"""Memory that is left, of the machine and of a job within it."""

from __future__ import annotations

from pathlib import Path

import pytest

from extract.probing import cross_validation
from extract.probing.free_memory import free_memory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


MACHINE = {"proc/meminfo": "MemTotal:       16000 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0"}
JOB = "sys/fs/cgroup/slurm/job_1"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8000 << 10),
        ({"proc/self/cgroup": "0::/"}, 8000 << 10),
        ({"proc/self/cgroup": "0::/slurm/job_1", f"{JOB}/memory.max": "5000", f"{JOB}/memory.current": "2000"}, 3000),
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1",
                f"{JOB}/memory.max": "5000",
                f"{JOB}/memory.current": "4900",
                f"{JOB}/memory.stat": "anon 100\nfile 4800\ninactive_file 4000\nactive_file 800",
            },
            4100,
        ),
        ({"proc/self/cgroup": "0::/slurm/job_1", f"{JOB}/memory.max": "max", f"{JOB}/memory.current": "2"}, 8000 << 10),
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1/step_0",
                f"{JOB}/step_0/memory.max": "max",
                f"{JOB}/step_0/memory.current": "2",
                f"{JOB}/memory.max": "900",
                f"{JOB}/memory.current": "1000",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "11:cpu,cpuacct:/a\n9:memory:/b\n0::/c",
                "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "700",
                "sys/fs/cgroup/memory/b/memory.usage_in_bytes": "100",
            },
            600,
        ),
    ],
)
def test_the_least_of_the_machine_and_its_jobs(tmp_path, files, free):
    assert free_memory(write(tmp_path, MACHINE | files)) == free


def test_of_this_machine():
    assert 0 < free_memory() < 1 << 50


def test_folds_side_by_side_have_room(monkeypatch):
    features = 100_000 * 512
    monkeypatch.setattr(cross_validation.os, "sched_getaffinity", lambda _: range(16))
    for free, threads in ((1 << 40, 8), (2 * 3 * 8 * features, 2), (0, 1)):
        monkeypatch.setattr(cross_validation, "free_memory", lambda free=free: free)
        assert cross_validation.threads_for(features) == threads
    assert cross_validation.threads_for(1000) == 1
