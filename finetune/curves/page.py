"""The page of a curve: one HTML file that needs nothing beside it, to be read, printed and passed on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.probing.numbers import SHORT_NAMES, in_time
from extract.probing.page import last_component, render_page, settings_lines, store_lines, versions_line, write_page
from extract.probing.report_targets import Picture, svg_uri
from finetune.curves.cells import CellResult
from finetune.curves.charts import curve_svg
from finetune.curves.results import CurveResult, TargetCurve
from finetune.curves.tables import TITLES, CurveTable, curve_table
from finetune.curves.words import describe_state, describe_target, listed, number

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


def write_curve_page(path: str | Path, result: CurveResult) -> None:
    """Write the page; it appears whole or not at all, and names no participant and no folder.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    write_page(Path(path), render_curve_page(result))


def render_curve_page(result: CurveResult) -> str:
    """Return the page of `write_curve_page`."""
    plan = result.plan
    shown = {name: value for name, value in plan.settings.model_dump(mode="json").items() if name not in _NOT_SHOWN}
    shown["augmentation"] = shown["augmentation"] or "default"
    return render_page(
        "finetune.curves",
        "curve.html",
        simulated=plan.simulated,
        summary=_summary(result),
        provenance=[("Curve", _provenance(result)), ("Settings of each training", settings_lines(shown))],
        title=", ".join(plan.settings.target),
        state=[_without_folders(sentence) for sentence in describe_state(result)],
        sections=[_section(curve) for curve in result.targets],
        titles=TITLES,
        plan=plan,
        seeds=len(plan.seeds),
        targets=[curve.name for curve in result.targets],
        cells=[_cell(cell, result.targets) for cell in result.cells],
    )


def _section(curve: TargetCurve) -> Section:
    metric = SHORT_NAMES.get(curve.metric, curve.metric)
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
        (
            "Transfer from",
            f"weights of {last_component(plan.weights)}" if "/" in plan.weights else f"{plan.weights} weights",
        ),
        ("Done", f"{done} of {len(result.cells)} cells"),
    ]


def _provenance(result: CurveResult) -> list[tuple[str, str]]:
    plan = result.plan
    return [
        ("targets", ", ".join(plan.settings.target)),
        ("weights", last_component(plan.weights)),
        *store_lines(plan.store),
        ("simulated", "yes" if plan.simulated else "no"),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("learning rate from scratch", "the same" if plan.scratch_lr is None else f"{plan.scratch_lr:g}"),
        ("draws of the people tested", f"{plan.draws:,}"),
        ("computing time", in_time(sum(cell.seconds for cell in result.cells))),
        versions_line(plan.created_by),
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
        "seconds": in_time(cell.seconds) if cell.seconds else "",
        "scores": [number(scores.get((curve.name, cell.cell.seed))) for curve in curves],
    }


def _without_folders(text: str) -> str:
    """Leave of paths in a text the last component: folders may name people."""
    return _PATH.sub("", text)
