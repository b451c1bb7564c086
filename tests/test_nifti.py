"""The fast decoder against nibabel, and what it refuses."""

from __future__ import annotations

import gzip
import io
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_cases import AFFINE, DTYPES, gzip_with_flags, image_of, nifti, nifti_pair, pack, patched, with_field

from ingest.conform import conform, otsu_threshold
from ingest.errors import ScanError
from ingest.grid import MNI152_GRID, NATIVE_GRID
from ingest.intensity import IntensityRule, to_grey_levels
from ingest.nifti import NiftiVolume, read_nifti

SCALINGS = [None, (0.5, -3.0), (0.0, 7.0), (np.nan, np.nan), (-2.0, 1e6), (1e-30, 0.0)]


def check_equal(volume: NiftiVolume, expected: nib.Nifti1Pair, shape: tuple[int, ...]) -> None:
    values = volume.data.transpose(2, 1, 0).astype(np.float64) * volume.slope + volume.inter
    np.testing.assert_array_equal(values, expected.get_fdata().reshape(shape))
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.data.dtype.isnative
    assert volume.data.flags.aligned
    assert not volume.data.flags.writeable


@st.composite
def affines(draw) -> np.ndarray:
    """Any axis order and flips, voxel sizes, turned by up to 20 degrees and sheared a little."""
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    sizes = draw(st.tuples(*[st.floats(0.3, 5)] * 3))
    angles = draw(st.tuples(*[st.floats(-0.35, 0.35)] * 3))
    shear = np.eye(3)
    shear[0, 1], shear[1, 2] = draw(st.tuples(*[st.floats(-0.2, 0.2)] * 2))
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) @ shear @ np.eye(3)[:, order] @ np.diag(sizes) @ np.diag(signs)
    affine[:3, 3] = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    return affine


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    frames=st.sampled_from([(), (1,), (1, 1)]),
    members=st.integers(0, 3),
    forms=st.sampled_from([(1, 1), (4, 0), (0, 1), (2, 3), (0, 5), (9, 2)]),
    affine=affines(),
    scaling=st.sampled_from(SCALINGS),
    extension=st.binary(max_size=40),
    gap=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_equals_nibabel(dtype, order, kind, shape, frames, members, forms, affine, scaling, extension, gap, seed):
    data = np.random.default_rng(seed).uniform(0, 100, (*shape, *frames)).astype(dtype)
    content = nifti(
        data, kind=kind, order=order, affine=affine, sform=forms[0] % 9, qform=forms[1], extension=extension
    )
    content = with_field(content, "sform_code", forms[0])
    if gap:  # an odd vox_offset
        image = data.nbytes
        start = len(content) - image
        content = with_field(content[:start] + b"\0" * gap + content[start:], "vox_offset", start + gap)
    if scaling is not None:
        content = with_field(content, "scaling", *scaling)

    volume = read_nifti(pack(content, members))

    check_equal(volume, kind.from_bytes(content), shape)
    larger = {np.dtype(np.int8): np.int16, np.dtype(np.int64): np.float64, np.dtype(np.uint64): np.float64}
    assert volume.data.dtype == larger.get(np.dtype(dtype), dtype)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    kind=st.sampled_from([nib.Nifti1Pair, nib.Nifti2Pair]),
    members=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    scaling=st.sampled_from(SCALINGS),
    gap=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_a_pair_equals_nibabel(dtype, order, kind, members, scaling, gap, seed):
    data = np.random.default_rng(seed).uniform(0, 100, (3, 4, 5)).astype(dtype)
    header, image = nifti_pair(data, kind=kind, order=order)
    header, image = with_field(header, "vox_offset", gap), b"\0" * gap + image
    if scaling is not None:
        header = with_field(header, "scaling", *scaling)
    file_map = kind.make_file_map()
    for name, content in (("header", header), ("image", image)):
        file_map[name].fileobj = io.BytesIO(content)

    volume = read_nifti(pack(header, members[0]), pack(image, members[1]))

    check_equal(volume, kind.from_file_map(file_map), (3, 4, 5))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("forms", [(1, 0), (0, 1)])
def test_all_48_orientations_equal_nibabel(kind, forms):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = image_of(data, affine=np.diag([1.0, 2, 3, 1]), kind=kind)
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = image.as_reoriented(np.array(list(zip(order, flips, strict=True))))
        turned_data = np.asarray(turned.dataobj)
        content = nifti(turned_data, affine=turned.affine, kind=kind, sform=forms[0], qform=forms[1])
        check_equal(read_nifti(content), kind.from_bytes(content), turned_data.shape)


DATA = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
GOOD = nifti(DATA)
GOOD2 = nifti(DATA, kind=nib.Nifti2Image)
PACKED = gzip.compress(GOOD)
QFORM = nifti(DATA, sform=0, qform=1)
HEADER, IMAGE = nifti_pair(DATA, kind=nib.Nifti1Pair)
EMPTY_MEMBER = gzip.compress(b"")
REAL = {"float128": 1536, "complex64": 32, "complex128": 1792, "complex256": 2048, "RGB": 128, "RGBA": 2304}


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", "bad_nifti", "nothing"),
        (b"\x1f\x8b", "bad_nifti", "truncated: the gzip"),
        (b"not an image at all" * 50, "bad_nifti", "not a NIfTI"),
        (GOOD[:200], "bad_nifti", "truncated"),
        (GOOD[:352], "bad_nifti", "truncated"),
        (GOOD[:-1], "bad_nifti", "truncated"),
        (GOOD2[:400], "bad_nifti", "truncated"),
        (gzip.compress(GOOD[:352]), "bad_nifti", "truncated"),
        (gzip.compress(GOOD[:-1]), "bad_nifti", "truncated"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "bad_nifti", "damaged gzip"),
        (PACKED[:-4] + b"\0\0\0\0", "bad_nifti", "damaged gzip"),
        (b"\x1f\x8b" + b"x" * 60, "bad_nifti", "gzip"),
        (gzip.compress(PACKED), "bad_nifti", "not a NIfTI file: it starts with 1f8b"),
        (with_field(GOOD, "magic", *b"ni1\0"), "unsupported", "pair"),
        (with_field(GOOD, "magic", *b"\0\0\0\0"), "bad_nifti", "magic"),
        (with_field(GOOD, "magic", *b"n+2\0"), "bad_nifti", "magic"),
        (with_field(GOOD, "magic", *b"n+1x"), "bad_nifti", "magic"),
        (GOOD2.replace(b"\r\n\x1a\n", b"\n\x1a\n\n"), "bad_nifti", "text mode"),
        (with_field(GOOD, "dim", 4, 2, 3, 2, 2), "unsupported", "4-D"),
        (with_field(GOOD, "dim", 5, 2, 3, 2, 1, 2), "unsupported", "5-D"),
        (with_field(GOOD, "dim", 2, 2, 12), "unsupported", "2-D"),
        (with_field(GOOD, "dim", 3, 2000, 2000, 2000), "bad_image", "shape"),
        (with_field(GOOD, "dim", 3, 32767, 32767, 32767), "bad_image", "shape"),
        (with_field(GOOD2, "dim", 3, 2**62, 2**62, 2**62), "bad_image", "shape"),
        (with_field(GOOD2, "dim", 3, 2**32, 2**32, 2), "bad_image", "shape"),  # 2**65 wraps round to 0
        (with_field(GOOD, "dim", 3, -2, 3, 4), "bad_image", "shape"),
        (with_field(GOOD, "dim", 3, -2, -3, 4), "bad_image", "shape"),
        (with_field(GOOD, "dim", 3, 0, 3, 4), "bad_image", "shape"),
        (with_field(GOOD, "dim", 3, 700, 3, 4), "bad_image", "field of view"),
        (with_field(GOOD, "dim", 99), "bad_nifti", "dim"),
        (with_field(GOOD, "dim", 0), "bad_nifti", "dim"),
        *[(with_field(GOOD, "datatype", code), "unsupported", name) for name, code in REAL.items()],
        (with_field(GOOD, "datatype", 12345), "bad_nifti", "datatype"),
        (with_field(GOOD, "datatype", 0), "bad_nifti", "datatype"),
        (with_field(GOOD, "vox_offset", np.nan), "bad_nifti", "vox_offset"),
        (with_field(GOOD, "vox_offset", np.inf), "bad_nifti", "vox_offset"),
        (with_field(GOOD, "vox_offset", -352), "bad_nifti", "vox_offset"),
        (with_field(GOOD, "vox_offset", 0), "bad_nifti", "vox_offset is 0, expected 352"),
        (with_field(GOOD, "vox_offset", 348), "bad_nifti", "vox_offset"),
        (with_field(GOOD, "vox_offset", 3e9), "bad_nifti", "vox_offset"),
        (with_field(GOOD2, "vox_offset", 2**62), "bad_nifti", "vox_offset"),
        (with_field(GOOD, "vox_offset", 353), "bad_nifti", "truncated"),
        (with_field(GOOD, "scaling", 1.0, np.inf), "bad_nifti", "scl_slope"),
        (with_field(with_field(GOOD, "sform_code", 0), "qform_code", 0), "unsupported", "left and right"),
        (with_field(with_field(GOOD, "sform_code", 77), "qform_code", -1), "unsupported", "77 and -1"),
        (with_field(GOOD, "srow", *[0] * 12), "bad_image", "mm"),
        (with_field(GOOD, "srow", *[1] * 12), "bad_image", "singular"),
        (with_field(GOOD, "srow", *[np.nan] * 12), "bad_image", "finite"),
        (with_field(GOOD2, "srow", *[1e300] * 12), "bad_image", "mm"),
        (with_field(QFORM, "quatern", 1, 1, 1), "bad_nifti", "affine"),
        (with_field(QFORM, "quatern", 3e38, 3e38, 3e38), "bad_nifti", "affine"),
        (with_field(QFORM, "quatern", np.nan, 0, 0), "bad_image", "finite"),
        (with_field(QFORM, "pixdim", 2), "bad_nifti", "qfac"),
        (with_field(QFORM, "pixdim", np.nan), "bad_nifti", "qfac"),
        (with_field(QFORM, "pixdim", 1, -1, 1, 1), "bad_nifti", "pixdims"),
    ],
)
def test_refuses_with_a_reason(content, status, reason):
    with pytest.raises(ScanError, match=reason) as caught:
        read_nifti(content)
    assert caught.value.status == status


@pytest.mark.parametrize("content", [PACKED, gzip.compress(GOOD2), pack(GOOD, 3), pack(GOOD2, 2)])
def test_every_truncation_of_a_gzip_file_is_refused(content):
    for length in range(len(content)):
        with pytest.raises(ScanError, match=r"truncated|damaged|nothing|starts with") as caught:
            read_nifti(content[:length])
        assert caught.value.status == "bad_nifti"


def test_a_pair_is_refused_when_header_or_image_do_not_fit():
    for header, image, reason in (
        (HEADER, IMAGE[:-1], "truncated"),
        (HEADER, b"", "truncated"),
        (HEADER, gzip.compress(IMAGE)[:-1], "truncated"),
        (GOOD, IMAGE, "magic"),
        (with_field(HEADER, "vox_offset", 1), IMAGE, "truncated"),
        (with_field(HEADER, "vox_offset", -1), IMAGE, "vox_offset"),
    ):
        with pytest.raises(ScanError, match=reason) as caught:
            read_nifti(header, image)
        assert caught.value.status == "bad_nifti"
    with pytest.raises(ScanError, match=r"\.img") as caught:
        read_nifti(HEADER)
    assert caught.value.status == "unsupported"


def test_a_handedness_of_zero_is_the_default():
    content = with_field(QFORM, "pixdim", 0)
    np.testing.assert_array_equal(read_nifti(content).affine, nib.Nifti1Image.from_bytes(content).affine)


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"trailing bytes",
        PACKED + b"\0" * 100_000,
        PACKED + b"garbage after the stream",
        PACKED + EMPTY_MEMBER,
        PACKED + PACKED[:-9],  # what follows the image's member is not read, so its damage does not matter
        EMPTY_MEMBER * 3 + PACKED,
        EMPTY_MEMBER + b"\0" * 200_000 + PACKED,
        gzip.compress(GOOD[:400]) + b"\0" * 9 + EMPTY_MEMBER + gzip.compress(GOOD[400:]),
        gzip.compress(GOOD + b"\0" * 5000),
        gzip.compress(GOOD, compresslevel=0),
        gzip_with_flags(GOOD, name=b"T1.nii", crc=False),
        gzip_with_flags(GOOD, extra=b"BC\2\0\0\0", name=b"T1.nii", comment=b"a scan", crc=True),
        gzip_with_flags(GOOD[:360], extra=b"x" * 65535, crc=True) + gzip_with_flags(GOOD[360:], crc=True),
    ],
)
def test_gzip_in_all_its_forms(content):
    check_equal(read_nifti(content), nib.Nifti1Image.from_bytes(GOOD), (2, 3, 4))


def test_a_damaged_gzip_header_is_refused():
    content = bytearray(gzip_with_flags(GOOD[:360], name=b"T1.nii", crc=True) + gzip.compress(GOOD[360:]))
    content[12] ^= 1  # a letter of the name, which FHCRC covers
    with pytest.raises(ScanError, match="damaged gzip"):
        read_nifti(bytes(content))


ZEROS = b"\0" * (100 << 20)
LARGE = with_field(GOOD, "dim", 3, 400, 300, 300)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(GOOD + ZEROS), "bytes follow the image"),
        (gzip.compress(GOOD[:360]) + gzip.compress(GOOD[360:] + ZEROS), "bytes follow the image"),
        (gzip.compress(with_field(GOOD, "vox_offset", 96 << 20) + ZEROS), "vox_offset"),
        (gzip.compress(LARGE), "cannot hold"),
        (gzip.compress(GOOD) + gzip.compress(b"\0" * 4096) * 500, None),  # never looked at
        (EMPTY_MEMBER * 20_000, "nothing"),
        (EMPTY_MEMBER * 20_000 + PACKED, None),
        (LARGE, "truncated"),
    ],
)
def test_bombs_take_no_memory(content, reason):
    tracemalloc.start()  # sees zlib's and numpy's memory; libdeflate's output is a bytearray
    try:
        if reason is None:
            assert read_nifti(content).data.shape == (4, 3, 2)
        else:
            with pytest.raises(ScanError, match=reason):
                read_nifti(content)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_member_at_a_time_takes_the_memory_of_the_image():
    content = pack(nifti(np.zeros((120, 120, 120), np.float64), affine=np.eye(4)), 40)
    tracemalloc.start()
    try:
        size = read_nifti(content).data.nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.3 * size + (4 << 20)
    finally:
        tracemalloc.stop()


def large_brain(value: float, spread: float, dtype: str = "f8") -> NiftiVolume:
    """Return a 3.5 litre box of texture in air, so that it is taken for a whole head."""
    data = np.zeros((40, 46, 40), dtype)
    data[4:36, 4:42, 4:36] = np.random.default_rng(0).uniform(value, value * spread, (32, 38, 32)).astype(dtype)
    affine = np.diag([4.5, 4.5, 4.5, 1])
    affine[:3, 3] = [-90, -120, -72]
    return read_nifti(nifti(data, affine=affine))


@pytest.mark.parametrize("value", [1e-44, 1e-38, 1e-3, 1e15, 1.6e38])
@pytest.mark.parametrize("grid", [NATIVE_GRID, MNI152_GRID])
def test_intensities_of_any_size_are_stored(value, grid):
    stored = to_grey_levels(conform(large_brain(value, 2.0), grid).box, IntensityRule())
    assert stored.data.max() == 255
    assert stored.scale * 255 == pytest.approx(2 * value, rel=0.1 if value > 1e-40 else 0.5)


@pytest.mark.parametrize("grid", [NATIVE_GRID, MNI152_GRID])
@pytest.mark.parametrize("fill", [0.0, -5.0, np.nan, np.inf, 1e300, -np.inf])
def test_nothing_positive_is_a_bad_image(fill, grid):
    volume = read_nifti(nifti(np.full((91, 109, 91), fill), affine=np.diag([2.0, 2, 2, 1]) + [[0] * 3 + [-90]] * 4))
    with pytest.raises(ScanError) as caught:
        to_grey_levels(conform(volume, grid).box, IntensityRule())
    assert caught.value.status in ("bad_image", "wrong_shape")


def test_positive_voxels_between_the_coarse_samples_are_a_bad_image():
    data = np.zeros((210, 210, 210), np.uint8)
    data[np.arange(210) % 4 == 2] = 9
    data[np.arange(210) % 4 == 1] = 7
    data[np.arange(210) % 4 == 3] = 8
    data[:, ::4] = data[:, :, ::4] = 0
    data[0] = data[:, 0] = data[:, :, 0] = 0
    with pytest.raises(ScanError, match="thinly") as caught:
        conform(read_nifti(nifti(data, affine=np.eye(4))), NATIVE_GRID)
    assert caught.value.status == "bad_image"


def test_voxels_beyond_the_crop_may_hold_anything():
    data = np.ones((182, 218, 182), np.float64)
    data[90, 100:, 90] = 2
    data[0, 0, :4] = [np.nan, np.inf, 1e300, -1e300]
    affine = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
    content = with_field(nifti(data, affine=affine), "scaling", 1e30, 0)
    stored = to_grey_levels(conform(read_nifti(content), MNI152_GRID).box, IntensityRule())
    assert stored.left_out == data.size - 160 * 192 * 160 - 4


def test_otsu_of_the_smallest_and_largest_numbers():
    for scale in (1e-44, 1e38):
        values = np.repeat(np.array([0.5, 3.0], np.float32) * np.float32(scale), 100)
        assert values[0] <= otsu_threshold(values) < values[-1]


def test_otsu_of_equal_numbers_is_below_them():
    assert 0 <= otsu_threshold(np.full(5, 7, np.float32)) < 7


def test_patching_is_what_the_standard_says():
    """The helper's offsets against nibabel's header, or the refusals above would test the wrong fields."""
    for content, kind in ((GOOD, nib.Nifti1Header), (GOOD2, nib.Nifti2Header)):
        size = kind.sizeof_hdr
        header = kind(with_field(content, "scaling", 3.0, 4.0)[:size], check=False)
        assert (float(header["scl_slope"]), float(header["scl_inter"])) == (3.0, 4.0)
        assert int(kind(with_field(content, "vox_offset", 999)[:size], check=False)["vox_offset"]) == 999
        assert int(kind(with_field(content, "datatype", 8)[:size], check=False)["datatype"]) == 8
        np.testing.assert_array_equal(kind(content[:size]).get_sform(), AFFINE.astype("f4" if size == 348 else "f8"))
    assert patched(b"abcd", 1, np.frombuffer(b"XY", "u1")) == b"aXYd"
