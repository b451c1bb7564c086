"""The ``loaders`` command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ingest.command import run_app
from ingest.consoles import console, print_line

if TYPE_CHECKING:
    from loaders.profile import Profile

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Loading from a store."
)


@app.callback()
def _several() -> None:
    """Keep ``profile`` a command of its own, although it is the only one."""


@app.command()
def profile(
    store: Annotated[str, typer.Argument(help="Store, or s3:// address of one.")],
    scans: Annotated[int, typer.Option(min=1, help="Scans to read, at most.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Threads that read and decode.",
            show_default="one per core, at most 8; 16 where they decode for a GPU, and for s3://",
        ),
    ] = None,
    view: Annotated[str, typer.Option(help="volume, axial, coronal, sagittal or triplanar.")] = "volume",
    slices: Annotated[int, typer.Option(min=1, help="Slices of each plane.")] = 3,
    dtype: Annotated[str, typer.Option(help="uint8, float32, float16 or bfloat16.")] = "uint8",
    backend: Annotated[str, typer.Option(help="auto, dali or torch.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU if there is one")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how fast a store can be read here, which stage limits it, and what would help."""
    # Here and not above: torch takes seconds to import, and --help does not wait for it.
    from ingest.places import as_place
    from loaders.profile import profile_store

    found = profile_store(
        as_place(store), scans=scans, batch_size=batch_size, threads=threads, view=view, slices=slices,
        dtype=dtype, backend=backend, device=device,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(found)


def _show(found: Profile) -> None:
    timing, settings = found.timing, found.settings
    dali = settings["backend"] == "dali"
    print_line(
        f"{settings['store']}: {timing.scans_per_second:,.0f} scans/s, {timing.bytes_read / timing.elapsed / 1e9:.2f} "
        f"GB/s read, {timing.bytes_out / timing.elapsed / 1e9:.2f} GB/s of pictures ({settings['scans']} scans, "
        f"{settings['view']}, {settings['dtype']}, {settings['backend']} backend on {settings['device']}, "
        f"{settings['threads']} threads)"
    )
    console.print("\nlimit of each stage, by itself", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "scans/s", "GB/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found.stages:
        table.add_row(stage.name, f"{stage.scans_per_second:,.0f}", f"{stage.gigabytes_per_second:.2f}")
    console.print(table, highlight=False)
    console.print("the pass, in seconds", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("where", "seconds"):
        table.add_column(column, justify="left" if column == "where" else "right")
    for name, seconds in (
        ("in all", timing.elapsed),
        (f"read ({timing.threads} threads together)", timing.read),
        ("check" if dali and settings["device"] != "cpu" else "check and decode", timing.decode),
        ("copy to the GPU", timing.copy),
        ("scale, augment, DALI" if dali and settings["device"] == "cpu" else "scale, augment", timing.augment),
        ("the consumer waited", timing.starved),
        ("the threads waited for the consumer", timing.idle),
    ):
        table.add_row(name, f"{seconds:.3f}")
    console.print(table, highlight=False)
    for line in found.advice:
        print_line(line)


def main() -> None:
    """Run the command; expected failures are one line on stderr and exit code 1."""
    run_app(app, {"profile": ""})


if __name__ == "__main__":
    main()
