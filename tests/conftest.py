"""Scans made on the fly, and where real data lie."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ingest.grid import FSL_MNI152_AFFINE, FSL_MNI152_SHAPE

DATA = Path(os.environ.get("BRAIN_VOLUMES_DATA", Path(__file__).parents[2] / "shared" / "data"))


#: Files that take long; begun first, none of them is left to one worker at the end.
LONG = (
    "readme",
    "packaging",
    "benchmarks",
    "benchmark_finetune",
    "finetune_resume",
    "finetune_distributed",
    "extract",
    "object_stores",
    "memory",
    "clusters",
    "fast_networks",
    "withdraw",
    "finetune_curves",
    "probe_report",
    "verify",
    "loader_remote",
    "rerun",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no data or device for, and begin with what takes long."""
    import torch

    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)  # in their order otherwise
    for item in items:
        if item.get_closest_marker("real_data") and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="no real data here (set BRAIN_VOLUMES_DATA)"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with ds002748, orientations and odd."""
    return DATA


def ellipsoid(
    affine: np.ndarray,
    shape_xyz: tuple[int, int, int],
    *,
    marker_mm: tuple[float, float, float] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return a brain-sized textured ellipsoid around the world's origin, with a bright ball at `marker_mm`.

    Returns
    -------
    numpy.ndarray
        float64 (x, y, z), 0 outside, 50 to 150 inside, 400 in the marker.
    """
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape_xyz], indexing="ij"), axis=-1)
    mm = nib.affines.apply_affine(affine, index)
    inside = ((mm / np.array([62.0, 80.0, 55.0])) ** 2).sum(axis=-1) < 1
    texture = np.random.default_rng(seed).uniform(50, 150, shape_xyz)
    data = np.where(inside, texture, 0.0)
    if marker_mm is not None:
        data[np.linalg.norm(mm - np.array(marker_mm), axis=-1) < 12] = 400.0
    return data


def write_nifti(path: Path, data_xyz: np.ndarray, affine: np.ndarray, *, code: int = 1) -> Path:
    """Write a .nii or .nii.gz file with nibabel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data_xyz, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    return path


def mni_brain(*, marker_mm: tuple[float, float, float] | None = None, seed: int = 0) -> np.ndarray:
    """Return an ellipsoid on FSL's MNI152 grid, int16 (x, y, z), LAS."""
    return ellipsoid(FSL_MNI152_AFFINE, FSL_MNI152_SHAPE, marker_mm=marker_mm, seed=seed).astype(np.int16)


def write_ukb_zip(folder: Path, eid: str, members: dict[str, bytes], *, instance: int = 2, field: int = 20252) -> Path:
    """Write a UK Biobank bulk archive."""
    path = folder / eid[:2] / f"{eid}_{field}_{instance}_0.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def nifti_bytes(tmp_path: Path) -> Callable[..., bytes]:
    """Make the bytes of a .nii.gz file from an array (x, y, z) and its affine."""

    def make(data_xyz: np.ndarray, affine: np.ndarray, *, code: int = 4) -> bytes:
        return write_nifti(tmp_path / "scratch.nii.gz", data_xyz, affine, code=code).read_bytes()

    return make
