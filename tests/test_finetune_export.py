"""What is exported gives what the network gives, without this package."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import call_command, tiny_settings
from full_disk import full_disk
from networks import assert_close, trained
from torchvision.models import get_model

from extract import build_encoder
from extract.checkpoints import read_checkpoint
from extract.errors import WeightsUnavailableError
from finetune.checkpoints import checkpoint_of, load_run, read_training, write_checkpoint
from finetune.export import DESCRIPTION, export_run
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from ingest.errors import StoreError
from loaders.views import View

SHAPE = (9, 24, 20)
GRID = {"shape_zyx": list(SHAPE), "voxel_mm": 1.0, "affine_ras": np.eye(4).tolist(), "space": "native"}
OURS = ("finetune", "extract", "loaders", "ingest", "torchvision")
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)

HEADS = [
    Head("sex", "binary", ("female", "male"), frequencies=(0.25, 0.75)),
    Head("age", "continuous", units="years", mean=62.5, std=7.25, typical=62.5),
    Head("site", "multiclass", ("a", "b", "c"), outputs=3, frequencies=(0.2, 0.3, 0.5)),
    Head("income", "ordinal", outputs=3, levels=(1.0, 2.0, 4.0, 7.0)),
    Head("drinks per week", "count", mean=1.5, std=0.6),
]

#: Model, view, pool, slices, crop, size, scale.
SEEN = {
    "axial": ("resnet18", View.axial, "mean", 2, None, None, 0.5),
    "triplanar": ("resnet18", View.triplanar, "attention", 3, (7, 20, 18), (24, 32), 1.0),
    "volume": ("mc3_18", View.volume, "mean", 3, (8, 24, 20), (8, 20, 24), 1.0),
}


def make_run(folder: Path, name: str) -> Path:
    """Write the folder of a run whose network does something with everything; return its path."""
    model, view, pool, slices, crop, size, scale = SEEN[name]
    network = trained(
        lambda: ScanNetwork(model, Input(view, slices, crop, size, scale, MEAN, STD), HEADS, pool=pool, dropout=0.5)
    )
    settings = tiny_settings(model=model, view=None if view is View.volume else str(view), target="sex")
    attrs = {
        "store": {"path": str(folder), "id": "s", "grid": GRID, "intensity": {"percentile": 99.9}}, "simulated": True,
        "epoch": 7, "step": 9,
    }  # fmt: skip
    folder.mkdir()
    write_checkpoint(folder / "best.pt", checkpoint_of(network, settings, attrs))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in SEEN}


def volumes_of(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


class NotOurs(MetaPathFinder):
    """Finds nothing of ours, as where this package is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"{name} is not there")


def without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make as if this package were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotOurs(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="is not there"):
        importlib.import_module("finetune.heads")


@pytest.mark.parametrize("name", SEEN)
def test_a_program_predicts_what_the_network_does(runs, tmp_path, monkeypatch, capsys, name):
    run, out = runs[name], tmp_path / "p.pt2"
    assert call_command(monkeypatch, "export", run, out) == 0
    assert capsys.readouterr().out == (
        f"{out}: program of torch.export, uint8 scan x 9 x 24 x 20 -> sex, age, site, income, drinks per week\n"
    )
    beside = {DESCRIPTION: ""}
    loaded = load_run(run)
    with monkeypatch.context() as elsewhere:
        without_us(elsewhere)
        program = torch.export.load(out, extra_files=beside).module()
        predicted = {count: program(volumes_of(count)) for count in (1, 2, 5)}
    for count, by_target in predicted.items():
        found = {target: values.numpy() for target, values in by_target.items()}
        with torch.inference_mode():
            outputs = loaded.network(volumes_of(count)).numpy()
        assert list(found) == [head.name for head in HEADS]
        for head, place in zip(HEADS, loaded.network.head_slices, strict=True):
            expected = head.predict(outputs[:, place])
            assert found[head.name].shape == expected.shape
            np.testing.assert_allclose(found[head.name], expected, rtol=1e-5)
            assert count == 1 or np.ptp(expected, axis=0).min() > 1e-5, "scans differ"
    about = json.loads(beside[DESCRIPTION])
    assert about["input"]["shape"] == ["scan", *SHAPE]
    assert about["input"]["grid"] == GRID
    assert about["outputs"]["sex"]["labels"] == ["female", "male"]
    assert about["outputs"]["age"]["units"] == "years"
    assert about["outputs"]["income"]["levels"] == [1, 2, 4, 7]
    assert {head: one["shape"][1:] for head, one in about["outputs"].items()} == {
        head.name: [len(head.labels)] if head.labels else [] for head in HEADS
    }
    assert about["attrs"]["simulated"]
    with pytest.raises(Exception, match="9"):
        program(torch.zeros((2, 8, 24, 20), dtype=torch.uint8))
    with zipfile.ZipFile(out) as archive:
        texts = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"network.py" not in texts
    assert str(run.parent).encode() not in texts, "names of folders stay here"


@pytest.mark.parametrize("name", ["axial", "volume"])
def test_weights_are_those_of_torchvision(runs, tmp_path, name):
    out = tmp_path / "w.pt"
    said = export_run(runs[name], out).in_words()
    state = torch.load(out, weights_only=True)
    loaded = load_run(runs[name])
    network = get_model(loaded.network.model)
    missing = network.load_state_dict(state, strict=False)
    assert (sorted(missing.missing_keys), missing.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    for part, value in loaded.network.encoder.state_dict().items():
        assert torch.equal(network.state_dict()[part], value), part
    assert state.brain_volumes["mean"] == list(MEAN)
    assert "input / 255, minus 0.4, 0.5, 0.6, over 0.3, 0.2, 0.25" in said
    checkpoint = read_checkpoint(out)
    assert (checkpoint.name, checkpoint.model, checkpoint.std) == ("w.pt (epoch 7)", loaded.network.model, STD)
    encoder = build_encoder(weights=str(out), device="cpu")
    with torch.inference_mode():
        assert_close(encoder(volumes_of(3)), loaded.network.features(volumes_of(3)), 1e-4)


def test_what_is_there_stays(runs, tmp_path, monkeypatch, capsys):
    axial = runs["axial"]
    out = tmp_path / "w.pt"
    out.write_text("mine")
    assert call_command(monkeypatch, "export", axial, out) == 1
    assert "w.pt exists; add --overwrite to replace it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    capsys.readouterr()
    assert call_command(monkeypatch, "export", axial / "best.pt", out, "--overwrite", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["path"], document["model"]["name"]) == (str(out), "resnet18")
    assert read_checkpoint(out).model == "resnet18"
    with pytest.raises(StoreError, match=r"w.onnx ends in '.onnx', expected .pt \(weights of the encoder\) or .pt2"):
        export_run(axial, tmp_path / "w.onnx")
    with pytest.raises(WeightsUnavailableError, match=r"nothing is at .*none; expected the folder of a"):
        export_run(tmp_path / "none", tmp_path / "n.pt")
    with pytest.raises(WeightsUnavailableError, match=r"w\.pt is no checkpoint of a finetune run"):
        export_run(out, tmp_path / "n.pt2")
    content = read_training(axial / "best.pt")
    write_checkpoint(tmp_path / "old.pt", {**content, "attrs": {"store": {}}})
    with pytest.raises(WeightsUnavailableError, match=r"old\.pt does not say of which grid"):
        export_run(tmp_path / "old.pt", tmp_path / "n.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.pt", "w.pt"]


@pytest.mark.parametrize("name", ["w.pt", "p.pt2"])
def test_a_disk_that_is_full_is_named(runs, tmp_path, monkeypatch, capsys, name):
    with full_disk():
        code = call_command(monkeypatch, "export", runs["axial"], tmp_path / name)
    assert code == 1
    assert f"{name} cannot be written: File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
