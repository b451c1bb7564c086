"""Where the time goes: the loader keeps account, and the profile says what limits."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_store import make_store

from ingest.shard import shard_path
from loaders import CorruptShardError, dali_backend, open_loader
from loaders.cli import main
from loaders.fetch import ShardFetcher
from loaders.profile import Stage, judge, profile_store
from loaders.timing import Timing

SCANS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("profile") / "s.zarr"
    return path, make_store(path, SCANS)


@pytest.fixture
def store(made) -> Path:
    return made[0]


@pytest.fixture
def voxels(made) -> np.ndarray:
    return made[1]


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_pass_accounts_for_its_scans_and_bytes(store, backend):
    with open_loader(store, batch_size=5, backend=backend, device="cpu", dtype="float16", threads=2) as loader:
        for _ in range(2):  # each pass begins anew
            count = sum(len(batch.rows) for batch in loader)
            timing = loader.timing
            assert timing.scans == count == SCANS
            assert timing.batches == 5
            assert timing.threads == 2
            assert timing.bytes_out == SCANS * 16 * 12 * 8 * 2
            assert timing.bytes_read == sum(file.stat().st_size for file in store.glob("volumes/c/*/0/0/0"))
            assert timing.read > 0
            assert timing.decode > 0
            assert 0 < timing.starved <= timing.elapsed
            assert timing.scans_per_second == pytest.approx(SCANS / timing.elapsed)
            assert timing.decoded_on_cpu == 0


def test_what_dali_takes_on_a_cpu_is_counted(store, monkeypatch):
    def slowly(run: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            time.sleep(0.02)
            return run(*arguments)

        return slow

    run = dali_backend._run
    monkeypatch.setattr(dali_backend, "_run", lambda pipeline: map(slowly(lambda outputs: outputs), run(pipeline)))
    fetch = ShardFetcher.fetch
    monkeypatch.setattr(ShardFetcher, "compiled", False)
    monkeypatch.setattr(ShardFetcher, "fetch", slowly(fetch))  # which is no part of it
    with open_loader(store, batch_size=5, backend="dali", device="cpu", threads=1) as loader:
        for _ in loader:
            time.sleep(0.02)
    assert loader.timing.augment >= 5 * 0.02
    assert loader.timing.augment + loader.timing.starved <= loader.timing.elapsed


def test_whoever_waits_is_told_apart(store, monkeypatch):
    with open_loader(store, batch_size=4, backend="torch") as loader:
        for _ in loader:
            time.sleep(0.05)  # a consumer that takes its time
        slow_consumer = loader.timing.idle, loader.timing.starved
        read = loader._fetcher.fetch

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.03)
            return read(*arguments)

        monkeypatch.setattr(type(loader._fetcher), "fetch", lambda _, *arguments: slowly(*arguments))
        for _ in loader:
            pass
        slow_reading = loader.timing.idle, loader.timing.starved
    assert slow_consumer[0] > slow_consumer[1], "the threads waited more"
    assert slow_reading[1] > slow_reading[0], "the consumer waited more"
    assert loader.timing.read > loader.timing.decode


def stages(**speeds: float) -> list[Stage]:
    return [Stage(name.replace("_", " "), speed, 1.0) for name, speed in speeds.items()]


@pytest.mark.parametrize(
    ("speeds", "options", "bottleneck", "said"),
    [
        ({"read": 100, "read_again": 900, "check": 5000, "decode": 800}, {}, "read", "the storage limits"),
        ({"read": 100, "read_again": 110, "check": 5000, "decode": 800}, {}, "read", "more cores"),
        ({"read": 100, "read_again": 110, "check": 5000, "decode": 800}, {"remote": True}, "read", "cache_dir="),
        ({"read": 900, "read_again": 900, "check": 5000, "decode": 300}, {}, "decode", "a GPU with DALI"),
        ({"read": 900, "read_again": 900, "check": 800, "decode": 3}, {"inflates": True}, "check", "more cores"),
        ({"read": 900, "read_again": 900, "check": 800, "decode": 700, "copy": 50}, {}, "copy", "compressed bytes"),
    ],
)
def test_the_slowest_stage_is_named_with_what_would_help(speeds, options, bottleneck, said):
    timing = Timing(scans=100, elapsed=1.0, threads=2)
    settings = {"inflates": False, "remote": False, "view": "volume", **options}
    found, advice = judge(timing, stages(**speeds), **settings)
    assert found == bottleneck
    assert said in " ".join(advice)
    assert advice[0].startswith(f"{bottleneck} is the slowest stage")


def test_a_loader_that_is_slower_than_its_stages_is_remarked_upon():
    speeds = stages(read=1000, read_again=1000, check=5000, decode=1000)
    for rate, remarked in ((100, True), (480, False)):
        _, advice = judge(Timing(scans=rate, elapsed=1.0), speeds, inflates=False, remote=False, view="axial")
        assert ("the loader is slower than its stages" in " ".join(advice)) is remarked


@pytest.mark.parametrize("view", ["volume", "axial"])
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_profile(store, view, backend):
    found = profile_store(store, scans=10, batch_size=4, view=view, slices=2, dtype="float32", backend=backend)
    assert found.timing.scans == 10
    assert [stage.name for stage in found.stages][:4] == ["read", "read again", "check", "decode"]
    assert all(stage.scans_per_second > 0 for stage in found.stages)
    assert found.bottleneck in {stage.name for stage in found.stages}
    assert json.loads(json.dumps(found.to_json()))["settings"]["view"] == view


def loaders(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(sysconfig.get_path("scripts")) / "loaders"
    return subprocess.run([str(script), *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_command(store, tmp_path, monkeypatch, capsys):
    def error_of(path: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["loaders", "profile", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        return capsys.readouterr().err

    done = loaders("profile", store, "--scans", 8, "--batch-size", 3, "--backend", "torch")
    assert done.returncode == 0, done.stderr
    for words in ("scans/s", "limit of each stage", "read again", "is the slowest stage", "the consumer waited"):
        assert words in done.stdout
    done = loaders("profile", store, "--scans", 8, "--json")
    assert json.loads(done.stdout)["settings"]["scans"] == 8
    error = error_of(tmp_path / "nothing.zarr")
    assert error.startswith("error: no store at")
    assert len(error.splitlines()) == 1
    make_store(tmp_path / "empty.zarr", 2, bad=(0, 1))
    assert "holds no volume with status ok" in error_of(tmp_path / "empty.zarr")


@pytest.mark.parametrize(("at", "reason"), [(-20, "checksum of the index is wrong"), (300, "slab . has a wrong ch")])
def test_a_scan_that_cannot_be_read_is_named(tmp_path, at, reason):
    make_store(tmp_path / "s.zarr", 3)
    path = shard_path(tmp_path / "s.zarr", 1)
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=rf"row 1 \(1.nii.gz\) of .*: .*{reason}.*; ingest verify STORE"):
        profile_store(tmp_path / "s.zarr", backend="torch", threads=5)


class Event:
    """Stands in for a CUDA event: everything that was put on a stream is done at once."""

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self, _: object = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


class Stream:
    """Stands in for a CUDA stream."""

    def __init__(self, *_: object) -> None:
        self.waited_for: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event)

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_the_way_of_copies_to_a_gpu_with_stand_ins_for_its_streams(store, voxels, monkeypatch, dtype):
    from loaders import torch_backend

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    device = torch.device("cpu")
    monkeypatch.setattr(
        torch_backend,
        "on_cpu",
        lambda batches, output, epoch, timing: torch_backend.on_gpu(
            ((plan, array.copy()) for plan, array in batches), output, epoch, timing, device
        ),
    )
    table = np.arange(256, dtype=np.uint8)
    monkeypatch.setattr("loaders.output.Output.table", lambda *_: table)  # a GPU gets bytes
    with open_loader(store, batch_size=5, backend="torch", device="cpu", dtype=dtype) as loader:
        batches = list(loader)
        for _ in loader:
            break  # leaves no copy behind
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(SCANS))
    images = torch.cat([batch.images for batch in batches])
    expected = torch.from_numpy(voxels)
    if dtype == "bfloat16":
        expected = expected.float().mul_(1 / 255).to(torch.bfloat16)
    assert torch.equal(images, expected)
    assert len(current.waited_for) == 5 + 1, "each batch is waited for by the stream that uses it"
    assert loader.timing.copy > 0
    assert loader.timing.augment > 0
