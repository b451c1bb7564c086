"""Augmentation: geometry against scipy, seeds, noise, and what stays as it was."""

from __future__ import annotations

import dataclasses
import doctest
import math
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

import loaders.augment as augment_module
import loaders.noise as noise_module
from loaders.augment import augment
from loaders.augmentation import Augmentation, Draw, draw
from loaders.noise import add_noise, hash_counters

SIZE = (24, 32, 28)
OFF = Augmentation(rotation_deg=0, translation_mm=0, scale=0, gain=0, gamma=0, noise=0, bias_field=0)
GEOMETRY = dataclasses.replace(OFF, rotation_deg=25, translation_mm=4, scale=0.2)
GREY = torch.full((4, *SIZE), 0.5)
EVERYTHING = Augmentation(flip=0.5, crop=(20, 28, 24))
EVERYTHING_WHOLE = dataclasses.replace(EVERYTHING, crop=None)
KEYS = np.array([[1, 0, 17], [1, 0, 4], [1, 1, 17], [2, 0, 17]])
PLANES = {"axial": 1, "coronal": 2, "sagittal": 3}  # the axis of (scan, z, y, x) across each


def only(**parts: float) -> Augmentation:
    """Return an augmentation of these parts."""
    return dataclasses.replace(OFF, **parts)


def smooth(scans: int = 4, size: tuple[int, ...] = SIZE, *, seed: int = 0) -> torch.Tensor:
    """Return smooth random images from 0 to 1."""
    noise = np.random.default_rng(seed).normal(size=(scans, *size))
    images = np.stack([ndimage.gaussian_filter(image, 1.5) for image in noise])
    low, high = images.min(), images.max()
    return torch.from_numpy((images - low) / (high - low)).to(torch.float32)


def ball(size: tuple[int, int, int], *, sd: float) -> torch.Tensor:
    """Return one image with a round blob in its centre."""
    distances = np.indices(size) - (np.array(size)[:, None, None, None] - 1) / 2
    return torch.from_numpy(np.exp(-(distances**2).sum(axis=0) / (2 * sd**2))[None]).to(torch.float32)


def forward_matrix(drawn: Draw) -> np.ndarray:
    """Return "turn about x, then y, then z, and grow" on (x, y, z), written out."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(drawn.angles), np.sin(drawn.angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return drawn.scale * about_z @ about_y @ about_x


def moved_by_scipy(volume: np.ndarray, drawn: Draw) -> np.ndarray:
    """Turn, grow and shift a volume (z, y, x) around its centre."""
    backward = np.linalg.inv(forward_matrix(drawn))[::-1, ::-1]  # on (z, y, x)
    centre = (np.array(volume.shape) - 1) / 2
    offset = centre - backward @ (centre + drawn.shift[::-1])
    return ndimage.affine_transform(volume.astype(float), backward, offset, order=1, mode="grid-constant")


def slices(volumes: torch.Tensor, view: str, index: list[int]) -> torch.Tensor:
    """Cut volumes as `extract.views.slices_of` does: upright, patient left on the left."""
    return volumes.index_select(PLANES[view], torch.tensor(index)).movedim(PLANES[view], 1).flip(2)


def test_off_is_the_images_themselves() -> None:
    images = torch.rand(4, *SIZE)
    assert augment(images, OFF, KEYS) is images


@pytest.mark.parametrize("size", [SIZE, (9, 10, 7), (1, 6, 5)])
def test_geometry_is_scipys(size: tuple[int, ...]) -> None:
    images = smooth(size=size)
    ours = augment(images, GEOMETRY, KEYS).numpy()
    for image, key, result in zip(images.numpy(), KEYS, ours, strict=True):
        np.testing.assert_allclose(result, moved_by_scipy(image, draw(GEOMETRY, key)), atol=1e-4)


@pytest.mark.parametrize("part", ["rotation_deg", "translation_mm", "scale"])
def test_each_part_of_the_geometry_alone_is_scipys(part: str) -> None:
    images, wanted = smooth(1), only(**{part: getattr(GEOMETRY, part)})
    reference = moved_by_scipy(images[0].numpy(), draw(wanted, KEYS[0]))
    np.testing.assert_allclose(augment(images, wanted, KEYS[:1])[0].numpy(), reference, atol=1e-4)
    assert np.abs(reference - images[0].numpy()).max() > 0.1


@pytest.mark.parametrize("view", PLANES)
def test_slices_move_as_the_head_does_in_their_plane(view: str) -> None:
    across = {"axial": 2, "coronal": 1, "sagittal": 0}[view]
    volumes, index = smooth(), [3, 10, 20]
    ours = augment(slices(volumes, view, index), GEOMETRY, KEYS, view=view)
    for i, key in enumerate(KEYS):
        drawn = draw(GEOMETRY, key)
        in_plane = dataclasses.replace(
            drawn,
            angles=np.where(np.arange(3) == across, drawn.angles, 0),
            shift=np.where(np.arange(3) == across, 0, drawn.shift),
            scale=1.0,
        )
        grown = forward_matrix(in_plane) * drawn.scale
        grown[across, across] = 1
        backward = np.linalg.inv(grown)[::-1, ::-1]
        centre = (np.array(SIZE) - 1) / 2
        offset = centre - backward @ (centre + in_plane.shift[::-1])
        moved = ndimage.affine_transform(volumes[i].double().numpy(), backward, offset, order=1, mode="grid-constant")
        reference = slices(torch.from_numpy(moved)[None], view, index)[0]
        np.testing.assert_allclose(ours[i].numpy(), reference.numpy(), atol=1e-4)


def test_directions_are_as_documented() -> None:
    volume = torch.zeros(1, 29, 29, 33)
    volume[0, 14, 14, 24] = 1  # right of the centre
    centre = np.array([14, 14, 16])
    volume = torch.from_numpy(ndimage.gaussian_filter(volume.numpy(), (0, 2, 2, 2)))
    for key in KEYS:
        shift, turn, grow = only(translation_mm=4), only(rotation_deg=20), only(scale=0.3)
        before = np.array(ndimage.center_of_mass(volume[0].numpy()))
        after = [
            np.array(ndimage.center_of_mass(augment(volume, part, key[None])[0].numpy()))
            for part in (shift, turn, grow)
        ]
        np.testing.assert_allclose((after[0] - before)[::-1], draw(shift, key).shift, atol=0.01)
        x_axis = forward_matrix(draw(turn, key))[:, 0]
        np.testing.assert_allclose((after[1] - centre)[::-1], 8 * x_axis, atol=0.05)
        assert x_axis[1] * draw(turn, key).angles[2] > 0  # about z: x towards y, right towards the front
        np.testing.assert_allclose((after[2] - centre)[::-1], [8 * draw(grow, key).scale, 0, 0], atol=0.05)


def test_rotation_keeps_the_shape_of_a_ball_in_a_grid_that_is_no_cube() -> None:
    image = ball((40, 60, 30), sd=4)
    turned = augment(image, only(rotation_deg=90), KEYS[:1])
    assert np.abs(draw(only(rotation_deg=90), KEYS[0]).angles).max() > 0.5
    assert (turned - image).abs().max() < 0.03


def test_sums_are_kept_or_grow_with_the_head() -> None:
    image = ball((40, 44, 42), sd=4)
    for part in (only(rotation_deg=20), only(translation_mm=5), only(scale=0.2)):
        for key in KEYS:
            ratio = augment(image, part, key[None]).sum() / image.sum()
            assert ratio == pytest.approx(draw(part, key).scale ** 3, rel=0.01)


def test_bias_field_is_smooth_and_has_its_peak_and_a_mean_of_zero() -> None:
    part = only(bias_field=0.4)
    logs = (augment(torch.full((4, *SIZE), 0.5), part, KEYS) / 0.5).log()
    for log, key in zip(logs, KEYS, strict=True):
        peak = draw(part, key).bias_peak
        assert log.abs().max() == pytest.approx(peak, rel=0.1)
        assert abs(log.mean()) < 1e-5
        assert all(log.diff(dim=axis).abs().max() < 0.3 * peak for axis in range(3))


def test_bias_field_is_the_same_under_autocast() -> None:
    images = torch.rand(1, *SIZE)
    plain = augment(images, only(bias_field=0.4), KEYS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, only(bias_field=0.4), KEYS[:1]), plain)


def test_gain_and_gamma_are_what_was_drawn_and_background_stays_black() -> None:
    images = torch.rand(4, *SIZE) * 0.8
    images[:, :5] = 0
    part = only(gain=0.2, gamma=0.5, bias_field=0.2)
    for got, image, key in zip(augment(images, only(gain=0.2, gamma=0.5), KEYS), images, KEYS, strict=True):
        drawn = draw(part, key)
        np.testing.assert_allclose(got, (drawn.gain * image**drawn.exponent).clamp(0, 1), atol=1e-6)
    moved = augment(images, dataclasses.replace(part, rotation_deg=10), KEYS)
    assert (augment(images, part, KEYS)[:, :5] == 0).all()
    assert moved.min() == 0
    assert moved.max() <= 1


def test_hash_is_lowbias32_with_keys() -> None:
    counters = np.array([0, 1, 2, 1000, 2**31 - 1], dtype=np.uint32)
    keys = np.random.default_rng(0).integers(2**32, size=(3, 2), dtype=np.uint32)
    bits = counters ^ keys[:, :1]
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits ^= keys[:, 1:]
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    ours = hash_counters(torch.from_numpy(counters.view(np.int32)), torch.from_numpy(keys.view(np.int32)))
    assert np.array_equal(ours.numpy().view(np.uint32), bits)


def noise_of(key: list[int], size: tuple[int, ...] = (37, 41, 39), view: int = 0) -> np.ndarray:
    """Return noise with a standard deviation of 1."""
    image = torch.zeros((1, *size))
    add_noise(image, torch.ones(1), torch.from_numpy(draw(OFF, np.array(key)).noise_keys[[view]].view(np.int32)))
    return image[0].double().numpy()


def test_noise_is_normal_and_white() -> None:
    noise = noise_of([1, 2, 3], (61, 101, 81))  # an odd number of voxels, in several blocks
    error = 1 / math.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.std() - 1) < 4 * error
    assert abs((noise**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96) * error
    assert 4.5 < np.abs(noise).max() < 6
    centred = noise.ravel()
    half = (noise.size + 1) // 2
    for lag in (1, 2, 3, 81, 81 * 101, 2**17, half, half - 1):  # neighbours along each axis, blocks, partners
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 4.5 / math.sqrt(noise.size - lag)
        squares = centred**2 - 1
        assert abs((squares[lag:] * squares[:-lag]).mean()) < 4.5 * 2 / math.sqrt(noise.size - lag)


def test_noise_does_not_depend_on_the_blocks_it_is_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise_of([1, 2, 3])
    monkeypatch.setitem(noise_module._BLOCK, "cpu", 1001)
    np.testing.assert_allclose(noise_of([1, 2, 3]), whole, atol=1e-6)


def test_noise_differs_between_scans_epochs_seeds_and_views() -> None:
    first = noise_of([1, 2, 3])
    others = [noise_of(key) for key in ([1, 2, 4], [1, 3, 3], [2, 2, 3])] + [noise_of([1, 2, 3], view=1)]
    for other in others:
        assert abs((first * other).mean()) < 4.5 / math.sqrt(first.size)
        # nor the same numbers at other places
        assert len(np.intersect1d(np.unique(first), np.unique(other))) < 0.2 * first.size


def test_noise_has_the_drawn_sd_and_leaves_the_mean() -> None:
    images = torch.full((4, 40, 30, 30), 0.5)
    images[:, :20] = 0
    for got, key in zip(augment(images, only(noise=0.1), KEYS), KEYS, strict=True):
        sd = draw(only(noise=0.1), key).noise_sd
        assert got[20:].std().item() == pytest.approx(sd, rel=0.02)
        assert got[20:].mean().item() == pytest.approx(0.5, abs=5 * sd / math.sqrt(20 * 30 * 30))
        assert got[:20].min() == 0  # the positive half in the background
        assert got[:20].mean().item() == pytest.approx(sd / math.sqrt(2 * math.pi), rel=0.05)


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


def test_flips_swap_left_and_right_where_there_are_any() -> None:
    images = torch.rand(4, *SIZE)
    keys = np.arange(200)[:, None]
    assert torch.equal(augment(images, only(flip=1), KEYS), images.flip(3))
    assert torch.equal(augment(images, only(flip=1), KEYS, view="axial"), images.flip(3))
    assert torch.equal(augment(images, only(flip=1), KEYS, view="coronal"), images.flip(3))
    assert augment(images, only(flip=1), KEYS, view="sagittal") is images
    some = augment(torch.arange(2.0).expand(200, 1, 1, 2), only(flip=0.3), keys)
    assert 40 <= (some[..., 0] == 1).sum() <= 80


@pytest.mark.parametrize("view", ["volume", *PLANES])
def test_a_crop_is_a_window_of_the_whole(view: str) -> None:
    images = torch.rand(4, *SIZE)
    size, crop = (SIZE, (10, 30, 28)) if view == "volume" else (SIZE[1:], (30, 13))
    whole = augment(images, Augmentation(), KEYS, view=view)
    cropped = augment(images, Augmentation(crop=crop), KEYS, view=view)
    places = set()
    for i in range(4):
        found = [
            starts
            for starts in np.ndindex(*(n - c + 1 for n, c in zip(size, crop, strict=True)))
            if torch.equal(whole[(i, ..., *(slice(s, s + c) for s, c in zip(starts, crop, strict=True)))], cropped[i])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 1


def test_crops_reach_every_place_alike() -> None:
    images = torch.arange(5.0).div(4).expand(1000, 1, 1, 5)
    starts = augment(images, only(crop=(1, 1, 3)), np.arange(1000)[:, None])[..., 0].flatten() * 4
    assert (np.bincount(starts.int().numpy(), minlength=3) > 280).all()


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


def test_planes_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"planes are \[\[24\], \[\], \[\]\], expected indices"):
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
