"""Plots of things side by side: several embeddings, confounds, numbers of people; as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from extract.probing.curves import LearningCurve
from extract.probing.plots import COLOURS, GREY, shorten, styled, to_svg
from extract.probing.results import Interval

#: Shapes of the dots: colours alone do not survive a grey print.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: A point of a curve is as wide as this share of the distance to the next, so that bars do not hide each other.
_ASIDE = 0.035


def grouped_forest_plot(
    series: Mapping[str, Mapping[str, Interval]], *, xlabel: str, span: tuple[float, float]
) -> bytes:
    """Draw scores with their 95 % intervals against chance: a group for each target, a row in it for each series.

    Parameters
    ----------
    series
        Name -> target -> score, of one metric with one chance level; the first is on top of each group. A last series
        called "confounds alone" is grey.
    span
        Ends of the axis at least; widened if an interval needs it.

    Returns
    -------
    bytes
        An SVG file.
    """
    targets = list(dict.fromkeys(target for found in series.values() for target in found))
    everything = [interval for found in series.values() for interval in found.values()]
    step = 0.8 / len(series)
    with styled():
        height = 0.9 + len(targets) * max(0.34, 0.17 * len(series) + 0.12) + 0.17 * len(series)
        figure = Figure(figsize=(4.6, height), layout="constrained")
        axes = figure.add_subplot()
        chance = everything[0].chance
        axes.axvline(chance, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        for number, (name, found) in enumerate(series.items()):
            colour, marker = series_style(number, name)
            label: str | None = shorten(name, 40)
            for place, target in enumerate(targets):
                if target not in found or not np.isfinite(found[target].score):
                    continue
                interval = found[target]
                y = place + (number - (len(series) - 1) / 2) * step
                fill = "white" if interval.holds_chance else colour
                axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(
                    interval.score, y, marker, color=colour, markerfacecolor=fill, markersize=5, markeredgewidth=1.3
                )
            axes.plot([], [], marker, color=colour, markersize=5, label=label)
        ends = np.array([[interval.low, interval.high] for interval in everything])
        finite = ends[np.isfinite(ends)]
        low, high = min([span[0], *finite]), max([span[1], *finite])
        margin = 0.03 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(targets) - 0.4, -0.6)
        axes.set_yticks(range(len(targets)), [shorten(target) for target in targets])
        for place in range(1, len(targets)):
            axes.axhline(place - 0.5, color="#e5e7eb", linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(xlabel)
        figure.legend(loc="outside upper left", ncols=1, handletextpad=0.2)
        return to_svg(figure)


def curve_plot(curves: Mapping[str, LearningCurve], *, ylabel: str) -> bytes:
    """Draw the learning curves of one target: score by the number of people trained on, with 95 % intervals.

    Parameters
    ----------
    curves
        Name of the embeddings -> curve of the target.

    Returns
    -------
    bytes
        An SVG file.
    """
    points = [point for curve in curves.values() for point in curve.points]
    sizes = sorted({point.people for point in points})
    with styled():
        figure = Figure(figsize=(4.6, 3.2 + (0.17 * len(curves) if len(curves) > 1 else 0)), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(points[0].interval.chance, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        for number, (name, curve) in enumerate(curves.items()):
            colour, marker = series_style(number, name)
            found = [point for point in curve.points if np.isfinite(point.interval.score)]
            aside = 1 + _ASIDE * (number - (len(curves) - 1) / 2)
            people = np.array([point.people for point in found]) * aside
            score, low, high = (
                np.array([getattr(point.interval, end) for point in found]) for end in ("score", "low", "high")
            )
            axes.errorbar(
                people, score, [score - low, high - score], color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                elinewidth=1.1, capsize=2.5, label=shorten(name, 40),
            )  # fmt: skip
        axes.xaxis.set_major_locator(FixedLocator(labels_apart(sizes)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="people trained on", ylabel=ylabel)
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=1)
        return to_svg(figure)


def series_style(number: int, name: str) -> tuple[str, str]:
    """Return the colour and the marker of a series."""
    if name == "confounds alone":
        return GREY, "d"
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def labels_apart(sizes: Sequence[int]) -> list[int]:
    """Return sizes whose labels do not touch on a logarithmic axis; the largest is among them."""
    if len(sizes) < 2:
        return list(sizes)
    least = (sizes[-1] / sizes[0]) ** 0.1
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or kept[-1] / size > least:
            kept.append(size)
    return kept
