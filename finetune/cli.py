"""The ``finetune`` command."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

from extract.errors import WEIGHTS_UNAVAILABLE, WeightsUnavailableError, is_out_of_memory
from finetune.curves.cli import curve_command
from finetune.errors import NonFiniteLossError
from finetune.options import Config, settings_from, with_settings
from ingest.command import GOES_ON, run_app
from ingest.consoles import console, errors, print_line
from ingest.default_command import RunByDefault
from ingest.progress import progress_bar

if TYPE_CHECKING:
    from finetune.run import Progress

#: What to do after Ctrl-C, by command.
_AFTER_CTRL_C = {
    "run": "the same command{} goes on at the last checkpoint",
    "predict": "",
    "export": "",
    "curve": GOES_ON,
}

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a network for a phenotype:  finetune STORE RUN_DIR --target NAME  (options: finetune run --help)",
)

Store = Annotated[str, typer.Argument(metavar="STORE", help="A store made by ingest, or s3://bucket/store.zarr")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run; of one that was killed, to go on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew, if RUN_DIR is that of a run.")]


@app.command("run")
@with_settings
def run_command(
    store: Store,
    run_dir: RunDir,
    config: Config = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train, choose the best epoch by validation, and score it on people who were held back (the default command)."""
    # Here and not above, as in every command: torch takes seconds to import, and --help does not wait for it.
    from extract.distributed import join_group
    from finetune.printing import epoch_lines, print_result
    from finetune.results import SETTINGS
    from finetune.run import finetune

    given = {name for name, value in flags.items() if value is not None and value != []}
    if config is None and (run_dir / SETTINGS).is_file() and "target" not in given:
        config = run_dir / SETTINGS  # to go on, it is enough to name the run
    settings = settings_from(config, flags)
    logging.getLogger("loaders").addFilter(_is_no_skipped_scan)
    with join_group() as group:
        with progress_bar("finetune", errors if group.rank == 0 else Console(quiet=True)) as bar:
            task = bar.add_task("finetune", total=None)
            tell = None if group.rank or errors.is_terminal or as_json else epoch_lines(errors)

            def show(progress: Progress) -> None:
                _show(bar, task, progress)
                if tell is not None:
                    tell(progress)

            result = finetune(store, run_dir, settings, group=group, overwrite=overwrite, on_progress=show)
        if group.rank:
            return
    print_result(result, console, errors, as_json=as_json)
    asked = settings.test > 0 or result.scans["test"] > 0
    if result.skipped or (asked and any(one.status != "ok" for one in result.test)):
        raise typer.Exit(1)


Run = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, or a checkpoint of one.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, if it is there.")]


@app.command("predict")
def predict_command(
    store: Store,
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Predictions to write: .parquet or .csv")],
    where: Annotated[str | None, typer.Option(help='Only scans of which this is true, such as "age >= 60".')] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, dali or torch.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="that of the run")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Scans at a time.", show_default="by free memory")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the loader.", show_default="one per core, at most 8; 16 for a GPU, or s3://"),
    ] = None,
    overwrite: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Predict for the scans of any store with a finished run: a table with a row per scan."""
    from finetune.predict import predict_to
    from finetune.printing import print_predicted

    logging.getLogger("loaders").addFilter(_is_no_skipped_scan)
    with progress_bar("predict", errors) as bar:
        task = bar.add_task("predict", total=None)
        done = predict_to(
            out, store, run, where=where, device=device, backend=backend, precision=precision, batch_size=batch_size,
            threads=threads, overwrite=overwrite, on_plan=lambda scans: bar.update(task, total=scans),
            on_batch=lambda scans: bar.advance(task, scans),
        )  # fmt: skip
    print_predicted(done, console, errors, as_json=as_json)
    if done.skipped:
        raise typer.Exit(1)


@app.command("export")
def export_command(
    run: Run,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Encoder's weights by torchvision's names, .pt, or torch.export, .pt2")
    ],
    overwrite: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Write a network for use elsewhere: the weights of its encoder, or all of it as a program."""
    from finetune.export import export_run

    done = export_run(run, out, overwrite=overwrite)
    for warning in done.warnings:
        print_line(f"warning: {warning}", errors)
    if as_json:
        print(json.dumps({"path": str(done.path), **done.description, "warnings": list(done.warnings)}))
    else:
        print_line(done.in_words())


app.command("curve")(curve_command)


def _is_no_skipped_scan(record: logging.LogRecord) -> bool:
    """Tell of a message of the loader whether it is another one than of those that the summary repeats."""
    return not record.getMessage().startswith("skipped:")


def _show(bar: Bar, task: TaskID, progress: Progress) -> None:
    from finetune.printing import progress_words

    notes = [f"epoch {min(progress.epoch + 1, progress.epochs)}/{progress.epochs}", *progress_words(progress)]
    notes += [f"{progress.scans_per_second:.1f} scans/s"] if progress.scans_per_second else []
    notes += [f"starved {progress.starved:.0%}"] if progress.scans_per_second else []
    bar.update(task, completed=progress.step, total=progress.steps, notes=", ".join(notes))


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1, or 3 if weights cannot be had."""
    try:
        run_app(app, _AFTER_CTRL_C, codes={WeightsUnavailableError: WEIGHTS_UNAVAILABLE, NonFiniteLossError: 1})
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        what = f"the GPU has not enough memory ({reason}); use a smaller --micro-batch, --checkpointing or --scale"
        print_line(f"error: {what}", errors)
        sys.exit(1)


if __name__ == "__main__":
    main()
