"""Pictures of stored brains: three planes side by side, with letters."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from extract.embeddings import Embeddings
from ingest.planes import planes_of, side_by_side
from loaders import CorruptShardError, VolumeReader

_GAP = 6  # voxels of black between planes
_PIXELS_PER_VOXEL = 2
_DPI = 200


def montage_figure(volume: np.ndarray) -> Figure:
    """Draw the three planes of a volume side by side on black, with letters in their upper corners.

    Parameters
    ----------
    volume
        uint8 (z, y, x), RAS.

    Returns
    -------
    matplotlib.figure.Figure
        One image whose data coordinates are voxels, grey levels 0 to 255.
    """
    planes = planes_of(volume)
    canvas, starts = side_by_side(planes, _GAP)
    height, width = canvas.shape
    inch = _PIXELS_PER_VOXEL / _DPI
    figure = Figure(figsize=(width * inch, height * inch), dpi=_DPI, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    for plane, start in zip(planes, starts, strict=True):
        end = start + plane.pixels.shape[1]
        for letter, at, side in ((plane.left, start + 3, "left"), (plane.right, end - 4, "right")):
            axes.text(
                at, 3, letter, ha=side, va="top", size=9, color="white",
                path_effects=[withStroke(linewidth=1.5, foreground="black")],
            )  # fmt: skip
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    axes.set_axis_off()
    return figure


def montage_png(volume: np.ndarray) -> bytes:
    """Return `montage_figure` as a PNG file, two pixels per voxel.

    Parameters
    ----------
    volume
        uint8 (z, y, x), RAS.
    """
    buffer = io.BytesIO()
    montage_figure(volume).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def read_brains(
    embeddings: Embeddings, store: Path | None = None, *, count: int = 6
) -> tuple[list[tuple[int, np.ndarray]], list[str]]:
    """Read some of the volumes that the embeddings were made from.

    Parameters
    ----------
    store
        Where the store is now; by default where it was when the embeddings were made.
    count
        At most this many scans, evenly spaced over those of the embeddings.

    Returns
    -------
    brains
        (row, uint8 (z, y, x)) of each.
    warnings
        Why brains are absent: a store that is gone, is another one, or is damaged. They name no folder and no
        participant, because reports are passed on.
    """
    made_from = embeddings.attrs.get("store") or {}
    path = store or made_from.get("path")
    if not path:
        return [], ["no brains are shown: the embeddings do not say which store they were made from"]
    name = Path(path).name
    if not Path(path).exists():
        return [], [f"no brains are shown: the store {name} is no longer where it was; name its place with --store"]
    brains: list[tuple[int, np.ndarray]] = []
    warnings: list[str] = []
    try:
        with VolumeReader(path) as reader:
            if reader.store.attrs.get("store_id") != made_from.get("id"):
                return [], [
                    f"no brains are shown: the store {name} is not the one that the embeddings were made from "
                    "(its store_id differs); name the right one with --store, or run extract again"
                ]
            present = np.intersect1d(embeddings.scans["row"].to_numpy(np.int64), reader.store.ok_rows)
            for row in evenly_spaced(present, count):
                try:
                    brains.append((int(row), reader.read([row])[0]))
                except CorruptShardError:  # its message names the source file, and so the participant
                    warnings.append(f"row {row} of the store {name} is damaged and not shown; see: ingest verify STORE")
    except (OSError, ValueError, KeyError, TypeError):  # what zarr and JSON make of damaged metadata
        return [], [f"no brains are shown: the store {name} cannot be opened; see what is wrong with: ingest inspect"]
    return brains, warnings


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the rows, from the first to the last."""
    positions = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[np.rint(positions).astype(np.int64)]
