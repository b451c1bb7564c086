"""The report of a fine-tuning run: nothing from outside, nobody's name, nothing hidden, whatever there is to show."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from report_page import Page, svg_text

from extract.probing.results import Interval, OutOfFold, TargetResult
from finetune import finetune
from finetune.checkpoints import LoadedRun, load_run
from finetune.examples import make_examples
from finetune.network import ScanNetwork
from finetune.report import render_finetune_report, write_finetune_report
from finetune.report_plots import loss_plot
from finetune.results import RunResult, read_result
from finetune.settings import make_settings
from ingest.encode import encode_shard
from ingest.grid import Grid
from ingest.scan import ScanRow
from ingest.shard import shard_path, write_shard
from ingest.store import create_store, open_store, resize_store, write_phenotypes, write_scans
from loaders.views import View

HOSTILE = "<script>alert(1)</script>"
NAN = float("nan")
SCANS = 44


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the name of a person, and in it a store whose brightness tells sex and age."""
    folder = tmp_path_factory.mktemp("jane.doe")
    path, shape = folder / "study.zarr", (16, 16, 12)
    create_store(path, [], Grid(shape, 2.0, tuple(map(tuple, np.eye(4).tolist())), "native"), slab=4)
    resize_store(path, SCANS)
    rng = np.random.default_rng(0)
    sex, age = np.arange(SCANS) % 2.0, rng.uniform(45, 80, SCANS)
    rows = []
    for row in range(SCANS):
        voxels = rng.integers(20, 60, shape)
        voxels[8:, :, :6] += int(150 * sex[row])
        voxels[:8] += int(2 * age[row] - 80)
        write_shard(shard_path(path, row), encode_shard(voxels.astype(np.uint8), 4))
        rows.append(
            ScanRow(f"person-{row:04d}", "", "T1", f"person-{row:04d}.nii.gz", status="ok", scale=1.0, offset=0.0)
        )
    write_scans(path, rows)
    table = pd.DataFrame({"sex": sex, "age": age, "smoking": rng.permutation(np.arange(SCANS) % 3.0)})
    variables = {
        "sex": {"task": "binary", "labels": {"0": "female", "1": "male"}},
        "age": {"task": "continuous", "units": "years"},
        "smoking": {"task": "multiclass", "labels": {"0": "never", "1": HOSTILE, "2": "current"}},
    }
    write_phenotypes(path, table, variables)
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> tuple[RunResult, LoadedRun]:
    """Return a run of three targets that was really trained, a little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    asked = {
        "target": "sex,age,smoking", "weights": "scratch", "view": "axial", "slices": 3, "size": 32, "epochs": 3,
        "batch_size": 8, "lr": 1e-3, "augmentation": "none", "device": "cpu", "backend": "torch", "threads": 1,
        "test": 0.45, "bootstrap": 200, "tensorboard": False,
    }  # fmt: skip
    finetune(folder / "study.zarr", folder / "run", make_settings(asked), report=False)
    run = load_run(folder / "run")
    torch.set_num_threads(threads)
    return read_result(folder / "run", run.heads), run


@pytest.fixture(scope="module")
def written(tmp_path_factory, folder, trained) -> tuple[Path, list[str]]:
    """Return the report of the run, and its warnings."""
    path = tmp_path_factory.mktemp("out") / "new" / "report.html"
    return path, write_finetune_report(path, *trained, open_store(folder / "study.zarr"), warnings=["careful"])


def rendered(result: RunResult, run: LoadedRun, store=None, **more) -> tuple[Page, list[str]]:
    source, warnings = render_finetune_report(result, run, store, **more)
    page = Page(source)
    assert page.open == []
    return page, warnings


def test_page_of_a_run_has_all_its_parts_and_nothing_more(folder, trained, written):
    result, _ = trained
    path, warnings = written
    assert warnings == ["careful"]
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    for heading in (
        "Test scores",
        "Training",
        "Predictions for the test people",
        "What the network used: sex",
        "Method",
    ):
        assert f"<h2>{heading}</h2>" in source
    for words in (
        "Warning: careful.", "Trained from scratch:", "resnet18", "axial × 3 slices", "torch", "weight decay0.01",
        "Zeiler", "years", "200 draws", "These are images of people", f"3 ({result.steps} steps)",
        "12 × 16 × 16 voxels (x, y, z) of 2 mm, RAS, native", f"epoch {result.best_epoch}, step",
    ):  # fmt: skip
        assert words in page.text, words
    assert "SIMULATED" not in source
    for one in result.test:
        assert f"{one.headline.score:.3f}{one.headline.low:.3f} to {one.headline.high:.3f}" in page.text
        assert f"{one.participants} people" in page.text
    for one in result.validation:
        assert f"{one.headline.score:.3f}" in page.text
    assert page.brains == 2 * 4  # each with its colours
    words = [svg_text(content) for _, content in page.images if not content.startswith(b"\x89PNG")]
    for expected in ("training validation best epoch", "sex, AUC age, r smoking, AUC", "learning rate", "test scans"):
        assert any(expected in text for text in words), expected
    assert len(words) == 3 + 3 + 2 + 3
    # Nothing from outside, nobody's name, no folder
    assert not re.search(r"https?:|@import|url\(", source)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for private in ("person-", "jane.doe", str(folder), "/tmp", "<script"):
        assert private not in source
    assert '<meta name="generator" content="brain-volumes' in source[:512]


def test_an_axis_of_wide_losses_has_plain_numbers():
    history = [{"epoch": number, "train_loss": loss, "lr": 1e-3} for number, loss in enumerate((0.8, 0.2, 0.03), 1)]
    text = svg_text(loss_plot(history, 2))
    assert "0.05 0.1 0.2 0.5 loss" in text
    assert "$" not in text


def test_simulated_and_pretrained_are_told(trained):
    result, run = trained
    attrs = {**run.attrs, "simulated": True, "weights": {"name": "/home/jane.doe/other.pt", "sha256": "0" * 64}}
    attrs["resolved"] = {"weights": "jane.doe/other.pt", "processes": 2, "augmentation": {"rotation_deg": 2.0}}
    settings = run.settings.model_copy(
        update={"weights": "homes/jane.doe/other.pt", "split": "jane.doe/split.csv", "augmentation": {}}
    )
    page, _ = rendered(replace(result, test=[], history=[]), replace(run, attrs=attrs, settings=settings))
    assert "SIMULATED DATA" in page.text
    assert "from scratch" not in page.text
    assert "other.pt" in page.text
    assert "augmentationdefault" in page.text
    assert "As it was run" in page.text
    assert "processes2 augmentationrotation_deg 2.0" in page.text
    assert "jane.doe" not in page.text


def test_why_there_are_no_maps_is_told(tmp_path, folder, trained):
    result, run = trained
    page, warnings = rendered(replace(result, test=result.test[:1], history=[]), run, None)
    assert warnings == ["no maps are shown: the store is not where it was"]
    assert warnings[0] in page.text
    assert page.brains == 0
    shutil.copytree(folder / "study.zarr", tmp_path / "study.zarr")
    store = open_store(tmp_path / "study.zarr")
    other = replace(store, attrs={**store.attrs, "store_id": "other"})
    assert "store_id differs" in make_examples(run, result.test, other, 4).warnings[0]
    first = make_examples(run, result.test, store, 4)
    assert len(first.shown) == 4
    assert first.warnings == []
    shard_path(tmp_path / "study.zarr", first.shown[1].row).write_bytes(b"damaged")
    found = make_examples(run, result.test, store, 4)
    assert [one.row for one in found.shown] == [first.shown[k].row for k in (0, 2, 3)]
    row = first.shown[1].row
    assert found.warnings == [f"row {row} of the store is damaged and not shown; see: ingest verify STORE"]
    shutil.rmtree(tmp_path / "study.zarr")
    found = make_examples(run, result.test, store, 4)
    assert found.shown == []
    assert found.warnings
    assert "person-" not in "".join(found.warnings)


def test_whatever_results_lack_the_page_is_written(trained):
    result, run = trained
    n = 5
    constant = OutOfFold(np.arange(n) + 60.0, np.full(n, 62.0), np.zeros(n, int), np.arange(n))
    lost = {name: Interval(NAN if name == "r2" else 0.0, NAN, NAN, 0.0) for name in ("r", "r2", "mae")}
    test = [
        TargetResult("sex", "binary", "skipped", 12, 11, reason="nobody of the part has 'male'"),
        TargetResult("age", "continuous", "ok", n, n, metric="r", metrics=lost, units="years", out_of_fold=constant),
        TargetResult("smoking", "multiclass", "skipped", 0, 0, reason="0 scans of the part have a value"),
    ]
    history = [{"epoch": 1.0, "step": 3.0, "lr": 1e-3, "train_loss": 0.7}, {"epoch": 2.0, "step": 6.0, "lr": 0.0}]
    people = {**result.people, "validation": 0}
    bare = replace(result, test=test, validation=[], history=history, people=people, skipped={3: "/x/person-3", 1: ""})
    settings = run.settings.model_copy(update={"bootstrap": 0})
    page, warnings = rendered(bare, replace(run, settings=settings), examples=0)
    assert warnings == ["2 scans could not be read and were left out (rows 1, 3 of the store)"]
    assert "not scored: nobody of the part has 'male'" in page.text
    assert "the weights are those of the last epoch" in page.text
    assert "person-" not in page.text
    assert not re.search(r"\bnan\b", page.text.lower())
    page, _ = rendered(replace(bare, test=[], history=[], stopped="early"), run)
    assert "Nobody was kept for testing" in page.text
    assert page.images == []


def test_a_volume_network_is_shown_by_grad_cam(folder, trained):
    result, run = trained
    seen = replace(run.network.seen, view=View.volume, size=(16, 32, 32))
    network = ScanNetwork("r3d_18", seen, run.heads).eval()
    solid = replace(run, network=network)
    page, _ = rendered(
        replace(result, test=result.test[1:2], validation=[]), solid, open_store(folder / "study.zarr"), examples=2
    )
    assert "whole volume" in page.text
    assert "What the network used: age" in page.text
    assert "positions (z, y, x) of the last stage" in page.text
    assert "lowers itraises it" in page.text
    assert "Selvaraju" in page.text
    assert page.brains == 2 * 2


def test_in_a_browser_nothing_is_cut_off_or_broken(written):
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium here; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        for width in (420, 1100):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            wrong: list[str] = []
            tab.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            tab.goto(written[0].as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
            assert wrong == []
        assert tab.evaluate("(t => t.scrollWidth <= t.clientWidth)(document.querySelector('.scroll'))")
        browser.close()
