"""The page of a curve: one HTML file that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from extract.probing.report import last_component, plain
from extract.probing.report_targets import Picture, svg_uri
from extract.probing.writing import write_whole
from finetune.curves.cells import CellResult
from finetune.curves.charts import curve_svg
from finetune.curves.results import CurveResult, TargetCurve
from finetune.curves.tables import TITLES, CurveTable, curve_table
from finetune.curves.words import METRICS, describe_state, describe_target, listed, number

_PATH = re.compile(r"(?<!\S)['\"(]?(?:~|\.{0,2})/(?:[^\s'\"]*/)?")

_NOT_SHOWN = ("target", "weights", "train_people", "split")  # of the settings: said elsewhere, or of the cells


@dataclass(frozen=True)
class Section:
    """What the page says of one target."""

    curve: TargetCurve
    metric: str
    sentences: list[str]
    picture: Picture
    table: CurveTable


def write_curve_page(path: Path, result: CurveResult) -> None:
    """Write the page; it appears whole or not at all, and names no participant and no folder.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    page = render_curve_page(result)
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8", errors="replace"))


def render_curve_page(result: CurveResult) -> str:
    """Return the page of `write_curve_page`."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader("finetune.curves"), jinja2.PackageLoader("extract.probing")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plan = result.plan
    return environment.get_template("curve.html").render(
        date=datetime.now(UTC).date().isoformat(),
        title=", ".join(plan.settings.target),
        simulated=plan.simulated,
        summary=_summary(result),
        state=[_without_folders(sentence) for sentence in describe_state(result)],
        sections=[_section(curve) for curve in result.targets],
        titles=TITLES,
        plan=plan,
        seeds=len(plan.seeds),
        targets=[curve.name for curve in result.targets],
        cells=[_cell(cell, result.targets) for cell in result.cells],
        provenance=_provenance(result),
        settings=[
            (name.replace("_", " "), "none" if value is None else plain(value))
            for name, value in plan.settings.model_dump(mode="json").items()
            if name not in _NOT_SHOWN
        ],
    )


def _section(curve: TargetCurve) -> Section:
    metric = METRICS.get(curve.metric, curve.metric)
    sizes = sorted({point.size for point in curve.points})
    alt = (
        f"{metric} of {curve.name} by the number of people trained on, {sizes[0]:,} to {sizes[-1]:,}, of each method, "
        "with 95 % intervals, and what transfer is ahead by; the table gives the numbers"
    )
    return Section(curve, metric, describe_target(curve), Picture(svg_uri(curve_svg(curve)), alt), curve_table(curve))


def _summary(result: CurveResult) -> list[tuple[str, str]]:
    plan = result.plan
    done = sum(cell.status == "ok" for cell in result.cells)
    people = plan.people
    return [
        ("People tested", f"{people['test']:,}, the same throughout"),
        ("People to train on", f"{people['train']:,} at most, and {people['validation']:,} to validate"),
        ("Sizes", ", ".join(f"{size:,}" for size in plan.sizes)),
        ("Methods", listed([TITLES[method] for method in plan.methods])),
        ("Seeds", f"{len(plan.seeds)} of each"),
        ("Model", plan.settings.model),
        ("Transfer from", f"{last_component(plan.weights)} weights"),
        ("Done", f"{done} of {len(result.cells)} cells"),
    ]


def _provenance(result: CurveResult) -> list[tuple[str, str]]:
    plan = result.plan
    grid = plan.store.get("grid") or {}
    size = " × ".join(str(length) for length in reversed(grid.get("shape_zyx", [])))
    return [
        ("targets", ", ".join(plan.settings.target)),
        ("weights", last_component(plan.weights)),
        ("store", last_component(str(plan.store.get("name")))),
        ("store id", plain(plan.store.get("id"))),
        ("grid", f"{size} voxels (x, y, z) of {grid.get('voxel_mm', 0):g} mm, RAS, {grid.get('space')}"),
        ("simulated", "yes" if plan.simulated else "no"),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("learning rate from scratch", "the same" if plan.scratch_lr is None else f"{plan.scratch_lr:g}"),
        ("draws of the people tested", f"{plan.draws:,}"),
        ("computing time", _duration(sum(cell.seconds for cell in result.cells))),
        ("versions", ", ".join(f"{name} {version}" for name, version in plan.created_by.items())),
    ]


def _cell(cell: CellResult, curves: tuple[TargetCurve, ...]) -> dict[str, Any]:
    """Return what the table of all cells says of one."""
    scores = {
        point_seed: score
        for curve in curves
        for point in curve.points
        if (point.method, point.size) == (cell.cell.method, cell.cell.size)
        for point_seed, score in zip(((curve.name, seed) for seed in point.seeds), point.scores, strict=True)
    }
    training = cell.training
    if "steps" in training:
        ended = ", stopped early" if training["stopped"] == "early" else ""
        how = f"{training['steps']:,} steps, {training['epochs']:,} epochs (best {training['best_epoch']:,}){ended}"
    else:
        how = ", ".join(f"penalty {penalty:.3g}" for penalty in training.get("penalty", {}).values())
    return {
        "method": TITLES[cell.cell.method],
        "size": f"{cell.cell.size:,}",
        "seed": cell.cell.seed,
        "status": cell.status,
        "reason": _without_folders(cell.reason),
        "scans": f"{cell.train_scans:,}" if cell.train_scans else "",
        "how": how,
        "seconds": _duration(cell.seconds) if cell.seconds else "",
        "scores": [number(scores.get((curve.name, cell.cell.seed))) for curve in curves],
    }


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _without_folders(text: str) -> str:
    """Leave of paths in a text the last component: folders may name people."""
    return _PATH.sub("", text)
