"""Embeddings: the same numbers as plain torchvision, weights that are what they say, files that keep everything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call
from conftest import mni_brain, write_nifti
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.video import R3D_18_Weights, r3d_18

from extract import Embeddings, build_encoder, extract, open_embeddings
from extract.cli import main
from extract.weights import WeightsUnavailableError, load_weights
from ingest import IngestSettings, ingest, open_store
from ingest.grid import FSL_MNI152_AFFINE
from loaders import VolumeReader
from loaders.views import View, slice_positions, slices_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store with three volumes and, between them, a row without one."""
    folder = tmp_path_factory.mktemp("extract")
    for seed, name in enumerate(("9000001", "9000002", "9000004")):
        marker = (-30.0, 20.0 * seed, 10.0)
        write_nifti(
            folder / "src" / f"{name}.nii.gz", mni_brain(seed=seed, marker_mm=marker), FSL_MNI152_AFFINE, code=4
        )
    (folder / "src" / "9000003.nii.gz").write_bytes(b"broken")
    (folder / "p.csv").write_text("eid,31-0.0,21003-2.0,738-2.0\n9000001,1,55,-3\n9000002,0,61.5,4\n9000004,1,70,2\n")
    ingest(folder / "src", folder / "s.zarr", IngestSettings(phenotypes=folder / "p.csv"))
    return folder / "s.zarr"


@pytest.fixture(scope="module")
def embedded(store) -> Embeddings:
    return extract(store, build_encoder(weights="random", scale=0.5))


def by_hand(volume: np.ndarray, network: torch.nn.Module, view: str, slices: int) -> np.ndarray:
    """Embed one volume (z, y, x) by torchvision alone, slice by slice."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    planes = ["axial", "coronal", "sagittal"] if view == "triplanar" else [view]
    network.fc = torch.nn.Identity()
    features = []
    for plane in planes:
        axis = ["axial", "coronal", "sagittal"].index(plane)
        for position in slice_positions(volume.shape[axis], slices):
            picture = np.flip(np.take(volume, position, axis=axis), 0)
            grey = torch.from_numpy(picture.copy()).float() / 255
            with torch.no_grad():
                features.append(network(((grey.expand(3, -1, -1) - mean) / std)[None])[0].numpy())
    return np.mean(features, axis=0)


@pytest.mark.parametrize(("view", "slices"), [("axial", 1), ("coronal", 2), ("sagittal", 3), ("triplanar", 1)])
def test_2d_features_are_those_of_plain_torchvision(store, tmp_path, view, slices):
    torch.manual_seed(3)
    network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    found = extract(store, build_encoder(weights=str(tmp_path / "w.pth"), view=View(view), slices=slices), batch_size=2)
    with VolumeReader(store) as reader:
        volumes = reader.read(reader.store.ok_rows)
    expected = [by_hand(volume, network, view, slices) for volume in volumes]
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.attrs["view"] == view


def test_3d_features_are_those_of_plain_torchvision(store, tmp_path):
    torch.manual_seed(4)
    network = r3d_18().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    found = extract(store, build_encoder("r3d_18", weights=str(tmp_path / "w.pth"), scale=0.25), batch_size=2)
    with VolumeReader(store) as reader:
        volumes = torch.from_numpy(reader.read(reader.store.ok_rows)).float() / 255
    small = torch.nn.functional.avg_pool3d(volumes[:, None], 4)
    preset = R3D_18_Weights.KINETICS400_V1.transforms()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (preset.mean, preset.std))
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = network((small - mean) / std).numpy()
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.features.shape == (3, 512)
    assert found.attrs["view"] == "volume"


def test_slices_are_upright():
    volume = torch.zeros(1, 6, 5, 4, dtype=torch.uint8)
    volume[0, 5, 4, 0] = 1  # top, front, left
    axial, coronal, sagittal = slices_of(volume.expand(1, 6, 5, 4), View.triplanar, 1)
    assert axial.shape == (1, 1, 5, 4)
    assert coronal.shape == (1, 1, 6, 4)
    assert sagittal.shape == (1, 1, 6, 5)
    top = volume.clone()
    top[0, :, 4, 0] = 1
    top[0, 5, :, 0] = 1
    assert slices_of(top, View.axial, 1)[0][0, 0, 0, 0] == 1  # front is up, left is left
    assert slices_of(top, View.coronal, 1)[0][0, 0, 0, 0] == 1  # top is up


def test_rows_identity_and_phenotypes(store, embedded):
    assert list(embedded.scans["row"]) == [0, 1, 3]
    assert list(embedded.scans["participant"]) == ["9000001", "9000002", "9000004"]
    np.testing.assert_array_equal(embedded.phenotypes["sex"], [1, 0, 1])
    np.testing.assert_array_equal(embedded.phenotypes["income"], [np.nan, 4, 2])
    assert embedded.attrs["simulated"] is False
    assert embedded.attrs["store"]["id"] == open_store(store).attrs["store_id"]
    assert embedded.attrs["weights"]["name"] == "random (seed 0)"
    assert len(embedded.attrs["weights"]["sha256"]) == 64


def test_some_rows_alone(store, embedded):
    found = extract(store, build_encoder(weights="random", scale=0.5), rows=[3, 0])
    np.testing.assert_allclose(found.features, embedded.features[[2, 0]], rtol=1e-4, atol=1e-5)
    assert list(found.scans["participant"]) == ["9000004", "9000001"]
    np.testing.assert_array_equal(found.phenotypes["sex"], [1, 1])
    with pytest.raises(ValueError, match="rows is empty, expected one scan or more"):
        extract(store, build_encoder(weights="random"), rows=[])
    with pytest.raises(IndexError, match="row 2"):
        extract(store, build_encoder(weights="random"), rows=[2])


def test_random_weights_depend_on_their_seed_alone(store, embedded):
    torch.manual_seed(99)
    again = extract(store, build_encoder(weights="random", scale=0.5), batch_size=1, backend="dali")
    np.testing.assert_allclose(again.features, embedded.features, rtol=1e-4, atol=1e-5)
    assert again.attrs["weights"] == embedded.attrs["weights"]
    other = build_encoder(weights="random", scale=0.5, seed=1).weights
    assert other.sha256 != embedded.attrs["weights"]["sha256"]
    before = torch.rand(1)
    torch.manual_seed(99)
    assert torch.rand(1) == before  # building an encoder leaves the global generator alone


class Hostile:
    """Runs a command when it is unpickled carelessly."""

    def __reduce__(self):
        return (Path.touch, (Path("hostile-was-here"),))


def test_weights_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save({"a": Hostile()}, tmp_path / "hostile2.pth")
    for name in ("hostile.pth", "hostile2.pth"):
        with pytest.raises(WeightsUnavailableError, match="no state dict that is safe"):
            build_encoder(weights=str(tmp_path / name))
    assert not (tmp_path / "hostile-was-here").exists()
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(WeightsUnavailableError, match="no state dict that is safe"):
        build_encoder(weights=str(tmp_path / "text.pth"))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsUnavailableError, match="holds list"):
        build_encoder(weights=str(tmp_path / "list.pth"))
    torch.save(r3d_18().state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsUnavailableError, match="does not fit resnet18"):
        build_encoder(weights=str(tmp_path / "other.pth"))
    with pytest.raises(WeightsUnavailableError, match="expected imagenet, random, or the path"):
        build_encoder(weights="kinetics")


def test_pretrained_weights_come_from_torchvisions_cache_and_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / name
    torch.manual_seed(5)
    network = resnet18()
    torch.save(network.state_dict(), file)
    found = load_weights("resnet18", "imagenet")
    assert found.name == "imagenet"
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(found.state_dict["conv1.weight"], network.conv1.weight)
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsUnavailableError, match="delete"):
        load_weights("resnet18", "imagenet")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "vgg"}, "expected one of .*resnet18.*r3d_18"),
        ({"view": View.volume}, "expected axial"),
        ({"model": "r3d_18", "view": View.axial}, "expected volume"),
        ({"slices": 0}, "1 or more"),
        ({"slices": 1.5}, "slices is 1.5, expected a whole number, 1 or more"),
        ({"scale": 2.0}, "at most 1"),
        ({"precision": "double"}, "auto, float32, bfloat16, float16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build_encoder(weights="random", **settings)


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the extract command as a user does; its proxies lead nowhere, so that no run depends on a network."""

    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", "from extract.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **nowhere, **environment}
    )


def test_command_line(store, tmp_path):
    out = tmp_path / "new" / "e.h5"
    arguments = (store, out, "--weights", "random", "--view", "axial", "--slices", "1", "--scale", "0.25", "--json")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["scans"] == 3
    assert summary["features"] == 512
    exact = open_embeddings(out)
    assert exact.features.shape == (3, 512)
    assert summary["precision"] == exact.attrs["precision"] == "float32"
    assert exact.attrs["compiled"] is False
    assert (summary["embedded"], summary["skipped"], summary["processes"]) == (3, [], 1)
    assert set(summary["time"]) == {"read", "decode", "copy", "wait", "compute", "write", "threads"}
    assert summary["time"]["read"] > 0
    assert summary["time"]["compute"] > 0
    assert summary["time"]["compute"] + summary["time"]["wait"] + summary["time"]["write"] <= summary["seconds"]
    assert 0 < summary["busy_share"] <= 1
    done = call(main, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["embedded"] == 0
    done = call(main, *arguments[:-1], "--overwrite", "--precision", "bfloat16", "--batch-size", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "scans/s), bfloat16" in done.stdout
    assert re.search(r"^network busy \d+% of the time, waiting for scans \d+%", done.stdout, flags=re.MULTILINE)
    assert open_embeddings(out).attrs["precision"] == "bfloat16"
    np.testing.assert_allclose(open_embeddings(out).features, exact.features, rtol=0.1, atol=0.02)


def test_weights_that_cannot_be_downloaded_are_one_line_and_exit_code_3(store, tmp_path):
    done = run(store, tmp_path / "e.zarr", TORCH_HOME=str(tmp_path / "empty"))
    assert done.returncode == 3
    assert done.stderr.startswith("error: imagenet weights of resnet18 cannot be downloaded")
    assert done.stderr.count("\n") == 1
    assert "--weights random" in done.stderr
    assert not (tmp_path / "e.zarr").exists()


def test_ctrl_c_is_told_in_one_line(tmp_path, monkeypatch):
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ingest.store.open_store", end)
    done = call(main, tmp_path / "s.zarr", tmp_path / "e.h5", "--overwrite")
    told = "interrupted; the same command goes on where it was\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)


def test_a_name_may_have_brackets_and_a_backend_is_known_before_anything_is_begun(store, tmp_path):
    small = ("--weights", "random", "--view", "axial", "--slices", 1, "--scale", 0.25)
    done = call(main, store, tmp_path / "a.npz", *small, "--backend", "tourch")
    assert (done.returncode, "backend 'tourch' is unknown" in done.stderr) == (1, True)
    assert not list(tmp_path.iterdir())
    done = call(main, store, tmp_path / "[v2]" / "[", *small)
    assert done.returncode == 1
    done = call(main, store, tmp_path / "a[v2].npz", *small)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'a[v2].npz'}: 3 scans")
