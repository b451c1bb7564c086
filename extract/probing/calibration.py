"""Calibration: whether what a probe predicts is, on average, what comes true. Drawn as SVG files."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from extract.probing.plots import BLUE, COLOURS, GREY, PALE, shorten, styled, to_svg
from extract.probing.results import OutOfFold

#: Scans of a bin, at least, and bins at most.
_LEAST, _MOST_BINS = 12, 10

_HARDLY = 0.05  # of the spread of the truth


@dataclass(frozen=True)
class Reliability:
    """Means of bins of predictions against what came true.

    Attributes
    ----------
    predicted, observed
        (bin,) means over the scans of each bin.
    low, high
        (bin,) 95 % interval of `observed`.
    count
        (bin,) scans.
    """

    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


def reliability(predicted: np.ndarray, truth: np.ndarray, fold: np.ndarray, *, shares: bool) -> Reliability:
    """Bin predictions by their rank within each fold, into bins of equally many.

    Folds have models of their own; ranked together, differences between folds would look like miscalibration.

    Parameters
    ----------
    predicted
        (scan,) probabilities of a class, or values.
    truth
        (scan,) 0 or 1, or values in the same units.
    fold
        (scan,) in which fold it was tested.
    shares
        Whether `truth` is 0 or 1: intervals are then Wilson's (1927, JASA 22:209), else t intervals.
    """
    bins = int(np.clip(len(truth) // _LEAST, 1, _MOST_BINS))
    number = np.empty(len(truth), dtype=np.int64)
    for one in np.unique(fold):
        of_fold = np.flatnonzero(fold == one)
        ranks = stats.rankdata(predicted[of_fold], method="average") - 0.5  # scans predicted alike share a bin
        number[of_fold] = np.minimum(ranks * bins // len(of_fold), bins - 1)
    used, number, count = np.unique(number, return_inverse=True, return_counts=True)
    mean = np.bincount(number, weights=predicted) / count
    observed = np.bincount(number, weights=truth.astype(np.float64)) / count
    if shares:
        z = float(stats.norm.ppf(0.975))
        middle = (observed + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z * np.sqrt(observed * (1 - observed) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    else:
        middle = observed
        squares = np.bincount(number, weights=(truth - observed[number]) ** 2)
        freedom = np.maximum(count - 1, 1)
        half = stats.t.ppf(0.975, freedom) * np.sqrt(squares / freedom / count)
    assert len(used) == len(count)
    return Reliability(mean, observed, middle - half, middle + half, count)


def calibration_slope(predicted: np.ndarray, truth: np.ndarray, fold: np.ndarray) -> float:
    """Slope of truth on prediction within folds: 1 if spread is right, below 1 if predictions are too extreme.

    Both are centred in each fold. NaN if predictions hardly vary, as where nothing was found: a slope would be noise.
    """
    a, b = predicted.astype(np.float64), truth.astype(np.float64)
    for one in np.unique(fold):
        of_fold = fold == one
        a = np.where(of_fold, a - a[of_fold].mean(), a)
        b = np.where(of_fold, b - b[of_fold].mean(), b)
    spread = float(a @ a)
    return float(a @ b) / spread if spread > (_HARDLY**2) * float(b @ b) else float("nan")


def probability_calibration_plot(found: OutOfFold, labels: list[str]) -> bytes:
    """Draw how often a class came true against its predicted probability, above the number of scans by probability.

    Of two classes the second is drawn, with intervals; of more, each has a line.

    Returns
    -------
    bytes
        An SVG file.
    """
    two = len(labels) == 2
    with styled():
        figure = Figure(figsize=(4.2, 5.0), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
        for code in [1] if two else range(len(labels)):
            of_class = reliability(found.predicted[:, code], found.truth == code, found.fold, shares=True)
            colour = COLOURS[0 if two else code % len(COLOURS)]
            name = f"{shorten(labels[code], 18)}, bins of {_counts(of_class)}"
            line = "-" if code < len(COLOURS) else "--"
            _draw(axes, of_class, colour, name, line=line, bars=len(labels) <= 4)
            below.hist(
                found.predicted[:, code], bins=list(np.linspace(0, 1, 21)), histtype="stepfilled" if two else "step",
                color=PALE if two else colour,
            )  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that is of the class")
        figure.legend(loc="outside upper left", fontsize=8 if len(labels) <= 6 else 6)  # not over intervals
        below.set(xlabel=f"predicted probability{f' ({shorten(labels[1])})' if two else ''}", ylabel="scans")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return to_svg(figure)


def value_calibration_plot(found: OutOfFold, quantity: str) -> bytes:
    """Draw mean true values against mean predictions in bins of equally many scans, above the number by prediction.

    Parameters
    ----------
    quantity
        Name and unit for the axes.

    Returns
    -------
    bytes
        An SVG file.
    """
    shown = np.isfinite(found.truth) & np.isfinite(found.predicted)
    true, predicted, fold = found.truth[shown], found.predicted[shown], found.fold[shown]
    title = textwrap.fill(shorten(quantity, 60), 32)
    with styled():
        figure = Figure(figsize=(4.2, 5.0), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        if len(true):
            binned = reliability(predicted, true, fold, shares=False)
            ends = np.array([binned.predicted, binned.observed, binned.low, binned.high])
            low, high = float(ends.min()), float(ends.max())
            margin = 0.06 * (high - low) or 0.5
            low, high = low - margin, high + margin
            axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
            slope = calibration_slope(predicted, true, fold)
            words = f", slope {slope:.2f}" if np.isfinite(slope) else ", which hardly vary"
            _draw(axes, binned, BLUE, f"bins of {_counts(binned)} scans{words}", line="-", bars=True)
            axes.set(xlim=(low, high), ylim=(low, high))
            below.hist(np.clip(predicted, low, high), bins=list(np.linspace(low, high, 25)), color=PALE)
            figure.legend(loc="outside upper left", fontsize=8)
        axes.set_ylabel(f"mean true {title}")
        below.set(xlabel=f"predicted {title}", ylabel="scans")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return to_svg(figure)


def _draw(axes: Axes, binned: Reliability, colour: str, label: str, *, line: str, bars: bool) -> None:
    if bars:
        error = np.clip([binned.observed - binned.low, binned.high - binned.observed], 0, None)
        axes.errorbar(binned.predicted, binned.observed, error, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
    axes.plot(binned.predicted, binned.observed, marker="o", markersize=4.5, color=colour, linestyle=line, label=label)


def _counts(binned: Reliability) -> str:
    low, high = int(binned.count.min()), int(binned.count.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
