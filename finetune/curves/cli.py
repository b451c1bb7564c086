"""The ``finetune curve`` command."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress as Bar
from rich.progress import TaskID

from finetune.curves.settings import CurveSettings, make_curve_settings
from finetune.options import Config, option_of, settings_from, with_settings
from finetune.settings import read_settings
from ingest.consoles import errors, print_line
from ingest.progress import progress_bar

if TYPE_CHECKING:
    from finetune.curves.work import CurveProgress


@functools.partial(with_settings, without=("bootstrap",))  # it draws people itself, see --draws
def curve_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store made by ingest, or s3://bucket/store.zarr")],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the curve; many may work on one.")],
    train_sizes: Annotated[
        str, typer.Option(metavar="N,N", help="People to train on; auto: 25, 50, 100 ... and all there are.")
    ] = "auto",
    methods: Annotated[str, typer.Option(metavar="A,B", help="Those to run.")] = "transfer,scratch,probe",
    seeds: Annotated[str, typer.Option(metavar="N", help="Repeats, or their numbers with commas between.")] = "5",
    scratch_lr: Annotated[
        float | None, typer.Option(help="Learning rate from random weights.", show_default="the same")
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Of the people tested, for intervals.")] = 2000,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for what other processes have begun.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Keep the network of each cell.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **flags: Any,
) -> None:
    """Learning curves: fine-tuned, from scratch, and frozen with a probe, over numbers of people to train on."""
    if config is not None:
        _refuse_options(config)
    settings = settings_from(config, flags)
    curve = make_curve_settings(
        {
            "sizes": train_sizes, "methods": methods, "seeds": seeds, "scratch_lr": scratch_lr, "draws": draws,
            "wait": wait, "retry_failed": retry_failed, "keep_weights": keep_weights,
        },
        "the command",
        named=_option_of,
    )  # fmt: skip
    # Here and not above: torch takes seconds to import, and --help does not wait for it.
    from finetune.curves.files import PAGE
    from finetune.curves.printing import cell_lines, print_curve
    from finetune.curves.running import run_curve

    with progress_bar("curve", errors) as bar:
        task = bar.add_task("curve", total=None)
        tell = None if errors.is_terminal or as_json else cell_lines(errors)

        def show(progress: CurveProgress) -> None:
            _show(bar, task, progress)
            if tell is not None:
                tell(progress)

        result = run_curve(store, run_dir, settings, curve, on_progress=show)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_curve(result)
        print_line(f"page: {run_dir / PAGE}")
    if result.failed or len(result.unfinished) > result.elsewhere:  # others answer for what they are at
        raise typer.Exit(1)


def _refuse_options(config: Path) -> None:
    """Raise ValueError if a file of settings, which are those of each training, has some of the curve."""
    for name in read_settings(config):
        if name in ("train_sizes", "train-sizes") or name.replace("-", "_") in CurveSettings.model_fields:
            raise ValueError(
                f"{config}: {name} is not of a training, but of the curve; take it out of the file, and give the "
                f"command {_option_of(name)}"
            )


def _option_of(name: str) -> str:
    return "--train-sizes" if name == "sizes" else option_of(name)


def _show(bar: Bar, task: TaskID, progress: CurveProgress) -> None:
    cell, training = progress.cell, progress.training
    notes = str(cell)
    if training is not None:
        notes += f", step {training.step}/{training.steps}, loss {training.loss:.3f}"
    bar.update(task, completed=progress.done, total=progress.total, notes=notes)
