"""A benchmark's speeds as one picture: ours, the peers and the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from benchmarks.results import Report, Result

OURS, PEER, LIMIT, TEXT = "#1f4e79", "#c3cad4", "#b45309", "#1f2937"

_STYLE: Any = {
    "font.size": 12,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "svg.fonttype": "none",  # text stays text: a small file
    "svg.hashsalt": "brain-volumes",  # same results, same bytes
    "text.parse_math": False,
}


def bar_chart(report: Report, path: Path) -> None:
    """Draw a report's results as bars, the fastest on top, on a logarithmic scale.

    Parameters
    ----------
    report
        Results whose names start with "limit" become lines, those with "ours" are ours, all others are peers'.
    path
        A .png or .svg file, 10 inches wide.

    Raises
    ------
    ValueError
        If the results are of different units, or there is none besides the limit.
    """
    units = {result.unit for result in report.results}
    bars = sorted((r for r in report.results if not _is_limit(r)), key=lambda result: result.value, reverse=True)
    if len(units) != 1 or not bars:
        raise ValueError(f"a chart needs results of one unit, got {len(bars)} results of the units {sorted(units)}")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 1.5 + 0.36 * len(bars)), layout="constrained")
        _draw(figure, bars, [result for result in report.results if _is_limit(result)], units.pop())
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if path.suffix == ".svg" else None
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw(figure: Figure, bars: list[Result], limits: list[Result], unit: str) -> None:
    axes = figure.add_subplot()
    axes.set_xscale("log")
    values = [result.value for result in bars]
    axes.barh(range(len(bars)), values, height=0.68, color=[OURS if _is_ours(r) else PEER for r in bars], zorder=2)
    for y, result in enumerate(bars):  # within the bar, for the limit's line may be just beyond its end
        style: dict[str, Any] = {"color": "white", "fontweight": "bold"} if _is_ours(result) else {}
        at = (result.value, y)
        axes.annotate(_number(result.value), at, (-6, 0), textcoords="offset points", ha="right", va="center", **style)
    for line, limit in enumerate(sorted(limits, key=lambda result: result.value, reverse=True)):
        axes.axvline(limit.value, color=LIMIT, linewidth=1.5, linestyle=(0, (4, 2)), zorder=1)
        text = f"{limit.name}: {_number(limit.value)}"
        axes.text(limit.value, -0.75 - 0.6 * line, f"{text} ", ha="right", va="bottom", color=LIMIT)
    everything = [*values, *(limit.value for limit in limits)]
    axes.set_xlim(min(everything) / 4, 1.1 * max(everything))  # the slowest has a bar for its number, too
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [result.name for result in bars])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"{unit}, logarithmic scale")


def _is_limit(result: Result) -> bool:
    return result.name.startswith("limit")


def _is_ours(result: Result) -> bool:
    return result.name.startswith("ours")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
