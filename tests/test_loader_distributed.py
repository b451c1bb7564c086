"""Loaders in the ranks of a process group of torch: each has its share of a pass, and goes on with it after a stop."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from sampled_store import OK, visited_by_ranks, whole_pass
from sampled_store import path as path  # a fixture
from sampled_store import store as store  # a fixture

from loaders import open_loader

RANK = """
import json, sys
import torch
from loaders import open_loader

store, meeting, rank, saved = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
with open_loader(store, batch_size=5, shuffle=True, seed=9, backend="torch", threads=1) as loader:
    report = {"of": [loader.sampling.rank, loader.sampling.world_size], "batches": len(loader), "rows": []}
    for batch in loader:
        sums = batch.images.long().sum()
        torch.distributed.all_reduce(sums)  # hangs unless every rank has as many batches
        report["rows"].append(batch.rows[batch.valid].tolist())
        if len(report["rows"]) == 1:
            report["state"] = loader.state_dict()
with open_loader(store, batch_size=2, shuffle=True, seed=9, backend="torch", threads=1) as loader:
    loader.load_state_dict(json.loads(saved))  # of a single process
    report["rest"] = [batch.rows[batch.valid].tolist() for batch in loader]
torch.distributed.destroy_process_group()
print(json.dumps(report))
"""


def test_ranks_of_a_process_group_share_each_pass(path, store, tmp_path):
    expected = whole_pass(store, shuffle=True, seed=9)
    with open_loader(store, batch_size=7, shuffle=True, seed=9, backend="torch") as loader:
        next(iter(loader))
        saved = json.dumps(loader.state_dict())
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(path), str(tmp_path / "meeting"), str(rank), saved],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1],
        )
        for rank in range(2)
    ]  # fmt: skip
    reports = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            reports.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    assert [report["of"] for report in reports] == [[0, 2], [1, 2]]
    assert [len(report["rows"]) for report in reports] == [report["batches"] for report in reports] == [3, 3]
    rows = [set(itertools.chain(*report["rows"])) for report in reports]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(OK)
    assert [
        row for step in zip(*(report["rows"] for report in reports), strict=True) for part in step for row in part
    ] == expected
    assert reports[0]["state"] == reports[1]["state"]
    assert [
        row for step in zip(*(report["rest"] for report in reports), strict=True) for part in step for row in part
    ] == expected[7:]
    assert visited_by_ranks(store, 1, reports[0]["state"], batch_size=4, shuffle=True, seed=9) == expected[10:]
