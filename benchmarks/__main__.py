"""``python -m benchmarks loaders``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.loaders import run_loaders
from benchmarks.results import save, show

DIRECTORY = Path("build/benchmarks/loaders")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure speed, as ratios taken in one run.")


@app.callback()
def _commands() -> None:
    """Keep the name of the benchmark on the command line while there is only one."""


@app.command()
def loaders(
    scans: Annotated[int, typer.Option(min=8, help="Volumes to read.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads and processes.", show_default="cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Epochs of everything but MONAI.")] = 5,
    directory: Annotated[Path, typer.Option(help="Where the simulated cohort is kept.")] = Path(
        "build/benchmarks/loaders"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there.")] = None,
) -> None:
    """Read volumes in random order: ours, MONAI, and the limit."""
    report = run_loaders(directory, scans=scans, batch_size=batch_size, workers=workers, repeats=repeats)
    show(report, Console())
    if json_file:
        save(report, json_file)


if __name__ == "__main__":
    app()
