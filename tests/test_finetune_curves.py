"""Learning curves of real trainings: cells, who shares them, what is resumed, what fails, what is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from curve_store import CURVE, make_cohort, make_weights, trainings
from report_page import Page

from extract import build_encoder
from extract.blocks import parts_path, start_parts
from extract.errors import WeightsUnavailableError
from extract.probing.linear import ridge
from extract.run import extract
from finetune.curves import CurveSettings, read_curve, run_curve
from finetune.curves.cells import Cell, claim, read_cell
from finetune.curves.planning import make_plan, read_plan
from finetune.run import finetune
from finetune.settings import FinetuneSettings
from finetune.split import read_split
from ingest.errors import StoreError
from ingest.store import open_store, write_phenotypes
from ingest.withdraw import withdraw
from loaders import View


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("curve") / "cohort.zarr")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "w.pth")


@pytest.fixture(scope="module")
def settings(weights: Path) -> FinetuneSettings:
    return trainings(weights)


@pytest.fixture(scope="module")
def finished(store: Path, settings: FinetuneSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curve of which the first cell was stopped in the middle, and gone on with."""
    run_dir = tmp_path_factory.mktemp("run") / "curve"

    def stop(progress):
        if progress.training is not None and progress.training.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_curve(store, run_dir, settings.model_copy(update={"checkpoint_every": 2}), CURVE, on_progress=stop)
    begun = Cell("transfer", 10, 4).folder(run_dir)
    assert (begun / "last.pt").is_file()
    assert read_curve(run_dir).unfinished
    steps = []
    result = run_curve(store, run_dir, settings, CURVE, on_progress=lambda told: steps.append(told))
    assert result.ok
    assert next(told.training.step for told in steps if told.training) == 2  # it went on
    assert [told.done for told in steps if told.result] == [1, 2, 3, 4, 5, 6]
    assert not (begun / "last.pt").exists()
    return run_dir


def test_who_withdraws_is_gone_from_every_cell(finished, store, tmp_path):
    shutil.copytree(finished, tmp_path / "curve")
    gone = next(who for who, part in read_split(finished / "split.csv").part_of.items() if part == "test")
    (tmp_path / "w.csv").write_text(f"eid\n{gone}\n")
    withdraw(tmp_path / "w.csv", [tmp_path / "curve"])
    rows = np.flatnonzero(open_store(store).scans["participant"].to_numpy().astype(str) == gone)
    before, after = read_curve(finished), read_curve(tmp_path / "curve")
    for target in (target for cell in after.cells for target in cell.targets):
        assert not np.isin(rows, target.rows).any()
        assert gone not in target.participants
    assert [curve.people for curve in after.targets] == [curve.people - 1 for curve in before.targets]
    files = [path for path in (tmp_path / "curve").rglob("*") if path.is_file() and path.suffix != ".npz"]
    name = re.compile(rf"(?<![0-9.]){gone}(?![0-9])".encode())  # no digits of a number
    assert [path for path in files if name.search(path.read_bytes())] == []


def test_all_methods_and_sizes_are_tested_on_the_same_people_and_trained_on_nested_ones(finished, store):
    scans = open_store(store).scans
    who = scans["participant"].to_numpy().astype(str)
    split = read_split(finished / "split.csv")
    result = read_curve(finished)
    assert len(result.cells) == 6
    test = {person for person, part in split.part_of.items() if part == "test"}
    for cell in result.cells:
        for target in cell.targets:
            assert set(who[target.rows]) == test
            assert len(target.rows) > 0
        assert cell.train_people == cell.cell.size
    assert result.plan.people == Counter(split.part_of.values())
    for curve in result.targets:
        assert curve.people == len(test)
        assert [point.size for point in curve.points] == [10, 15] * 3
    first, second = (set(_trained_on(store, result, Cell("transfer", size, 4))) for size in (10, 15))
    assert (len(first), len(second)) == (10, 15)
    assert first < second


def _trained_on(store, result, cell):
    from finetune.cohort import read_cohort

    volumes = open_store(store)
    cohort = read_cohort(volumes, result.plan.settings_of(cell, result.run_dir))
    return volumes.scans["participant"].to_numpy().astype(str)[cohort.rows_of("train")]


def test_a_cell_is_the_run_that_finetune_makes_even_if_it_was_stopped(finished, store, tmp_path):
    cell = Cell("transfer", 10, 4)
    plan = read_plan(finished)
    alone = finetune(store, tmp_path / "alone", plan.settings_of(cell, finished), report=False)
    of_curve = read_cell(finished, cell)
    for expected, found in zip(alone.test, of_curve.targets, strict=True):
        assert found.name == expected.name
        np.testing.assert_array_equal(found.rows, expected.out_of_fold.rows)
        np.testing.assert_array_equal(found.predicted, expected.out_of_fold.predicted)
        assert found.scores[found.metric] == expected.headline.score
        point = next(curve for curve in read_curve(finished).targets if curve.name == found.name).point("transfer", 10)
        assert point.estimate.score == pytest.approx(expected.headline.score)
    assert of_curve.training["steps"] == alone.steps


def test_a_probe_is_ridge_on_what_the_frozen_network_gives(finished, store, weights):
    cell = Cell("probe", 15, 4)
    encoder = build_encoder("resnet18", weights=str(weights), view=View.axial, slices=1, size=32, device="cpu")
    embeddings = extract(store, encoder, backend="torch", threads=1)
    volumes = open_store(store)
    who = volumes.scans["participant"].to_numpy().astype(str)
    people = _trained_on(store, read_curve(finished), cell)
    train = np.isin(who, people)
    age = volumes.phenotypes["age"].to_numpy()
    fit = ridge(
        embeddings.features[train].astype(np.float64),
        age[train][:, None],
        np.unique(who[train], return_inverse=True)[1],
    )
    found = next(target for target in read_cell(finished, cell).targets if target.name == "age")
    expected = fit.decide(embeddings.features[found.rows].astype(np.float64))[:, 0]
    np.testing.assert_allclose(found.predicted, expected, rtol=1e-6)


def test_files_tell_the_curve_and_name_nobody_and_no_folder(finished, store):
    result = read_curve(finished)
    document = json.loads((finished / "curve.json").read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert document["complete"]
    assert document["targets"][0]["scores"][0]["by_seed"].keys() == {"4"}
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    source = (finished / "curve.html").read_text()
    page = Page(source)
    assert not page.open
    assert "SIMULATED DATA" in page.text
    assert len(page.images) == 2
    for expected in (
        "Tested on",
        "One seed:",
        "Scratch goes without freeze_until layer4",
        "frozen + probe",
        "w.pth",
        "6 of 6 cells",
    ):
        assert expected in page.text
    assert str(store.parent) not in source
    assert not any(who in source for who in open_store(store).scans["participant"])


def test_what_is_done_is_not_done_again_and_a_larger_curve_takes_it_over(finished, store, settings):
    told = []
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("cell.json")}
    more = CURVE.model_copy(update={"seeds": (4, 5), "methods": ("probe",), "sizes": (10, 15, 30)})
    result = run_curve(store, finished, settings.model_copy(update={"threads": 2}), more, on_progress=told.append)
    assert result.ok
    assert {str(one.cell) for one in told} == {
        "probe, 10 people, seed 5", "probe, 15 people, seed 5", "probe, 30 people, seed 4", "probe, 30 people, seed 5",
    }  # fmt: skip
    assert before.items() <= {path: path.stat().st_mtime_ns for path in finished.rglob("cell.json")}.items()
    assert result.targets[0].point("probe", 10).seeds == (4, 5)
    assert [cell.cell.method for cell in read_curve(finished).cells] == ["probe"] * 6  # what is asked for is shown


@pytest.fixture(scope="module")
def shared(store: Path, settings: FinetuneSettings, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that goes on with one curve of sex, whose trainings cannot go well."""
    run_dir = tmp_path_factory.mktemp("shared") / "curve"
    unstable = settings.model_copy(update={"target": ("sex",), "clip": None, "lr": 1e30})

    def go_on(on_progress=None, **chosen):
        curve = CurveSettings(draws=100, **chosen)
        return run_curve(store, run_dir, unstable, curve, on_progress=on_progress)

    return go_on


def test_many_that_are_started_at_once_do_each_cell_once(shared):
    done, results = [], []

    def work():
        chosen = {"sizes": (10, 20), "methods": ("probe",), "seeds": (0, 1, 2, 3), "wait": True}
        results.append(shared(lambda told: told.result and done.append(str(told.cell)), **chosen))

    others = [threading.Thread(target=work) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert all(result.ok for result in results)
    assert sorted(done) == sorted(str(cell) for cell in results[0].plan.cells())
    assert json.loads((results[0].run_dir / "curve.json").read_text())["complete"]


HOLD = """
import sys, time
from pathlib import Path
from ingest.lock import store_lock
with store_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_cells_of_another_process_are_left_to_it_and_taken_over_when_it_dies(shared):
    chosen = {"sizes": (10, 20), "methods": ("probe",), "seeds": (6,)}
    run_dir = shared(sizes=(10,), methods=("probe",), seeds=(0,)).run_dir
    claimed = Cell("probe", 10, 6).folder(run_dir).with_name("seed6.claim")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(claimed)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        result = shared(**chosen)
        assert (result.elsewhere, len(result.unfinished), result.ok) == (1, 1, False)
        assert result.targets[0].point("probe", 20) is not None
        assert "1 of 2 cells not done, 1 of them under way" in (run_dir / "curve.html").read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert shared(**chosen).ok


def test_a_cell_that_fails_is_a_row_with_the_reason_and_tried_again_only_if_asked_to(shared):
    chosen = {"sizes": (10,), "methods": ("scratch", "probe"), "seeds": (9,)}
    result = shared(**chosen)
    assert not result.ok
    assert result.complete
    (failed,) = result.failed
    assert str(failed.cell) == "scratch, 10 people, seed 9"
    assert "learning rate" in failed.reason
    assert "Begin another curve with a lower --scratch-lr, or --clip 1" in failed.reason
    assert result.targets[0].point("probe", 10) is not None
    assert "Failed: scratch, 10 people, seed 9: " in Page((result.run_dir / "curve.html").read_text()).text
    told = []
    assert shared(told.append, **chosen).failed
    assert not told
    (failed.cell.folder(result.run_dir) / "results.json").write_text("{}")  # as of a run whose score is not defined
    assert shared(told.append, retry_failed=True, **chosen).failed
    assert {str(one.cell) for one in told} == {"scratch, 10 people, seed 9"}
    assert "learning rate" in told[-1].result.reason
    folder = failed.cell.folder(result.run_dir)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_another_curve_is_not_mixed_in(finished, store, settings, tmp_path):
    with pytest.raises(
        StoreError, match=r"was begun with lr 0\.001, not 0\.1; use the same settings, or another folder"
    ):
        run_curve(store, finished, settings.model_copy(update={"lr": 0.1}), CURVE)
    with pytest.raises(StoreError, match=r"was begun with scratch_lr None, not 0\.1"):
        run_curve(store, finished, settings, CURVE.model_copy(update={"scratch_lr": 0.1}))
    with pytest.raises(StoreError, match="exists and is no curve"):
        run_curve(store, store.parent, settings, CURVE)
    with pytest.raises(ValueError, match="size 400 of the curve is more than the 30 people of the training part"):
        run_curve(store, tmp_path / "c", settings, CURVE.model_copy(update={"sizes": (10, 400)}))
    with pytest.raises(ValueError, match="train_people is 10: a curve has sizes"):
        run_curve(store, tmp_path / "c", settings.model_copy(update={"train_people": 10}), CURVE)
    with pytest.raises(FileNotFoundError, match="no curve at"):
        read_curve(tmp_path / "nothing")


def test_a_curve_that_is_refused_leaves_nothing_that_the_next_one_would_use(store, settings, tmp_path):
    volumes, run_dir = open_store(store), tmp_path / "c"
    for refused, sizes, message in (
        ({"test": 0}, (10,), "nobody is in the test part"),
        ({}, (10, 400), "size 400 of the curve is more than the 30 people"),
        ({"freeze_until": "layer9"}, (10,), "freeze_until is 'layer9', expected one of stem"),
        ({"crop": (400, 8, 8)}, (10,), "crop"),
        ({"size": None, "scale": 0.1}, (10,), "scale is 0.1, which leaves"),
        ({"augmentation": {"rotate": 3.0}}, (10,), "augmentation 'rotate' is unknown"),
        ({"device": "cuda:7"}, (10,), "device"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(volumes, run_dir, settings.model_copy(update=refused), CurveSettings(sizes=sizes))
    with pytest.raises(WeightsUnavailableError, match="no weights 'imagnet'"):
        make_plan(volumes, run_dir, settings.model_copy(update={"weights": "imagnet"}), CURVE)
    assert not list(run_dir.iterdir())
    (run_dir / "split.csv").write_text("participant,part\n90000000,train\n")  # of a process that was killed here
    chosen = settings.model_copy(update={"test": 0.1, "seed": 7})
    plan, _ = make_plan(volumes, run_dir, chosen, CURVE)
    assert (plan.people["test"], plan.people) == (6, Counter(read_split(run_dir / "split.csv").part_of.values()))
    again, _ = make_plan(volumes, run_dir, chosen, CURVE)
    assert again == plan


def test_a_curve_is_by_one_truth(finished, store, settings, tmp_path):
    copy, curve = shutil.copytree(store, tmp_path / "s.zarr"), shutil.copytree(finished, tmp_path / "c")
    volumes = open_store(copy)
    make_plan(volumes, curve, settings, CURVE)
    tested = read_cell(curve, Cell("probe", 10, 4)).targets[0].rows
    changed = volumes.phenotypes.copy()
    changed.loc[tested[0], "sex"] = np.nan  # what is not known any more is compared with nothing
    write_phenotypes(copy, changed, volumes.variables)
    make_plan(open_store(copy), curve, settings, CURVE)
    changed.loc[tested[1], "sex"] = 1 - changed.loc[tested[1], "sex"]
    write_phenotypes(copy, changed, volumes.variables)
    with pytest.raises(StoreError, match="has scores by other values of sex, which have changed in the store since"):
        make_plan(open_store(copy), curve, settings, CURVE)


def test_who_withdraws_is_gone_from_what_was_not_finished(finished, tmp_path):
    curve = shutil.copytree(finished, tmp_path / "c")
    people = tmp_path / "w.csv"
    people.write_text("9000001\n")
    shutil.rmtree(curve / "embeddings.zarr")
    parts = parts_path(curve / "embeddings.zarr")
    start_parts(parts, {"store_id": "x"})
    (curve / "embeddings.zarr.lock").touch()  # of a process that was killed
    left = [curve / ".split.csv.0123abcd.tmp", curve / "probe/n10/seed4/.test.npz.0123abcd.tmp"]
    for path in left:
        path.write_text("9000001")
    record = curve / "probe/n10/seed4/cell.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"status": "failed", "reason": "row 1 (a/9000001.zip): damaged"}))
    withdraw(people, [curve])
    assert not parts.exists()
    assert not any(path.exists() for path in left)
    assert json.loads(record.read_text())["reason"] == "row 1 (a/withdrawn.zip): damaged"
    assert "9000001" not in (curve / "split.csv").read_text()


def test_a_claim_is_given_up_at_the_end_of_its_block(tmp_path):
    cell = Cell("transfer", 10, 0)
    with claim(tmp_path, cell) as first, claim(tmp_path, cell) as second:
        assert (first, second) == (True, False)
    with claim(tmp_path, cell) as again:
        assert again
