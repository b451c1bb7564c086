"""What a user sees of a run: the bar, one JSON document, its summary, Ctrl-C, and errors that nobody thought of."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from calling import call
from conftest import ellipsoid, write_nifti
from rich.console import Console

import finetune.cli
import ingest.cli
from ingest.progress import progress_bar
from ingest.settings import IngestSummary

INGEST = str(Path(sys.executable).with_name("ingest"))
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a folder with six good scans and two that are broken."""
    folder = tmp_path_factory.mktemp("progress") / "src"
    for number in range(6):
        data = ellipsoid(AFFINE, (32, 42, 32), seed=number).astype(np.int16)
        write_nifti(folder / f"{9000000 + number}.nii.gz", data, AFFINE)
    for number in (7, 8):
        (folder / f"{9000000 + number}.nii.gz").write_bytes(b"broken")
    return folder


def patched(folder: Path, script: str) -> dict[str, str]:
    """Return an environment in which each process runs a script first: Python imports sitecustomize as it starts."""
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(script)
    path = os.pathsep.join([str(folder / "patch"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "300"}


def plain(text: str) -> str:
    """Leave colours and movements of the cursor out."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def shown(total: int | None, *updates: dict) -> str:
    """Return the last line of a bar after some updates."""
    console = Console(force_terminal=True, file=StringIO(), width=120)
    with progress_bar("ingest", console) as progress:
        bar = progress.add_task("ingest", total=total)
        for update in updates:
            time.sleep(0.01)  # there is no rate in no time
            progress.update(bar, **update)
        console.file = StringIO()
        progress.refresh()
        return plain(console.file.getvalue())


def test_the_bar_shows_count_rate_bytes_failures_and_time_left():
    line = shown(
        200,
        {"advance": 1, "bytes": 1_000_000, "failures": 0},
        {"advance": 1, "bytes": 2_500_000, "failures": 0},
        {"advance": 1, "bytes": 7_300_000, "failures": 2},
    )
    assert re.search(r"ingest .*\b3/200\b", line)
    rate = float(re.findall(r"([\d.]+)/s", line)[0])
    assert 0 < rate < 110
    assert "7.3 MB" in line
    assert "2 failed" in line
    hours, minutes, seconds = map(int, re.findall(r"(\d+):(\d\d):(\d\d)", line)[0])
    left = 3600 * hours + 60 * minutes + seconds
    assert left == pytest.approx(197 / rate, rel=0.1, abs=1.1)


def test_the_bar_says_nothing_of_what_it_does_not_know():
    assert "failed" not in shown(200, {"advance": 1, "bytes": 10, "failures": 0})
    line = shown(None)
    assert "failed" not in line
    assert "/s" not in line
    assert "0/?" in line


def test_no_bar_without_a_terminal():
    console = Console(file=StringIO())
    with progress_bar("ingest", console) as progress:
        progress.update(progress.add_task("ingest", total=3), advance=1)
        progress.refresh()
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""


def run_on_a_terminal(command: list[str]) -> tuple[str, str, int]:
    """Run a command whose stderr is a terminal of 120 columns; return its stdout, what the terminal got, its code."""
    controller, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=env) as process:
        os.close(terminal)
        got = b""
        while True:
            try:
                chunk = os.read(controller, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            got += chunk
        os.close(controller)
        stdout = process.communicate(timeout=60)[0]
    return stdout, got.decode(), process.returncode


def test_a_run_on_a_terminal_shows_its_bar_beside_one_json_document(source, tmp_path):
    stdout, screen, code = run_on_a_terminal([INGEST, str(source), str(tmp_path / "s.zarr"), "--json"])
    assert code == 1
    assert json.loads(stdout)["scans"] == 8
    assert "\x1b[" in screen
    last = [line for line in plain(screen).replace("\r", "\n").splitlines() if "8/8" in line][-1]
    assert re.search(r"ingest .*8/8 .*\d/s .*\d (bytes|kB) 2 failed \d:\d\d:\d\d", last)
    read = sum(file.stat().st_size for file in source.iterdir())
    assert f"{read / 1000:.1f} kB" in last


@pytest.mark.parametrize("workers", ["0", "1"])
def test_json_is_one_document_and_nothing_else(source, tmp_path, workers):
    command = [INGEST, str(source), str(tmp_path / "s.zarr"), "--workers", workers, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # two scans are broken
    assert done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert {"scans", "status", "seconds", "volumes_per_second", "bytes"} <= set(document)
    assert document["scans"] == 8
    assert document["status"] == {"bad_nifti": 2, "ok": 6}
    assert document["bytes"] == sum(file.stat().st_size for file in source.iterdir())
    assert document["volumes_per_second"] == pytest.approx(6 / document["seconds"], rel=0.01)
    assert sorted(name for name, _, _ in document["failures"]) == ["9000007.nii.gz", "9000008.nii.gz"]
    assert done.stderr == ""  # no bar, no colours, no chatter of dask
    if workers == "0":
        again = subprocess.run([*command, "--retry-failed"], capture_output=True, text=True, timeout=120)
        assert json.loads(again.stdout)["retried"] == 2


def test_the_summary_says_what_was_left_from_before_of_a_store_of_any_name(tmp_path, monkeypatch):
    summary = IngestSummary(
        scans=30, status={"bad_nifti": 25, "ok": 5}, seconds=2.0, volumes_per_second=2.5, bytes=0, simulated=False,
        new=0, changed=1, retried=2, left=4, failures=[("[/y].nii", "bad_nifti", "[/z]")] * 25, warnings=["[/w]"],
    )  # fmt: skip
    monkeypatch.setattr("ingest.cli.ingest", lambda *_, **__: summary)
    done = call(ingest.cli.main, tmp_path, "[/x].zarr")
    assert done.stdout.startswith(
        "[/x].zarr: 30 scans (25 bad_nifti, 5 ok; 0 new, 1 changed, 2 tried again, 4 left from before) in 2.0 s"
    )
    *_, last, more, warning = done.stderr.splitlines()
    assert last == "bad_nifti: [/y].nii: [/z]"
    assert more == "... and 5 more; see the column scans/error of [/x].zarr"
    assert warning == "warning: [/w]"


@pytest.mark.parametrize(
    ("main", "works", "command", "told"),
    [
        (ingest.cli.main, "ingest.cli.ingest", "src s.zarr", "; the same command goes on where it was"),
        (
            ingest.cli.main, "ingest.cli.ingest", "src s.zarr --overwrite",
            "; the same command without --overwrite goes on where it was",
        ),
        (ingest.cli.main, "ingest.cli.verify", "verify s.zarr", ""),
        (ingest.cli.main, "ingest.cli.write_report", "report s.zarr r.html", ""),
        (ingest.cli.main, "ingest.cli.summarise_store", "inspect s.zarr", ""),
        (
            ingest.cli.main, "ingest.cli.simulate_cohort", "simulate new --participants 2",
            "; remove DIR, and run the same command again",
        ),
        (finetune.cli.main, "finetune.run.finetune", "s.zarr r", "; the same command goes on at the last checkpoint"),
        (finetune.cli.main, "finetune.predict.predict_to", "predict s.zarr r p.csv", ""),
        (
            finetune.cli.main, "finetune.curves.running.run_curve", "curve s.zarr c",
            "; the same command goes on where it was",
        ),
    ],
)  # fmt: skip
def test_ctrl_c_is_told_in_one_line(main, works, command, told, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(works, stop)
    done = call(main, *command.split())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"interrupted{told}\n")
    monkeypatch.setenv("RANK", "1")
    done = call(main, *command.split())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_is_told_in_one_line_by_a_run_with_workers(source, tmp_path):
    """Ctrl-C reaches all processes of a terminal."""
    working = tmp_path / "working"
    env = patched(
        tmp_path,
        "import pathlib, signal, time\n"
        "import ingest.convert\n"
        "conform = ingest.convert.conform\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests run in the background ignore it
        "def stay(volume, grid):\n"
        f"    pathlib.Path({str(working)!r}).touch()\n"
        "    time.sleep(1)\n"
        "    return conform(volume, grid)\n"
        "ingest.convert.conform = stay\n",
    )
    command = [INGEST, str(source), str(tmp_path / "s.zarr"), "--workers", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True) as run:
        while not working.exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=120)
    assert (run.returncode, out.strip(), err.strip()) == (130, "", "interrupted; the same command goes on where it was")


def test_a_command_that_is_misspelt_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main, command, meant in (
        (ingest.cli.main, "inspct s.zarr", "inspect"),
        (finetune.cli.main, "predct s.zarr r p.csv", "predict"),
    ):
        done = call(main, *command.split())
        assert done.returncode == 2
        assert f"{meant}?" in done.stderr.replace("│", " ").split()
        assert "did you mean" in done.stderr
    (tmp_path / "inspct").mkdir()
    done = call(ingest.cli.main, "inspct", "s.zarr")
    assert done.returncode == 1
    assert "did you mean" not in done.stderr
    assert "no scans" in done.stderr


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unexpected_error_is_logged_once_with_its_traceback(source, tmp_path, workers):
    folder = tmp_path / "src"
    folder.mkdir()
    for file in sorted(source.iterdir())[:4]:
        os.link(file, folder / file.name)
    image = nib.load(source / "9000005.nii.gz")
    image.header["descrip"] = "provoke an error"
    nib.save(image, folder / "9000005.nii.gz")
    env = patched(
        tmp_path,
        "import ingest.convert\n"
        "conform = ingest.convert.conform\n"
        "def fail_for_one(volume, grid):\n"
        "    if volume.description == 'provoke an error':\n"
        "        raise ZeroDivisionError('nobody thought of this')\n"
        "    return conform(volume, grid)\n"
        "ingest.convert.conform = fail_for_one\n",
    )
    command = [INGEST, str(folder), str(tmp_path / "s.zarr"), "--workers", workers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1
    assert "(4 ok, 1 read_error)" in done.stdout
    assert done.stderr.count("unexpected error in 9000005.nii.gz") == 1
    assert re.search(r"^ERROR +unexpected error in", done.stderr, flags=re.MULTILINE)  # by the log of this process
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count("in fail_for_one") == 1
    assert done.stderr.count("ZeroDivisionError: nobody thought of this") == 2  # the traceback's end, and the failure
    assert "read_error: 9000005.nii.gz: unexpected ZeroDivisionError: nobody thought of this" in done.stderr
