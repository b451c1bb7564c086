"""The report of a probe: one HTML page that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import jinja2

from extract.embeddings import Embeddings
from extract.montage import montage_png, read_brains
from extract.plots import MANY_POINTS, confusion_plot, forest_plot, roc_plot, scatter_plot
from extract.results import Interval, TargetResult
from ingest.errors import StoreError

_METRICS = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "r": "r", "r2": "R²", "mae": "MAE"}

#: Headline metrics: title of the panel, its axis, and the least span of that axis.
_PANELS = {
    "auc": ("Classification", "AUC (dashed: chance, 0.5)", (0.4, 1.0)),
    "r": ("Regression", "Pearson's r (dashed: chance, 0)", (-0.2, 1.0)),
}

_ABSENT = "not recorded"


@dataclass(frozen=True)
class Picture:
    """An image within the page."""

    uri: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Score:
    """An interval in words: metric, score, ends, chance, verdict."""

    metric: str
    score: str
    interval: str
    chance: str
    verdict: str


@dataclass(frozen=True)
class Target:
    """A target as the page shows it."""

    result: TargetResult
    headline: Score | None = None
    others: list[Score] = field(default_factory=list)
    picture: Picture | None = None


def write_report(
    path: Path,
    embeddings: Embeddings,
    results: list[TargetResult],
    *,
    settings: Mapping[str, object],
    store: Path | None = None,
) -> list[str]:
    """Write the report of a probe; it appears whole or not at all.

    The page names no participant and no folder, so that it can be passed on.

    Parameters
    ----------
    path
        The HTML file, replaced if it exists; its folder is made.
    embeddings, results
        What was probed, and what was found.
    settings
        ``folds``, ``repeats``, ``seed``, and what else was asked for.
    store
        Where the store is now, for pictures of brains; by default where it was when the embeddings were made.

    Returns
    -------
    list of str
        Warnings, which the page shows too: why brains are absent.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    page, warnings = render_report(embeddings, results, settings=settings, store=store)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")  # file names may be no UTF-8
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"the report {path} cannot be written: {error}; choose another name") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
    return warnings


def render_report(
    embeddings: Embeddings,
    results: list[TargetResult],
    *,
    settings: Mapping[str, object],
    store: Path | None = None,
) -> tuple[str, list[str]]:
    """Return the page of `write_report` and its warnings."""
    attrs = embeddings.attrs
    weights = str((attrs.get("weights") or {}).get("name", _ABSENT))
    grid = (attrs.get("store") or {}).get("grid") or {}
    brains, warnings = read_brains(embeddings, store)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("extract"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("probe.html").render(
        simulated=bool(attrs.get("simulated")),
        random=weights.startswith("random ("),
        date=datetime.now(UTC).date().isoformat(),
        summary=_summary(embeddings, results, settings),
        targets=[_target(result, embeddings) for result in results],
        panels=_panels(results),
        brains=[
            Picture(
                _uri(montage_png(volume), "image/png"),
                f"axial, coronal and sagittal plane of the brain in row {row}",
                f"row {row}",
            )
            for row, volume in brains
        ],
        space=grid.get("space"),
        warnings=warnings,
        provenance=_provenance(attrs),
        settings=[(key.replace("_", " "), _plain(value)) for key, value in settings.items()],
    )
    return page, warnings


def verdict(interval: Interval) -> str:
    """Say where a score lies against chance: by whether its 95 % interval holds it."""
    if not all(map(math.isfinite, (interval.score, interval.low, interval.high, interval.chance))):
        return "not defined"
    if interval.holds_chance:
        return "within chance"
    return "above chance" if interval.low > interval.chance else "below chance"


def _summary(
    embeddings: Embeddings, results: list[TargetResult], settings: Mapping[str, object]
) -> list[tuple[str, str]]:
    attrs = embeddings.attrs
    weights = attrs.get("weights") or {}
    probed = sum(result.status == "ok" for result in results)
    skipped = len(results) - probed
    view = str(attrs.get("view", _ABSENT))
    return [
        ("Scans", f"{len(embeddings.features):,}"),
        ("Participants", f"{embeddings.scans['participant'].nunique():,}"),
        ("Features", f"{embeddings.features.shape[1]:,}"),
        ("Model", str(attrs.get("model", _ABSENT))),
        ("View", "whole volume" if view == "volume" else f"{view} × {attrs.get('slices', '?')} slices"),
        ("Weights", f"{weights.get('name', _ABSENT)}, sha256 {str(weights.get('sha256', _ABSENT))[:12]}…"),
        ("Cross-validation", f"{settings.get('folds', '?')} folds × {settings.get('repeats', '?')} repeats"),
        ("Targets", f"{probed} probed" + (f", {skipped} skipped" if skipped else "")),
    ]


def _target(result: TargetResult, embeddings: Embeddings) -> Target:
    if result.status != "ok":
        return Target(result)
    labels = embeddings.variables.get(result.name, {}).get("labels") or {}
    units = "categories" if labels else result.units or ""  # codes count categories, whatever these are of
    others = [_score(name, interval, units) for name, interval in result.metrics.items() if name != result.metric]
    return Target(
        result,
        headline=_score(result.metric, result.headline, units),
        others=others,
        picture=_picture(result, units, labels),
    )


def _score(metric: str, interval: Interval, units: str) -> Score:
    unit = f" {units}" if metric == "mae" and units else ""
    return Score(
        _METRICS.get(metric, metric),
        _number(interval.score, metric) + unit,
        f"{_number(interval.low, metric)} to {_number(interval.high, metric)}",
        _number(interval.chance, metric),
        verdict(interval),
    )


def _number(value: float, metric: str) -> str:
    if not math.isfinite(value):
        return "–"
    if metric == "mae":  # three figures, in whatever unit
        decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
        return f"{value:,.{decimals}f}"
    return f"{value:.3f}".replace("-0.000", "0.000")


def _picture(result: TargetResult, units: str, labels: Mapping[str, str]) -> Picture | None:
    found = result.out_of_fold
    if found is None:
        return None
    if result.task == "binary":
        positive = result.labels[1] if len(result.labels) == 2 else "1"
        caption = f"ROC curve of each fold and their mean; positive class: {positive}."
        return Picture(_uri(roc_plot(found, positive)), f"ROC curves of {result.name}", caption)
    if result.task == "multiclass":
        names = result.labels or [str(code) for code in range(found.predicted.shape[1])]
        caption = (
            "Class given to each scan, all classes taken as equally likely (as for balanced accuracy): "
            "share of each true class, and number of scans."
        )
        return Picture(_uri(confusion_plot(found, names)), f"confusion matrix of {result.name}", caption)
    caption = "Predicted against true values; on the dashed line they are equal."
    if len(found.truth) > MANY_POINTS:
        caption += " Colour: number of scans."
    if labels:
        caption += " Categories: " + "; ".join(f"{code} = {label}" for code, label in labels.items()) + "."
    plot = scatter_plot(found, f"{result.name} ({units})" if units else result.name)
    return Picture(_uri(plot), f"predicted against true {result.name}", caption)


def _panels(results: list[TargetResult]) -> list[Picture]:
    panels = []
    for metric, (title, axis, span) in _PANELS.items():
        chosen = [result for result in results if result.status == "ok" and result.metric == metric]
        if chosen:
            alt = f"{title}: headline scores of {len(chosen)} targets with 95 % intervals; the table gives the numbers"
            panels.append(Picture(_uri(forest_plot(chosen, xlabel=axis, span=span)), alt, title))
    return panels


def _provenance(attrs: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights, rule, store = (attrs.get(name) or {} for name in ("weights", "input", "store"))
    grid = store.get("grid") or {}
    size = " × ".join(str(length) for length in reversed(grid.get("shape_zyx", [])))
    versions = attrs.get("created_by") or {}
    return [
        ("model", _plain(attrs.get("model"))),
        ("weights", _plain(weights.get("name"))),
        ("weights sha256", _plain(weights.get("sha256"))),
        ("layer", _plain(attrs.get("layer"))),
        ("view", _plain(attrs.get("view"))),
        ("slices per view", "whole volume" if attrs.get("view") == "volume" else _plain(attrs.get("slices"))),
        ("scale of the input", _plain(attrs.get("scale"))),
        ("pooling", _plain(attrs.get("pooling"))),
        ("precision", _plain(attrs.get("precision"))),
        ("input rule", str(rule.get("rule", _ABSENT))),
        ("input mean, std", f"{_plain(rule.get('mean'))}; {_plain(rule.get('std'))}"),
        ("loader backend", _plain(attrs.get("backend"))),
        ("store", _last_component(str(store["path"])) if store.get("path") else _ABSENT),
        ("store id", _plain(store.get("id"))),
        (
            "grid",
            f"{size} voxels (x, y, z) of {grid.get('voxel_mm', 0):g} mm, RAS, {grid.get('space')}" if grid else _ABSENT,
        ),
        ("simulated", "yes" if attrs.get("simulated") else "no"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or _ABSENT),
    ]


def _plain(value: object) -> str:
    """Write a setting for people; of a path only the last component, since folders may name people."""
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", ".", "\\"))):
        return _last_component(str(value))
    return str(value)


def _last_component(path: str) -> str:
    return PureWindowsPath(path).name or path


def _uri(content: bytes, kind: str = "image/svg+xml") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
