"""The ``probe`` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from extract.embeddings import Embeddings, open_embeddings
from extract.probe import probe, target_names
from extract.results import TargetResult
from ingest.progress import progress_bar

_METRICS = {"auc": "AUC", "balanced_accuracy": "bal. acc.", "r": "r", "r2": "R2", "mae": "MAE"}

console = Console()
errors = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def probe_command(
    path: Annotated[Path, typer.Argument(metavar="EMB", help="Embeddings made by extract: .zarr or .h5")],
    targets: Annotated[
        str | None, typer.Option(metavar="A,B", help="Phenotypes.", show_default="all but confounds")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=KIND", help="binary, multiclass, ordinal, count or continuous; repeatable."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation, over participants.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Of the cross-validation, each on other folds.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="For the report's brains.", show_default="where EMB was made")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Fit linear probes to embeddings: one score with its 95 % interval per phenotype."""
    if store is not None and report is None:
        raise typer.BadParameter("only a report shows scans of the store; add --report FILE.html", param_hint="--store")
    embeddings = open_embeddings(path)
    named = None if targets is None else [name.strip() for name in targets.split(",") if name.strip()]
    names = target_names(embeddings, named)
    with progress_bar("probe", errors) as progress:
        bar = progress.add_task("probe", total=len(names))
        results = probe(
            embeddings,
            names,
            tasks=_parse_tasks(task or []),
            folds=folds,
            repeats=repeats,
            seed=seed,
            on_target=lambda _: progress.advance(bar),
        )
    if report is not None:
        from extract.report import write_report  # drawing needs matplotlib, which takes a second to import

        settings: dict[str, object] = {"embeddings": path.name, "folds": folds, "repeats": repeats, "seed": seed}
        for warning in write_report(report, embeddings, results, settings=settings, store=store):
            errors.print(f"warning: {warning}", soft_wrap=True, highlight=False, markup=False)
    if as_json:
        document = {
            "embeddings": path.name,
            "simulated": bool(embeddings.attrs.get("simulated")),
            "model": embeddings.attrs.get("model"),
            "weights": embeddings.attrs.get("weights"),
            "folds": folds,
            "repeats": repeats,
            "seed": seed,
            "targets": [result.to_json() for result in results],
            "report": None if report is None else str(report),
        }
        print(json.dumps(document))
    else:
        _print_results(path, embeddings, results)
        if report is not None:
            console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
    if named is not None and any(result.status == "skipped" for result in results):
        raise typer.Exit(1)


def _parse_tasks(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for option, (name, _, kind) in zip(options, pairs, strict=True):
        if not name.strip() or not kind.strip():
            raise typer.BadParameter(f"{option!r} is not NAME=KIND, such as income=continuous", param_hint="--task")
    return {name.strip(): kind.strip() for name, _, kind in pairs}


def _print_results(path: Path, embeddings: Embeddings, results: list[TargetResult]) -> None:
    weights = (embeddings.attrs.get("weights") or {}).get("name", "unknown")
    console.print(
        f"{path}: {embeddings.features.shape[0]} scans x {embeddings.features.shape[1]} features, "
        f"{embeddings.attrs.get('model', 'unknown model')}, {weights} weights"
        + (", simulated data" if embeddings.attrs.get("simulated") else ""),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("target", "task", "n", "metric", "score", "95 % interval", "chance"):
        right = heading in ("n", "score", "95 % interval", "chance")
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "target")
    probed = [result for result in results if result.status == "ok"]
    for result in probed:
        who = (escape(result.name), result.task, str(result.n))
        for name, found in result.metrics.items():
            interval = f"{_number(found.low)} to {_number(found.high)}"
            table.add_row(*who, _METRICS.get(name, name), _number(found.score), interval, _number(found.chance))
            who = ("", "", "")
    if probed:
        console.print(table, highlight=False)
    for result in results:
        if result.status == "skipped":
            errors.print(f"skipped: {result.name}: {result.reason}", soft_wrap=True, highlight=False, markup=False)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-0.000", "0.000")


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(1)
