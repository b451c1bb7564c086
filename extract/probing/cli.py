"""The ``probe`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from extract.embeddings import Embeddings, open_embeddings
from extract.probing.apply import (
    apply_probe,
    check_model_suffix,
    check_table_suffix,
    confound_warnings,
    load_probe,
    save_probe,
    write_predictions,
)
from extract.probing.arguments import SIZES, name_or_table, parse_bins, parse_pairs, parse_sizes, split_names
from extract.probing.compare import Difference, Probed, align, differences, distinct_names, probe_all
from extract.probing.confounds import missing_warnings, number_warnings, read_confounds
from extract.probing.doubts import check_layer, check_not_empty, doubts
from extract.probing.effort import MANY_PATTERNS, estimate_effort
from extract.probing.model import refit
from extract.probing.printing import (
    errors,
    print_comparison,
    print_curves,
    print_embeddings,
    print_json,
    print_results,
    print_skipped,
    print_written,
    warn,
)
from extract.probing.probe import target_names
from extract.probing.settings import THIRD_DEGREE, ProbeSettings
from extract.probing.writing import check_page_suffix, check_writable
from ingest.default_command import RunByDefault
from ingest.progress import progress_bar


class _ProbeCommands(RunByDefault):
    """``--curve`` may stand without sizes, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for place, arg in enumerate(args):
            if arg == "--curve" and not SIZES.fullmatch("".join(args[place + 1 : place + 2])):
                args = [*args[:place], "--curve=auto", *args[place + 1 :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ProbeCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fit linear probes to embeddings:  probe EMB  (its options: probe run --help)",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("run")
def run_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="EMB...",
            help="Embeddings made by extract. Several are compared, with the first, on the scans that they share.",
        ),
    ],
    targets: Annotated[
        str | None, typer.Option(metavar="A,B", help="Phenotypes.", show_default="all but confounds")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KIND",
            help="binary, multiclass, ordinal, count or continuous, of targets and confounds; repeatable.",
        ),
    ] = None,
    bins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="N classes of equally many of all people, or NAME=inner edges, age=55,65; repeatable.",
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of files with several layers; several are compared.")
    ] = None,
    confounds: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Remove phenotypes, brain_volume, head_scale; and score them alone."),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Never split these: a phenotype (site), or a table of families or kin."),
    ] = None,
    kinship: Annotated[
        float | None,
        typer.Option(help="Related from this coefficient on, of a table in --groups.", show_default=str(THIRD_DEGREE)),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation, over participants.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Of the cross-validation, each on other folds.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds.")] = 0,
    permutations: Annotated[
        int, typer.Option(min=0, help="Test the features by so many, with ridge regression; 0 for none.")
    ] = 0,
    bootstrap: Annotated[
        int,
        typer.Option(
            min=0, help="Intervals by so many draws of people: of who is tested, not of who is trained on; 0 for none."
        ),
    ] = 0,
    curve: Annotated[
        str | None,
        typer.Option(metavar="[SIZES]", help="Learning curve: train on 50, 100, 200 ... or so many, e.g. 100,1000."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="For the report's brains.", show_default="where EMB was made")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="MODEL.json", help="Save models fitted to everyone, for probe apply.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score linear probes: one score with its 95 % interval per phenotype (the default command)."""
    if store is not None and report is None:
        raise typer.BadParameter("only a report shows scans of the store; add --report FILE.html", param_hint="--store")
    layers: list[str | None] = [*split_names(layer)] or [None]
    if report is not None:
        check_page_suffix(report)
    if save is not None:
        check_model_suffix(save)
        if len(paths) * len(layers) > 1:
            raise typer.BadParameter("models are saved of one embedding and layer; name one", param_hint="--save")
    if len(set(paths)) < len(paths) or len(set(layers)) < len(layers):
        raise typer.BadParameter("embeddings or a layer are named twice; name each once")
    for out in (report, save):
        if out is not None:
            check_writable(out)
    settings = ProbeSettings(
        folds=folds,
        repeats=repeats,
        seed=seed,
        confounds=tuple(split_names(confounds)),
        groups=name_or_table(groups),
        kinship=kinship,
        bins=parse_bins(bins or []),
        permutations=permutations,
        bootstrap=bootstrap,
    )
    sizes = None if curve is None else parse_sizes(curve)
    tasks = parse_pairs(task or [], "--task", "income=continuous")

    sources = [(path, one) for path in paths for one in layers]
    labels = distinct_names([path for path, _ in sources], [one for _, one in sources])
    for path, one in sources:
        check_layer(path, one)
    named = {name: open_embeddings(path, one) for name, (path, one) in zip(labels, sources, strict=True)}
    for name, embeddings in named.items():
        check_not_empty(name, embeddings)
    warnings: list[str] = []
    if len(named) > 1:
        named, warnings = align(named)
    asked = None if targets is None else split_names(targets)
    first = named[labels[0]]
    names = target_names(first, asked)
    values = read_confounds(first, settings.confounds, tasks)
    warnings += number_warnings(first, values, tasks) + missing_warnings(values)
    warnings += doubts(named, names, tasks=tasks, settings=settings)
    if len(names) > MANY_PATTERNS:
        effort = estimate_effort(first, names, tasks=tasks, settings=settings, confounds=values)
        if effort.patterns > MANY_PATTERNS:
            warn(effort.in_words() + (f" for each of {len(named)} embeddings" if len(named) > 1 else ""))
    with progress_bar("probe", errors) as progress:
        bar = progress.add_task("probe", total=None)
        probed = probe_all(
            named, names, tasks=tasks, settings=settings, curve=sizes,
            on_target=lambda _: progress.advance(bar), on_plan=lambda total: progress.update(bar, total=total),
        )  # fmt: skip
    compared = differences(probed) if len(probed) > 1 else []
    nothing = all(result.status != "ok" for one in probed for result in one.results)
    unsaved = save is not None and nothing
    for warning in warnings:
        warn(f"warning: {warning}")
    if as_json:
        document = _document(sources, probed, compared, settings, report, None if unsaved else save)
        print_json(document | {"warnings": warnings})
    else:
        for (path, one), embeddings in zip(sources, named.values(), strict=True):
            print_embeddings(path, embeddings, one)
        if len(probed) > 1:
            print_comparison(probed, compared)
        else:
            print_results(probed[0].results)
        print_curves(probed)
        print_skipped(probed)
    # Files come last: if one cannot be written, the scores have been printed.
    if save is not None and not unsaved:
        _save(save, probed[0], tasks, settings, layers[0])
        if not as_json:
            print_written("models", save)
    if report is not None:
        from extract.probing.report import write_report  # drawing needs matplotlib, which takes a second to import

        shown = write_report(
            report, probed, differences=compared, settings=_settings(settings), store=store, warnings=warnings
        )
        for warning in shown[len(warnings) :]:
            warn(f"warning: {warning}")
        if not as_json:
            print_written("report", report)
    if unsaved:
        raise ValueError(f"every target was skipped, so there is no model for {save}")
    if nothing or (asked is not None and any(found.status == "skipped" for one in probed for found in one.results)):
        raise typer.Exit(1)


@app.command("apply")
def apply_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.json", help="Saved by probe EMB --save MODEL.json")],
    path: Annotated[Path, typer.Argument(metavar="EMB", help="Embeddings made in the same way, of anybody.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Predictions to write: .csv or .parquet")],
    as_json: AsJson = False,
) -> None:
    """Predict for new people with probes that were saved: values, classes and their probabilities, per scan."""
    check_table_suffix(out)
    check_writable(out)
    saved = load_probe(model)
    embeddings = open_embeddings(path, saved.layer)
    predictions = apply_probe(saved, embeddings)
    write_predictions(out, predictions)
    for warning in confound_warnings(saved, embeddings):
        warn(f"warning: {warning}")
    simulated = saved.simulated or bool(embeddings.attrs.get("simulated"))
    targets = [one.name for one in saved.models]
    if as_json:
        print_json({"predictions": str(out), "scans": len(predictions), "targets": targets, "simulated": simulated})
    else:
        count = f"{len(predictions)} scans x {len(targets)} targets ({', '.join(targets)})"
        print_written("predictions", Path(f"{out}: {count}" + (", simulated data" if simulated else "")))


def _save(path: Path, probed: Probed, tasks: dict[str, str], settings: ProbeSettings, layer: str | None) -> None:
    """Fit what was probed to everyone and write it."""
    models = [
        replace(refit(probed.embeddings, result.name, tasks=tasks, settings=settings), score=result.headline)
        for result in probed.results
        if result.status == "ok"
    ]
    save_probe(path, probed.embeddings, models, layer=layer)


def _document(
    sources: Sequence[tuple[Path, str | None]],
    probed: Sequence[Probed],
    compared: Sequence[Difference],
    settings: ProbeSettings,
    report: Path | None,
    save: Path | None,
) -> dict[str, Any]:
    """Return what ``--json`` prints; the top level is about the first embedding."""
    first = probed[0]
    document: dict[str, Any] = {
        "embeddings": sources[0][0].name,
        **_identity(first.embeddings, sources[0][1]),
        **_settings(settings),
        "targets": first.to_json(),
        "report": None if report is None else str(report),
        "save": None if save is None else str(save),
    }
    if len(probed) > 1:
        document["embeddings"] = [
            {"name": one.name, "file": path.name, **_identity(one.embeddings, layer), "targets": one.to_json()}
            for (path, layer), one in zip(sources, probed, strict=True)
        ]
        document["differences"] = [difference.to_json() for difference in compared]
    return document


def _identity(embeddings: Embeddings, layer: str | None) -> dict[str, Any]:
    return {
        "scans": len(embeddings.features),
        "features": embeddings.features.shape[1],
        "simulated": bool(embeddings.attrs.get("simulated")),
        "model": embeddings.attrs.get("model"),
        "weights": embeddings.attrs.get("weights"),
        "layer": layer,
    }


def _settings(settings: ProbeSettings) -> dict[str, Any]:
    """Return the settings for people and programs; of a file only its name."""
    return {
        "folds": settings.folds,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "confounds": list(settings.confounds),
        "groups": settings.groups.name if isinstance(settings.groups, Path) else settings.groups,
        "kinship": settings.kinship,
        "bins": {name: of if isinstance(of, int) else list(of) for name, of in settings.bins.items()},
        "permutations": settings.permutations,
        "bootstrap": settings.bootstrap,
    }


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        warn(f"error: {error}")
        sys.exit(1)
