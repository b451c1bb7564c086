"""The ``extract`` command."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from extract.errors import WEIGHTS_UNAVAILABLE, WeightsUnavailableError, is_out_of_memory
from ingest.command import GOES_ON, run_app
from ingest.consoles import errors, print_line
from ingest.progress import progress_bar
from loaders.views import View

if TYPE_CHECKING:
    from extract.encoder import Encoder
    from extract.resume import ExtractSummary
    from extract.timing import Timing

_SHOWN_SKIPPED = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def extract_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store made by ingest, or s3://bucket/store.zarr")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Embeddings to write: .zarr, .h5, .parquet or .npz")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A ResNet of torchvision (2D: resnet18, ...) or video network (3D: r3d_18, s3d, ...).",
            show_default="resnet18, or that of RUN_DIR",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="imagenet, kinetics, random, FILE, or RUN_DIR of finetune: then scans are seen as they were there.",
            show_default="those of the model",
        ),
    ] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="Folder with torchvision's files.", show_default="torchvision's cache")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="E.g. layer2,layer3,avgpool.", show_default="what the classifier sees")
    ] = None,
    pooling: Annotated[str, typer.Option(help="mean, max or both, over positions and slices.")] = "mean",
    view: Annotated[View | None, typer.Option(help="Slices of a 2D model.", show_default="triplanar")] = None,
    slices: Annotated[
        int | None, typer.Option(min=1, help="Slices per plane, of a 2D model.", show_default="3")
    ] = None,
    crop: Annotated[str | None, typer.Option(help="Z,Y,X: the central part of each volume.")] = None,
    size: Annotated[str | None, typer.Option(help="Resize each picture to N, H,W or Z,Y,X.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Or by a factor, e.g. 0.5 for half resolution.", show_default="1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights.", show_default="0")] = None,
    backend: Annotated[str, typer.Option(help="auto, dali or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile, slow to start.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Scans at a time.", show_default="by free memory")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, if it is embeddings of any kind.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Embed every scan of a store with a frozen network."""
    # Here and not above: torch takes seconds to import, and neither --help nor a misspelt option waits for it.
    from extract.distributed import join_group
    from extract.embeddings import check_suffix, local_path
    from extract.encoder import InputWarning, build_encoder
    from extract.fast import CompileWarning
    from extract.models import about_pictures
    from extract.resume import extract_to
    from extract.weights import about_store
    from ingest.store import open_store

    path = local_path(out)
    check_suffix(path)
    if seed is not None and weights != "random":
        raise ValueError(f"seed is {seed}, but only random weights depend on it; leave it out, or use --weights random")
    with join_group() as group:
        with group.first_here(), warnings.catch_warnings(record=True) as warned:
            for kind in (CompileWarning, InputWarning):
                warnings.simplefilter("always", kind)
            volumes = open_store(store)  # before weights are looked for
            encoder = build_encoder(
                model, weights=weights, weights_dir=weights_dir, layers=_names(layers), pooling=pooling, view=view,
                slices=slices, crop=_numbers("crop", crop), size=_numbers("size", size), scale=scale, seed=seed or 0,
                device=group.device(device), precision=precision, compiled=compiled,
            )  # fmt: skip
            if slices is not None and encoder.view is View.volume:
                raise ValueError(f"slices is {slices}, but {encoder.model} sees whole volumes; leave it out")
            sizes = encoder.picture_sizes(volumes.grid.shape_zyx)
        told = [str(warning.message) for warning in warned] + about_store(encoder.weights, volumes)
        if encoder.weights.trained is None:  # others were trained on what they see, or differ, which is said
            told += about_pictures(encoder.model, sizes)
        for warning in told if group.rank == 0 else []:
            print_line(f"warning: {warning}", errors)
        logging.getLogger("loaders").addFilter(_is_no_skipped_scan)
        name = "extract" if group.size == 1 else f"extract (process 1 of {group.size})"
        with progress_bar(name, errors if group.rank == 0 else Console(quiet=True)) as progress:
            bar = progress.add_task("extract", total=None)

            def show(timing: Timing) -> None:
                progress.update(bar, completed=timing.scans, busy=timing.busy)

            summary = extract_to(
                path, store, encoder, backend=backend, batch_size=batch_size, overwrite=overwrite, group=group,
                on_plan=lambda scans: progress.update(bar, total=scans), on_batch=show,
            )  # fmt: skip
    if summary is not None:
        _print_summary(path, encoder, summary, as_json=as_json)
        if summary.skipped:
            raise typer.Exit(1)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected whole numbers with commas between them") from None


def _is_no_skipped_scan(record: logging.LogRecord) -> bool:
    """Tell of a message of the loader whether it is another one than of those that the summary repeats."""
    return not record.getMessage().startswith("skipped:")


def _print_summary(out: Path, encoder: Encoder, summary: ExtractSummary, *, as_json: bool) -> None:
    """Print what a run did; scans that were left out go to stderr."""
    speed = summary.embedded / summary.seconds
    simulated = summary.attrs["simulated"]
    for row, reason in list(summary.skipped.items())[:_SHOWN_SKIPPED]:
        print_line(f"skipped: row {row}: {reason}", errors)
    if summary.skipped:
        more = len(summary.skipped) - _SHOWN_SKIPPED
        print_line(
            (f"... and {more} more; " if more > 0 else "")
            + f"{len(summary.skipped)} scans are left out; repair them with ingest verify STORE --against SRC "
            "--repair, then run the same command again",
            errors,
        )
    if as_json:
        document = {
            "scans": summary.scans,
            "features": summary.features,
            "embedded": summary.embedded,
            "skipped": [{"row": row, "reason": reason} for row, reason in summary.skipped.items()],
            "model": encoder.model,
            "weights": summary.attrs["weights"],
            "view": str(encoder.view),
            "precision": encoder.precision,
            "simulated": simulated,
            "seconds": round(summary.seconds, 3),
            "scans_per_second": round(speed, 3),
            "busy_share": round(summary.timing.busy, 3),
            "time": summary.timing.to_json(),
            "processes": summary.processes,
        }
        print(json.dumps(document))
        return
    new = "" if summary.embedded == summary.scans else f", {summary.embedded} of them new"
    print_line(
        f"{out}: {summary.scans} scans x {summary.features} features, {encoder.model}, {encoder.weights.name} weights, "
        f"{encoder.view} view, in {summary.seconds:.1f} s ({speed:.1f} scans/s){new}"
        + ("" if encoder.precision == "float32" else f", {encoder.precision}")
        + (", simulated data" if simulated else "")
    )
    if summary.embedded:
        print_line(summary.timing.in_words())


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1, or 3 if weights cannot be had."""
    after_ctrl_c = {"run": GOES_ON.format("")}  # with --overwrite, too
    try:
        run_app(app, after_ctrl_c, codes={WeightsUnavailableError: WEIGHTS_UNAVAILABLE})
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        print_line(f"error: {reason}; use a smaller --batch-size", errors)
        sys.exit(1)


if __name__ == "__main__":  # torchrun starts modules
    main()
