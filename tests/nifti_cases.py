"""NIfTI files in memory: valid ones from nibabel, and ways to damage them."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import zlib

import nibabel as nib
import numpy as np

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0.1, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8")

#: Fields that tests overwrite: (offset, dtype without byte order) in NIfTI-1, and in NIfTI-2.
FIELDS = {
    "dim": ((40, "i2"), (16, "i8")),
    "datatype": ((70, "i2"), (12, "i2")),
    "bitpix": ((72, "i2"), (14, "i2")),
    "pixdim": ((76, "f4"), (104, "f8")),
    "vox_offset": ((108, "f4"), (168, "i8")),
    "scaling": ((112, "f4"), (176, "f8")),
    "qform_code": ((252, "i2"), (344, "i4")),
    "sform_code": ((254, "i2"), (348, "i4")),
    "quatern": ((256, "f4"), (352, "f8")),
    "srow": ((280, "f4"), (400, "f8")),
    "magic": ((344, "u1"), (4, "u1")),
}


def image_of(
    data: np.ndarray,
    *,
    kind: type = nib.Nifti1Image,
    order: str = "<",
    affine: np.ndarray = AFFINE,
    sform: int = 1,
    qform: int = 1,
    extension: bytes = b"",
) -> nib.Nifti1Pair:
    """Return an image of nibabel's; the qform is the affine without its shears."""
    image = kind(data.astype(data.dtype.newbyteorder(order)), affine, header=kind.header_class(endianness=order))
    image.set_data_dtype(data.dtype)  # else the header's float32 wins over the data's type
    image.set_sform(affine, sform)
    image.set_qform(affine if qform else None, qform)
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", extension))
    return image


def nifti(data: np.ndarray, **settings) -> bytes:
    """Return the bytes of a single file, see `image_of`."""
    file = io.BytesIO()
    image_of(data, **settings).to_stream(file)
    return file.getvalue()


def nifti_pair(data: np.ndarray, **settings) -> tuple[bytes, bytes]:
    """Return the bytes of header and image of a pair, see `image_of`."""
    image = image_of(data, **settings)
    file_map = image.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    image.to_file_map(file_map)
    return file_map["header"].fileobj.getvalue(), file_map["image"].fileobj.getvalue()


def patched(content: bytes, offset: int, value: np.ndarray) -> bytes:
    """Return `content` with the bytes of `value` at `offset`."""
    return content[:offset] + value.tobytes() + content[offset + value.nbytes :]


def with_field(content: bytes, name: str, *values: float) -> bytes:
    """Return a file with a header field of `FIELDS` overwritten, in the file's version and byte order."""
    order = "<" if int.from_bytes(content[:4], "little") in (348, 540) else ">"
    version = 1 if 540 in (int.from_bytes(content[:4], end) for end in ("little", "big")) else 0
    offset, dtype = FIELDS[name][version]
    return patched(content, offset, np.array(values, order + dtype))


def pack(content: bytes, members: int) -> bytes:
    """Gzip in that many members; 0 leaves it as it is."""
    if not members:
        return content
    cuts = np.linspace(0, len(content), members + 1).astype(int)
    return b"".join(gzip.compress(content[a:b], mtime=0) for a, b in itertools.pairwise(cuts))


def gzip_with_flags(content: bytes, *, extra: bytes = b"", name: bytes = b"", comment: bytes = b"", crc: bool) -> bytes:
    """Return one gzip member with optional header fields (RFC 1952, section 2.3.1)."""
    flags = (2 if crc else 0) | (4 if extra else 0) | (8 if name else 0) | (16 if comment else 0)
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\x03"
    head += struct.pack("<H", len(extra)) + extra if extra else b""
    head += name + b"\0" if name else b""
    head += comment + b"\0" if comment else b""
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF) if crc else b""
    body = zlib.compressobj(wbits=-15)
    packed = body.compress(content) + body.flush()
    return head + packed + struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
