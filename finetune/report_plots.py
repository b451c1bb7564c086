"""Pictures of a fine-tuning run: its course over epochs as SVG files, and maps over brains as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from extract.probing.plots import BLUE, COLOURS, GREY, ORANGE, shorten, styled, to_svg
from finetune.saliency import SaliencyMap, strongest_place
from ingest.planes import planes_of, side_by_side

#: Against to for: cold to warm, told apart by people who see no red or green, and bright on grey brains.
MAP_COLOURS = LinearSegmentedColormap.from_list("evidence", ["#67e8f9", "#2563eb", "#3f3f46", "#ea580c", "#fde047"])

_GAP = 6  # voxels of black between planes
_WIDTH = 1000  # pixels of a picture, at least
_DPI = 200
_OPAQUE = 0.75  # of the strongest place
_FEW = 40  # epochs whose points are marked
_WIDE = 20  # the largest loss over the smallest, from which on the axis is logarithmic
_DECADES = 1000  # ... and from which on whole decades are labels enough


def loss_plot(history: Sequence[Mapping[str, float]], best_epoch: int) -> bytes:
    """Draw the losses of training and validation over epochs.

    Parameters
    ----------
    history
        Rows of epochs.csv; a number that an epoch lacks is absent or NaN.
    best_epoch
        Is marked.

    Returns
    -------
    bytes
        An SVG file.
    """
    series = {
        "training": (_course(history, "train_loss"), ORANGE),
        "validation": (_course(history, "validation_loss"), BLUE),
    }
    return _epochs_plot(series, best_epoch, ylabel="loss", wide=True)


def score_plot(history: Sequence[Mapping[str, float]], best_epoch: int, columns: Mapping[str, str]) -> bytes:
    """Draw validation scores over epochs, one line per target; see `loss_plot`.

    Parameters
    ----------
    columns
        Name of a line -> column of epochs.csv.
    """
    series = {
        name: (_course(history, column), COLOURS[number % len(COLOURS)])
        for number, (name, column) in enumerate(columns.items())
    }
    return _epochs_plot(series, best_epoch, ylabel="validation score")


def rate_plot(history: Sequence[Mapping[str, float]], best_epoch: int) -> bytes:
    """Draw the learning rate at the end of each epoch; see `loss_plot`."""
    return _epochs_plot({"learning rate": (_course(history, "lr"), BLUE)}, best_epoch, ylabel="learning rate")


def _course(history: Sequence[Mapping[str, float]], column: str) -> np.ndarray:
    """Return (epoch, value) of the epochs that have one, float64 (point, 2)."""
    pairs = [(row["epoch"], row.get(column)) for row in history]
    known = [(epoch, value) for epoch, value in pairs if value is not None and np.isfinite(value)]
    return np.array(known, dtype=np.float64).reshape(-1, 2)


def _epochs_plot(
    series: Mapping[str, tuple[np.ndarray, str]], best_epoch: int, *, ylabel: str, wide: bool = False
) -> bytes:
    with styled():
        figure = Figure(figsize=(3.9, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, (points, colour) in series.items():
            marker = "o" if len(points) <= _FEW else ""
            axes.plot(*points.T, color=colour, linewidth=1.6, marker=marker, markersize=3, label=shorten(name))
        if not any(len(points) for points, _ in series.values()):
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        elif best_epoch > 0:
            axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"best epoch, {best_epoch}")
        values = np.concatenate([points[:, 1] for points, _ in series.values()])
        if wide and len(values) and 0 < _WIDE * values.min() < values.max():
            axes.set_yscale("log")
            if values.max() < _DECADES * values.min():
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())  # matplotlib's writes TeX
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.legend(loc="best", fontsize=8)
        return to_svg(figure)


def map_figure(volume: np.ndarray, found: SaliencyMap) -> Figure:
    """Draw a map over the planes of a brain through its strongest place, with letters in their upper corners.

    Parameters
    ----------
    volume
        uint8 (z, y, x), RAS.
    found
        Its map: colours grow more opaque with the size of a value, and fine lines cross at the strongest.

    Returns
    -------
    matplotlib.figure.Figure
        Two images whose data coordinates are voxels: grey levels, and the map between minus and plus its largest size.
    """
    at = strongest_place(found.values, volume)
    planes = planes_of(volume, at)
    grey, starts = side_by_side(planes, _GAP)
    values, _ = side_by_side(planes_of(found.values, at), _GAP)
    height, width = grey.shape
    inch = max(2, -(-_WIDTH // width)) / _DPI
    figure = Figure(figsize=(width * inch, height * inch), dpi=_DPI, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    limit = limit_of(found)
    axes.imshow(
        values, cmap=MAP_COLOURS, vmin=-limit, vmax=limit, alpha=_OPAQUE * np.abs(values) / limit,
        interpolation="nearest" if found.method == "occlusion" else "bilinear",
    )  # fmt: skip
    shape = volume.shape
    z, y, x = at
    crossings = ((shape[1] - 1 - y, x), (shape[0] - 1 - z, x), (shape[0] - 1 - z, y))
    for plane, start, (row, column) in zip(planes, starts, crossings, strict=True):
        rows, columns = plane.pixels.shape
        top = (height - rows) // 2
        axes.hlines(top + row, start - 0.5, start + columns - 0.5, color="white", linewidth=0.4, alpha=0.6)
        axes.vlines(start + column, top - 0.5, top + rows - 0.5, color="white", linewidth=0.4, alpha=0.6)
        margin = 0.03 / inch
        for letter, place, side in (
            (plane.left, start + margin, "left"),
            (plane.right, start + columns - 1 - margin, "right"),
        ):
            axes.text(
                place, margin, letter, ha=side, va="top", size=9, color="white",
                path_effects=[withStroke(linewidth=1.5, foreground="black")],
            )  # fmt: skip
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    return figure


def limit_of(found: SaliencyMap) -> float:
    """Return where the colours of a map end: its largest size, 1 of a map of zeros."""
    return float(np.abs(found.values).max()) or 1.0


def map_png(volume: np.ndarray, found: SaliencyMap) -> bytes:
    """Return `map_figure` as a PNG file."""
    return _png(map_figure(volume, found))


def colour_bar_png(*, both: bool) -> bytes:
    """Return the colours of maps over grey as a PNG file: from end to end, or of one direction alone."""
    figure = Figure(figsize=(2.56, 0.1), dpi=100, facecolor="#6b7280")
    axes = figure.add_axes((0, 0, 1, 1))
    ends = np.linspace(-1 if both else 0, 1, 256)[None]
    axes.imshow(ends, cmap=MAP_COLOURS, vmin=-1, vmax=1, alpha=_OPAQUE * np.abs(ends), aspect="auto")
    axes.set_axis_off()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
