"""A store with scans that stand out in known ways, and what the page of its report holds."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_nifti
from PIL import Image

from ingest import ingest, open_store
from ingest.report import write_report

#: FSL's MNI152 grid at 2 mm: an eighth of the voxels, resampled onto the store's grid.
MNI_2MM = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
SHAPE = (91, 109, 91)
HOSTILE = "<script>alert(1)</script>'\"&amp;\u2028 \x01</script><!--"
QUALITY = ["intensity", "volume", "x", "y", "z", "noise"]


def brain(seed: int, *, size: float = 1.0, noise: float = 1.0, marker_mm: Sequence[float] | None = None) -> np.ndarray:
    """Return a smooth ellipsoid on the 2 mm grid, float64 (x, y, z), with noise of that SD and a bright ball."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    mm = index @ MNI_2MM[:3, :3].T + MNI_2MM[:3, 3]
    inside = ((mm / (np.array([62.0, 80.0, 55.0]) * size)) ** 2).sum(axis=-1) < 1
    rng = np.random.default_rng(seed)
    grey = 100 + 10 * np.sin(mm / 15).sum(axis=-1) + rng.normal(0, noise, SHAPE)
    data = np.where(inside, np.clip(grey, 1, 132), 0.0)  # so that noise does not move the top
    if marker_mm is not None:
        data[np.linalg.norm(mm - np.array(marker_mm), axis=-1) < 10] = 400.0
    return data


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a folder of 14 usual scans, four that stand out by one measure each, three broken files, and one name."""
    folder = tmp_path_factory.mktemp("source")
    usual = 14
    scans = {f"{9000000 + 137 * number}": brain(number) for number in range(usual)}
    scans["9900001"] = brain(31, noise=8.0)
    scans["9900002"] = np.roll(brain(32), 7, axis=2)
    scans["9900003"] = brain(33, size=0.6)
    scans["9900004"] = brain(34, marker_mm=(0.0, 0.0, 0.0))
    scans["<img src=x onerror=alert(1)> '\"&amp;"] = brain(35)
    for name, data in scans.items():
        write_nifti(folder / f"{name}.nii.gz", data.astype(np.int16), MNI_2MM, code=4)
    for number in range(2):
        (folder / f"991000{number}.nii.gz").write_bytes(b"no image")
    (folder / "9920000.nii.gz").write_bytes((folder / "9000000.nii.gz").read_bytes()[:-900])
    return folder


EXPECTED = {
    "9900001": ("noise", "above"),
    "9900002": ("centre", "above"),
    "9900003": ("volume", "below"),
    "9900004": ("intensity", "below"),
}


@pytest.fixture(scope="module")
def store(source, tmp_path_factory) -> Path:
    """Return the store of `source`."""
    path = tmp_path_factory.mktemp("stores") / "study.zarr"
    ingest(source, path)
    return path


@pytest.fixture
def own_store(store, tmp_path) -> Path:
    """Return a copy of the store that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "own.zarr"))


def written(store: Path, folder: Path, **settings: Any) -> tuple[Any, str]:
    """Write a report; return its summary and its text, and see that nothing else was written."""
    page = folder / "qc" / "report.html"
    page.parent.mkdir(exist_ok=True)
    summary = write_report(store, page, **settings)
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]
    return summary, page.read_text(encoding="utf-8")


def tables_in(page: str) -> dict[str, Any]:
    """Return the tables of a page."""
    packed = re.search(r'<script type="application/octet-stream" id="data">(.*?)</script>', page, re.DOTALL)
    assert packed
    return json.loads(zlib.decompress(base64.b64decode(packed[1], validate=True)))


def pictures_in(page: str) -> dict[int, np.ndarray]:
    """Return the pictures of a page, uint8 (height, width), in their order."""
    found = re.search(r'<script type="application/json" id="pictures">(.*?)</script>', page, re.DOTALL)
    assert found
    files = {int(row): base64.b64decode(text, validate=True) for row, text in json.loads(found[1]).items()}
    return {row: np.asarray(Image.open(io.BytesIO(content)).convert("L")) for row, content in files.items()}


def row_of(store: Path, participant: str) -> int:
    return open_store(store).scans["participant"].tolist().index(participant)


def numbers(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    scales = {"intensity": (130, 4), "volume": (1500, 40), "x": (0, 1), "y": (-3, 1), "z": (-5, 1), "noise": (5, 0.4)}
    return pd.DataFrame({name: rng.normal(mean, sd, n) for name, (mean, sd) in scales.items()})
