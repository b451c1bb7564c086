"""Geometry of augmentation: turns, shifts and growth against scipy, flips, crops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from augmenting import KEYS, OFF, PLANES, SIZE, only, smooth
from scipy import ndimage

from loaders.augment import augment
from loaders.augmentation import Augmentation, Draw, draw

GEOMETRY = dataclasses.replace(OFF, rotation_deg=25, translation_mm=4, scale=0.2)


def ball(size: tuple[int, int, int], *, sd: float) -> torch.Tensor:
    """Return one image with a round blob in its centre."""
    distances = np.indices(size) - (np.array(size)[:, None, None, None] - 1) / 2
    return torch.from_numpy(np.exp(-(distances**2).sum(axis=0) / (2 * sd**2))[None]).to(torch.float32)


def forward_matrix(drawn: Draw) -> np.ndarray:
    """Return "turn about x, then y, then z, and grow" on (x, y, z), written out."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(drawn.angles), np.sin(drawn.angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return drawn.scale * about_z @ about_y @ about_x


def moved_by_scipy(volume: np.ndarray, drawn: Draw) -> np.ndarray:
    """Turn, grow and shift a volume (z, y, x) around its centre."""
    backward = np.linalg.inv(forward_matrix(drawn))[::-1, ::-1]  # on (z, y, x)
    centre = (np.array(volume.shape) - 1) / 2
    offset = centre - backward @ (centre + drawn.shift[::-1])
    return ndimage.affine_transform(volume.astype(float), backward, offset, order=1, mode="grid-constant")


def slices(volumes: torch.Tensor, view: str, index: list[int]) -> torch.Tensor:
    """Cut volumes as `extract.views.slices_of` does: upright, patient left on the left."""
    return volumes.index_select(PLANES[view], torch.tensor(index)).movedim(PLANES[view], 1).flip(2)


@pytest.mark.parametrize("size", [SIZE, (9, 10, 7), (1, 6, 5)])
def test_geometry_is_scipys(size: tuple[int, ...]) -> None:
    images = smooth(size=size)
    ours = augment(images, GEOMETRY, KEYS).numpy()
    for image, key, result in zip(images.numpy(), KEYS, ours, strict=True):
        np.testing.assert_allclose(result, moved_by_scipy(image, draw(GEOMETRY, key)), atol=1e-4)


@pytest.mark.parametrize("part", ["rotation_deg", "translation_mm", "scale"])
def test_each_part_of_the_geometry_alone_is_scipys(part: str) -> None:
    images, wanted = smooth(1), only(**{part: getattr(GEOMETRY, part)})
    reference = moved_by_scipy(images[0].numpy(), draw(wanted, KEYS[0]))
    np.testing.assert_allclose(augment(images, wanted, KEYS[:1])[0].numpy(), reference, atol=1e-4)
    assert np.abs(reference - images[0].numpy()).max() > 0.1


@pytest.mark.parametrize("view", PLANES)
def test_slices_move_as_the_head_does_in_their_plane(view: str) -> None:
    across = {"axial": 2, "coronal": 1, "sagittal": 0}[view]
    volumes, index = smooth(), [3, 10, 20]
    ours = augment(slices(volumes, view, index), GEOMETRY, KEYS, view=view)
    for i, key in enumerate(KEYS):
        drawn = draw(GEOMETRY, key)
        in_plane = dataclasses.replace(
            drawn,
            angles=np.where(np.arange(3) == across, drawn.angles, 0),
            shift=np.where(np.arange(3) == across, 0, drawn.shift),
            scale=1.0,
        )
        grown = forward_matrix(in_plane) * drawn.scale
        grown[across, across] = 1
        backward = np.linalg.inv(grown)[::-1, ::-1]
        centre = (np.array(SIZE) - 1) / 2
        offset = centre - backward @ (centre + in_plane.shift[::-1])
        moved = ndimage.affine_transform(volumes[i].double().numpy(), backward, offset, order=1, mode="grid-constant")
        reference = slices(torch.from_numpy(moved)[None], view, index)[0]
        np.testing.assert_allclose(ours[i].numpy(), reference.numpy(), atol=1e-4)


def test_directions_are_as_documented() -> None:
    volume = torch.zeros(1, 29, 29, 33)
    volume[0, 14, 14, 24] = 1  # right of the centre
    centre = np.array([14, 14, 16])
    volume = torch.from_numpy(ndimage.gaussian_filter(volume.numpy(), (0, 2, 2, 2)))
    for key in KEYS:
        shift, turn, grow = only(translation_mm=4), only(rotation_deg=20), only(scale=0.3)
        before = np.array(ndimage.center_of_mass(volume[0].numpy()))
        after = [
            np.array(ndimage.center_of_mass(augment(volume, part, key[None])[0].numpy()))
            for part in (shift, turn, grow)
        ]
        np.testing.assert_allclose((after[0] - before)[::-1], draw(shift, key).shift, atol=0.01)
        x_axis = forward_matrix(draw(turn, key))[:, 0]
        np.testing.assert_allclose((after[1] - centre)[::-1], 8 * x_axis, atol=0.05)
        assert x_axis[1] * draw(turn, key).angles[2] > 0  # about z: x towards y, right towards the front
        np.testing.assert_allclose((after[2] - centre)[::-1], [8 * draw(grow, key).scale, 0, 0], atol=0.05)


def test_rotation_keeps_the_shape_of_a_ball_in_a_grid_that_is_no_cube() -> None:
    image = ball((40, 60, 30), sd=4)
    turned = augment(image, only(rotation_deg=90), KEYS[:1])
    assert np.abs(draw(only(rotation_deg=90), KEYS[0]).angles).max() > 0.5
    assert (turned - image).abs().max() < 0.03


def test_sums_are_kept_or_grow_with_the_head() -> None:
    image = ball((40, 44, 42), sd=4)
    for part in (only(rotation_deg=20), only(translation_mm=5), only(scale=0.2)):
        for key in KEYS:
            ratio = augment(image, part, key[None]).sum() / image.sum()
            assert ratio == pytest.approx(draw(part, key).scale ** 3, rel=0.01)


def test_flips_swap_left_and_right_where_there_are_any() -> None:
    images = torch.rand(4, *SIZE)
    keys = np.arange(200)[:, None]
    assert torch.equal(augment(images, only(flip=1), KEYS), images.flip(3))
    assert torch.equal(augment(images, only(flip=1), KEYS, view="axial"), images.flip(3))
    assert torch.equal(augment(images, only(flip=1), KEYS, view="coronal"), images.flip(3))
    assert augment(images, only(flip=1), KEYS, view="sagittal") is images
    some = augment(torch.arange(2.0).expand(200, 1, 1, 2), only(flip=0.3), keys)
    assert 40 <= (some[..., 0] == 1).sum() <= 80


@pytest.mark.parametrize("view", ["volume", *PLANES])
def test_a_crop_is_a_window_of_the_whole(view: str) -> None:
    images = torch.rand(4, *SIZE)
    size, crop = (SIZE, (10, 30, 28)) if view == "volume" else (SIZE[1:], (30, 13))
    whole = augment(images, Augmentation(), KEYS, view=view)
    cropped = augment(images, Augmentation(crop=crop), KEYS, view=view)
    places = set()
    for i in range(4):
        found = [
            starts
            for starts in np.ndindex(*(n - c + 1 for n, c in zip(size, crop, strict=True)))
            if torch.equal(whole[(i, ..., *(slice(s, s + c) for s, c in zip(starts, crop, strict=True)))], cropped[i])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 1


def test_crops_reach_every_place_alike() -> None:
    images = torch.arange(5.0).div(4).expand(1000, 1, 1, 5)
    starts = augment(images, only(crop=(1, 1, 3)), np.arange(1000)[:, None])[..., 0].flatten() * 4
    assert (np.bincount(starts.int().numpy(), minlength=3) > 280).all()
