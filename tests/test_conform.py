"""Every scan on the store's grid: the right place, the right side, the right picture."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ellipsoid, mni_brain, write_nifti
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import mni_picture, native_picture
from scipy import ndimage

from ingest.conform import conform, otsu_threshold
from ingest.errors import ScanError
from ingest.grid import FSL_MNI152_AFFINE, MNI152, MNI152_GRID, NATIVE, NATIVE_GRID, space_of
from ingest.intensity import IntensityRule, VoxelBox, positive_percentile, to_grey_levels
from ingest.nifti import read_nifti
from ingest.sampling import sample_trilinear


def picture(path: Path, grid) -> np.ndarray:
    return to_grey_levels(conform(read_nifti(path.read_bytes()), grid).box, IntensityRule()).data


def oblique_affine(degrees: float = 7.0, voxel_mm: tuple[float, float, float] = (0.9, 0.9, 1.2)) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0.05], [0, -0.05, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-voxel_mm[0], voxel_mm[1], voxel_mm[2]])
    affine[:3, 3] = -affine[:3, :3] @ np.array([85, 100, 60]) + np.array([4.0, -11.0, 23.0])
    return affine


def test_mni_volume_equals_the_reference(tmp_path):
    path = write_nifti(tmp_path / "brain.nii.gz", mni_brain(marker_mm=(-30, 20, 10)), FSL_MNI152_AFFINE, code=4)
    difference = picture(path, MNI152_GRID).astype(int) - mni_picture(path)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_oblique_native_volume_equals_the_reference(tmp_path, dtype):
    affine = oblique_affine()
    data = ndimage.gaussian_filter(ellipsoid(affine, (170, 200, 130)), 1.5) * 10
    data[data < 5] = 0
    path = write_nifti(tmp_path / "brain.nii", data.astype(dtype), affine)
    stored = picture(path, NATIVE_GRID)
    assert np.abs(stored.astype(int) - native_picture(path)).max() <= 1
    box = [(axis.min() + axis.max()) / 2 for axis in np.nonzero(stored)]
    assert box == pytest.approx((79.5, 95.5, 79.5), abs=1)


@pytest.mark.real_data
def test_real_brains_equal_the_reference(real_data):
    for participant in ("sub-03", "sub-25"):  # the first is oblique
        path = real_data / "ds002748" / participant / "anat" / f"{participant}_T1w.nii.gz"
        difference = picture(path, NATIVE_GRID).astype(int) - native_picture(path)
        assert np.abs(difference).max() <= 1


@pytest.mark.real_data
def test_all_orientations_give_the_same_picture(real_data):
    files = sorted((real_data / "orientations").glob("*.nii.gz"))
    pictures = [picture(path, NATIVE_GRID) for path in files]
    assert len(pictures) == 24
    for path, other in zip(files, pictures, strict=True):
        np.testing.assert_array_equal(other, pictures[0], err_msg=path.name)


def test_all_48_axis_orders_give_the_same_picture(tmp_path):
    affine = np.diag([1.1, 1.3, 1.2, 1.0])
    affine[:3, 3] = [-70, -90, -65]
    image = nib.Nifti1Image(ellipsoid(affine, (128, 140, 110), marker_mm=(-40, 10, 5)).astype(np.int16), affine)
    expected = None
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = image.as_reoriented(np.array(list(zip(order, flips, strict=True))))
        stored = picture(write_nifti(tmp_path / "turned.nii", np.asarray(turned.dataobj), turned.affine), NATIVE_GRID)
        expected = stored if expected is None else expected
        np.testing.assert_array_equal(stored, expected, err_msg=str((order, flips)))


@settings(max_examples=40, deadline=None)
@given(shift=st.tuples(*[st.floats(-3, 12)] * 3), degrees=st.floats(-30, 30), zoom=st.floats(0.4, 2.0))
def test_sampling_equals_scipy(shift, degrees, zoom):
    volume = np.random.default_rng(1).random((7, 9, 11), dtype=np.float32)
    matrix = np.eye(4)
    matrix[:3, :3] = zoom * nib.eulerangles.euler2mat(*np.deg2rad([degrees, degrees / 2, -degrees]))
    matrix[:3, 3] = shift
    out = np.empty((6, 8, 10), np.float32)
    sample_trilinear(volume, 1.0, 0.0, matrix, out)
    expected = ndimage.affine_transform(volume.transpose(2, 1, 0), matrix, output_shape=(10, 8, 6), order=1)
    # A point within rounding of the edge is inside for one and outside for the other.
    voxel = np.stack(np.meshgrid(*[np.arange(n) for n in (10, 8, 6)], indexing="ij"), axis=-1)
    index = voxel @ matrix[:3, :3].T + shift
    edge = np.minimum(np.abs(index), np.abs(index - (np.array(volume.shape[::-1]) - 1))).min(axis=-1) < 1e-6
    np.testing.assert_allclose(np.where(edge, 0, out.transpose(2, 1, 0)), np.where(edge, 0, expected), atol=1e-5)


def test_same_voxels_are_shifted_not_blurred(tmp_path):
    affine = np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = [80, -99, -70]
    data = ellipsoid(affine, (161, 199, 141)).astype(np.int16)
    conformed = conform(read_nifti(write_nifti(tmp_path / "a.nii", data, affine).read_bytes()), NATIVE_GRID)
    assert set(np.unique(conformed.box.data)) == set(np.unique(data))
    assert (conformed.box.data > 0).sum() == (data > 0).sum()
    assert conformed.cut_off_voxels == 0


def test_voxels_outside_the_grid_are_counted(tmp_path):
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = [-100, -100, -100]
    data = np.zeros((200, 200, 200), np.uint8)
    data[10:190, 98:102, 98:102] = np.arange(1, 181, dtype=np.uint8)[:, None, None]  # a rod 20 mm too long
    conformed = conform(read_nifti(write_nifti(tmp_path / "rod.nii", data, affine).read_bytes()), NATIVE_GRID)
    assert conformed.cut_off_voxels == 20 * 16


def test_a_head_with_neck_is_anchored_at_its_vertex(tmp_path):
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = [-100, -120, -170]
    noise = np.random.default_rng(0).uniform(1, 9, (200, 240, 260))
    head = ellipsoid(affine, (200, 240, 260)) * 3
    neck = np.zeros_like(head)
    neck[60:140, 80:160, :150] = 250
    shoulders = np.zeros_like(head)
    shoulders[:, 90:150, :30] = 250
    data = np.maximum.reduce([noise, head, neck, shoulders]).astype(np.int16)
    conformed = conform(read_nifti(write_nifti(tmp_path / "head.nii", data, affine).read_bytes()), NATIVE_GRID)
    z, y, x = np.nonzero(conformed.box.data > 100)
    assert 150 <= z.max() <= 157  # the vertex is just below the top
    top = z > 80  # above the neck
    assert (y[top].min() + y[top].max()) / 2 == pytest.approx(95.5, abs=3)
    assert (x[top].min() + x[top].max()) / 2 == pytest.approx(79.5, abs=3)
    assert conformed.cut_off_voxels == 0  # neck and shoulders are meant to be


def test_other_template_grids_are_resampled_in_place(tmp_path):
    affine = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    data = ellipsoid(affine, (91, 109, 91), marker_mm=(-40, 0, 0)).astype(np.float32)
    stored = conform(read_nifti(write_nifti(tmp_path / "2mm.nii", data, affine).read_bytes()), MNI152_GRID).box.data
    z, y, x = (np.median(axis) for axis in np.nonzero(stored > 399))
    assert (x - 80, y - 113, z - 61) == pytest.approx((-40, 0, 0), abs=1)


def test_a_template_volume_that_covers_too_little_is_refused(tmp_path):
    path = write_nifti(tmp_path / "part.nii", mni_brain()[:90], FSL_MNI152_AFFINE, code=4)
    with pytest.raises(ScanError, match="covers") as caught:
        conform(read_nifti(path.read_bytes()), MNI152_GRID)
    assert caught.value.status == "wrong_shape"


@pytest.mark.parametrize("data", [np.zeros((9, 9, 9), np.int16), np.full((9, 9, 9), -3.0), np.full((9, 9, 9), np.nan)])
def test_empty_images_are_refused(tmp_path, data):
    path = write_nifti(tmp_path / "empty.nii", data, np.eye(4))
    with pytest.raises(ScanError, match="no positive voxel"):
        conform(read_nifti(path.read_bytes()), NATIVE_GRID)


def test_grey_levels():
    values = np.zeros((2, 100, 100), np.float32)
    values[0] = np.arange(10000).reshape(100, 100)
    stored = to_grey_levels(VoxelBox.whole(values), IntensityRule())
    assert stored.data[1].max() == 0
    assert stored.data.max() == 255
    assert np.percentile(values[values > 0], 99.9) == pytest.approx(255 * stored.scale)
    with pytest.raises(ScanError, match="constant image"):
        to_grey_levels(VoxelBox.whole(np.full((4, 4, 4), 5, np.float32)), IntensityRule())


def test_otsu_parts_two_humps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(20, 4, 5000), rng.normal(100, 10, 3000)])
    assert 28 < otsu_threshold(values) < 70


def test_space_of():
    eye = np.eye(4)
    assert space_of("T1_brain_to_MNI.nii.gz", eye, (9, 9, 9), 0) == MNI152
    assert space_of("sub-1_space-MNI152NLin6Asym_T1w.nii", eye, (9, 9, 9), 0) == MNI152
    assert space_of("sub-1_space-MNI_T1w.nii", eye, (9, 9, 9), 0) == MNI152
    for other in ("MNI305", "MNIInfant", "MNIPediatricAsym", "MNIColin27"):
        assert space_of(f"sub-1_space-{other}_cohort-1_T1w.nii", eye, (9, 9, 9), 4) == NATIVE
    assert space_of("a.nii", eye, (9, 9, 9), 4) == MNI152
    assert space_of("a.nii", FSL_MNI152_AFFINE, (182, 218, 182), 1) == MNI152
    assert space_of("a.nii", eye, (182, 218, 182), 1) == NATIVE


@pytest.mark.parametrize("voxel_mm", [1, 2])
def test_voxels_outside_the_template_grid_are_counted(tmp_path, voxel_mm):
    affine = np.diag([-voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = FSL_MNI152_AFFINE[:3, 3]
    shape = np.array([182, 218, 182]) // voxel_mm
    data = np.random.default_rng(0).integers(-2, 5, shape).astype(np.int16)
    conformed = conform(read_nifti(write_nifti(tmp_path / "a.nii.gz", data, affine, code=4).read_bytes()), MNI152_GRID)
    left_out = to_grey_levels(conformed.box, IntensityRule()).left_out
    mm = nib.affines.apply_affine(affine, np.argwhere(data > 0))
    low = np.array([-80.5, -113.5, -61.5])
    outside = ((mm < low) | (mm > low + np.array([160, 192, 160]))).any(axis=1)
    assert conformed.cut_off_voxels + left_out == outside.sum() > 0


@settings(max_examples=200, deadline=None)
@given(
    values=arrays(np.float32, st.integers(2, 60), elements=st.floats(0, 2.0**100, width=32)),
    percentile=st.sampled_from([0.0, 1.0, 50.0, 99.0, 99.9, 100.0]),
)
def test_percentile_is_that_of_numpy(values, percentile):
    positive = values[values > 0].astype(np.float64)
    assume(len(positive))
    box = VoxelBox.whole(values.reshape(1, 1, -1))
    if positive.min() == positive.max():
        with pytest.raises(ScanError, match="constant"):
            positive_percentile(box, percentile)
        return
    found = positive_percentile(box, percentile)[0]
    assert found == pytest.approx(np.percentile(positive, percentile), rel=1e-6)
