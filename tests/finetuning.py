"""A tiny store with something to learn, runs that take a second, and a server that forks runs which die."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import extracting
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.video.resnet import Conv3DSimple

from extract.checkpoints import BEST, LAST
from extract.models import parameter_shapes
from finetune import cli
from finetune.checkpoints import load_run
from finetune.results import EPOCHS, PREDICTIONS, SPLIT, RunResult, read_result
from finetune.run import Progress, finetune
from finetune.settings import FinetuneSettings, make_settings, read_settings
from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store, resize_store, write_phenotypes, write_scans

SHAPE = (4, 24, 24)  # z, y, x
PEOPLE, SCANS = 40, 48  # the first eight people have two scans

#: By phenotype, rows of `table` of which it is not known.
MISSING = {"age": [1, 5, 40], "site": range(6, PEOPLE, 5), "sex": [2]}

#: A run of a few small steps.
TINY: dict[str, Any] = {
    "target": "sex", "weights": "scratch", "view": "axial", "slices": 1, "epochs": 2, "batch_size": 8,
    "micro_batch": 4, "threads": 1, "device": "cpu", "tensorboard": False, "bootstrap": 50,
}  # fmt: skip

#: What of a history tells how long it took.
TIMES = {"seconds", "scans_per_second", "starved"}


def people_of_scans() -> np.ndarray:
    """Return the number of the person of each scan, int64 (scan,)."""
    return np.concatenate([np.arange(PEOPLE), np.arange(SCANS - PEOPLE)])


def make_brains(path: Path, *, without: Mapping[str, Sequence[int]] | None = None, seed: int = 0) -> pd.DataFrame:
    """Write a store of noise in which half of the people have a bright ball; return what is known of each scan.

    Parameters
    ----------
    without
        By phenotype, rows of which it is not known.

    Returns
    -------
    pandas.DataFrame
        float64 (scan,): ``sex`` is who has the ball, ``age`` how bright all is; ``site``, ``education``, ``drinks`` and
        ``coin`` follow from nothing.
    """
    rng = np.random.default_rng(seed)
    who = people_of_scans()
    sex = (rng.permutation(PEOPLE) % 2)[who]
    age = rng.uniform(40, 80, PEOPLE)[who]
    voxels = rng.integers(20, 60, (SCANS, *SHAPE)) + (age * 0.5).astype(int)[:, None, None, None]
    voxels[sex == 1, :, 4:14, 6:16] += 120
    create_store(path, [], Grid(SHAPE, 1.0, tuple(map(tuple, np.eye(4).tolist())), "native"), slab=2)
    resize_store(path, SCANS)
    rows = []
    for row, person in enumerate(who):
        write_shard(shard_path(path, row), encode_shard(voxels[row].astype(np.uint8), 2))
        session = "2" if row < PEOPLE else "3"
        rows.append(ScanRow(f"p{person:02}", session, "T1", f"{row}.nii.gz", status="ok", scale=1.0, offset=0.0))
    write_scans(path, rows)
    drawn = {
        "site": rng.permutation(PEOPLE) % 3, "education": rng.permutation(PEOPLE) % 4,
        "drinks": rng.poisson(3, PEOPLE), "coin": rng.permutation(PEOPLE) % 2,
    }  # fmt: skip
    table = pd.DataFrame({"sex": sex, "age": age, **{name: of[who] for name, of in drawn.items()}}, dtype=np.float64)
    for name, missing in (without or {}).items():
        table.loc[list(missing), name] = np.nan
    write_phenotypes(path, table, {
        "sex": {"task": "binary", "labels": {"0": "female", "1": "male"}},
        "age": {"task": "continuous", "units": "years"},
        "site": {"task": "multiclass"},
        "education": {"task": "ordinal"},
        "drinks": {"task": "count"},
        "coin": {"task": "binary"},
    })  # fmt: skip
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """What is known of the scans of a store, whose place is ``attrs["path"]``."""
    path = tmp_path_factory.mktemp("brains") / "s.zarr"
    table = make_brains(path, without=MISSING)
    table.attrs["path"] = path
    return table


@pytest.fixture(scope="module")
def store(table) -> Path:
    return table.attrs["path"]


class Server(extracting.Server):
    """Runs `finetune` in processes of their own, which start at once; the settings are those of ``RUN_DIR.yaml``."""

    def __init__(self, warm_store: Path) -> None:
        command = [sys.executable, __file__, str(warm_store)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._answer()


class ThinBlock(BasicBlock):
    """A block of a ResNet whose convolutions leave channels apart.

    With it a resnet18 has 0.2 instead of 11 million numbers, which are trained, written and read in no time.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None, *_: Any, **__: Any) -> None:
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, groups=inplanes, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, groups=planes, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.stride = downsample, stride


class ThinConv3d(Conv3DSimple):
    """The same for an r3d_18."""

    def __init__(self, inplanes: int, planes: int, _: Any = None, stride: int = 1, padding: int = 1) -> None:
        nn.Conv3d.__init__(self, inplanes, planes, 3, stride, padding, groups=inplanes, bias=False)


def tiny_settings(**changes: Any) -> FinetuneSettings:
    """Return the settings of a tiny run."""
    return make_settings({**TINY, **changes})


def call_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Call ``finetune`` in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def run_tiny(store: Path, run_dir: Path, **changes: Any) -> RunResult:
    """Run with a few settings changed, without a report."""
    return finetune(str(store), run_dir, tiny_settings(**changes), report=False)


def stop_after(step: int) -> Callable[[Progress], None]:
    """Return what interrupts a run after a step."""

    def stop(progress: Progress) -> None:
        if progress.step >= step:
            raise KeyboardInterrupt

    return stop


def stopped_gradients(store: Path, run_dir: Path, settings: FinetuneSettings, step: int) -> list[torch.Tensor]:
    """Interrupt a run after a step; return `gradients_of` it."""
    with pytest.raises(KeyboardInterrupt):
        finetune(str(store), run_dir, settings, report=False, on_progress=stop_after(step))
    return gradients_of(run_dir)


def gradients_of(run_dir: Path) -> list[torch.Tensor]:
    """Return the averages of gradients in the last checkpoint: weights hardly tell how large they were."""
    content = torch.load(run_dir / LAST, weights_only=True)
    return [state["exp_avg"] for state in content["training"]["optimiser"]["state"].values()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextmanager
def thin() -> Iterator[None]:
    """Let a resnet18 and an r3d_18 be thin, and torch have one thread: the last digits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.resnet.BasicBlock", ThinBlock)
        patch.setattr("torchvision.models.video.resnet.Conv3DSimple", ThinConv3d)
        parameter_shapes.cache_clear()  # of those that are not thin
        try:
            yield
        finally:
            parameter_shapes.cache_clear()
            torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def thin_networks() -> Iterator[None]:
    """Let all networks of a test be thin."""
    with thin():
        yield


def assert_same_run(found: Path, expected: Path, *, tolerance: float = 0.0) -> None:
    """Check that two finished runs have the same weights, history, predictions and scores; times may differ."""
    for name in (BEST, LAST):
        mine, other = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        assert mine.keys() == other.keys(), name
        for attrs in (mine["attrs"], other["attrs"]):  # how a run is shared out makes no other one of it
            for free in ("micro_batch", "processes"):
                del attrs["resolved"][free]
        assert mine["attrs"] == other["attrs"], name
        assert mine["model"] == other["model"], name
        for key, value in mine["state_dict"].items():
            if tolerance:
                torch.testing.assert_close(value, other["state_dict"][key], rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(value, other["state_dict"][key]), f"{name}: {key}"
    mine, other = (read_result(folder, load_run(folder).heads) for folder in (found, expected))
    for name in ("best_epoch", "epochs", "steps", "stopped", "people", "scans", "skipped", "warnings"):
        assert getattr(mine, name) == getattr(other, name), name
    for row, expected_row in zip(mine.history, other.history, strict=True):
        for name in expected_row.keys() - TIMES:
            assert row[name] == pytest.approx(expected_row[name], rel=tolerance, abs=tolerance, nan_ok=True), name
        assert row.keys() == expected_row.keys()
    for part in ("test", "validation"):
        for one, same in zip(getattr(mine, part), getattr(other, part), strict=True):
            assert (one.name, one.status, one.reason, one.n) == (same.name, same.status, same.reason, same.n)
            for name, interval in one.metrics.items():
                assert interval.score == pytest.approx(same.metrics[name].score, rel=tolerance, abs=tolerance)
    tables = [pd.read_parquet(folder / PREDICTIONS) for folder in (found, expected)]
    pd.testing.assert_frame_equal(*tables, check_exact=not tolerance, rtol=10 * tolerance or 1e-9)
    assert (found / SPLIT).read_text() == (expected / SPLIT).read_text()
    assert len((found / EPOCHS).read_text().splitlines()) == len(mine.history) + 1


def _serve(warm_store: Path) -> None:
    with thin():
        run_tiny(warm_store, warm_store.with_name("warm"))
        extracting.serve(_run_of_file)


def _run_of_file(store: str, run_dir: str) -> None:
    settings = make_settings(read_settings(Path(f"{run_dir}.yaml")))
    finetune(store, Path(run_dir), settings, report=False)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
