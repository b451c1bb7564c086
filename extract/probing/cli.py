"""The ``probe`` command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from extract.embeddings import open_embeddings
from extract.probing.apply import (
    apply_probe,
    check_model_suffix,
    check_table_suffix,
    confound_warnings,
    load_probe,
    save_probe,
    write_predictions,
)
from extract.probing.arguments import (
    name_or_table,
    parse_bins,
    parse_pairs,
    parse_place,
    parse_sizes,
    sizes_follow,
    split_names,
)
from extract.probing.compare import Probed, align, differences, distinct_names, probe_all
from extract.probing.confounds import missing_warnings, number_warnings, read_confounds
from extract.probing.document import settings_to_json, to_document
from extract.probing.doubts import check_not_empty, doubts
from extract.probing.effort import MANY_PATTERNS, estimate_effort
from extract.probing.model import refit_all
from extract.probing.phenotypes import Joined, join_table, without_variables
from extract.probing.printing import (
    print_comparison,
    print_curves,
    print_embeddings,
    print_json,
    print_phenotypes,
    print_results,
    print_skipped,
    print_written,
)
from extract.probing.probe import target_names
from extract.probing.replacing import check_absent, check_report_replaceable, check_saved_probe_replaceable
from extract.probing.settings import THIRD_DEGREE, ProbeSettings
from ingest.command import run_app
from ingest.consoles import errors, print_line
from ingest.default_command import RunByDefault
from ingest.progress import progress_bar
from ingest.replacing import check_page_suffix
from ingest.writing import check_writable


class _ProbeCommands(RunByDefault):
    """``--curve`` may stand without sizes, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for place, arg in enumerate(args):
            if arg == "--curve" and not sizes_follow(args[place + 1 : place + 2]):
                args = [*args[:place], "--curve=auto", *args[place + 1 :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ProbeCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fit linear probes to embeddings:  probe EMB  (its options: probe run --help)",
)

PhenotypeTable = Annotated[
    str | None,
    typer.Option(
        "--phenotypes",
        metavar="FILE",
        help="CSV, TSV or parquet to join by participant, as ingest does: beside, or instead of, those of the store.",
    ),
]
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
        str | None,
        typer.Option(
            metavar="A,B",
            help="Phenotypes; those with a comma in their name in quotes.",
            show_default="all but those that ingest marks as confounds",
        ),
    ] = None,
    phenotypes: PhenotypeTable = None,
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
        typer.Option(
            metavar="[SIZES]",
            help="Learning curve: train on 50, 100, 200 ... (of few people 12, 25 ...), or on 100,1000.",
        ),
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
    if report is not None:
        check_writable(report)
        check_report_replaceable(report)
    if save is not None:
        check_writable(save)
        check_saved_probe_replaceable(save)
    table = None if phenotypes is None else parse_place(phenotypes, "--phenotypes")
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
    named = {name: open_embeddings(path, one) for name, (path, one) in zip(labels, sources, strict=True)}
    for name, embeddings in named.items():
        check_not_empty(name, embeddings)
    joined: Joined | None = None
    if table is not None:  # the others have the phenotypes of the first; their own are not compared with the table's
        joined = join_table(named[labels[0]], table)
        named = {name: without_variables(one, joined.variables) for name, one in named.items()}
        named[labels[0]] = joined.embeddings
    warnings: list[str] = []
    if len(named) > 1:
        named, warnings = align(named)
    asked = None if targets is None else split_names(targets)
    first = named[labels[0]]
    names = target_names(first, asked)
    values = read_confounds(first, settings.confounds, tasks)
    warnings += number_warnings(first, values, tasks) + missing_warnings(values)
    with errors.status(f"looking at {len(names)} phenotypes"):  # of a thousand it takes a minute
        warnings += doubts(named, names, tasks=tasks, settings=settings)
        many = len(names) > MANY_PATTERNS
        effort = estimate_effort(first, names, tasks=tasks, settings=settings, confounds=values) if many else None
    if effort is not None and effort.patterns > MANY_PATTERNS:
        print_line(effort.in_words() + (f" for each of {len(named)} embeddings" if len(named) > 1 else ""), errors)
    with progress_bar("probe", errors) as progress:
        bar = progress.add_task("probe", total=None)
        probed = probe_all(
            named, names, tasks=tasks, settings=settings, curve=sizes,
            on_target=lambda _: progress.advance(bar), on_plan=lambda total: progress.update(bar, total=total),
        )  # fmt: skip
    compared = differences(probed) if len(probed) > 1 else []
    nothing = all(result.status != "ok" for one in probed for result in one.results)
    unsaved = save is not None and nothing
    of_table = [] if joined is None else joined.warnings
    for warning in of_table + warnings:
        print_line(f"warning: {warning}", errors)
    if as_json:
        document = to_document(
            sources, probed, compared, settings, phenotypes=joined, report=report, save=None if unsaved else save,
            warnings=of_table + warnings,
        )  # fmt: skip
        print_json(document)
    else:
        for (path, _), embeddings in zip(sources, named.values(), strict=True):
            print_embeddings(path, embeddings)
        if joined is not None:
            print_phenotypes(joined)
        if len(probed) > 1:
            print_comparison(probed, compared)
        else:
            print_results(probed[0].results)
        print_curves(probed)
        print_skipped(probed)
    # Files come last: if one cannot be written, the scores have been printed.
    if save is not None and not unsaved:
        _save(save, probed[0], tasks, settings, layers[0], joined)
        if not as_json:
            print_written("models", save)
    if report is not None:
        from extract.probing.report import write_report  # drawing needs matplotlib, which takes a second to import

        shown = write_report(
            report, probed, differences=compared, settings=settings_to_json(settings), phenotypes=joined, store=store,
            warnings=warnings,
        )  # fmt: skip
        for warning in shown[len(warnings) :]:
            print_line(f"warning: {warning}", errors)
        if not as_json:
            print_written("report", report)
    if unsaved:
        raise ValueError(f"every target was skipped, so there is no model for {save}")
    if (
        (joined is not None and joined.bad_values)
        or nothing
        or (asked is not None and any(found.status == "skipped" for one in probed for found in one.results))
        or any(size in found.missing for size in sizes or () for one in probed for found in one.curves.values())
    ):
        raise typer.Exit(1)


@app.command("apply")
def apply_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.json", help="Saved by probe EMB --save MODEL.json")],
    path: Annotated[Path, typer.Argument(metavar="EMB", help="Embeddings made in the same way, of anybody.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Predictions to write: .csv or .parquet")],
    phenotypes: PhenotypeTable = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict for new people with probes that were saved: values, classes and their probabilities, per scan."""
    check_table_suffix(out)
    check_writable(out)
    table = None if phenotypes is None else parse_place(phenotypes, "--phenotypes")
    check_absent(out, overwrite=overwrite, inputs=[one for one in (model, path, table) if isinstance(one, Path)])
    saved = load_probe(model)
    embeddings = open_embeddings(path, saved.layer)
    joined = None if table is None else join_table(embeddings, table)
    if joined is not None:
        embeddings = joined.embeddings
    predictions = apply_probe(saved, embeddings)
    write_predictions(out, predictions)
    for warning in ([] if joined is None else joined.warnings) + confound_warnings(saved, embeddings):
        print_line(f"warning: {warning}", errors)
    simulated = saved.simulated or bool(embeddings.attrs.get("simulated"))
    targets = [one.name for one in saved.models]
    if as_json:
        print_json({
            "predictions": str(out), "scans": len(predictions), "targets": targets, "simulated": simulated,
            "phenotypes": None if joined is None else joined.to_json(),
        })  # fmt: skip
    else:
        count = f"{len(predictions)} scans x {len(targets)} targets ({', '.join(targets)})"
        print_written("predictions", Path(f"{out}: {count}" + (", simulated data" if simulated else "")))
    if joined is not None and joined.bad_values:
        raise typer.Exit(1)


def _save(
    path: Path,
    probed: Probed,
    tasks: dict[str, str],
    settings: ProbeSettings,
    layer: str | None,
    joined: Joined | None,
) -> None:
    """Fit what was probed to everyone and write it."""
    scores = {result.name: result.headline for result in probed.results if result.status == "ok"}
    with progress_bar("fitting to everyone", errors) as progress:
        bar = progress.add_task("fitting to everyone", total=len(scores))
        fitted = refit_all(
            probed.embeddings, list(scores), tasks=tasks, settings=settings, on_target=lambda _: progress.advance(bar)
        )
    models = [replace(model, score=scores[model.name]) for model in fitted]
    save_probe(path, probed.embeddings, models, layer=layer, phenotypes=None if joined is None else joined.to_json())


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1."""
    run_app(app, {"run": "", "apply": ""})
