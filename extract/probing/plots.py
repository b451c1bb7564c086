"""Plots of what a probe found, as SVG files: drawn on figures of their own, so that nothing global is touched."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from sklearn.metrics import confusion_matrix, roc_curve

from extract.probing.results import OutOfFold, TargetResult

#: A scatter of more points than these is drawn as a two-dimensional histogram.
MANY_POINTS = 5000

_BINS = 60

BLUE, PALE, GREY, ORANGE = "#1f4e79", "#9dbbd8", "#6b7280", "#b45309"

#: Of things side by side; told apart by people who see no red or green, too.
COLOURS = (BLUE, ORANGE, "#0d9488", "#a21caf", "#65a30d", "#111827")

_RATES = np.linspace(0, 1, 201)


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of the reports while this is entered."""
    style = mpl.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "legend.frameon": False,
            "svg.fonttype": "none",  # text stays text: small files, and scripts that matplotlib's font lacks
            "svg.hashsalt": "brain-volumes",  # same results, same bytes
            "text.parse_math": False,  # names of phenotypes may hold a dollar sign
        }
    )
    with style, warnings.catch_warnings():
        # Only measuring uses matplotlib's own font; the browser draws the glyph.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def to_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file; same figure, same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def shorten(text: str, width: int = 26) -> str:
    """Return a name that fits beside an axis, without characters that XML forbids."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def forest_plot(results: list[TargetResult], *, xlabel: str, span: tuple[float, float]) -> bytes:
    """Draw headline scores with their 95 % intervals against chance, first target on top.

    Parameters
    ----------
    results
        Targets of one metric, with one chance level.
    span
        Ends of the axis at least; widened if an interval needs it.

    Returns
    -------
    bytes
        An SVG file.
    """
    headlines = [result.headline for result in results]
    with styled():
        figure = Figure(figsize=(4.6, 0.75 + 0.34 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        chance = headlines[0].chance
        if np.isfinite(chance):
            axes.axvline(chance, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        for y, headline in enumerate(headlines):
            if not np.isfinite(headline.score):
                axes.text(chance, y, " not defined", va="center", color=GREY)
                continue
            colour = GREY if headline.holds_chance else BLUE if headline.score > chance else ORANGE
            fill = "white" if headline.holds_chance else colour
            axes.plot([headline.low, headline.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(headline.score, y, "o", color=colour, markerfacecolor=fill, markersize=6, markeredgewidth=1.5)
        ends = np.array([[h.low, h.high] for h in headlines])
        finite = ends[np.isfinite(ends)]
        low, high = min([span[0], *finite]), max([span[1], *finite])
        margin = 0.03 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(results) - 0.4, -0.6)
        axes.set_yticks(range(len(results)), [shorten(result.name) for result in results])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(xlabel)
        return to_svg(figure)


def roc_plot(found: OutOfFold, labels: list[str]) -> bytes:
    """Draw ROC curves (at equal false positive rates, mean over folds); of two classes each fold's, too.

    Of more than two classes each has its curve against the rest. Folds in which a class or the rest was not tested
    have no curve. One fold is called the test scans.

    Returns
    -------
    bytes
        An SVG file.
    """
    two, several = len(labels) == 2, len(np.unique(found.fold)) > 1
    with styled():
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="chance")
        for code in [1] if two else range(len(labels)):
            curves = _fold_curves(found, code)
            if two and several:
                for number, curve in enumerate(curves):
                    axes.plot(_RATES, curve, color=PALE, linewidth=1, label=None if number else "each fold")
            if curves:
                name = ("mean of folds" if several else "test scans") if two else shorten(labels[code], 18)
                style = COLOURS[0 if two else code % len(COLOURS)]
                line = "-" if code < len(COLOURS) else "--"
                axes.plot(_RATES, np.mean(curves, axis=0), color=style, linewidth=2, linestyle=line, label=name)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="false positive rate")
        axes.set_ylabel("true positive rate" + (f" ({shorten(labels[1])})" if two else ", each class against the rest"))
        axes.legend(loc="lower right", fontsize=9 if len(labels) <= 8 else 6)
        return to_svg(figure)


def _fold_curves(found: OutOfFold, code: int) -> list[np.ndarray]:
    """Return the true positive rates of a class at `_RATES` in each fold."""
    curves = []
    for fold in np.unique(found.fold):
        of_fold = found.fold == fold
        positive = found.truth[of_fold] == code
        if positive.all() or not positive.any():
            continue
        false, true, _ = roc_curve(positive, found.predicted[of_fold, code])
        curves.append(np.interp(_RATES, false, true))
        curves[-1][0] = 0.0  # every curve starts in the corner
    return curves


def confusion_plot(found: OutOfFold, labels: list[str]) -> bytes:
    """Draw the confusion matrix: shares of each true class, and counts.

    As for the balanced accuracy (`probing.scores.balanced_accuracy`), probabilities are divided by the frequencies of
    the classes in the training scans before the largest is taken, or all would be given the commonest class.

    Returns
    -------
    bytes
        An SVG file.
    """
    classes = np.arange(len(labels))
    truth = found.truth.astype(np.int64)
    chosen = np.empty_like(truth)
    for fold in np.unique(found.fold):
        test = found.fold == fold
        frequencies = np.maximum(np.bincount(truth[~test], minlength=len(labels)), 1)
        chosen[test] = np.argmax(found.predicted[test] / frequencies, axis=1)
    counts = confusion_matrix(truth, chosen, labels=classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with styled():
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(labels) <= 12:  # in more cells numbers are illegible
            size = 9 if len(labels) <= 5 else 6
            for row, column in np.ndindex(*shares.shape):
                text = f"{100 * shares[row, column]:.0f} %\n({counts[row, column]:,})"
                colour = "white" if shares[row, column] > 0.55 else "black"
                axes.text(column, row, text, ha="center", va="center", size=size, color=colour)
        names = [shorten(label, 16) for label in labels]
        upright = len(labels) <= 4 and max(map(len, names)) <= 10
        axes.set_xticks(classes, names, rotation=0 if upright else 40, ha="center" if upright else "right")
        axes.set_yticks(classes, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of true class")
        bar.outline.set_visible(False)
        return to_svg(figure)


def scatter_plot(found: OutOfFold, quantity: str) -> bytes:
    """Draw predicted against true values with the line of identity; equal axes, so that shrinkage is seen.

    Parameters
    ----------
    quantity
        Name and unit for the axes.

    Returns
    -------
    bytes
        An SVG file; the points are a picture within it, which keeps it small.
    """
    shown = np.isfinite(found.truth) & np.isfinite(found.predicted)
    true, predicted = found.truth[shown], found.predicted[shown]
    with styled():
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        if len(true):
            _points(figure, axes, true, predicted)
        title = textwrap.fill(shorten(quantity, 70), 40)
        axes.set(xlabel=f"true {title}", ylabel=f"predicted {title}", aspect="equal")
        return to_svg(figure)


def _points(figure: Figure, axes: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    whole = bool((true == np.rint(true)).all())
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    margin = max(0.04 * (high - low), 0.6 if whole else 0.0) or 1.0
    low, high = low - margin, high + margin
    if len(true) > MANY_POINTS:
        columns = np.linspace(low, high, _BINS + 1)
        if whole:  # bins that hold equally many whole numbers, or there would be stripes
            step = max(1, round((high - low) / _BINS))
            columns = np.arange(np.floor(low) - 0.5, high + step, step)
        counts = axes.hist2d(
            true, predicted, bins=(columns, np.linspace(low, high, _BINS + 1)), cmin=1, norm="log", cmap="Blues",
            rasterized=True,
        )  # fmt: skip
        figure.colorbar(
            counts[3], ax=axes, fraction=0.045, pad=0.02, label="scans", format=StrMethodFormatter("{x:,.0f}")
        ).outline.set_visible(False)
    else:
        alpha = float(np.clip(60 / np.sqrt(len(true)) / 10, 0.2, 0.7))
        axes.scatter(true, predicted, s=14, color=BLUE, alpha=alpha, linewidths=0, rasterized=True)
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="identity")
    axes.set(xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=whole))
    axes.legend(loc="upper left")
