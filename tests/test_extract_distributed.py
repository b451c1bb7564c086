"""Several processes, started as users do by torchrun: one output, no scan twice, and no process that waits for ever."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_store import make_store

from extract import build_encoder, open_embeddings
from extract.distributed import Group
from extract.resume import _Plan, extract_to
from ingest.shard import shard_path

SCANS = 21
ENCODER = {"weights": "random", "view": "axial", "slices": 1, "device": "cpu"}
SETTINGS = [word for name, value in (ENCODER | {"batch-size": 1}).items() for word in (f"--{name}", value)] + ["--json"]


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", SCANS, bad=[2])
    return tmp_path / "s.zarr"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*torchrun, *map(str, command)], capture_output=True, text=True, timeout=120)


def written_rows(traced: Path) -> list[list[int]]:
    """Return the rows that each process has written in blocks."""
    return [json.loads(file.read_text()) for file in sorted(traced.glob("*.json"))]


#: A process that notes which rows it writes: Python runs it before all else.
TRACE = """
import json, os, extract.resume
write, rows = extract.resume.write_block, []
def noting(parts, number, scans, features, skipped):
    write(parts, number, scans, features, skipped)
    rows.extend(scans["row"].tolist())
    open(os.path.join(os.environ["TRACED"], os.environ.get("RANK", "0") + ".json"), "w").write(json.dumps(rows))
extract.resume.write_block = noting
from extract.cli import main
main()
"""


def test_two_processes_make_what_one_makes(store, tmp_path, monkeypatch):
    shard_path(store, 20).write_bytes(b"damaged")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: the last digits depend on it
    extract_to(tmp_path / "one.zarr", store, build_encoder(**ENCODER), batch_size=1)
    torch.set_num_threads(threads)
    (tmp_path / "traced").mkdir()
    (tmp_path / "tracing.py").write_text(TRACE)
    monkeypatch.setenv("TRACED", str(tmp_path / "traced"))
    done = run(tmp_path / "tracing.py", store, tmp_path / "two.zarr", *SETTINGS)
    assert done.returncode == 1, "a scan is damaged"
    assert done.stderr.count("skipped: row 20") == 1, done.stderr
    (line,) = done.stdout.splitlines()  # of the first alone
    summary = json.loads(line)
    assert (summary["scans"], summary["embedded"], summary["processes"]) == (SCANS - 2, SCANS - 2, 2)
    assert [scan["row"] for scan in summary["skipped"]] == [20]
    one, two = open_embeddings(tmp_path / "one.zarr"), open_embeddings(tmp_path / "two.zarr")
    np.testing.assert_array_equal(two.features, one.features)
    pd.testing.assert_frame_equal(two.scans, one.scans)
    assert two.attrs == one.attrs
    shares = written_rows(tmp_path / "traced")
    assert len(shares) == 2
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == one.scans["row"].tolist()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.zarr", "s.zarr", "traced", "tracing.py", "two.zarr"]


#: The second process dies at its first block.
DYING = TRACE.replace("    write(parts", "    os._exit(9) if os.environ['RANK'] == '1' else None\n    write(parts")


def test_a_process_that_dies_ends_the_run_and_the_next_one_goes_on(store, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "traced").mkdir()
    monkeypatch.setenv("TRACED", str(tmp_path / "traced"))
    done = run(tmp_path / "dying.py", store, tmp_path / "e.npz", *SETTINGS)
    assert done.returncode != 0
    assert not (tmp_path / "e.npz").exists()
    written = list(itertools.chain(*written_rows(tmp_path / "traced")))
    summary = extract_to(tmp_path / "e.npz", store, build_encoder(**ENCODER))
    assert summary.embedded == SCANS - 1 - len(written)
    assert len(open_embeddings(tmp_path / "e.npz").features) == SCANS - 1
    assert not (tmp_path / "e.npz.parts").exists()


def test_what_fails_in_all_is_said_once(tmp_path):
    done = run("-m", "extract.cli", tmp_path / "none.zarr", tmp_path / "f.h5", *SETTINGS)
    assert done.returncode != 0
    assert done.stderr.count("error: no store at") == 1


def test_blocks_are_shared_out_without_rest():
    plan = _Plan(np.arange(100), batch_size=4, first_number=7)
    shares = [plan.share(Group(rank, 3)) for rank in range(3)]
    numbers = sorted(number for share in shares for number, _ in share)
    assert numbers == list(range(7, 11))
    assert sorted(np.concatenate([rows for share in shares for _, rows in share])) == list(range(100))
    assert all(len(rows) % 4 == 0 for share in shares for _, rows in share)
