"""The chart of a curve: scores of the methods by people trained on, and what transfer is ahead by."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from extract.probing.numbers import SHORT_NAMES
from extract.probing.plots import BLUE, COLOURS, GREY, ORANGE, shorten, styled, to_svg
from extract.probing.plots_compared import labels_apart
from finetune.curves.results import TargetCurve

#: Colour, marker and name of each method; shapes too, for colours alone do not survive a grey print.
STYLES = {
    "transfer": (BLUE, "o", "transfer (fine-tuned)"),
    "scratch": (ORANGE, "s", "scratch"),
    "probe": (COLOURS[2], "^", "frozen + linear probe"),
}

_OTHERS = {"scratch": "scratch", "probe": "frozen + probe"}

_ASIDE = 0.05  # of the logarithm between neighbours: points at one size do not hide each other
_BESIDE = 0.975  # of its mean, each seed
_PNG_DPI = 160


def curve_svg(curve: TargetCurve) -> bytes:
    """Draw the curve of one target as an SVG file."""
    with styled():
        return to_svg(_draw([curve]))


def curve_png(curves: Sequence[TargetCurve], title: str) -> bytes:
    """Draw the curves of all targets, one below the other, as a PNG file."""
    with styled():
        figure = _draw(curves, title)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_PNG_DPI, metadata={"Software": None})
        return buffer.getvalue()


def _draw(curves: Sequence[TargetCurve], title: str = "") -> Figure:
    figure = Figure(figsize=(9.2, 3.9 * len(curves) + (0.3 if title else 0)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10, color="#b91c1c" if "SIMULATED" in title else "#1f2937")
    rows = figure.subfigures(len(curves), 1, squeeze=False)[:, 0]
    for row, curve in zip(rows, curves, strict=True):
        _draw_target(row, curve, named=len(curves) > 1 or bool(title))
    return figure


def _draw_target(figure: SubFigure, curve: TargetCurve, *, named: bool) -> None:
    compared = bool(curve.gaps)
    axes = figure.subplots(1, 2 if compared else 1, width_ratios=[1.35, 1] if compared else None, squeeze=False)[0]
    _draw_scores(axes[0], curve)
    if named:
        axes[0].set_title(shorten(curve.name, 50), loc="left", fontsize=10, fontweight="bold")
    if compared:
        _draw_gaps(axes[1], curve)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=5, handlelength=1.8)


def _draw_scores(axes: Axes, curve: TargetCurve) -> None:
    metric = SHORT_NAMES.get(curve.metric, curve.metric)
    axes.axhline(curve.chance, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    if np.isfinite(curve.smallest):
        dots = (0, (1, 1.5))
        axes.axhline(curve.smallest, color=GREY, linewidth=1.2, linestyle=dots, label="80 % power against chance")
    methods = list(dict.fromkeys(point.method for point in curve.points))
    for number, method in enumerate(methods):
        colour, marker, name = STYLES[method]
        points = [point for point in curve.points if point.method == method]
        aside = _aside(number, len(methods))
        for point in points:  # each seed, pale
            places = [point.size * aside * _BESIDE] * len(point.scores)
            axes.plot(places, point.scores, marker, color=colour, markersize=3, alpha=0.4, markeredgewidth=0)
        people = np.array([point.size for point in points]) * aside
        found = [point.estimate for point in points]
        score = np.array([one.score for one in found])
        bars = np.abs(np.array([[one.low for one in found], [one.high for one in found]]) - score)
        axes.errorbar(
            people, score, bars, color=colour, marker=marker, markersize=5, linewidth=1.7, elinewidth=1.1, capsize=2.5,
            label=name,
        )  # fmt: skip
    _scale_people(axes, curve)
    axes.set_ylabel(f"{metric}, {curve.people:,} people tested")


def _draw_gaps(axes: Axes, curve: TargetCurve) -> None:
    metric = SHORT_NAMES.get(curve.metric, curve.metric)
    axes.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    others = list(dict.fromkeys(gap.other for gap in curve.gaps))
    for number, other in enumerate(others):
        colour, marker, _ = STYLES[other]
        gaps = [gap for gap in curve.gaps if gap.other == other]
        aside = _aside(number, len(others))
        people = np.array([gap.size for gap in gaps]) * aside
        axes.plot(people, [gap.estimate.score for gap in gaps], color=colour, linewidth=1.4)
        axes.plot([], [], marker, color=colour, linestyle="-", markersize=5, label=f"minus {_OTHERS[other]}")
        for gap, place in zip(gaps, people, strict=True):
            found, told = gap.estimate, gap.verdict != "not told apart"
            axes.plot([place, place], [found.low, found.high], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                place, found.score, marker, color=colour, markerfacecolor=colour if told else "white", markersize=5.5,
                markeredgewidth=1.3,
            )  # fmt: skip
    _scale_people(axes, curve)
    axes.set_ylabel(f"transfer minus the other ({metric})")
    axes.legend(loc="best", fontsize=8)


def _scale_people(axes: Axes, curve: TargetCurve) -> None:
    sizes = sorted({point.size for point in curve.points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(labels_apart(sizes)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("people trained on (logarithmic)")


def _aside(number: int, count: int) -> float:
    return float(np.exp(_ASIDE * (number - (count - 1) / 2)))
