"""What a network sees of a scan: crops, the slices of them, and the size that they are resized to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import assert_close
from small_store import SHAPE, make_store
from torch import nn

from extract import build_encoder, extract
from extract.encoder import describe
from extract.inputs import resize
from extract.models import about_pictures
from loaders import View

CROP = (13, 9, 5)  # of 16 x 12 x 8: an odd number of planes is cut off along each axis
VIEWS = [View.axial, View.coronal, View.sagittal, View.triplanar]


@pytest.fixture
def store(tmp_path):
    voxels = make_store(tmp_path / "s.zarr", 3)
    return tmp_path / "s.zarr", voxels


def middle_of(voxels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(voxels[:, 1:14, 1:10, 1:6].copy())


@pytest.mark.parametrize("view", VIEWS)
def test_a_crop_of_slices_is_that_of_volumes(store, view):
    path, voxels = store
    settings = {"weights": "random", "device": "cpu", "view": view, "slices": 2}
    expected = build_encoder(**settings)(middle_of(voxels))
    cropped = build_encoder(**settings, crop=CROP)
    assert_close(cropped(torch.from_numpy(voxels)), expected)
    found = extract(path, cropped)
    assert_close(torch.from_numpy(found.features), expected)
    assert list(found.attrs["crop"]) == list(CROP)


def test_a_crop_of_volumes(store):
    path, voxels = store
    expected = build_encoder("r3d_18", weights="random", device="cpu")(middle_of(voxels))
    cropped = build_encoder("r3d_18", weights="random", device="cpu", crop=CROP)
    assert_close(cropped(torch.from_numpy(voxels)), expected)
    assert_close(torch.from_numpy(extract(path, cropped).features), expected)


@pytest.mark.parametrize("view", [View.coronal, View.triplanar])
def test_a_crop_of_everything_changes_nothing(store, view):
    path, voxels = store
    settings = {"weights": "random", "device": "cpu", "view": view}
    whole = build_encoder(**settings, crop=SHAPE)
    assert torch.equal(whole(torch.from_numpy(voxels)), build_encoder(**settings)(torch.from_numpy(voxels)))
    assert_close(torch.from_numpy(extract(path, whole).features), whole(torch.from_numpy(voxels)))


@pytest.mark.parametrize("view", [View.sagittal, View.triplanar])
def test_crops_and_slices_that_are_not_there_are_refused(store, view):
    path, voxels = store
    images = torch.from_numpy(voxels)
    large = build_encoder(weights="random", device="cpu", view=view, crop=(16, 13, 8))
    many = build_encoder(weights="random", device="cpu", view=view, crop=CROP, slices=14)
    for use in (lambda e: e(images), lambda e: e.check(SHAPE), lambda e: extract(path, e)):
        with pytest.raises(ValueError, match=r"crop is 16 x 13 x 8, expected no more than the 16 x 12 x 8 voxels"):
            use(large)
        with pytest.raises(ValueError, match=r"slices is 14, expected 1 to (13|9|5) in the view"):
            use(many)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((6, 9), lambda x: nn.functional.avg_pool2d(x, (2, 3))),
        ((24, 54), lambda x: nn.functional.interpolate(x, size=(24, 54), mode="bilinear")),
        ((6, 54), lambda x: nn.functional.interpolate(nn.functional.avg_pool2d(x, (2, 1)), (6, 54), mode="bilinear")),
        ((12, 27), lambda x: x),
    ],
)
def test_areas_shrink_and_lines_grow(size, expected):
    pictures = torch.randint(0, 256, (3, 1, 12, 27), dtype=torch.uint8)
    torch.testing.assert_close(resize(pictures, size).float(), expected(pictures.float()))


def test_volumes_are_resized_along_each_axis():
    volumes = torch.randint(0, 256, (2, 1, 4, 6, 8), dtype=torch.uint8)
    found = resize(volumes, (2, 9, 8))
    halves = nn.functional.avg_pool3d(volumes.float(), (2, 1, 1))
    torch.testing.assert_close(found, nn.functional.interpolate(halves, size=(2, 9, 8), mode="trilinear"))
    assert torch.equal(resize(torch.full_like(volumes, 7), (3, 9, 5)), torch.full((2, 1, 3, 9, 5), 7.0))


def test_slices_of_all_planes_may_have_one_size(store):
    """The whole way: cropped, then cut, then resized, and fast as well as plain."""
    path, voxels = store
    settings = {"weights": "random", "device": "cpu", "slices": 1, "crop": (12, 9, 6), "size": 18}
    encoder = build_encoder(**settings)
    z, y, x = (
        torch.from_numpy(voxels[:, 2:14, 1:10, 1:7].copy()).select(axis, at) for axis, at in ((1, 6), (2, 4), (3, 2))
    )
    pictures = [
        nn.functional.interpolate(p.flip(1)[:, None].float(), size=(18, 18), mode="bilinear") for p in (z, y, x)
    ]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.weights.mean, encoder.weights.std))
    plain = build_encoder(**settings, plain=True)
    with torch.inference_mode():
        expected = torch.stack([plain.network((p / 255 - mean) / std) for p in pictures]).mean(0)
    assert_close(plain(torch.from_numpy(voxels)), expected)
    assert_close(encoder(torch.from_numpy(voxels)), expected)
    found = extract(path, encoder)
    assert_close(torch.from_numpy(found.features), expected)
    assert {key: describe(encoder)[key] for key in ("crop", "size", "scale", "pooling", "layers")} == {
        "crop": (12, 9, 6),
        "size": (18, 18),
        "scale": 1.0,
        "pooling": "mean",
        "layers": [{"name": "avgpool", "features": 512, "start": 0}],
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 64, "scale": 0.5}, "size is 64 and scale 0.5, expected one of them"),
        ({"size": (64, 64, 64)}, r"size is 64,64,64, expected one number or 2 \(height,width\)"),
        ({"size": (64, 64), "model": "r3d_18"}, r"size is 64,64, expected one number or 3 \(z,y,x\)"),
        ({"size": 0}, "size is 0, expected .* each 1 or more"),
        ({"size": (8, -8)}, "size is 8,-8, expected"),
        ({"size": 1.5}, "size is 1.5, expected"),
        ({"size": ()}, "expected one number"),
        ({"size": 100_000}, "size is 100000,100000, expected 134,217,728 voxels or fewer"),
        ({"crop": (4, 4)}, "expected three whole numbers: z,y,x"),
        ({"crop": (4, 4, 0)}, "crop is 4,4,0, expected 1 or more"),
        ({"crop": (4, 4, 2.5)}, "expected three whole numbers"),
    ],
)
def test_crops_and_sizes_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build_encoder(**{"weights": "random", **settings})


@pytest.mark.parametrize(
    ("model", "sizes", "words"),
    [
        ("resnet18", [(64, 64), (31, 64)], "resnet18 sees pictures of 31 x 64 voxels; below 32"),
        ("r3d_18", [(1, 64, 64)], "1 x 64 x 64"),
        ("resnet18", [(32, 40)], ""),
        ("s3d", [(13, 224, 224)], ""),
    ],
)
def test_pictures_that_shrink_to_nothing_are_warned_about(model, sizes, words):
    found = about_pictures(model, sizes)
    assert len(found) == bool(words)
    assert words in "".join(found)


def test_numbers_of_numpy_are_numbers():
    settings = {"weights": "random", "device": "cpu"}
    encoder = build_encoder(**settings, size=np.int64(32), slices=np.int32(2))
    assert (encoder.size, encoder.slices) == ((32, 32), 2)
    json.dumps(describe(encoder))


def test_a_network_of_volumes_has_no_slices():
    settings = {"weights": "random", "device": "cpu"}
    few, many = (describe(build_encoder("r3d_18", **settings, slices=slices)) for slices in (1, 9))
    assert few == many
    assert few["slices"] is None
    assert describe(build_encoder(**settings, slices=9))["slices"] == 9


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("foo", 0, "expected auto, cpu, cuda, or cuda:N"),
        ("mps", 0, "expected auto, cpu, cuda, or cuda:N"),
        ("cuda:-1", 2, "expected auto, cpu, cuda, or cuda:N"),
        ("cuda", 0, "no GPU is at hand; use device 'cpu'"),
        ("cuda:2", 2, "of 2 GPUs there is none with this number; use device 'cpu' or 'cuda'"),
    ],
)
def test_devices_that_are_not_there_are_refused(monkeypatch, device, gpus, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=words):
        build_encoder(weights="random", device=device)
