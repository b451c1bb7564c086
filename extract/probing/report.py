"""The report of a probe: one HTML page that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extract.probing.compare import Difference, Probed
from extract.probing.montage import montage_png, read_brains
from extract.probing.page import ABSENT, plain, render_page, settings_lines, store_lines, versions_line, write_page
from extract.probing.phenotypes import Joined
from extract.probing.report_targets import Picture, Score, curve_pictures, data_uri, panels, predictions, table_rows


def write_report(
    path: Path,
    probed: Sequence[Probed],
    *,
    settings: Mapping[str, object],
    differences: Sequence[Difference] = (),
    phenotypes: Joined | None = None,
    store: Path | None = None,
    warnings: Sequence[str] = (),
) -> list[str]:
    """Write the report of a probe; it appears whole or not at all.

    The page names no participant and no folder, so that it can be passed on.

    Parameters
    ----------
    path
        The HTML file, replaced if it exists; its folder is made.
    probed
        Embeddings and what was found with them, one or several of the same scans.
    settings
        ``folds``, ``repeats``, ``seed``, and what else was asked for.
    differences
        Of several embeddings from the first.
    phenotypes
        What was joined to the embeddings, if anything was.
    store
        Where the store is now, for pictures of brains; by default where it was when the embeddings were made.
    warnings
        More to be shown.

    Returns
    -------
    list of str
        Warnings, which the page shows too: those given, and why brains are absent.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    page, warnings = render_report(
        probed, settings=settings, differences=differences, phenotypes=phenotypes, store=store, warnings=warnings
    )
    write_page(path, page)
    return warnings


def render_report(
    probed: Sequence[Probed],
    *,
    settings: Mapping[str, object],
    differences: Sequence[Difference] = (),
    phenotypes: Joined | None = None,
    store: Path | None = None,
    warnings: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Return the page of `write_report` and its warnings."""
    first = probed[0].embeddings
    grid = (first.attrs.get("store") or {}).get("grid") or {}
    brains, brain_warnings = read_brains(first, store)
    warnings = [*warnings, *brain_warnings]
    results = [result for one in probed for result in one.results if result.status == "ok"]
    page = render_page(
        "extract.probing",
        "probe.html",
        simulated=any(one.embeddings.attrs.get("simulated") for one in probed),
        summary=_summary(probed, settings),
        provenance=[
            *(("Embeddings" if len(probed) == 1 else one.name, _provenance(one.embeddings.attrs)) for one in probed),
            ("Settings of the probe", settings_lines(settings)),
            *([] if phenotypes is None else [("Phenotypes", settings_lines(phenotypes.to_json()))]),
        ],
        random=[one.name for one in probed if _weights(one).startswith("random (")],
        names=[one.name for one in probed],
        targets=table_rows(probed, differences),
        kind=kind_of,
        confounds=list(dict.fromkeys(name for result in results for name in result.confounds)),
        permutations=max((result.permutations for result in results), default=0),
        null="; ".join(dict.fromkeys(result.null for result in results if result.null)),
        bootstrap=any(found.boot_low is not None for result in results for found in result.metrics.values()),
        groups=settings.get("groups"),
        panels=panels(probed),
        curves=curve_pictures(probed),
        predictions=[(one.name, predictions(one)) for one in probed],
        brains=[
            Picture(
                data_uri(montage_png(volume), "image/png"),
                f"axial, coronal and sagittal plane of the brain in row {row}",
                f"row {row}",
            )
            for row, volume in brains
        ],
        space=grid.get("space"),
        warnings=warnings,
    )
    return page, warnings


def kind_of(score: Score) -> str:
    """Return the style of a verdict."""
    return "undefined" if score.verdict == "not defined" else score.verdict.split()[0]


def _weights(one: Probed) -> str:
    return str((one.embeddings.attrs.get("weights") or {}).get("name", ABSENT))


def _summary(probed: Sequence[Probed], settings: Mapping[str, object]) -> list[tuple[str, str]]:
    first = probed[0].embeddings
    targets = sum(result.status == "ok" for result in probed[0].results)
    skipped = len(probed[0].results) - targets
    found = [
        ("Scans", f"{len(first.features):,}"),
        ("Participants", f"{first.scans['participant'].nunique():,}"),
        ("Targets", f"{targets} probed" + (f", {skipped} skipped" if skipped else "")),
        ("Cross-validation", f"up to {settings.get('folds', '?')} folds × {settings.get('repeats', '?')} repeats"),
    ]
    if len(probed) > 1:
        return [*found, ("Embeddings", ", ".join(one.name for one in probed))]
    attrs = first.attrs
    view = str(attrs.get("view", ABSENT))
    digest = str((attrs.get("weights") or {}).get("sha256", ABSENT))
    return [
        *found,
        ("Features", f"{first.features.shape[1]:,}"),
        ("Model", str(attrs.get("model", ABSENT))),
        ("View", "whole volume" if view == "volume" else f"{view} × {attrs.get('slices', '?')} slices"),
        ("Weights", f"{_weights(probed[0])}, sha256 {digest[:12]}…"),
    ]


def _provenance(attrs: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights, rule, store = (attrs.get(name) or {} for name in ("weights", "input", "store"))
    return [
        ("model", plain(attrs.get("model"))),
        ("weights", plain(weights.get("name"))),
        ("weights sha256", plain(weights.get("sha256"))),
        ("layers", _layers(attrs)),
        ("view", plain(attrs.get("view"))),
        ("slices per view", "whole volume" if attrs.get("view") == "volume" else plain(attrs.get("slices"))),
        ("pooling", plain(attrs.get("pooling"))),
        ("crop (z, y, x)", plain(attrs.get("crop") or "none")),
        ("size of the input", plain(attrs.get("size") or f"scaled by {plain(attrs.get('scale'))}")),
        ("precision", plain(attrs.get("precision"))),
        ("input rule", str(rule.get("rule", ABSENT))),
        ("input mean, std", f"{plain(rule.get('mean'))}; {plain(rule.get('std'))}"),
        ("loader backend", plain(attrs.get("backend"))),
        *store_lines(store),
        ("simulated", "yes" if attrs.get("simulated") else "no"),
        versions_line(attrs.get("created_by")),
    ]


def _layers(attrs: Mapping[str, Any]) -> str:
    layers = attrs.get("layers")
    if not layers:
        return plain(attrs.get("layer"))
    return ", ".join(f"{layer['name']} ({layer['features']:,} features)" for layer in layers)
