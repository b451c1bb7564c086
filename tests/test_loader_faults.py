"""Whatever happens to a scan, the loader says which one, in time, or goes on without it. It never hangs."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from small_store import make_store

from ingest.shard import shard_path
from loaders import Augmentation, Batch, CorruptShardError, ShardError, SlowReadError, open_loader
from loaders.fetch import Buffer, ShardFetcher
from loaders.progress import begin
from loaders.threads import BatchGroups, ScanGroup, ScanThreads

SCANS = 12
BACKENDS = ["torch", "dali"]


DEADLINE = 1.0  # seconds; a busy machine must not miss it where nothing hangs


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", SCANS)
    return tmp_path / "s.zarr"


@pytest.fixture
def voxels(tmp_path) -> np.ndarray:
    return make_store(tmp_path / "same.zarr", SCANS)


def hang(store: Path, row: int) -> Path:
    """Put a pipe in a shard's place: whoever opens it waits until somebody writes."""
    path = shard_path(store, row)
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.fixture
def freed() -> Iterator[list[Path]]:
    """Let the threads that wait at pipes go when the test is over."""
    pipes: list[Path] = []
    yield pipes
    for pipe in pipes:
        descriptor = os.open(pipe, os.O_PATH)
        pipe.unlink()  # first, for whoever finds that this is no file looks at it again
        with contextlib.suppress(OSError):  # nobody waits there
            os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK))
        os.close(descriptor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_that_hangs_is_an_error_that_names_the_scan(store, freed, backend):
    freed.append(hang(store, 5))
    started = time.perf_counter()
    with (
        open_loader(store, batch_size=4, backend=backend, deadline=DEADLINE) as loader,
        pytest.raises(SlowReadError, match=r"row 5 \(5.nii.gz\) of .*s.zarr cannot be read: no answer within 1 s"),
    ):
        list(loader)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_scans_that_hang_are_skipped_even_if_they_are_more_than_the_threads(store, voxels, freed, backend, caplog):
    hanging = [0, 1, 2, 7]
    freed += [hang(store, row) for row in hanging]
    with open_loader(store, batch_size=4, backend=backend, deadline=DEADLINE, on_error="skip", threads=2) as loader:
        batches = list(loader)
    assert sorted(loader.skipped) == hanging
    assert all("no answer within 1 s" in reason for reason in loader.skipped.values())
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for batch in batches:
        assert batch.valid.tolist() == [row not in hanging for row in batch.rows]
        np.testing.assert_array_equal(batch.images[batch.valid], voxels[batch.rows[batch.valid]])
        assert not batch.images[~batch.valid].any()
    assert loader.timing.scans == SCANS - len(hanging)
    assert sum("row 7" in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING) >= 1


def test_a_thread_that_comes_back_too_late_changes_nothing(store, voxels, freed):
    pipe = hang(store, 2)
    freed.append(pipe)
    with open_loader(store, batch_size=3, backend="torch", deadline=DEADLINE, on_error="skip", threads=2) as loader:
        batches = []
        for number, batch in enumerate(loader):
            if number == 1:  # row 2 was given up: now it comes, with bytes
                descriptor = os.open(pipe, os.O_WRONLY)
                with contextlib.suppress(BrokenPipeError):  # it may have seen already that this is no file
                    os.write(descriptor, b"x" * 1000)
                os.close(descriptor)
                time.sleep(0.2)
            batches.append(batch)
        kept = np.concatenate([batch.images for batch in batches])
    expected = voxels.copy()
    expected[2] = 0
    np.testing.assert_array_equal(kept, expected)


def test_storage_that_does_not_answer_at_all_ends_the_pass(store, freed, monkeypatch):
    monkeypatch.setattr("loaders.threads._MOST_GIVEN_UP", 3)
    freed += [hang(store, row) for row in range(SCANS)]
    with (
        open_loader(store, batch_size=2, backend="torch", deadline=0.1, on_error="skip", threads=1) as loader,
        pytest.raises(SlowReadError, match="4 reads hang: the storage does not answer"),
    ):
        list(loader)


def test_reads_that_came_back_hang_no_more(monkeypatch, caplog):
    monkeypatch.setattr("loaders.threads._MOST_GIVEN_UP", 1)
    comes_back, ours = threading.Event(), []

    def load(group: ScanGroup, _: Buffer) -> None:
        ours.append(threading.current_thread())
        begin(group.progress, 0)
        comes_back.wait(30)

    threads = ScanThreads(1, load, deadline=0.05, describe=str)
    for row in range(3):
        comes_back.clear()
        batch = BatchGroups([ScanGroup([row], [0], None)])
        threads.submit(batch)
        threads.wait(batch)
        assert isinstance(batch.groups[0].errors[0], SlowReadError)
        comes_back.set()
        ours[row].join(timeout=30)
    threads.close()
    assert "on_error" not in caplog.text, "that is what whoever reads this has set"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["absent", "flipped", "a folder", "empty", "unreadable"])
def test_a_bad_shard_is_an_error_or_skipped(store, voxels, backend, fault):
    path = shard_path(store, 6)
    if fault == "flipped":
        content = bytearray(path.read_bytes())
        content[300] ^= 4
        path.write_bytes(content)
    elif fault == "unreadable":
        path.unlink()
        path.symlink_to(path.name)  # a circle
    else:
        path.unlink()
        if fault == "a folder":
            path.mkdir()
        elif fault == "empty":
            path.touch()
    with (
        open_loader(store, batch_size=5, backend=backend) as loader,
        pytest.raises(
            CorruptShardError, match=r"row 6 \(6.nii.gz\) of .*: .*; ingest verify STORE --against SRC --repair"
        ),
    ):
        list(loader)
    with open_loader(store, batch_size=5, backend=backend, on_error="skip") as loader:
        for _ in range(2):  # passes
            batches = list(loader)
            images = np.concatenate([batch.images for batch in batches])
            valid = np.concatenate([batch.valid for batch in batches])
            assert valid.tolist() == [row != 6 for row in range(SCANS)]
            np.testing.assert_array_equal(images[valid], voxels[valid])
            assert not images[6].any()
        assert list(loader.skipped) == [6]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "float16", "view": "axial", "slices": [0, 9]},
        {"dtype": "bfloat16", "channels": 3},
        {"dtype": "float32", "augmentation": Augmentation(noise=0)},
    ],
)
def test_a_skipped_picture_is_as_black_as_the_background_of_others(store, backend, settings):
    shard_path(store, 6).unlink()
    options = {"mean": 0.5, "std": 0.25, "backend": backend, "device": "cpu", "on_error": "skip", **settings}
    with open_loader(store, batch_size=SCANS, **options) as loader:
        (batch,) = loader
    assert (batch.images[6] == -2).all()
    assert batch.images[5].min() == -2, "a slab of it is empty"


def test_a_fault_that_no_scan_is_to_blame_for_is_not_skipped(store, monkeypatch):
    def explode(*_: object) -> None:
        raise MemoryError("no memory left")

    with open_loader(store, backend="torch", on_error="skip") as loader:
        monkeypatch.setattr("loaders.groups.source_of", explode)
        with pytest.raises(MemoryError, match="no memory"):
            list(loader)


def test_a_thread_that_is_made_to_exit_does_not_hang_the_loader(store, monkeypatch):
    def leave(*_: object) -> None:
        raise SystemExit(3)

    shard_path(store, 5).unlink()
    monkeypatch.setattr(ShardFetcher, "fetch", leave)
    with open_loader(store, backend="torch") as loader, pytest.raises(SystemExit):
        list(loader)


def test_a_pass_can_be_tried_again_after_an_error(store, voxels):
    path = shard_path(store, 3)
    content = path.read_bytes()
    path.unlink()
    with open_loader(store, batch_size=2, backend="torch") as loader:
        with pytest.raises(ShardError):
            list(loader)
        path.write_bytes(content)
        images = np.concatenate([batch.images for batch in loader])
    np.testing.assert_array_equal(images, voxels)


def test_a_closed_loader_says_so_and_closing_twice_is_no_error(store):
    loader = open_loader(store, backend="torch")
    list(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        list(loader)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("begun", [False, True])
def test_a_loader_that_nobody_holds_is_freed_and_its_threads_end(store, backend, begun):
    before = set(threading.enumerate())
    loader = open_loader(store, batch_size=2, backend=backend, device="cpu", threads=3)
    threads = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("decode")]
    assert len(threads) == 3
    if begun:
        for _ in loader:
            break  # in the middle of a pass
    freed = weakref.ref(loader)
    del loader
    gc.collect()  # DALI's pipelines refer to themselves
    assert freed() is None
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_no_threads_are_left(store):
    before = threading.active_count()
    for _ in range(3):
        with open_loader(store, batch_size=2, backend="torch", threads=3) as loader:
            next(iter(loader))
    assert threading.active_count() == before


def tell_what_is_wrong(batches: Iterable[Batch], answers: Connection) -> None:
    try:
        list(batches)
    except ValueError as error:
        answers.send(str(error))


@pytest.mark.parametrize(("backend", "begun"), [("torch", False), ("dali", False), ("torch", True)])
def test_a_loader_that_is_used_in_a_forked_process_says_so(store, backend, begun):
    with open_loader(store, batch_size=6, backend=backend, device="cpu") as loader:
        batches = iter(loader)
        if begun:
            next(batches)  # the last one is under way: its end is waited for, and nothing more given to the threads
        here, there = multiprocessing.Pipe()
        arguments = (batches if begun else loader, there)
        child = multiprocessing.get_context("fork").Process(target=tell_what_is_wrong, args=arguments)
        child.start()
        answered = here.poll(30)
        child.kill()
        child.join()
        assert answered, "it hangs"
        assert "is used in process" in (error := here.recv())
        assert "open it in the worker that uses it" in error
        assert len(list(batches)) == 2 - begun, "here it goes on"


PROGRAM = """
import signal
import sys
from loaders import open_loader
signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that are started in the background ignore it
with open_loader(sys.argv[1], batch_size=2, backend=sys.argv[2], deadline=60) as loader:
    while True:
        for batch in loader:
            if batch.rows[0] == 0:
                print("started", flush=True)
"""


@pytest.mark.parametrize(("backend", "hanging"), [("torch", False), ("torch", True), ("dali", True)])
def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(store, backend, hanging):
    if hanging:
        hang(store, 7)
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, store, backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children == [], "there are no other processes"
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert time.perf_counter() - started < 10
    assert "KeyboardInterrupt" in stderr
    assert process.returncode in (1, -signal.SIGINT)
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_program_ends_although_a_read_hangs(store):
    hang(store, 4)
    program = f"""
from loaders import open_loader
loader = open_loader({str(store)!r}, batch_size=2, backend="torch", deadline=0.3)
list(loader)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "SlowReadError: row 4 (4.nii.gz)" in done.stderr
