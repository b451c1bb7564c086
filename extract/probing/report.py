"""The report of a probe: one HTML page that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import jinja2

from extract.probing.compare import Difference, Probed
from extract.probing.montage import montage_png, read_brains
from extract.probing.report_targets import Picture, Score, curve_pictures, data_uri, panels, predictions, table_rows
from extract.probing.writing import write_whole

#: Instead of what a file does not say.
ABSENT = "not recorded"


def write_report(
    path: Path,
    probed: Sequence[Probed],
    *,
    settings: Mapping[str, object],
    differences: Sequence[Difference] = (),
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
    page, warnings = render_report(probed, settings=settings, differences=differences, store=store, warnings=warnings)
    # File names may be no UTF-8
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8", errors="replace"))
    return warnings


def render_report(
    probed: Sequence[Probed],
    *,
    settings: Mapping[str, object],
    differences: Sequence[Difference] = (),
    store: Path | None = None,
    warnings: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Return the page of `write_report` and its warnings."""
    first = probed[0].embeddings
    grid = (first.attrs.get("store") or {}).get("grid") or {}
    brains, brain_warnings = read_brains(first, store)
    warnings = [*warnings, *brain_warnings]
    results = [result for one in probed for result in one.results if result.status == "ok"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("extract.probing"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("probe.html").render(
        simulated=any(one.embeddings.attrs.get("simulated") for one in probed),
        random=[one.name for one in probed if _weights(one).startswith("random (")],
        date=datetime.now(UTC).date().isoformat(),
        summary=_summary(probed, settings),
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
        provenance=[(one.name, _provenance(one.embeddings.attrs)) for one in probed],
        settings=[
            (key.replace("_", " "), "none" if value is None else plain(value)) for key, value in settings.items()
        ],
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
        ("Cross-validation", f"{settings.get('folds', '?')} folds × {settings.get('repeats', '?')} repeats"),
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
    grid = store.get("grid") or {}
    size = " × ".join(str(length) for length in reversed(grid.get("shape_zyx", [])))
    versions = attrs.get("created_by") or {}
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
        ("store", last_component(str(store["path"])) if store.get("path") else ABSENT),
        ("store id", plain(store.get("id"))),
        (
            "grid",
            f"{size} voxels (x, y, z) of {grid.get('voxel_mm', 0):g} mm, RAS, {grid.get('space')}" if grid else ABSENT,
        ),
        ("simulated", "yes" if attrs.get("simulated") else "no"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or ABSENT),
    ]


def _layers(attrs: Mapping[str, Any]) -> str:
    layers = attrs.get("layers")
    if not layers:
        return plain(attrs.get("layer"))
    return ", ".join(f"{layer['name']} ({layer['features']:,} features)" for layer in layers)


def plain(value: object) -> str:
    """Write a setting for people; of a path only the last component, since folders may name people."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", ".", "\\"))):
        return last_component(str(value))
    return str(value)


def last_component(path: str) -> str:
    """Return the name of a file without its folders, whose names may be those of people."""
    return PureWindowsPath(path).name or path
