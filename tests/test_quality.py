"""Quality of volumes: the right numbers, noise of known size, and which scans stand out."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from reported_store import QUALITY, numbers

from ingest.outliers import compare_scans
from ingest.quality import ScanQuality, measure_volume, measures_of, otsu_level


def reference(volume: np.ndarray, threshold: int) -> ScanQuality:
    """Measure a volume of 1 mm voxels in plain numpy."""
    inside = volume > threshold
    grey = np.where(inside, volume, 0).astype(np.float64)
    z, y, x = (
        (grey * np.arange(n).reshape([-1 if i == axis else 1 for i in range(3)])).sum() / grey.sum() - (n - 1) / 2
        for axis, n in enumerate(volume.shape)
    )
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = (sliding_window_view(volume.astype(np.int64), (1, 3, 3))[:, :, :, 0] * kernel).sum(axis=(-2, -1))
    whole = sliding_window_view(inside, (1, 3, 3)).all(axis=(-3, -2, -1))
    noise = np.sqrt(np.pi / 2) / 6 * np.abs(response[whole]).mean()
    return ScanQuality(volume[inside].mean(), inside.sum() / 1000, x, y, z, noise)


@pytest.mark.parametrize("shape", [(12, 30, 26), (40, 17, 33)])
@pytest.mark.parametrize("zeros", [0.0, 0.05])
def test_numbers_are_those_of_numpy(shape, zeros):
    rng = np.random.default_rng(shape[0])
    volume = rng.integers(1, 256, shape).astype(np.uint8)
    volume[rng.random(shape) < zeros] = 0
    volume[:3] = 0
    found, expected = measure_volume(volume, 1.0), reference(volume, 0)
    for name in QUALITY:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
    doubled = measure_volume(volume, 2.0)
    assert doubled.volume == pytest.approx(8 * found.volume)
    assert doubled.x == pytest.approx(2 * found.x)


def test_numbers_of_whole_heads_leave_the_air_out():
    rng = np.random.default_rng(0)
    volume = rng.integers(1, 12, (20, 40, 40)).astype(np.uint8)  # air is not zero
    volume[4:16, 8:32, 10:30] = rng.integers(90, 200, (12, 24, 20))
    level = otsu_level(np.bincount(volume.ravel(), minlength=256))
    assert 11 <= level < 90
    found = measure_volume(volume, 1.0, whole_heads=True)
    expected = reference(volume, level)
    assert found.volume == expected.volume == 12 * 24 * 20 / 1000
    assert found.noise == pytest.approx(expected.noise, rel=1e-12)


@pytest.mark.parametrize("sd", [2.0, 6.0, 15.0])
def test_noise_of_known_size_is_found_whatever_the_slope_and_the_mask(sd):
    rng = np.random.default_rng(1)
    volume = np.linspace(90, 150, 80) + rng.normal(0, sd, (30, 90, 80))
    volume[:, :20] = 0  # the edge of a mask is no noise
    found = measure_volume(np.clip(np.rint(volume), 0, 255).astype(np.uint8), 1.0)
    assert found.noise == pytest.approx(np.sqrt(sd**2 + 1 / 12), rel=0.02)  # rounding adds 1/12


def test_nothing_inside_gives_no_numbers():
    empty = measure_volume(np.zeros((8, 8, 8), np.uint8), 1.0)
    assert all(np.isnan(getattr(empty, name)) for name in QUALITY)
    dot = np.zeros((8, 8, 8), np.uint8)
    dot[3, 3, 3] = 9
    found = measure_volume(dot, 1.0, whole_heads=False)
    assert (found.intensity, found.volume, found.x) == (9, 0.001, -0.5)
    assert np.isnan(found.noise)
    assert otsu_level(np.zeros(256, np.int64)) == 0


def test_scores_are_robust_sds():
    table = numbers(2000)
    table.loc[7, "noise"] = 9.0
    table.loc[8, "z"] += 40.0
    table.loc[9] = np.nan
    cohort = compare_scans(table, measures_of(whole_heads=False))
    noise = table["noise"]
    mad = (noise - noise.median()).abs().median()
    assert cohort.deviations["noise"][7] == pytest.approx((9.0 - noise.median()) / (1.4826 * mad))
    assert cohort.deviations["intensity"].std() == pytest.approx(1, abs=0.07)  # of normal numbers robust SDs are SDs
    assert cohort.outliers[:2].tolist() == [8, 7]
    assert np.isnan(cohort.score[9])
    assert cohort.explain(9) == cohort.explain(np.argmin(cohort.score)) == ""
    assert re.fullmatch(
        r"noise \d+\.\d robust SDs above the median \(9\.00 against 5\.0\d grey levels\)", cohort.explain(7)
    )
    assert "centre of mass" in cohort.explain(8)
    assert re.search(r"\(\d+\.\d mm off, usual 1\.\d: (39|40|41)\.\d up", cohort.explain(8))
    assert (cohort.deviations["centre"].dropna() >= 0).all()  # nobody is too near


def test_equal_scans_are_no_outliers_and_one_that_differs_is():
    table = pd.DataFrame(dict.fromkeys(QUALITY, [5.0] * 9))
    measures = measures_of(whole_heads=False)
    assert compare_scans(table, measures).score.tolist() == [0.0] * 9  # the MAD is 0
    table.loc[3, "volume"] += 1  # a millilitre does not matter
    assert len(compare_scans(table, measures).outliers) == 0
    table.loc[3, "volume"] += 30
    cohort = compare_scans(table, measures)
    assert cohort.outliers.tolist() == [3]
    assert cohort.standing_out(3)[0].name == "volume"
    assert len(compare_scans(table[:0], measures).score) == 0
