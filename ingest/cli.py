"""The ``ingest`` command."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Annotated

import typer
from dask.utils import parse_bytes
from rich.logging import RichHandler

from ingest.command import GOES_ON, run_app
from ingest.consoles import errors, print_line
from ingest.default_command import RunByDefault
from ingest.dictionary import VARIABLES
from ingest.inspection import summarise_store
from ingest.layouts import Layout
from ingest.places import Place, as_place
from ingest.printing import (
    print_dictionary,
    print_ingest,
    print_report,
    print_store,
    print_verify,
    print_withdrawal,
)
from ingest.progress import progress_bar
from ingest.report import write_report
from ingest.run import ingest
from ingest.scan import EXPECTED_ABSENCES, ScanRow
from ingest.settings import IngestSettings, Space
from ingest.simulate import MOST_PARTICIPANTS, SimulatedLayout, simulate_cohort
from ingest.store import DEFAULT_SLAB
from ingest.verify import SAMPLE, verify
from ingest.withdraw import withdraw

_MOST_ROWS = 10_000  # a page holds the pictures of fewer

#: What to do after Ctrl-C, by command.
_AFTER_CTRL_C = {
    "run": GOES_ON,
    "inspect": "",
    "withdraw": GOES_ON,
    "verify": "",
    "report": "",
    "dictionary": "",
    "simulate": "remove DIR, and run the same command again",
}


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn brain scans into a chunked Zarr store:  ingest SRC OUT.zarr  (its options: ingest run --help)",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("run")
def run_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="UK Biobank zips, a BIDS tree, a folder of NIfTI files, or a manifest (CSV or TSV with the columns "
            "path, participant, session, modality). May be s3://bucket/prefix.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT.zarr", help="The store to make, go on with, or add to. May be s3://...")
    ],
    layout: Annotated[Layout, typer.Option(help="How the scans are named.")] = Layout.auto,
    image: Annotated[
        str | None,
        typer.Option(
            help="The one image type of the store. UKB: member (T1_brain_to_MNI, T2_FLAIR_brain_to_MNI); "
            "BIDS: suffix, with entities (T1w, space-MNI152NLin2009cAsym_T1w); flat: part of the name."
        ),
    ] = None,
    space: Annotated[
        Space, typer.Option(help="Space of the store; auto: that of the first readable scan.")
    ] = Space.auto,
    phenotypes: Annotated[str | None, typer.Option(help="CSV, TSV or parquet to join by participant.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0 works in this one, with a thread per core and one more.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A dask cluster to use, e.g. tcp://10.0.0.1:8786")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of all processes together, e.g. 4GB (bytes without a unit); with --scheduler, of each worker.",
        ),
    ] = None,
    slab: Annotated[
        int | None, typer.Option(min=1, help="Planes per LZ4 slab.", show_default=str(DEFAULT_SLAB))
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Read again what an earlier run failed to read.")
    ] = False,
    withdrawn: Annotated[
        str | None, typer.Option(metavar="LIST", help="People who withdrew: pass their scans over.")
    ] = None,
    allow_readd: Annotated[
        bool, typer.Option("--allow-readd", help="Take anybody, though people have been withdrawn from OUT.zarr.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.zarr if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ingest the scans of a folder (the default command)."""
    table = None if phenotypes is None else _place(phenotypes)
    if workers and scheduler is not None:
        raise typer.BadParameter("the scheduler has its own; leave one of them out", param_hint="--workers")
    settings = IngestSettings(layout=layout, image=image, space=space, phenotypes=table, slab=slab)
    limit = None if max_memory is None else _parse_bytes(max_memory)
    read = failures = 0
    with progress_bar("ingest", errors) as progress:
        bar = progress.add_task("ingest", total=None)

        def count(row: ScanRow) -> None:
            nonlocal read, failures
            read += row.source_size
            failures += row.status not in EXPECTED_ABSENCES | {"ok"}
            progress.update(bar, advance=1, bytes=read, failures=failures)

        summary = ingest(
            _place(source),
            _place(out),
            settings,
            workers=workers,
            scheduler=scheduler,
            max_memory=limit,
            overwrite=overwrite,
            retry_failed=retry_failed,
            withdrawn=None if withdrawn is None else _place(withdrawn),
            allow_readd=allow_readd,
            on_plan=lambda scans, _: progress.update(bar, total=scans),
            on_scan=count,
        )
    if as_json:
        print(json.dumps(summary.to_json()))
    else:
        print_ingest(summary, out)
    if not summary.clean:
        raise typer.Exit(1)


@app.command("inspect")
def inspect_command(
    store: Annotated[str, typer.Argument(metavar="OUT.zarr", help="A store.")],
    as_json: AsJson = False,
) -> None:
    """Print what is in a store."""
    summary = summarise_store(_place(store))
    if as_json:
        print(json.dumps(summary.to_json()))
    else:
        print_store(summary, store)


@app.command("withdraw")
def withdraw_command(
    list_file: Annotated[Path, typer.Argument(metavar="LIST", help="One participant id a line.")],
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Volume stores, embeddings, report pages.")],
    as_json: AsJson = False,
) -> None:
    """Remove people who withdrew from every store named, for good."""
    record = withdraw(list_file, [_place(store) for store in stores])
    if as_json:
        print(json.dumps(record.to_json()))
    else:
        print_withdrawal(record)
    if not record.clean:
        raise typer.Exit(1)


@app.command("verify")
def verify_command(
    store: Annotated[str, typer.Argument(metavar="OUT.zarr", help="A store.")],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="The folder that was ingested: compare with its scans.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, help="How many scans to compare; 0 compares all.", show_default=str(SAMPLE))
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Ingest damaged scans again; needs --against.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads; 0 takes one per core, at most 8.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a store, and name the scans that are damaged."""
    if repair and against is None:
        raise typer.BadParameter("a repair reads the sources again; add --against SRC", param_hint="--repair")
    if sample is not None and against is None:
        raise typer.BadParameter("only sources are compared; add --against SRC", param_hint="--sample")
    with progress_bar("verify", errors) as progress:
        bar = progress.add_task("verify", total=None)
        report = verify(
            _place(store),
            against=None if against is None else _place(against),
            sample=SAMPLE if sample is None else sample,
            repair=repair,
            threads=workers or None,
            on_plan=lambda scans: progress.update(bar, total=scans),
            on_scan=lambda _: progress.advance(bar),
        )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print_verify(report, store)
    if not report.clean:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    store: Annotated[str, typer.Argument(metavar="OUT.zarr", help="A store.")],
    page: Annotated[Path, typer.Argument(metavar="REPORT.html", help="The page to write; another report is replaced.")],
    rows: Annotated[
        str, typer.Option(metavar="ROWS", help="Scans to show with their picture before all others: 17,400-420")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Threads; 0 takes one per core, at most 8.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about every scan: outliers first, with pictures, numbers and failures."""
    wanted = _parse_rows(rows)
    with progress_bar("report", errors) as progress:
        bar = progress.add_task("report", total=None)
        summary = write_report(
            _place(store),
            page,
            rows=wanted,
            threads=workers or None,
            on_plan=lambda volumes: progress.update(bar, total=volumes),
            on_scan=lambda _: progress.advance(bar),
        )
    if as_json:
        print(json.dumps(summary.to_json()))
    else:
        print_report(summary)
    if not summary.clean:
        raise typer.Exit(1)


@app.command("dictionary")
def dictionary_command(as_json: AsJson = False) -> None:
    """Print the phenotypes that are known: field, title, task, units, codes, source."""
    if as_json:
        print(json.dumps({"variables": [variable.to_json() for variable in VARIABLES]}))
    else:
        print_dictionary(VARIABLES)


@app.command("simulate")
def simulate_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    participants: Annotated[
        int, typer.Option(min=1, max=MOST_PARTICIPANTS, help="People; about one in twenty has two scans.")
    ],
    layout: Annotated[SimulatedLayout, typer.Option(help="UK Biobank's zips, or BIDS.")] = SimulatedLayout.ukb,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a cohort with known effects, for anyone without access to UK Biobank."""
    with progress_bar("simulate", errors) as progress:
        bar = progress.add_task("simulate", total=None)
        scans = simulate_cohort(
            directory,
            participants,
            layout=str(layout),
            seed=seed,
            on_plan=lambda scans: progress.update(bar, total=scans),
            on_scan=lambda: progress.advance(bar),
        )
    if as_json:
        print(json.dumps({"directory": str(directory), "scans": scans, "participants": participants, "seed": seed}))
        return
    done = f"{directory}: {scans} scans of {participants} simulated participants"
    print_line(done)


def _parse_rows(text: str) -> list[int]:
    """Read ``17,400-420``."""
    rows: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        span = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not 0 < len(span) <= _MOST_ROWS:
            raise typer.BadParameter(
                f"{part!r} is neither a row nor a range of at most {_MOST_ROWS:,}; expected e.g. 17,400-420",
                param_hint="--rows",
            )
        rows += span
    return rows


def _place(text: str) -> Place:
    try:
        return as_place(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _parse_bytes(text: str) -> int:
    """Read a size such as ``4GB``, ``512 MiB`` or ``2e9``."""
    try:
        size = int(parse_bytes(text)) if re.match(r"\s*[\d.]", text) else 0  # "" and "GB" would be 1 of something
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is no size; expected e.g. 4GB or 512MiB", param_hint="--max-memory")
    return size


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1."""
    # Warnings and errors: dask tells of everything that it does.
    handler = RichHandler(logging.WARNING, console=errors, show_time=False, show_path=False)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    run_app(app, _AFTER_CTRL_C)
