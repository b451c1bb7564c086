"""Several processes, started as users do by torchrun: one output, no scan twice, and no process that waits for ever."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_store import make_store

from extract import build_encoder, open_embeddings
from extract.distributed import Group
from extract.resume import _Plan, extract_to
from ingest.errors import StoreError
from ingest.shard import shard_path

SCANS = 21
ENCODER = {"weights": "random", "view": "axial", "slices": 1, "device": "cpu"}
SETTINGS = [word for name, value in (ENCODER | {"batch-size": 1}).items() for word in (f"--{name}", value)] + ["--json"]


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", SCANS, bad=[2])
    return tmp_path / "s.zarr"


def written_rows(folder: Path, out: str) -> list[list[int]]:
    """Return the rows that each process has written in blocks."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{out}.*.json"))]


#: A process that notes which rows it writes. Of its second output the second process dies at the first block.
TRACE = """
import contextlib, json, os, sys, extract.distributed, extract.resume
from pathlib import Path
from extract import cli
write, rank, words = extract.resume.write_block, int(os.environ["RANK"]), sys.argv[1:]

def run(out, *arguments):
    rows = []
    def noting(parts, number, scans, features, skipped):
        if rank and out == "killed.npz":
            os._exit(9)
        write(parts, number, scans, features, skipped)
        rows.extend(scans["row"].tolist())
        Path(f"{out}.{rank}.json").write_text(json.dumps(rows))
    extract.resume.write_block = noting
    sys.argv = ["extract", "s.zarr", out, *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        Path(f"{out}.{rank}.code").write_text(str(ended.code))

with extract.distributed.join_group() as group:
    extract.distributed.join_group = lambda: contextlib.nullcontext(group)
    for out in ("two.zarr", "killed.npz"):
        run(out, *words)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return where two processes have worked, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    make_store(folder / "s.zarr", SCANS, bad=[2])
    shard_path(folder / "s.zarr", 20).write_bytes(b"damaged")
    (folder / "tracing.py").write_text(TRACE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "tracing.py", *map(str, SETTINGS)]
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_two_processes_make_what_one_makes(done, tmp_path, monkeypatch):
    folder, returned = done
    monkeypatch.chdir(folder)  # messages name the store
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: the last digits depend on it
    extract_to(tmp_path / "one.zarr", "s.zarr", build_encoder(**ENCODER), batch_size=1)
    torch.set_num_threads(threads)
    assert [(folder / f"two.zarr.{rank}.code").read_text() for rank in (0, 1)] == ["1", "0"], "a scan is damaged"
    assert returned.stderr.count("skipped: row 20") == 1, returned.stderr
    (line,) = returned.stdout.splitlines()  # of the first alone
    summary = json.loads(line)
    assert (summary["scans"], summary["embedded"], summary["processes"]) == (SCANS - 2, SCANS - 2, 2)
    assert [scan["row"] for scan in summary["skipped"]] == [20]
    one, two = open_embeddings(tmp_path / "one.zarr"), open_embeddings(folder / "two.zarr")
    np.testing.assert_array_equal(two.features, one.features)
    pd.testing.assert_frame_equal(two.scans, one.scans)
    assert two.attrs == one.attrs
    shares = written_rows(folder, "two.zarr")
    assert len(shares) == 2
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == one.scans["row"].tolist()
    assert not (folder / "two.zarr.parts").exists()


def test_a_process_that_dies_ends_the_run_and_the_next_one_goes_on(done):
    folder, returned = done
    assert returned.returncode != 0
    assert not (folder / "killed.npz").exists()
    written = list(itertools.chain(*written_rows(folder, "killed.npz")))
    summary = extract_to(folder / "killed.npz", folder / "s.zarr", build_encoder(**ENCODER))
    assert summary.embedded == SCANS - 2 - len(written)
    assert len(open_embeddings(folder / "killed.npz").features) == SCANS - 2
    assert not (folder / "killed.npz.parts").exists()


@dataclass(frozen=True)
class Told(Group):
    """Two processes one after the other: the second is told what the first has said, and neither waits."""

    size: int = 2
    said: list = field(default_factory=list)

    def tell(self, what):
        if self.rank:
            return self.said.pop(0)
        self.said.append(what)
        return what

    def gather(self, _):
        raise EOFError("all blocks are written")


def test_a_process_with_another_encoder_ends_the_run(store, tmp_path):
    first = Told()
    with pytest.raises(EOFError):
        extract_to(tmp_path / "e.h5", store, build_encoder(**ENCODER), batch_size=1, group=first)
    said = list(first.said)
    with pytest.raises(EOFError):
        extract_to(tmp_path / "e.h5", store, build_encoder(**ENCODER), group=Told(1, said=said))
    written = len(list((tmp_path / "e.h5.parts").glob("*.npz")))
    other = build_encoder(**ENCODER | {"slices": 2})
    with pytest.raises(
        StoreError, match="process 1 differs from process 0: it has slices 2, not 1; give all processes"
    ):
        extract_to(tmp_path / "e.h5", store, other, group=Told(1, said=list(first.said)))
    assert len(list((tmp_path / "e.h5.parts").glob("*.npz"))) == written == 3


def test_what_fails_in_the_first_is_not_said_by_the_others():
    first = Told()
    with pytest.raises(ValueError, match="no store"), first.first_here():
        raise ValueError("no store")
    with pytest.raises(SystemExit) as ended, Told(1, said=first.said).first_here():
        raise AssertionError("the second has nothing to do")
    assert ended.value.code == 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Group(5, 8, 1).device("auto") == Group(1, 2, 1).device("cuda") == "cuda:1"
    assert Group(0, 2, 0).device("cpu") == "cpu"
    assert Group().device("cuda:1") == "cuda:1"
    assert Group().device("auto") == "auto"
    assert chosen == [1, 1]
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU .* use --nproc-per-node 2"):
        Group(2, 4, 2).device("auto")
    with pytest.raises(ValueError, match=r"device is cuda:1 for each of 2 processes; leave it out"):
        Group(0, 2, 0).device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Group(2, 4, 2).device("auto") == "auto"


@pytest.mark.parametrize(("scans", "processes", "blocks"), [(20, 4, 5), (20, 1, 1), (3, 8, 3), (100, 2, 4)])
def test_few_scans_are_work_for_all_processes(scans, processes, blocks):
    batch_size = min(4, -(-scans // processes))
    plan = _Plan(np.arange(scans), batch_size, 0, {})
    shares = [plan.share(Group(rank, processes)) for rank in range(processes)]
    assert sum(map(len, shares)) == blocks
    assert sum(map(bool, shares)) == min(processes, blocks)


def test_blocks_are_shared_out_without_rest():
    plan = _Plan(np.arange(100), batch_size=4, first_number=7, settings={})
    shares = [plan.share(Group(rank, 3)) for rank in range(3)]
    numbers = sorted(number for share in shares for number, _ in share)
    assert numbers == list(range(7, 11))
    assert sorted(np.concatenate([rows for share in shares for _, rows in share])) == list(range(100))
    assert all(len(rows) % 4 == 0 for share in shares for _, rows in share)
