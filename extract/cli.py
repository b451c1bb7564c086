"""The ``extract`` command."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from extract.embeddings import check_suffix, write_embeddings
from extract.encoder import build_encoder
from extract.fast import CompileWarning
from extract.run import extract
from extract.weights import WeightsUnavailableError
from ingest.errors import StoreError
from ingest.progress import progress_bar
from ingest.store import open_store
from loaders.views import View

#: Exit code when weights cannot be had, so that a script can go on with others.
WEIGHTS_UNAVAILABLE = 3

console = Console()
errors = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def extract_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store made by ingest, or s3://bucket/store.zarr")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Embeddings to write: .zarr or .h5")],
    model: Annotated[str, typer.Option(help="resnet18 (2D) or r3d_18 (3D).")] = "resnet18",
    weights: Annotated[
        str | None, typer.Option(help="imagenet, kinetics, random or FILE.", show_default="those of the model")
    ] = None,
    view: Annotated[View | None, typer.Option(help="Slices of a 2D model.", show_default="triplanar")] = None,
    slices: Annotated[int, typer.Option(min=1, help="Slices per view.")] = 3,
    scale: Annotated[float, typer.Option(help="Resize the input, e.g. 0.5 for half resolution.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, dali or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile, slow to start.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Scans at a time.", show_default="by free memory")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Embed every scan of a store with a frozen ResNet-18."""
    check_suffix(out)
    if out.exists() and not overwrite:
        raise StoreError(f"{out} exists; add --overwrite to replace it, or choose another name")
    scans = len(open_store(store).ok_rows)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", CompileWarning)
        encoder = build_encoder(
            model, weights=weights, view=view, slices=slices, scale=scale, seed=seed, device=device,
            precision=precision, compiled=compiled,
        )  # fmt: skip
    for warning in warned:
        errors.print(f"warning: {warning.message}", soft_wrap=True, highlight=False, markup=False)
    started = time.perf_counter()
    with progress_bar("extract", errors) as progress:
        bar = progress.add_task("extract", total=scans)
        embeddings = extract(
            store, encoder, backend=backend, batch_size=batch_size, on_batch=lambda n: progress.advance(bar, n)
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(out, embeddings)
    seconds = time.perf_counter() - started
    summary = {
        "scans": len(embeddings.features),
        "features": embeddings.features.shape[1],
        "model": model,
        "weights": embeddings.attrs["weights"],
        "view": str(encoder.view),
        "precision": encoder.precision,
        "simulated": embeddings.attrs["simulated"],
        "seconds": round(seconds, 3),
        "scans_per_second": round(len(embeddings.features) / seconds, 3),
    }
    if as_json:
        print(json.dumps(summary))
        return
    console.print(
        f"{out}: {summary['scans']} scans x {summary['features']} features, {model}, {encoder.weights.name} weights, "
        f"{encoder.view} view, in {seconds:.1f} s ({summary['scans_per_second']:.1f} scans/s)"
        + ("" if encoder.precision == "float32" else f", {encoder.precision}")
        + (", simulated data" if summary["simulated"] else ""),
        soft_wrap=True,
        highlight=False,
    )


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1, or 3 if weights cannot be had."""
    try:
        app()
    except WeightsUnavailableError as error:
        errors.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(WEIGHTS_UNAVAILABLE)
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(1)
