"""Histograms as the rectangles of an SVG, so that a page can draw them without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Of the drawing, in SVG units: size, margins.
WIDTH, HEIGHT = 320, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 10, 310, 10, 104

_BINS = 40
_TICKS = 4
_SHOWN_SPREADS = 8  # robust SDs from the median; what is beyond is counted, or one stray scan would squeeze all others


@dataclass(frozen=True)
class Bar:
    """One rectangle; `kind` is its class, `label` what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str


@dataclass(frozen=True)
class Histogram:
    """A drawing.

    Attributes
    ----------
    ticks
        (x, text) along the axis.
    lines
        (x, class) of vertical lines.
    beyond
        How many values lie outside the axis, in words; empty if none.
    tallest
        Scans in the tallest bar.
    """

    title: str
    unit: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    lines: list[tuple[float, str]]
    beyond: str
    tallest: int

    @property
    def baseline(self) -> int:
        """Where the bars stand."""
        return _BOTTOM


def draw_histogram(
    title: str,
    unit: str,
    note: str,
    series: Sequence[tuple[str, np.ndarray]],
    *,
    lines: Sequence[tuple[float, str]] = (),
    least_reach: float = 0.0,
) -> Histogram | None:
    """Stack the histograms of several groups of scans; None if there are no values.

    Parameters
    ----------
    series
        (class, float64 values) from the bottom up; NaN is left out.
    lines
        (value, class) of lines to draw.
    least_reach
        How far from the median the axis may go at least.
    """
    series = [(kind, values[np.isfinite(values)]) for kind, values in series]
    everything = np.concatenate([values for _, values in series])
    if not len(everything):
        return None
    low, high = _ends(everything, least_reach)
    edges = np.linspace(low, high, _BINS + 1)
    counts = [np.histogram(values, edges)[0] for _, values in series]
    tallest = int(max(1, np.sum(counts, axis=0).max()))
    scale = (_BOTTOM - _TOP) / tallest
    width = (_RIGHT - _LEFT) / _BINS
    step = _nice_step((high - low) / _TICKS)
    bars = []
    for number in range(_BINS):
        top = float(_BOTTOM)
        for (kind, _), count in zip(series, counts, strict=True):
            if count[number]:
                height = count[number] * scale
                top -= height
                span = f"{_text(edges[number], step / 10)} to {_text(edges[number + 1], step / 10)} {unit}"
                label = f"{span}: {count[number]:,} {kind}"
                x = _LEFT + number * width
                bars.append(Bar(round(x, 2), round(top, 2), round(width - 0.6, 2), round(height, 2), kind, label))

    def place(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT), 2)

    first = math.ceil(low / step)
    ticks = [(place(n * step), _text(n * step, step)) for n in range(first, math.floor(high / step) + 1)]
    shown = [(place(value), kind) for value, kind in lines if low <= value <= high]
    below, above = int((everything < low).sum()), int((everything > high).sum())
    parts = [f"{n:,} {side} the axis" for n, side in ((below, "below"), (above, "above")) if n]
    return Histogram(title, unit, note, bars, ticks, shown, ", ".join(parts), tallest)


def _ends(values: np.ndarray, least_reach: float) -> tuple[float, float]:
    """Return the ends of the axis: the data's, but not farther from the median than some robust SDs."""
    median = float(np.median(values))
    reach = max(least_reach, _SHOWN_SPREADS * 1.4826 * float(np.median(np.abs(values - median))))
    low, high = float(values.min()), float(values.max())
    if reach > 0:
        low, high = max(low, median - reach), min(high, median + reach)
    if high - low < 1e-9 * max(1.0, abs(median)):
        margin = max(0.5, abs(median) * 0.01)
        low, high = median - margin, median + margin
    return low, high


def _nice_step(raw: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is at least `raw`."""
    power = 10 ** math.floor(math.log10(raw))
    return next(float(factor * power) for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def _text(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step)))
    return f"{0.0 if abs(value) < step / 2 else value:,.{decimals}f}"  # no minus zero
