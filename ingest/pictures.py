"""Small pictures of stored volumes, and which of them a page of limited size holds."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ingest.planes import planes_of, side_by_side

_GAP = 4  # voxels of black between planes
_QUALITY = 45  # of WebP: 5 KB a brain, at which noise and ringing are still seen
_GOLDEN = (5**0.5 - 1) / 2
_ENTRY_BYTES = 20  # of a picture beside its base64: row, quotes, comma


@dataclass(frozen=True)
class Letter:
    """A side of the patient, as it is written onto pictures: how far from which edge, in % of the width."""

    text: str
    edge: str
    percent: float


def montage_webp(volume: np.ndarray) -> bytes:
    """Return the three planes of a volume side by side as a WebP file, one pixel per voxel.

    Parameters
    ----------
    volume
        uint8 (z, y, x), RAS.
    """
    canvas, _ = side_by_side(planes_of(volume), _GAP)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def montage_letters(shape_zyx: tuple[int, int, int]) -> list[Letter]:
    """Return where the patient's sides are in the pictures of `montage_webp`."""
    planes = planes_of(np.empty(shape_zyx, np.uint8))
    canvas, starts = side_by_side(planes, _GAP)
    width = canvas.shape[1]
    letters = []
    for plane, start in zip(planes, starts, strict=True):
        end = start + plane.pixels.shape[1]
        letters.append(Letter(plane.left, "left", round(100 * start / width, 2)))
        letters.append(Letter(plane.right, "right", round(100 * (width - end) / width, 2)))
    return letters


def picture_order(present: np.ndarray, outliers: np.ndarray, first: Sequence[int] = ()) -> list[int]:
    """Return all rows with a volume in the order in which their pictures are wanted.

    Those asked for, then the outliers, then the others so that however many fit, they are evenly spread over the store.

    Parameters
    ----------
    present
        int64, rows with a readable volume, ascending.
    outliers
        int64, the highest score first.
    first
        Rows asked for.
    """
    spread = present[np.argsort(np.arange(len(present)) * _GOLDEN % 1, kind="stable")]
    readable = set(present.tolist())
    return [row for row in dict.fromkeys([*first, *outliers.tolist(), *spread.tolist()]) if row in readable]


def fit_pictures(pictures: Iterable[tuple[int, bytes]], nbytes: int) -> dict[int, str]:
    """Take pictures until one more would need more than `nbytes` in the page.

    Parameters
    ----------
    pictures
        (row, file); no more are drawn from it than one beyond those that fit.

    Returns
    -------
    dict
        Row to base64, in the order given.
    """
    taken: dict[int, str] = {}
    for row, content in pictures:
        text = base64.b64encode(content).decode("ascii")
        nbytes -= len(text) + _ENTRY_BYTES
        if nbytes < 0:
            break
        taken[row] = text
    return taken
