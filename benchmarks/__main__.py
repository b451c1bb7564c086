"""``python -m benchmarks loaders``, ``ingest`` or ``tables``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.ingest import run_ingest
from benchmarks.loaders import run_loaders
from benchmarks.results import save, show
from benchmarks.tables import run_tables

DIRECTORY = Path("build/benchmarks")

Directory = Annotated[Path, typer.Option(help="Where simulated cohorts are kept.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure speed, as ratios taken in one run.")


@app.command()
def loaders(
    scans: Annotated[int, typer.Option(min=8, help="Volumes to read.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads and processes.", show_default="cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Epochs of everything but MONAI.")] = 5,
    directory: Directory = DIRECTORY / "loaders",
    json_file: JsonFile = None,
) -> None:
    """Read volumes in random order: ours, MONAI, and the limit."""
    report = run_loaders(directory, scans=scans, batch_size=batch_size, workers=workers, repeats=repeats)
    show(report, Console())
    if json_file:
        save(report, json_file)


@app.command("ingest")
def ingest_command(
    scans: Annotated[int, typer.Option(min=4, help="Archives to ingest.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything but the peers.")] = 3,
    directory: Directory = DIRECTORY / "ingest",
    json_file: JsonFile = None,
) -> None:
    """Ingest archives: ours, nibabel with zarr-python, dask, and the limit."""
    report = run_ingest(directory, scans=scans, repeats=repeats)
    show(report, Console())
    for machine, hours in report.settings["hours_for_40000_scans"].items():
        print(f"40,000 scans with {machine}: {hours} h")
    if json_file:
        save(report, json_file)


@app.command()
def tables(
    rows: Annotated[int, typer.Option(min=1000, max=900_000, help="Scans of the store.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, max=10)] = 3,
    directory: Directory = DIRECTORY / "tables",
    json_file: JsonFile = None,
) -> None:
    """Handle a store of very many rows: inspect, open, withdraw, discover, join."""
    report = run_tables(directory, rows=rows, repeats=repeats)
    show(report, Console())
    for name, seconds in report.settings["seconds"].items():
        target = report.settings["targets_s"].get(name)
        print(f"{name}: {seconds:.2f} s" + (f" (with 100,000 rows at most {target:g} s)" if target else ""))
    if json_file:
        save(report, json_file)


if __name__ == "__main__":
    app()
