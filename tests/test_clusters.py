"""docs/clusters.md is true: its script and its commands run, on a local cluster and with scripts in SLURM's place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import dask
import numpy as np
import pytest
from calling import call
from conftest import ellipsoid, write_nifti
from dask.utils import parse_bytes, parse_timedelta

from ingest import open_store
from ingest.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
TEXT = PAGE.read_text()
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]
PATH = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def shared(tmp_path) -> Path:
    """Return the folder that stands for /shared: six scans and a table."""
    for number in range(6):
        data = ellipsoid(AFFINE, (32, 42, 32), seed=number).astype(np.int16)
        write_nifti(tmp_path / "ukb" / "T1" / f"{9000000 + number}.nii.gz", data, AFFINE)
    rows = "\n".join(f"{9000000 + number},{number % 2}" for number in range(6))
    (tmp_path / "table.csv").write_text(f"eid,31-0.0\n{rows}\n")
    return tmp_path


def check_store(shared: Path) -> None:
    store = open_store(shared / "t1.zarr")
    assert list(store.scans["status"]) == ["ok"] * 6
    assert list(store.phenotypes["sex"]) == [0, 1] * 3


def fake_jobqueue(asked: dict) -> types.ModuleType:
    """Return a module whose SLURMCluster is a small cluster on this machine."""
    from distributed import LocalCluster

    class SLURMCluster(LocalCluster):
        def __init__(self, **options: object) -> None:
            asked.update(options)
            with dask.config.set({"distributed.worker.memory.pause": False}):
                super().__init__(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit="4GB")

        def scale(self, n: int) -> None:
            asked.setdefault("workers", n)  # closing it scales to 0
            super().scale(min(n, 2))

        def wait_for_workers(self, n_workers: int) -> None:
            asked["waited_for"] = n_workers
            super().wait_for_workers(min(n_workers, 2), timeout=60)

    module = types.ModuleType("dask_jobqueue")
    module.SLURMCluster = SLURMCluster  # type: ignore[attr-defined]
    return module


def test_the_script_runs_on_a_cluster(shared, monkeypatch, capsys):
    asked: dict = {}
    monkeypatch.setitem(sys.modules, "dask_jobqueue", fake_jobqueue(asked))
    code = block("python").replace("/shared/", f"{shared}/")
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    assert "'status': {'ok': 6}" in capsys.readouterr().out
    check_store(shared)
    # What its comments and the text say of the numbers.
    assert asked["workers"] == 40 == 5 * asked["processes"]
    assert asked["cores"] == asked["processes"]
    assert parse_bytes(asked["memory"]) / asked["processes"] == 4 * 10**9
    assert asked["waited_for"] <= asked["workers"]
    hours, minutes, _ = map(int, asked["walltime"].split(":"))
    lifetime, stagger = asked["worker_extra_args"][1::2]
    latest = parse_timedelta(lifetime) + parse_timedelta(stagger)
    assert latest < 3600 * hours + 60 * minutes
    assert asked["worker_extra_args"][::2] == ["--lifetime", "--lifetime-stagger"]


def test_its_options_are_those_of_dask():
    import distributed.config  # fills in its settings  # noqa: F401

    help_text = subprocess.run(
        [sys.executable, "-m", "distributed.cli.dask_worker", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in re.findall(r'"(--[a-z-]+)"', block("python")):
        assert option in help_text
    (variable,) = re.findall(r"export (DASK_\w+=\w+)", block("python"))
    name, _, value = variable.partition("=")
    assert dask.config.collect_env({name: value}) == {"distributed": {"worker": {"memory": {"pause": False}}}}
    assert "pause" in dask.config.get("distributed.worker.memory")


def test_the_command_uses_a_cluster_that_is_there(shared):
    from distributed import LocalCluster

    command = block("sh").replace("/shared/", f"{shared}/")
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        command = command.replace("tcp://10.0.0.1:8786", cluster.scheduler_address)
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": PATH}
        )
    assert done.returncode == 0, done.stderr
    assert "6 scans (6 ok)" in done.stdout
    check_store(shared)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "127.0.0.1", "127.0.0.1:99999", "smoke://127.0.0.1:8786"])
def test_a_scheduler_that_does_not_answer_is_named_in_one_line(shared, monkeypatch, address):
    monkeypatch.setattr("ingest.workers._CONNECT_S", 0.5)
    done = call(main, shared / "ukb", shared / "t1.zarr", "--scheduler", address)
    named = address if "://" in address else f"tcp://{address}"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: no dask scheduler answers at {named}; expected tcp://HOST:PORT of one that runs, and can be reached "
        "from this machine"
    ]
    assert not (shared / "t1.zarr").exists()


@pytest.fixture
def job(shared):
    """Return a function that starts the job's script as SLURM would, with a `scontrol` that notes how it was called."""
    (shared / "bin").mkdir()
    (shared / "bin" / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {shared}/scontrol.log\n')
    (shared / "bin" / "scontrol").chmod(0o755)
    (shared / "job.sh").write_text(block("bash").replace("/shared/", f"{shared}/").replace("28GB", "4GB"))
    env = {
        **os.environ,
        "PATH": f"{shared / 'bin'}{os.pathsep}{PATH}",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "2",
    }
    running: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        running.append(
            subprocess.Popen(
                ["bash", shared / "job.sh"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                start_new_session=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_the_job_of_one_node(shared, job):
    process = job()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "6 scans (6 ok)" in text
    check_store(shared)
    assert not (shared / "scontrol.log").exists()
    (shared / "ukb" / "T1" / "9000009.nii.gz").write_bytes(b"broken")
    process = job()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "bad_nifti: 9000009.nii.gz" in text


def test_the_job_requeues_itself_and_goes_on_after_it_was_killed(shared, job):
    process = job()
    end = time.monotonic() + 60
    while not (shared / "t1.zarr.lock").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)  # to the batch script alone: that is what B: is for
    while not (shared / "scontrol.log").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (shared / "scontrol.log").read_text() == "requeue 77\n"
    os.killpg(process.pid, signal.SIGKILL)  # as SLURM does then
    process.communicate()
    second = job()
    text, _ = second.communicate(timeout=120)
    assert second.returncode == 0, text
    check_store(shared)


def test_what_the_jobs_ask_of_slurm():
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", block("bash"), flags=re.MULTILINE))
    assert {"requeue", "signal", "cpus-per-task", "mem", "time", "output"} <= set(directives)
    (given,) = re.findall(r"--max-memory (\w+)", block("bash"))
    assert parse_bytes(given) <= 0.9 * parse_bytes(f"{directives['mem']}iB")
    assert re.fullmatch(r"B:USR1@\d+", directives["signal"])


def test_flags_of_the_page_exist():
    shown = subprocess.run(
        [Path(sys.executable).with_name("ingest"), "run", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    commands = re.sub(r"^#.*", "", block("bash") + block("sh"), flags=re.MULTILINE)
    flags = set(re.findall(r"--[a-z-]+", commands))
    assert flags == {"--phenotypes", "--workers", "--scheduler", "--max-memory"}
    for flag in flags | {"--retry-failed"}:
        assert flag in shown, flag
    assert "docs/clusters.md" in (PAGE.parents[1] / "README.md").read_text()
