"""The fast decoder against nibabel, and what it refuses."""

from __future__ import annotations

import gzip
import io
import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.errors import ScanError
from ingest.nifti import read_nifti

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0.1, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


def nifti(data: np.ndarray, *, kind: type = nib.Nifti1Image, order: str = "<", sform: int = 1, qform: int = 1) -> bytes:
    image = kind(data.astype(data.dtype.newbyteorder(order)), AFFINE, header=kind.header_class(endianness=order))
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE if qform else None, qform)
    file = io.BytesIO()
    image.to_stream(file)
    return file.getvalue()


def patched(content: bytes, offset: int, value: np.ndarray) -> bytes:
    return content[:offset] + value.tobytes() + content[offset + value.nbytes :]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8"]),
    order=st.sampled_from("<>"),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    frames=st.sampled_from([(), (1,), (1, 1)]),
    members=st.integers(0, 3),
    forms=st.sampled_from([(1, 1), (4, 0), (0, 1), (2, 3)]),
    scaling=st.sampled_from([None, (0.5, -3.0), (0.0, 7.0), (np.nan, np.nan)]),
    seed=st.integers(0, 99),
)
def test_equals_nibabel(dtype, order, kind, shape, frames, members, forms, scaling, seed):
    data = np.random.default_rng(seed).uniform(0, 100, (*shape, *frames)).astype(dtype)
    content = nifti(data, kind=kind, order=order, sform=forms[0], qform=forms[1])
    if scaling is not None:
        fields, offset = (f"{order}f8", 176) if kind is nib.Nifti2Image else (f"{order}f4", 112)
        content = patched(content, offset, np.array(scaling, fields))
    expected = kind.from_bytes(content)
    if members:
        cuts = np.linspace(0, len(content), members + 1).astype(int)
        packed = b"".join(gzip.compress(content[a:b]) for a, b in itertools.pairwise(cuts))
    else:
        packed = content

    volume = read_nifti(packed)

    values = volume.data.transpose(2, 1, 0).astype(np.float64) * volume.slope + volume.inter
    np.testing.assert_array_equal(values, expected.get_fdata().reshape(shape))
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.data.dtype.isnative


GOOD = nifti(np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4))
PACKED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", "bad_nifti", "nothing"),
        (b"not an image at all" * 50, "bad_nifti", "not a NIfTI"),
        (GOOD[:200], "bad_nifti", "truncated"),
        (GOOD[:-1], "bad_nifti", "truncated"),
        (PACKED[:-9], "bad_nifti", "truncated|damaged"),
        (PACKED[: len(PACKED) // 2], "bad_nifti", "truncated|damaged"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "bad_nifti", "damaged gzip"),
        (b"\x1f\x8b" + b"x" * 60, "bad_nifti", "gzip"),
        (patched(GOOD, 344, np.frombuffer(b"ni1\0", "u1")), "unsupported", "pair"),
        (patched(GOOD, 344, np.frombuffer(b"\0\0\0\0", "u1")), "bad_nifti", "magic"),
        (patched(GOOD, 40, np.array([4, 2, 3, 2, 2], "<i2")), "unsupported", "4-D"),
        (patched(GOOD, 40, np.array([3, 2000, 2000, 2000], "<i2")), "bad_image", "shape"),
        (patched(GOOD, 40, np.array([3, -2, 3, 4], "<i2")), "bad_image", "shape"),
        (patched(GOOD, 40, np.array([99], "<i2")), "bad_nifti", "dim"),
        (patched(GOOD, 70, np.array([128], "<i2")), "unsupported", "RGB|type"),
        (patched(GOOD, 70, np.array([32], "<i2")), "unsupported", "complex"),
        (patched(GOOD, 70, np.array([12345], "<i2")), "bad_nifti", "datatype"),
        (patched(GOOD, 252, np.array([0, 0], "<i2")), "unsupported", "left and right"),
        (patched(GOOD, 280, np.zeros(12, "<f4")), "bad_image", "mm"),
        (patched(GOOD, 280, np.full(12, np.nan, "<f4")), "bad_image", "finite"),
    ],
)
def test_refuses_with_a_reason(content, status, reason):
    with pytest.raises(ScanError, match=reason) as caught:
        read_nifti(content)
    assert caught.value.status == status


def test_a_gzip_bomb_is_not_inflated():
    bomb = gzip.compress(GOOD + b"\0" * (64 << 20))
    with pytest.raises(ScanError, match="bytes follow the image"):
        read_nifti(bomb)
