"""What a finished run predicts for any store, and its encoder among those of `extract`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from finetuning import call_command, make_brains, tiny_settings
from networks import assert_close
from rich.console import Console
from small_store import make_store
from trained_networks import MEAN, STD, make_scan_network, sha256, with_network

from extract import open_embeddings
from extract.checkpoints import FORMAT, read_checkpoint
from extract.cli import main as extract_main
from extract.errors import WeightsUnavailableError
from extract.probing.doubts import doubts
from extract.probing.probe import probe
from extract.probing.settings import ProbeSettings
from extract.trained import other_store
from extract.weights import load_weights
from finetune.build import build_network, find_weights
from finetune.checkpoints import LoadedRun, load_run, read_training, write_checkpoint
from finetune.export import export_run
from finetune.heads import Head
from finetune.predict import predict_to
from finetune.printing import print_predicted
from finetune.run import finetune
from ingest.errors import StoreError
from ingest.shard import shard_path
from ingest.store import open_store
from ingest.withdraw import withdraw
from loaders.views import View

TARGETS = "sex,age,site,education,drinks"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a store and a finished run."""
    folder = tmp_path_factory.mktemp("predict")
    make_brains(folder / "s.zarr")
    settings = tiny_settings(target=TARGETS, slices=2, crop="4,20,22", scale=0.75, epochs=1)
    finetune(folder / "s.zarr", folder / "multi", settings, report=False)
    return folder


def test_predictions_of_the_people_tested_are_those_of_the_run(place, tmp_path):
    done = predict_to(tmp_path / "p.parquet", place / "s.zarr", place / "multi", threads=1, device="cpu")
    found = pd.read_parquet(done.path)
    assert found["row"].tolist() == list(range(48))
    assert (done.scans, done.skipped, done.targets) == (48, {}, TARGETS.split(","))
    of_run = pd.read_parquet(place / "multi" / "predictions.parquet")
    assert set(of_run["part"]) == {"validation", "test"}
    same = found.set_index("row").loc[of_run["row"]].reset_index()
    columns = [name for name in of_run.columns if not name.startswith("true ")]
    assert columns == found.columns.tolist()
    pd.testing.assert_frame_equal(same[columns], of_run[columns], check_dtype=False, rtol=1e-4)
    assert np.ptp(found["age"]) > 1e-3, "not all the same"
    split = pd.read_csv(place / "multi" / "split.csv").set_index("participant")["part"]
    assert found["part"].tolist() == split.loc[found["participant"]].tolist()
    assert done.parts == found["part"].value_counts().to_dict()
    assert found.attrs["sha256"] == load_run(place / "multi").sha256
    assert found.attrs["simulated"] == {"run": False, "store": False}
    assert not any("not finished" in warning for warning in done.warnings)


def test_a_run_that_is_not_finished_is_told(place, tmp_path):
    for name in ("best.pt", "settings.yaml"):
        (tmp_path / name).write_bytes((place / "multi" / name).read_bytes())
    for run in (tmp_path, tmp_path / "best.pt"):
        done = predict_to(
            tmp_path / "p.csv", place / "s.zarr", run, threads=1, where="participant == 'p01'", overwrite=True
        )
        assert done.warnings[0].startswith("this run is not finished: the weights are of epoch 1 of 1; finetune STORE")
    assert export_run(tmp_path, tmp_path / "w.pt").warnings == (done.warnings[0],)


def test_a_part_of_a_store_by_the_command(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.csv"
    arguments = [place / "s.zarr", place / "multi" / "last.pt", out, "--where", "age >= 60", "--device", "cpu"]
    options = ["--batch-size", 5, "--threads", 1, "--json", "--precision", "bfloat16"]
    assert call_command(monkeypatch, "predict", *arguments, *options) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    found = pd.read_csv(out)
    ages = open_store(place / "s.zarr").phenotypes["age"]
    assert found["row"].tolist() == np.flatnonzero(ages >= 60).tolist()
    assert (document["scans"], document["batch_size"], document["precision"]) == (len(found), 5, "bfloat16")
    assert not document["simulated"]
    assert f"{document['parts']['train']} scans are of people whom the network was trained on" in said.err
    assert call_command(monkeypatch, "predict", *arguments) == 1
    assert "p.csv exists; add --overwrite" in capsys.readouterr().err
    before = out.read_bytes()
    assert call_command(monkeypatch, "predict", *arguments, "--overwrite") == 0
    assert out.read_bytes() != before
    assert "targets (sex, age, site, education, drinks), in" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_out_and_told(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "s.zarr", tmp_path / "s.zarr")
    for row in (4, 40):
        shard_path(tmp_path / "s.zarr", row).write_bytes(b"damaged")
    arguments = [tmp_path / "s.zarr", place / "multi", tmp_path / "p.parquet", "--device", "cpu"]
    assert call_command(monkeypatch, "predict", *arguments) == 1
    said = capsys.readouterr()
    assert "skipped: row 4: " in said.err
    assert "skipped: row 40: " in said.err
    found = pd.read_parquet(tmp_path / "p.parquet")
    assert found["row"].tolist() == [row for row in range(48) if row not in (4, 40)]
    of_run = pd.read_parquet(place / "multi" / "predictions.parquet").set_index("row").drop([4, 40], errors="ignore")
    np.testing.assert_allclose(found.set_index("row")["age"][of_run.index], of_run["age"], rtol=1e-4)
    for row in range(48):
        shard_path(tmp_path / "s.zarr", row).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="nothing can be predicted for any of 48 scans; row 0: "):
        predict_to(tmp_path / "n.parquet", tmp_path / "s.zarr", place / "multi", threads=1)
    assert not (tmp_path / "n.parquet").exists()


def test_who_withdraws_meanwhile_is_in_no_table(place, tmp_path):
    store = shutil.copytree(place / "s.zarr", tmp_path / "s.zarr")
    people, who = tmp_path / "w.csv", open_store(store).scans["participant"]
    people.write_text("\n".join(who[[3, 40]]))
    stay = np.flatnonzero(~who.isin(who[[3, 40]]))
    shard_path(store, 40).write_bytes(b"damaged")

    def leave(_: int) -> None:
        if people.exists():
            withdraw(people, [store])
            people.unlink()

    found = predict_to(
        tmp_path / "p.csv", store, place / "multi", batch_size=5, threads=1, device="cpu", on_batch=leave
    )
    assert found.skipped == {}
    assert pd.read_csv(tmp_path / "p.csv")["row"].tolist() == stay.tolist()


def test_where_nothing_can_be_written_is_told_first(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file is a file, expected a folder"):
        predict_to(tmp_path / "file" / "p.csv", place / "absent.zarr", place / "multi")
    with pytest.raises(StoreError, match="file is a file, expected a folder"):
        export_run(place / "absent", tmp_path / "file" / "w.pt")


def test_numbers_that_are_not_finite_are_no_predictions(place, tmp_path):
    content = read_training(place / "multi" / "best.pt")
    content["state_dict"]["encoder.bn1.running_mean"][0] = torch.nan
    write_checkpoint(tmp_path / "nan.pt", content)
    with pytest.raises(ValueError, match="predictions are no finite numbers: the weights do not work in float32"):
        predict_to(tmp_path / "p.parquet", place / "s.zarr", tmp_path / "nan.pt", threads=1)


def test_another_store_is_told(place, tmp_path, capsys):
    grid = {"shape_zyx": [160, 192, 160], "voxel_mm": 2.0, "affine_ras": np.eye(4).tolist(), "space": "MNI152"}
    rule = {"rule": "another", "percentile": 99.5}
    attrs = {"store": {"id": "x", "grid": grid, "intensity": rule}, "simulated": True}
    run = with_network(tmp_path / "other", make_scan_network(View.axial, slices=1), **attrs)
    volumes = open_store(place / "s.zarr")
    done = predict_to(tmp_path / "p.csv", place / "s.zarr", run, threads=1)
    assert (done.simulated, done.trained_on_simulated) == (False, True)
    print_predicted(done, Console(), Console(stderr=True), as_json=False)
    assert capsys.readouterr().out.rstrip().endswith("s), network trained on simulated data")
    assert done.parts == {}, "it has no split"
    assert done.warnings == [
        "the store has space native, voxel_mm 1.0, shape_zyx 4,24,24; the network was trained on space MNI152, "
        "voxel_mm 2.0, shape_zyx 160,192,160, and may be wrong about such scans",
        "the network was trained on simulated scans; these are not",
    ]
    ruled = replace(volumes, attrs={**volumes.attrs, "intensity": {"rule": "another", "percentile": 99.9}})
    assert "another rule (rule another, percentile 99.9) than" in other_store(attrs, ruled)[1]
    moved = {"store": {"grid": {**volumes.attrs["grid"], "affine_ras": (2 * np.eye(4)).tolist()}}}
    assert "lies elsewhere in the head" in other_store(moved, volumes)[0]
    assert other_store({}, volumes) == []


def test_a_store_that_does_not_go_with_the_network_is_refused(place, tmp_path):
    make_store(tmp_path / "small.zarr", 1)
    with pytest.raises(ValueError, match="crop is 4 x 20 x 22, expected no more than the 16 x 12 x 8 voxels"):
        predict_to(tmp_path / "q.csv", tmp_path / "small.zarr", place / "multi")
    with pytest.raises(ValueError, match=r"no scan of .* is left of which 'age > 200' is true"):
        predict_to(tmp_path / "q.csv", place / "s.zarr", place / "multi", where="age > 200")
    with pytest.raises(StoreError, match=r"ends in '.txt'"):
        predict_to(tmp_path / "q.txt", place / "s.zarr", place / "multi")
    assert not (tmp_path / "q.csv").exists()


def test_embeddings_of_a_run_are_probed(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "extract", str(place / "s.zarr"), str(tmp_path / "e.parquet"), "--weights", str(place / "multi"),
        "--device", "cpu",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        extract_main()
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert said == (
        "warning: multi/best.pt (epoch 1) was trained on people of this store, whose features look better than "
        "others' would; split.csv of the run tells who they are: test on those whom it has not seen\n"
    )
    found = open_embeddings(tmp_path / "e.parquet")
    assert (found.attrs["view"], found.attrs["slices"], found.attrs["scale"]) == ("axial", 2, 0.75)
    assert found.attrs["crop"] == [4, 20, 22]
    loaded = load_run(place / "multi")
    with torch.inference_mode():
        levels = torch.from_numpy(stored(place / "s.zarr"))
        assert_close(torch.from_numpy(found.features), loaded.network.features(levels), 1e-4)
    settings = ProbeSettings(repeats=1, folds=3)
    (note,) = found.attrs["notes"]
    assert said == f"warning: {note}\n"
    assert doubts({"e": found}, ["sex"], tasks={}, settings=settings)[0] == f"e: {note}"
    result = probe(found, ["sex"], settings=settings)[0]
    assert result.status == "ok"
    assert result.headline.score > 0.6


def stored(store: Path) -> np.ndarray:
    from loaders import open_loader

    with open_loader(store, batch_size=64, backend="torch", threads=1) as loader:
        return next(iter(loader)).images.numpy()


def test_a_run_begins_with_the_weights_of_another(place, tmp_path):
    run = with_network(tmp_path / "before", make_scan_network(View.axial))
    settings = tiny_settings(weights=str(run), target="age")
    weights = find_weights(settings)
    network = build_network(settings, [Head("age", "continuous")], weights)
    assert (network.seen.mean, network.seen.std, weights.name) == (MEAN, STD, "before/best.pt (epoch 7)")
    before = load_run(run).network.encoder.state_dict()
    for name, value in network.encoder.state_dict().items():
        assert value.is_floating_point() is False or torch.equal(value, before[name]), name
    done = finetune(place / "s.zarr", tmp_path / "after", tiny_settings(
        weights=str(run), target="age", epochs=1, train_people=8, freeze_until="layer4",
    ), report=False)  # fmt: skip
    after = load_run(done.run_dir)
    weights = after.attrs["weights"]
    assert (weights["name"], weights["sha256"]) == ("before/best.pt (epoch 7)", sha256(run / "best.pt"))
    assert after.network.seen.mean == MEAN
    assert torch.equal(after.network.encoder.layer4[1].conv2.weight, before["layer4.1.conv2.weight"])


NO_RUN = {
    "no complete checkpoint of a finetune run: no 'heads'": lambda model, _: model.pop("heads"),
    "no complete checkpoint .*to float: 'x'": lambda model, _: model["input"].update(mean="x"),
    "no complete checkpoint .*cannot convert": lambda model, _: model["input"].update(slices=float("inf")),
    "no complete checkpoint .*has 5 outputs": lambda model, _: model["heads"][0].update(outputs=5),
    "no complete checkpoint .*this is no head": lambda model, _: model["heads"][0].update(colour="red"),
    "no complete checkpoint .*'dict' object|attribute|items": lambda model, _: model.update(heads=[3]),
    "no complete checkpoint .*epohcs": lambda _, content: content["settings"].update(epohcs=3),
    "no complete checkpoint .*Missing key": lambda *_: None,
    "no complete checkpoint .*JSON": lambda _, content: content["attrs"].update(store=torch.zeros(2)),
    "is a checkpoint of version 99": lambda _, content: content.update(version=99),
    "is no checkpoint of a finetune run": lambda _, content: content.pop("settings"),
}


@pytest.fixture(scope="module")
def content(place) -> dict:
    """A checkpoint whose weights are next to nothing, so that it is written in no time."""
    return read_training(place / "multi" / "best.pt") | {"state_dict": {"conv1.weight": torch.zeros(1)}}


def changed(content: dict, change) -> dict:
    model = {**content["model"], "input": dict(content["model"]["input"])}
    model["heads"] = [dict(head) for head in model["heads"]]
    copied = {**content, "model": model} | {
        name: dict(content[name]) for name in ("settings", "state_dict", "attrs")
    }  # fmt: skip
    change(model, copied)
    return copied


@pytest.mark.parametrize("words", NO_RUN)
def test_what_is_no_run_is_refused_by_name(content, tmp_path, words):
    path = tmp_path / "w.pt"
    torch.save(changed(content, NO_RUN[words]), path)
    with pytest.raises(WeightsUnavailableError, match=rf"w\.pt .*({words})") as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


NONSENSE = {
    "view": ["diagonal", 3, None, "volume"],
    "slices": [0, "3", 2.5, None],
    "crop": [[1, 2], "abc", torch.zeros(2, 2), [0, 1, 1]],
    "size": [[1, 2, 3], {"a": 1}, [1 << 20, 1 << 20]],
    "scale": [0.0, float("nan"), "x", 10**400],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_about_the_input_is_refused_by_name(content, tmp_path, name):
    for value in NONSENSE[name]:
        torch.save(
            changed(content, lambda model, _, value=value: model["input"].update({name: value})), tmp_path / "w.pt"
        )
        with pytest.raises(WeightsUnavailableError, match=r"w\.pt is damaged: ") as caught:
            read_checkpoint(tmp_path / "w.pt")
        assert len(str(caught.value)) < 300
    for key, value in {"input": [1], "name": "resnet19"}.items():
        torch.save({**content, "model": {**content["model"], key: value}}, tmp_path / "w.pt")
        with pytest.raises(WeightsUnavailableError, match=r"w\.pt is "):
            read_checkpoint(tmp_path / "w.pt")


def test_names_of_runs(content, tmp_path, monkeypatch):
    (tmp_path / "sex").mkdir()
    for path in ("sex/best.pt", "sex/last.pt", "copy.pt"):
        torch.save(content, tmp_path / path)
    torch.save(
        {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": content["state_dict"]}, tmp_path / "own.pt"
    )
    torch.save(content["state_dict"], tmp_path / "sex" / "plain.pt")
    monkeypatch.chdir(tmp_path / "sex")
    expected = {
        ".": "sex/best.pt (epoch 1)", "best.pt": "sex/best.pt (epoch 1)", "last.pt": "sex/last.pt (epoch 1)",
        "../copy.pt": "copy.pt (epoch 1)", "../own.pt": "own.pt", "plain.pt": "plain.pt",
    }  # fmt: skip
    assert {path: read_checkpoint(path).name for path in expected} == expected
    with pytest.raises(WeightsUnavailableError, match=r"^sex/best\.pt does not fit resnet34: it is a check"):
        load_weights("resnet34", os.curdir)


def test_the_command_says_what_is_no_run(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for run, words in ((tmp_path / "empty", "is a folder without best.pt"), (tmp_path / "none", "nothing is at")):
        assert call_command(monkeypatch, "predict", place / "s.zarr", run, tmp_path / "p.csv") == 3
        said = capsys.readouterr().err
        assert words in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1


def test_a_loaded_run_is_what_was_saved(place):
    loaded = load_run(place / "multi")
    assert isinstance(loaded, LoadedRun)
    assert loaded.attrs["store"]["id"] == open_store(place / "s.zarr").attrs["store_id"]
    assert "intensity" in loaded.attrs["store"]
