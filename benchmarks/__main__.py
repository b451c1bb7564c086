"""``python -m benchmarks`` and what to measure; each command imports what it alone needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.results import Report, save, show

DIRECTORY = Path("build/benchmarks")

Directory = Annotated[Path, typer.Option(help="Where simulated cohorts are kept.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure speed, as ratios taken in one run.")


@app.command()
def loaders(
    scans: Annotated[int, typer.Option(min=8, help="Volumes to read.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads and processes.", show_default="cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Epochs of ours and the limit.")] = 5,
    peers: Annotated[bool, typer.Option(help="Measure them, too.")] = True,
    many: Annotated[int, typer.Option(min=100, help="Tiny scans over which memory is watched.")] = 100_000,
    directory: Directory = DIRECTORY / "loaders",
    json_file: JsonFile = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the speeds there (.png or .svg).")] = None,
) -> None:
    """Read scans in random order: ours, the peers, and the limit, with a warm and a cold page cache."""
    from benchmarks.charts import bar_chart
    from benchmarks.loaders import run_loaders

    report = run_loaders(
        directory, scans=scans, batch_size=batch_size, workers=workers, repeats=repeats, peers=peers, many=many
    )
    show(report, Console())
    memory = report.settings["memory"]
    print(f"memory: {memory['volumes_mb']} MiB, at most {memory['volumes_limit_mb']}; over {memory['tiny_scans']} tiny "
          f"scans {memory['tiny_mb']}, the first batch after {memory['tiny_start_s']} s")  # fmt: skip
    if json_file:
        save(report, json_file)
    if chart:
        bar_chart(report, chart)


@app.command("loaders-gpu")
def loaders_gpu(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark itself.")] = "cuda",
    scans: Annotated[int, typer.Option(min=4, help="Scans of each store.")] = 8192,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Planes, rows, columns of a volume.")] = (160, 192, 160),
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=0, help="Of each measurement.")] = 6.0,
    directory: Directory = DIRECTORY / "loaders-gpu",
    json_file: JsonFile = None,
) -> None:
    """Load onto a GPU: inflated there or decoded here, by thickness of slabs, with networks behind; 8 minutes."""
    from benchmarks.loaders_gpu import run_loaders_gpu

    report = run_loaders_gpu(
        directory,
        device=device,
        scans=scans,
        shape=shape,
        batch_size=batch_size,
        seconds=seconds,
        on_report=_keeping(json_file),
    )
    show(report, Console())
    _end(report, json_file)


@app.command("extract")
def extract_command(
    scans: Annotated[
        int | None, typer.Option(min=1, help="Of a turn, at most.", show_default="by network and device")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    stored: Annotated[int, typer.Option(min=1, help="Scans of the simulated store.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    directory: Directory = DIRECTORY / "loaders",
    json_file: JsonFile = None,
) -> None:
    """Embed scans: a plain loop, plain torchvision, our networks fed from memory, and extract; 7 minutes."""
    from benchmarks.extract import run_extract

    report = run_extract(
        directory, scans=scans, repeats=repeats, stored=stored, device=device, on_report=_keeping(json_file)
    )
    show(report, Console())
    _end(report, json_file)


@app.command("probe")
def probe_command(
    scans: Annotated[int, typer.Option(min=100)] = 40_000,
    few_scans: Annotated[int, typer.Option(min=100, help="Of a second cohort.")] = 2_000,
    features: Annotated[int, typer.Option(min=4)] = 512,
    phenotypes: Annotated[int, typer.Option(min=1, help="Continuous ones, which ours probes at once.")] = 1_000,
    patterns: Annotated[int, typer.Option(min=1, help="Of missing values that those have.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything with few scans.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Probe embeddings: ours, scikit-learn's nested pipelines, the limit, and many phenotypes at once; 10 minutes."""
    from benchmarks.probe import run_probe

    report = run_probe(
        scans=scans, few_scans=few_scans, features=features, turns=repeats, phenotypes=phenotypes, patterns=patterns
    )
    show(report, Console())
    for count, seconds in report.settings["limit_seconds"].items():
        print(f"limit with {count} scans: {seconds} s at {report.settings['gemm_gflops']} GFLOP/s")
    if json_file:
        save(report, json_file)


@app.command("finetune")
def finetune_command(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[tuple[int, int, int], typer.Option(help="Planes, rows, columns of a volume.")] = (160, 192, 160),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Counted in each turn.", show_default="by network and device")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, show_default="by network and device")] = None,
    directory: Directory = DIRECTORY / "finetune",
    json_file: JsonFile = None,
) -> None:
    """Train from a store, and the same networks fed from memory; 4 minutes."""
    from benchmarks.finetune import MEMORY, STORE, TARGET, run_finetune

    report = run_finetune(
        directory, device=device, shape=shape, steps=steps, turns=turns, on_report=_keeping(json_file)
    )
    show(report, Console())
    ratios = {name: ratio for name, ratio in report.ratios.items() if name.endswith(f"{STORE}/{MEMORY}")}
    slow = [name for name, ratio in ratios.items() if ratio < TARGET]
    answer = f"no, not of {'; '.join(slow)}" if slow else "yes, of all"
    print(f"{STORE}/{MEMORY} at least {TARGET:g}: {answer}")
    _end(report, json_file)


@app.command("finetune-cohort")
def finetune_cohort_command(
    directory: Directory = DIRECTORY / "finetune-cohort",
    json_file: JsonFile = None,
) -> None:
    """Fine-tune on 400 simulated people: what shows, what does not, and the frozen probe beside; 12 minutes."""
    from benchmarks.finetune_cohort import run_finetune_cohort, show_cohort

    report = run_finetune_cohort(directory)
    show_cohort(report, Console())
    if json_file:
        save(report, json_file)


@app.command("nulls")
def nulls_command(
    probe_seeds: Annotated[int, typer.Option(min=0, help="Exchanges of the phenotypes that are probed.")] = 20,
    finetune_seeds: Annotated[int, typer.Option(min=0, help="Exchanges that are fine-tuned for.")] = 20,
    directory: Directory = DIRECTORY / "finetune-cohort",
    json_file: JsonFile = None,
) -> None:
    """Probe and fine-tune for phenotypes without effect, and count the intervals that hold chance; 25 minutes."""
    from benchmarks.nulls import run_nulls, show_nulls

    report = run_nulls(directory, probe_seeds=probe_seeds, finetune_seeds=finetune_seeds)
    show_nulls(report, Console())
    if json_file:
        save(report, json_file)


@app.command("transfer")
def transfer_command(
    minutes: Annotated[float, typer.Option(min=0, help="Begin only if it takes no longer.")] = 75,
    directory: Directory = DIRECTORY / "transfer",
    json_file: JsonFile = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves there (.png).")] = None,
    words: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there what they say (.md).")] = None,
) -> None:
    """Pre-train on a simulated cohort, and go on with another one and with real scans, by sample size; 45 minutes."""
    from benchmarks.transfer import run_transfer, write_chart, write_words
    from finetune.curves import print_curve

    found = run_transfer(directory, minutes=minutes)
    for name, result in found.curves:
        print(f"\n{name}")
        print_curve(result, Console())
    if json_file:
        save(found.report, json_file)
    if chart:
        write_chart(found, chart)
    if words:
        write_words(found, words)


@app.command("ingest")
def ingest_command(
    scans: Annotated[int, typer.Option(min=4, help="Archives to ingest.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything but the peers.")] = 3,
    directory: Directory = DIRECTORY / "ingest",
    json_file: JsonFile = None,
) -> None:
    """Ingest archives: ours, nibabel with zarr-python, dask, and the limit."""
    from benchmarks.ingest import run_ingest

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
    from benchmarks.tables import run_tables

    report = run_tables(directory, rows=rows, repeats=repeats)
    show(report, Console())
    for name, seconds in report.settings["seconds"].items():
        target = report.settings["targets_s"].get(name)
        print(f"{name}: {seconds:.2f} s" + (f" (with 100,000 rows at most {target:g} s)" if target else ""))
    if json_file:
        save(report, json_file)


def _keeping(json_file: Path | None) -> Callable[[Report], None]:
    """Return what prints and keeps what there is of a report: a GPU may be there for minutes only."""

    def keep(report: Report) -> None:
        failed = f"; {len(report.settings['failures'])} failures" if report.settings["failures"] else ""
        for result in report.results[-1:]:
            print(f"{result.name}: {result.value} {result.unit}{failed}", flush=True)
        if json_file:
            save(report, json_file)

    return keep


def _end(report: Report, json_file: Path | None) -> None:
    """Write a report, and say what failed."""
    if json_file:
        save(report, json_file)
    for name, reason in report.settings["failures"].items():
        print(f"failed: {name}: {reason.splitlines()[0]}")
    if report.settings["failures"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
