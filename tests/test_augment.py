"""Augmentation: seeds and keys, types, planes, what stays as it was, and what is refused; the CPU and a GPU agree."""

from __future__ import annotations

import dataclasses
import doctest
import math
import sys

import numpy as np
import pytest
import torch
from augmenting import EVERYTHING, EVERYTHING_WHOLE, KEYS, OFF, PLANES, SIZE, only, smooth

import loaders.augment as augment_module
from loaders.augment import augment
from loaders.augmentation import Augmentation, draw

GREY = torch.full((4, *SIZE), 0.5)


def test_off_is_the_images_themselves() -> None:
    images = torch.rand(4, *SIZE)
    assert augment(images, OFF, KEYS) is images


@pytest.mark.parametrize("view", ["volume", *PLANES])
def test_a_scan_does_not_depend_on_its_batch(view: str) -> None:
    images = torch.rand(4, *SIZE)
    ranges = dataclasses.replace(EVERYTHING, crop=(20, 24, 24) if view == "volume" else (20, 24))
    together = augment(images, ranges, KEYS, view=view)
    order = [2, 0, 3, 1]
    assert torch.equal(augment(images[order], ranges, KEYS[order], view=view), together[order])
    for i in range(4):
        assert torch.equal(augment(images[i : i + 1], ranges, KEYS[i : i + 1], view=view), together[i : i + 1])


def test_every_column_of_the_key_counts() -> None:
    image = torch.rand(1, *SIZE)
    results = [augment(image, Augmentation(), key[None]) for key in KEYS]
    # large integers and their halves are told apart, too
    keys = [[2**32 + 5, 7], [1, 7 * 2**32 + 5], [5, 7], [7, 5], [5, 2**63], [5, 2**64 - 1]]
    results += [augment(image, Augmentation(), np.array([key], dtype=np.uint64)) for key in keys]
    for i, one in enumerate(results):
        assert all((one - other).abs().mean() > 1e-3 for other in results[:i])


def test_integer_types_of_keys_do_not_matter() -> None:
    image = torch.rand(1, *SIZE)
    results = [augment(image, Augmentation(), KEYS[:1].astype(dtype)) for dtype in (np.int64, np.uint8, np.uint64)]
    results.append(augment(image, Augmentation(), np.asfortranarray(KEYS)[:1]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_draws_fill_their_ranges_and_do_not_depend_on_each_other() -> None:
    ranges = Augmentation(flip=0.25)
    draws = [draw(ranges, np.array([0, 0, i])) for i in range(2000)]
    uniform = {
        "angles": (-math.radians(10), math.radians(10)),
        "shift": (-5.0, 5.0),
        "scale": (0.95, 1.05),
        "gain": (0.9, 1.1),
        "noise_sd": (0.0, 0.02),
        "bias_peak": (0.0, 0.2),
        "crop": (0.0, 1.0),
    }
    columns = []
    for name, (low, high) in uniform.items():
        values = np.array([getattr(drawn, name) for drawn in draws]).reshape(len(draws), -1)
        columns.append(values)
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        np.testing.assert_allclose(values.mean(axis=0), (low + high) / 2, atol=0.03 * (high - low))
    logs = np.log([[drawn.exponent] for drawn in draws])
    assert -0.2 <= logs.min() < -0.19
    assert 0.19 < logs.max() <= 0.2
    assert np.mean([drawn.flip for drawn in draws]) == pytest.approx(0.25, abs=0.04)
    correlation = np.corrcoef(np.hstack([*columns, logs]), rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.11
    # a part that is switched off leaves the others as they were
    np.testing.assert_array_equal(draw(only(rotation_deg=10), np.array([0, 0, 5])).angles, draws[5].angles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    images = smooth().to(dtype)
    before = images.clone()
    result = augment(images, Augmentation(), KEYS)
    assert result.dtype == dtype
    assert torch.equal(images, before)
    # computed in float32, and rounded once
    assert torch.equal(result, augment(images.to(torch.float32), Augmentation(), KEYS).to(dtype))
    assert torch.equal(augment(images, only(flip=1), KEYS), images.flip(-1))


def test_non_contiguous_images_and_empty_batches() -> None:
    images = torch.rand(4, *SIZE)
    result = augment(images, Augmentation(), KEYS)
    assert torch.equal(
        augment(images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), Augmentation(), KEYS), result
    )
    assert torch.equal(augment(images.flip(1).flip(1), Augmentation(), KEYS), result)
    assert augment(images[:0], EVERYTHING, KEYS[:0]).shape == (0, 20, 28, 24)


def test_global_random_states_are_left_alone() -> None:
    images = torch.rand(4, *SIZE)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = augment(images, EVERYTHING, KEYS)
    ours = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(ours[0], torch.rand(3))
    assert np.array_equal(ours[1], np.random.rand(3))  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(augment(images, EVERYTHING, KEYS), first)


def test_planes_of_a_triplanar_view_share_a_head() -> None:
    images = torch.full((1, 1, 20, 20), 0.5)
    gains = [augment(images, only(gain=0.2, gamma=0.2), KEYS[:1], view=view).mean() for view in PLANES]
    assert gains[0] == gains[1] == gains[2]
    noises = [augment(images, only(noise=0.2), KEYS[:1], view=view) for view in PLANES]
    assert not torch.equal(noises[0], noises[1])


@pytest.mark.parametrize("view", ["volume", *PLANES])
def test_scans_that_are_changed_together_become_what_each_becomes(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = EVERYTHING_WHOLE
    alone = augment(smooth(), ranges, KEYS, view=view)
    monkeypatch.setitem(augment_module._AT_ONCE, "cpu", 3 * GREY[0].numel())
    np.testing.assert_allclose(augment(smooth(), ranges, KEYS, view=view), alone, atol=2e-6)


@pytest.mark.parametrize("ranges", [EVERYTHING_WHOLE, only(noise=0.1), only(bias_field=0.3, flip=1.0)])
def test_planes_are_those_of_the_whole(ranges: Augmentation) -> None:
    images, planes = smooth(), [np.array([3, 11]), np.array([0, 16, 31]), np.array([27])]
    whole, got = augment(images, ranges, KEYS), augment(images, ranges, KEYS, planes=planes)
    wanted = torch.zeros(SIZE, dtype=torch.bool)
    for axis, index in enumerate(planes):
        wanted.index_fill_(axis, torch.from_numpy(index), True)
        of_both = [volume.index_select(1 + axis, torch.from_numpy(index)) for volume in (got, whole)]
        np.testing.assert_allclose(*of_both, atol=2e-6)
    assert not got[:, ~wanted].any()
    assert torch.equal(got[1:2], augment(images[1:2], ranges, KEYS[1:2], planes=planes))


def test_planes_alone_are_left_where_nothing_is_changed() -> None:
    images, planes = smooth(), [np.array([3]), np.array([0]), np.array([], int)]
    got = augment(images, only(), KEYS, planes=planes)
    assert torch.equal(got[:, 3], images[:, 3])
    assert torch.equal(got[:, :, 0], images[:, :, 0])
    assert not got[:, 4:, 1:].any()


def test_planes_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"planes are \[\[24\], \[\], \[\]\], expected whole numbers, indices"):
        augment(smooth(), EVERYTHING_WHOLE, KEYS, planes=[np.array([24]), np.array([], int), np.array([], int)])
    with pytest.raises(ValueError, match="planes go with whole volumes"):
        augment(smooth(), EVERYTHING, KEYS, planes=[np.array([1])] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("view", ["volume", "axial"])
def test_cpu_and_gpu_agree(view: str) -> None:
    images = smooth(size=(61, 67, 59))
    ranges = Augmentation(flip=0.5, noise=0.1, crop=(50, 51, 52) if view == "volume" else (50, 51))
    on_gpu = augment(images.cuda(), ranges, KEYS, view=view)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu() - augment(images, ranges, KEYS, view=view)).abs().max() < 1e-3
    assert (augment(images[1:2].cuda(), ranges, KEYS[1:2], view=view) - on_gpu[1:2]).abs().max() < 1e-5
    half = augment(images.cuda().to(torch.bfloat16), ranges, KEYS, view=view)
    assert half.dtype == torch.bfloat16
    assert (half.float() - on_gpu).abs().max() < 0.02


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"rotation_deg": -1.0}, "rotation_deg is -1.0, expected 0 <= rotation_deg <= 180; 0 switches it off"),
        ({"rotation_deg": 181}, "rotation_deg is 181, expected"),
        ({"translation_mm": math.inf}, "translation_mm is inf, expected 0 <= translation_mm < inf"),
        ({"scale": 1.0}, "scale is 1.0, expected 0 <= scale < 1"),
        ({"gain": 1}, "gain is 1, expected 0 <= gain < 1"),
        ({"gamma": math.nan}, "gamma is nan, expected 0 <= gamma < inf"),
        ({"noise": 1.5}, "noise is 1.5, expected 0 <= noise <= 1"),
        ({"bias_field": -0.1}, "bias_field is -0.1, expected"),
        ({"flip": 1.01}, "flip is 1.01, expected 0 <= flip <= 1"),
        ({"crop": (8, 0, 8)}, r"crop is \(8, 0, 8\), expected None, or positive integers \(z, y, x\) or \(height"),
        ({"crop": (8,)}, r"crop is \(8,\), expected"),
        ({"crop": 8}, "crop is 8, expected"),
        ({"crop": (8.0, 8.0)}, r"crop is \(8.0, 8.0\), expected"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(parts: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**parts)  # type: ignore[arg-type]


def test_limits_themselves_are_allowed() -> None:
    result = augment(torch.rand(4, *SIZE), Augmentation(180, 100, 0.99, 0.99, 2, 1, 2, 1, (1, 32, 28)), KEYS)
    assert result.isfinite().all()


@pytest.mark.parametrize(
    ("images", "keys", "view", "message"),
    [
        (GREY, KEYS, "triplanar", "view 'triplanar' is unknown, expected one of volume, axial, coronal"),
        (GREY[0], KEYS, "volume", r"shape \(24, 32, 28\), expected \(scan, z, y, x\) for view 'volume'"),
        (GREY[0], KEYS, "axial", r"expected \(scan, slice, height, width\) for view 'axial'"),
        (GREY[:, :0], KEYS, "axial", r"images have the shape \(4, 0, 32, 28\)"),
        (GREY.byte(), KEYS, "volume", r"images are torch.uint8, expected .*float\(\) / 255"),
        (GREY * 255, KEYS, "volume", "images range from 127.5 to 127.5, expected 0 to 1; divide grey levels by 255"),
        (GREY - 0.75, KEYS, "volume", "images range from -0.25"),
        (GREY * math.nan, KEYS, "volume", "images range from nan"),
        (GREY, KEYS[:3], "volume", r"keys are int64 \(3, 3\), expected integers \(scan, k\) for 4 scans"),
        (GREY, KEYS[:, 0], "volume", r"keys are int64 \(4,\), expected"),
        (GREY, KEYS[:, :0], "volume", r"keys are int64 \(4, 0\), expected"),
        (GREY, KEYS / 2, "volume", r"keys are float64 \(4, 3\), expected"),
        (GREY, KEYS - 1, "volume", "a key is -1, expected integers of 0 or more"),
        (GREY[:, :19], KEYS, "volume", r"crop \(20, 28, 24\) does not fit images of \(19, 32, 28\)"),
        (GREY, KEYS, "axial", r"in view 'axial'; expected 2 lengths, none larger"),
    ],
)
def test_wrong_input_is_refused(images: torch.Tensor, keys: np.ndarray, view: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(images, EVERYTHING, keys, view=view)


def test_examples_in_the_docstrings() -> None:
    # not `import loaders.augment`: the package may give the function that name
    failures, tests = doctest.testmod(sys.modules["loaders.augment"])
    assert tests > 0
    assert failures == 0
