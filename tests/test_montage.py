"""Pictures of brains: the right way round, whole, undistorted, with letters."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import mni_brain, write_nifti
from matplotlib.image import imread

from extract.probing.montage import evenly_spaced, montage_figure, montage_png
from ingest import ingest
from ingest.grid import FSL_MNI152_AFFINE
from ingest.planes import planes_of
from ingest.store import open_store
from loaders.reader import VolumeReader

#: Patient left, front, top: mm in MNI space, within the ellipsoid.
MARKERS = {"left": (-45.0, -17.0, 19.0), "front": (0.0, 45.0, 19.0), "top": (0.0, -17.0, 50.0)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store of three brains, each with one marker, in the order of their names."""
    folder = tmp_path_factory.mktemp("brains")
    for name, place in MARKERS.items():
        write_nifti(folder / "src" / f"person-{name}.nii.gz", mni_brain(marker_mm=place), FSL_MNI152_AFFINE, code=4)
    ingest(folder / "src", folder / "study.zarr")
    return folder / "study.zarr"


@pytest.mark.parametrize(
    ("marker", "plane", "side"),
    [
        ("left", "axial", "left"),
        ("left", "coronal", "left"),
        ("front", "axial", "top"),
        ("front", "sagittal", "right"),
        ("top", "coronal", "top"),
        ("top", "sagittal", "top"),
    ],
)
def test_planes_are_upright_and_left_is_left(store, marker, plane, side):
    opened = open_store(store)
    row = [Path(source).stem for source in opened.scans["source"]].index(f"person-{marker}.nii")
    with VolumeReader(opened) as reader:
        found = {p.name: p for p in planes_of(reader.read([row])[0])}[plane]
    height, width = found.pixels.shape
    y, x = (np.median(axis) for axis in np.nonzero(found.pixels == 255))
    middle = {"left": x < 0.35 * width, "right": x > 0.65 * width, "top": y < 0.35 * height}
    assert middle[side], (x, y)
    assert (found.left, found.right) == (("P", "A") if plane == "sagittal" else ("L", "R"))


def test_montage_shows_all_voxels_undistorted_with_letters_on_their_sides():
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 256, (10, 14, 12), dtype=np.uint8)
    figure = montage_figure(volume)
    axes = figure.axes[0]
    picture = np.asarray(axes.images[0].get_array())
    starts = {}
    for plane in planes_of(volume):
        windows = np.lib.stride_tricks.sliding_window_view(picture, plane.pixels.shape)
        places = np.argwhere((windows == plane.pixels).all(axis=(2, 3)))
        assert len(places) == 1  # whole, once
        starts[plane.name] = (places[0][1], plane)
    assert axes.images[0].get_clim() == (0, 255)
    assert axes.get_aspect() == 1.0
    width, height = figure.get_size_inches()
    assert width / height == pytest.approx(picture.shape[1] / picture.shape[0])
    letters = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert [letter for letter, _ in letters] == ["L", "R", "L", "R", "P", "A"]
    for i, (start, plane) in enumerate(starts.values()):
        middle = start + plane.pixels.shape[1] / 2
        assert start <= letters[2 * i][1] < middle < letters[2 * i + 1][1] < start + plane.pixels.shape[1]


def test_letters_are_drawn_on_an_empty_brain():
    pixels = imread(io.BytesIO(montage_png(np.zeros((160, 192, 160), np.uint8))))
    assert pixels.shape[:2] == (2 * 192, 2 * (160 + 160 + 192 + 12))
    assert pixels[..., :3].max() > 0.9
    assert pixels[40:, :, :3].max() == 0  # black below the letters


def test_rows_are_evenly_spaced():
    rows = np.arange(100) * 3
    assert list(evenly_spaced(rows, 4)) == [0, 99, 198, 297]
    assert list(evenly_spaced(rows[:2], 6)) == [0, 3]
    assert list(evenly_spaced(rows[:0], 6)) == []
