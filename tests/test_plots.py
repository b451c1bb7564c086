"""Plots of a report: what they draw, whatever the results are."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from report_page import svg_text
from scipy import stats

from extract.probing.calibration import (
    calibration_slope,
    probability_calibration_plot,
    reliability,
    value_calibration_plot,
)
from extract.probing.curves import CurvePoint, LearningCurve
from extract.probing.plots import confusion_plot, forest_plot, roc_plot, scatter_plot
from extract.probing.plots_compared import curve_plot, grouped_forest_plot
from extract.probing.results import Interval, OutOfFold, TargetResult

NAN = float("nan")


def test_confusion_matrix_gives_rare_classes_their_due():
    # Both classes' probabilities follow their frequencies, so the most probable class is 0 throughout.
    truth = np.array([0, 0, 0, 1] * 10)
    informed = np.where(truth == 1, 0.35, 0.15)
    text = svg_text(confusion_plot(OutOfFold(truth, np.c_[1 - informed, informed], np.arange(40) // 8), ["a", "b"]))
    assert re.findall(r"\((\d+)\)", text) == ["30", "0", "0", "10"]


def test_extreme_predictions_are_drawn():
    n = 6000
    rng = np.random.default_rng(0)
    fold = np.arange(n) % 5
    true = rng.integers(40, 80, n).astype(float)
    many = scatter_plot(OutOfFold(true, true + rng.normal(size=n), fold), "age (years)")
    assert "scans" in svg_text(many)
    assert len(many) < 200_000
    constant = scatter_plot(OutOfFold(np.full(9, 2.0), np.full(9, 2.0), fold[:9]), "x" * 300)
    assert "…" in svg_text(constant)
    scatter_plot(OutOfFold(true[:3], np.full(3, np.nan), fold[:3]), "age")
    one_class = OutOfFold(np.zeros(10, int), np.full((10, 2), 0.5), fold[:10])
    assert "mean of folds" not in svg_text(roc_plot(one_class, ["female", "male"]))
    confusion_plot(OutOfFold(rng.integers(0, 30, 90), rng.dirichlet(np.ones(30), 90), fold[:90]), ["site"] * 30)
    lost = TargetResult("a" * 99, "binary", "ok", 9, 9, metric="auc", metrics={"auc": Interval(NAN, NAN, NAN, 0.5)})
    assert "not defined" in svg_text(forest_plot([lost], xlabel="AUC", span=(0.4, 1.0)))


def test_equal_results_give_equal_plots():
    result = TargetResult("sex", "binary", "ok", 9, 9, metric="auc", metrics={"auc": Interval(0.9, 0.8, 1.0, 0.5)})
    first, again = (forest_plot([result], xlabel="AUC", span=(0.4, 1.0)) for _ in range(2))
    assert first == again
    assert json.dumps(svg_text(first)).isascii()


def test_each_class_has_a_curve_against_the_rest():
    rng = np.random.default_rng(0)
    truth = np.arange(90) % 3
    text = svg_text(roc_plot(OutOfFold(truth, rng.dirichlet([1, 1, 1], 90), np.arange(90) // 18), ["a", "b", "c"]))
    assert "each class against the rest" in text
    assert "chance a b c" in text


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_calibrated_probabilities_lie_on_the_line():
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=20_000)
    truth = (rng.uniform(size=20_000) < probability).astype(float)
    found = reliability(probability, truth, np.arange(20_000) % 5, shares=True)
    assert len(found.count) == 10
    assert found.count.sum() == 20_000
    assert np.ptp(found.count) <= 5  # of equally many: one in each fold at most
    assert np.sum((found.low < found.predicted) & (found.predicted < found.high)) >= 8  # of 10, at 95 %
    assert calibration_slope(probability, truth, np.arange(20_000) % 5) == pytest.approx(1, abs=0.03)
    sharper = np.clip(0.5 + 2 * (probability - 0.5), 0, 1)
    off = reliability(sharper, truth, np.arange(20_000) % 5, shares=True)
    assert off.predicted[0] == 0
    assert off.low[0] > 0.05  # predicted never, and it happens
    assert calibration_slope(sharper, truth, np.arange(20_000) % 5) < 0.8


def test_intervals_are_wilsons_and_students():
    truth = np.repeat([0.0, 1.0], [9, 3])
    found = reliability(np.full(12, 0.3), truth, np.zeros(12), shares=True)
    expected = stats.binomtest(3, 12).proportion_ci(method="wilson")
    assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high))
    values = np.random.default_rng(0).normal(size=12)
    found = reliability(np.zeros(12), values, np.zeros(12), shares=False)
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))


def test_folds_that_differ_by_a_constant_are_no_miscalibration():
    rng = np.random.default_rng(0)
    truth, fold = rng.normal(size=500), np.arange(500) % 5
    predicted = truth + 10.0 * fold
    assert calibration_slope(predicted, truth, fold) == pytest.approx(1)
    found = reliability(predicted, truth, fold, shares=False)
    assert np.all(np.diff(found.observed) > 0)  # by rank within folds; over all folds there would be no order
    assert np.isnan(calibration_slope(np.ones(10), np.arange(10.0), np.zeros(10)))


def test_calibration_of_extreme_predictions_is_drawn():
    rng = np.random.default_rng(0)
    fold = np.arange(60) % 5
    two = OutOfFold(rng.integers(0, 2, 60), np.full((60, 2), 0.5), fold)
    assert "bins of 60" in svg_text(probability_calibration_plot(two, ["female", "male"]))
    many = OutOfFold(rng.integers(0, 9, 60), rng.dirichlet(np.ones(9), 60), fold)
    assert "class 8" in svg_text(probability_calibration_plot(many, [f"class {k}" for k in range(9)]))
    constant = OutOfFold(np.full(60, 2.0), np.full(60, 2.0), fold)
    assert "slope" not in svg_text(value_calibration_plot(constant, "age"))
    value_calibration_plot(OutOfFold(np.ones(3), np.full(3, NAN), fold[:3]), "age")


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_series_are_side_by_side_whatever_they_lack():
    found, lost = Interval(0.8, 0.7, 0.9, 0.5), Interval(NAN, NAN, NAN, 0.5)
    series = {f"model {k}": {"sex": found, "x" * 90: lost} for k in range(8)} | {"confounds alone": {"smoking": found}}
    text = svg_text(grouped_forest_plot(series, xlabel="AUC", span=(0.4, 1.0)))
    for words in ("model 0", "model 7", "confounds alone", "sex", "smoking", "…", "AUC"):
        assert words in text


def test_curves_are_drawn_whatever_they_lack():
    one = LearningCurve("age", "r", [CurvePoint(160, Interval(0.5, 0.4, 0.6, 0.0))])
    assert "160" in svg_text(curve_plot({"emb": one}, ylabel="r"))
    points = [CurvePoint(n, Interval(0.5, 0.4, 0.6, 0.0)) for n in (50, 100, 200, 400, 24_000, 25_000)]
    text = svg_text(curve_plot({"a": LearningCurve("age", "r", points), "b": one}, ylabel="r"))
    assert "25,000" in text
    assert "24,000" not in text  # the labels would touch
    lost = LearningCurve("age", "r", [CurvePoint(50, Interval(NAN, NAN, NAN, 0.0))])
    curve_plot({"a": lost}, ylabel="r")
