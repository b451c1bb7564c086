"""Grey levels in augmentation: bias fields, gain and gamma, and noise that is normal, white and of the drawn size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from augmenting import KEYS, OFF, SIZE, only

import loaders.noise as noise_module
from loaders.augment import augment
from loaders.augmentation import draw
from loaders.noise import add_noise, hash_counters


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
