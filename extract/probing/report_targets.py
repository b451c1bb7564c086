"""The targets of a probe as its report shows them: scores in words, pictures of predictions and of curves."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from extract.probing.calibration import probability_calibration_plot, value_calibration_plot
from extract.probing.compare import Difference, Probed
from extract.probing.numbers import in_digits
from extract.probing.plots import MANY_POINTS, confusion_plot, forest_plot, roc_plot, scatter_plot
from extract.probing.plots_compared import curve_plot, grouped_forest_plot
from extract.probing.results import Interval, TargetResult

#: As reports write them.
METRICS = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "r": "r", "r2": "R²", "mae": "MAE"}

#: Headline metrics: title of the panel, its axis, and the least span of that axis.
_PANELS = {
    "auc": ("Classification", "AUC (dashed: chance, 0.5)", (0.4, 1.0)),
    "r": ("Regression", "Pearson's r (dashed: chance, 0)", (-0.2, 1.0)),
}


@dataclass(frozen=True)
class Picture:
    """An image within the page: with words for those who do not see it, a line below, a heading above."""

    uri: str
    alt: str
    caption: str = ""
    title: str = ""


@dataclass(frozen=True)
class Score:
    """An interval in words: metric, score, ends, chance, verdict; the ends of the bootstrap's, if there are any."""

    metric: str
    score: str
    interval: str
    chance: str
    verdict: str
    bootstrap: str = ""


@dataclass(frozen=True)
class Row:
    """A target probed with one embedding, as the table shows it.

    Attributes
    ----------
    name
        Of the embedding.
    alone, gain
        Of the headline metric: confounds alone, and what the embedding adds to that; None without confounds.
    difference
        From the first embedding; None for that one.
    p
        Of the permutation test, or nothing.
    """

    name: str
    result: TargetResult
    headline: Score | None = None
    others: list[Score] = field(default_factory=list)
    alone: Score | None = None
    gain: Score | None = None
    difference: Score | None = None
    p: str = ""


@dataclass(frozen=True)
class Predictions:
    """Pictures of one target's predictions with one embedding."""

    result: TargetResult
    pictures: list[Picture]


def verdict(interval: Interval) -> str:
    """Say where a score lies against chance: by whether its 95 % interval holds it."""
    if not all(map(math.isfinite, (interval.score, interval.low, interval.high, interval.chance))):
        return "not defined"
    if interval.holds_chance:
        return "within chance"
    return "above chance" if interval.low > interval.chance else "below chance"


def table_rows(probed: Sequence[Probed], differences: Sequence[Difference]) -> list[list[Row]]:
    """Return the rows of the table: for each target one for each embedding."""
    by_pair = {(difference.target, difference.name): difference.interval for difference in differences}
    names = dict.fromkeys(result.name for one in probed for result in one.results)
    return [
        [
            _row(one, result, by_pair.get((target, one.name)))
            for one in probed
            for result in one.results
            if result.name == target
        ]
        for target in names
    ]


def _row(one: Probed, result: TargetResult, difference: Interval | None) -> Row:
    if result.status != "ok":
        return Row(one.name, result)
    units = _units(one, result)
    alone, gain = result.confound_metrics.get(result.metric), result.gains.get(result.metric)
    return Row(
        one.name,
        result,
        headline=score_in_words(result.metric, result.headline, units),
        others=[score_in_words(name, found, units) for name, found in result.metrics.items() if name != result.metric],
        alone=None if alone is None else score_in_words(result.metric, alone, units),
        gain=None if gain is None else score_in_words(result.metric, gain, units),
        difference=None if difference is None else score_in_words(result.metric, difference, units),
        p="" if result.p_value is None else f"{result.p_value:.2g}",
    )


def _units(one: Probed, result: TargetResult) -> str:
    labels = one.embeddings.variables.get(result.name, {}).get("labels")
    return "categories" if labels else result.units or ""  # codes count categories, whatever these are of


def score_in_words(metric: str, interval: Interval, units: str) -> Score:
    """Write a score and what belongs to it; units are those of errors."""
    unit = f" {units}" if metric == "mae" and units else ""
    drawn = ""
    if interval.boot_low is not None and interval.boot_high is not None:
        drawn = f"{number_in_words(interval.boot_low, metric)} to {number_in_words(interval.boot_high, metric)}"
    return Score(
        METRICS.get(metric, metric),
        number_in_words(interval.score, metric) + unit,
        f"{number_in_words(interval.low, metric)} to {number_in_words(interval.high, metric)}",
        number_in_words(interval.chance, metric),
        verdict(interval),
        drawn,
    )


def number_in_words(value: float, metric: str) -> str:
    """Write the value of a metric with as many digits as tell something; a dash if it is not defined."""
    if not math.isfinite(value):
        return "–"
    if metric == "mae" and 1e-5 <= abs(value) < 1e9:  # three figures, in whatever unit
        decimals = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    if metric == "mae":
        return f"{value:.3g}"
    return in_digits(value)


def panels(probed: Sequence[Probed]) -> list[Picture]:
    """Return a chart of the headline scores for each headline metric: embeddings side by side, confounds alone last."""
    found = []
    for metric, (title, axis, span) in _PANELS.items():
        chosen = {
            one.name: [result for result in one.results if result.status == "ok" and result.metric == metric]
            for one in probed
        }
        if not any(chosen.values()):
            continue
        series = {name: {result.name: result.headline for result in results} for name, results in chosen.items()}
        alone = {
            result.name: result.confound_metrics[metric]
            for result in chosen[probed[0].name]
            if metric in result.confound_metrics
        }
        if alone:
            series["confounds alone"] = alone
        if len(series) == 1:
            plot = forest_plot(chosen[probed[0].name], xlabel=axis, span=span)
        else:
            plot = grouped_forest_plot(series, xlabel=axis, span=span)
        targets = len({name for of in series.values() for name in of})
        what = "" if len(series) == 1 else f" of {len(series)} models side by side"
        alt = f"{title}: headline scores{what}, {targets} targets with 95 % intervals; the table gives the numbers"
        found.append(Picture(svg_uri(plot), alt, title=title))
    return found


def curve_pictures(probed: Sequence[Probed]) -> list[Picture]:
    """Return a chart of learning curves for each target that has some."""
    pictures = []
    for target in dict.fromkeys(name for one in probed for name in one.curves):
        curves = {one.name: one.curves[target] for one in probed if target in one.curves}
        metric = next(iter(curves.values())).metric
        sizes = sorted({point.people for curve in curves.values() for point in curve.points})
        plot = curve_plot(curves, ylabel=f"{METRICS.get(metric, metric)} (dashed: chance)")
        alt = f"learning curve of {target}: {METRICS.get(metric, metric)} with {sizes[0]:,} to {sizes[-1]:,} people"
        notes = [
            f"no point at {size:,}{f' with {name}' if len(curves) > 1 else ''}: {reason}"
            for name, curve in curves.items()
            for size, reason in curve.missing.items()
        ]
        pictures.append(Picture(svg_uri(plot), alt, "; ".join(notes), target))
    return pictures


def predictions(one: Probed) -> list[Predictions]:
    """Return pictures of the predictions of each target that was probed: ROC, confusion or scatter, and calibration."""
    return [
        Predictions(result, _pictures(one, result))
        for result in one.results
        if result.status == "ok" and result.out_of_fold is not None
    ]


def _pictures(one: Probed, result: TargetResult) -> list[Picture]:
    found = result.out_of_fold
    if found is None:
        return []
    if result.labels:
        calibrated = Picture(
            svg_uri(probability_calibration_plot(found, result.labels)),
            f"calibration of {result.name}",
            "Calibration: how often a class came true, by predicted probability, in bins of equally many scans of each "
            "fold, with 95 % intervals (Wilson). Below: scans by probability.",
        )
        if len(result.labels) == 2:
            caption = f"ROC curve of each fold and their mean; positive class: {result.labels[1]}."
            return [
                Picture(svg_uri(roc_plot(found, result.labels)), f"ROC curves of {result.name}", caption),
                calibrated,
            ]
        caption = (
            "Class given to each scan, all classes taken as equally likely (as for balanced accuracy): "
            "share of each true class, and number of scans."
        )
        return [
            Picture(
                svg_uri(roc_plot(found, result.labels)),
                f"ROC curves of {result.name}",
                "ROC curve of each class against the rest, mean over folds.",
            ),
            Picture(svg_uri(confusion_plot(found, result.labels)), f"confusion matrix of {result.name}", caption),
            calibrated,
        ]
    units = _units(one, result)
    quantity = f"{result.name} ({units})" if units else result.name
    caption = "Predicted against true values; on the dashed line they are equal."
    if len(found.truth) > MANY_POINTS:
        caption += " Colour: number of scans."
    labels: Mapping[str, str] = one.embeddings.variables.get(result.name, {}).get("labels") or {}
    if labels:
        caption += " Categories: " + "; ".join(f"{code} = {label}" for code, label in labels.items()) + "."
    return [
        Picture(svg_uri(scatter_plot(found, quantity)), f"predicted against true {result.name}", caption),
        Picture(
            svg_uri(value_calibration_plot(found, quantity)),
            f"calibration of {result.name}",
            "Calibration: mean true value by prediction, in bins of equally many scans of each fold, with 95 % "
            "intervals; slope of true on predicted values within folds. Below: scans by prediction.",
        ),
    ]


def svg_uri(content: bytes) -> str:
    """Return an SVG file as an address."""
    return data_uri(content, "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Return a file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
