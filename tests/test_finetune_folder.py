"""The folder of a run: no other one is touched, it is overwritten only if asked, by one process, for the same store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finetuning import assert_same_run, call_command, contents, make_brains, run_tiny, stop_after, tiny_settings
from finetuning import store as store  # a fixture
from finetuning import table as table  # a fixture
from finetuning import thin_networks as thin_networks  # a fixture of all tests here

from extract.errors import WeightsUnavailableError
from finetune.curves import CurveSettings, read_curve, run_curve
from finetune.export import export_run
from finetune.predict import predict_to
from finetune.run import finetune
from finetune.split import read_split
from ingest.errors import StoreBusyError, StoreError
from ingest.lock import store_lock
from ingest.store import open_store, write_phenotypes


def test_a_folder_that_is_no_run_is_left_alone(store, tmp_path):
    for name, text in (("precious.txt", "x"), ("settings.yaml", "colour: green"), ("results.json", "{}")):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="is no folder of a run"):
                finetune(str(store), folder, tiny_settings(), overwrite=overwrite, report=False)
        assert contents(folder) == {name: text.encode(), "tensorboard/events": b"mine"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file is a file, expected the folder of a run; choose another name"):
        run_tiny(store, tmp_path / "file")
    with pytest.raises(StoreError, match="file is a file, expected the folder of a curve; choose another name"):
        run_curve(str(store), tmp_path / "file", tiny_settings())
    assert (tmp_path / "file").read_text() == "x"
    before = contents(store)
    with pytest.raises(StoreError, match="is no folder of a run"):
        finetune(str(store), store, tiny_settings(), overwrite=True, report=False)
    assert contents(store) == before
    assert list(tmp_path.glob("*.lock")) == list(store.parent.glob("*.lock")) == []


def test_nothing_is_left_of_a_run_that_cannot_begin(store, tmp_path):
    wrong: list[dict] = [{"target": "height"}, {"weights": "nowhere.pt"}, {"slices": 9}, {"freeze_until": "layer9"}]
    for changes in [*wrong, {"augmentation": {"zoom": 1}}, {"device": "cuda:99"}]:
        with pytest.raises((ValueError, WeightsUnavailableError)):
            run_tiny(store, tmp_path / "r", **changes)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_text(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetune(str(store), "r", tiny_settings(epochs=1), report=False).run_dir == Path("r")
    assert predict_to("p.csv", str(store), "r", threads=1).path == Path("p.csv")
    assert export_run("r", "w.pt").path == Path("w.pt")
    run_curve(str(store), "c", tiny_settings(epochs=1), CurveSettings(sizes=(10,), methods=("scratch",), seeds=(0,)))
    assert read_curve("c").run_dir == Path("c")


def test_overwrite_begins_anew(store, tmp_path):
    first = run_tiny(store, tmp_path / "r", seed=1, epochs=1, tensorboard=True)
    (tmp_path / "r" / "mine.txt").write_text("kept")
    again = finetune(str(store), tmp_path / "r", tiny_settings(seed=2, epochs=1), overwrite=True, report=False)
    assert again.history[0]["train_loss"] != first.history[0]["train_loss"]
    assert not (tmp_path / "r" / "tensorboard").exists()
    assert (tmp_path / "r" / "mine.txt").read_text() == "kept"
    run_tiny(store, tmp_path / "fresh", seed=2, epochs=1)
    assert_same_run(tmp_path / "r", tmp_path / "fresh")
    before = contents(tmp_path / "r")
    with pytest.raises(ValueError, match="freeze_until"):
        finetune(str(store), tmp_path / "r", tiny_settings(freeze_until="layer9"), overwrite=True, report=False)
    assert contents(tmp_path / "r") == before, "nothing is given up for what cannot begin"


def test_one_process_at_a_time(store, tmp_path, monkeypatch, capsys):
    with store_lock(tmp_path / "r"):
        with pytest.raises(StoreBusyError, match=r"r is being written by process \d+"):
            run_tiny(store, tmp_path / "r")
        assert call_command(monkeypatch, store, tmp_path / "r", "--target", "sex") == 1
        assert "is being written by process" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("change", ["other values", "exchanged"])
def test_phenotypes_that_have_changed_are_found_out(tmp_path, change):
    """Where two of them are exchanged, as by a corrected table, means and frequencies stay the same."""
    make_brains(tmp_path / "s.zarr")
    settings = tiny_settings(target="age", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(tmp_path / "s.zarr"), tmp_path / "r", settings, report=False, on_progress=stop_after(2))
    table = open_store(tmp_path / "s.zarr")
    age = table.phenotypes["age"].to_numpy() * 2
    if change == "exchanged":
        age = age / 2
        split = read_split(tmp_path / "r" / "split.csv").parts(table.scans["participant"])
        one, other = np.flatnonzero(split == "test")[:2]
        age[[one, other]] = age[[other, one]]
    write_phenotypes(tmp_path / "s.zarr", table.phenotypes.assign(age=age), table.variables)
    what = "other scans, or other values" if change == "exchanged" else "other values"
    with pytest.raises(StoreError, match=rf"r was begun with {what} of age.*--overwrite"):
        finetune(str(tmp_path / "s.zarr"), tmp_path / "r", settings, report=False)
