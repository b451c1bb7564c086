"""NIfTI bytes -> voxels and affine, several times faster than reading through nibabel's file objects.

nibabel parses the header; libdeflate inflates the whole file at once, in memory bounded by what the header announces.
The bytes of a NIfTI file keep x fastest, so they already are a C-ordered (z, y, x) array: nothing is transposed.

What is read is the header and the image, and of a gzip file the members that hold them, with their checksums. Zeros
between members are skipped, as gzip does. Whatever follows the image's last member is not looked at.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import deflate
import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from ingest.archive import MAX_DEFLATE_RATIO
from ingest.errors import ScanError

#: A whole head at 0.3 mm. As float64 that is 4 GiB, the most that a file can make the decoder allocate.
MAX_VOXELS = 1 << 29

#: Twice what scanners see at once; a header that claims kilometres would make conforming it slow and large.
MAX_EXTENT_MM = 1000.0

_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
#: Types that hardly a scan has, and another that holds their values as the loops of ingest see them: those are compiled
#: for each type that comes, which takes seconds.
_LARGER = {"i1": "i2", "i8": "f8", "u8": "f8"}
_UNSUPPORTED_DTYPES = {
    1: "binary",
    32: "complex64",
    128: "RGB",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA",
}
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SURPLUS = 64 << 20  # bytes of extensions before the image, or after it, before they are taken for a bomb
_HEADER_BYTES = 540  # a NIfTI-2 header; NIfTI-1 has 348 and at least 4 more bytes
_EOL_CHECKS = (b"\r\n\x1a\n", b"\0\0\0\0")  # of NIfTI-2; zeros are tolerated, as nibabel does


@dataclass(frozen=True)
class NiftiVolume:
    """One volume as it lies in its file.

    Attributes
    ----------
    data
        (z, y, x), the file's own dtype in native byte order, or one of `_LARGER`, read-only.
    affine
        float64 (4, 4), voxel (x, y, z) -> mm, of the sform if set, else the qform.
    slope, inter
        ``data * slope + inter`` is the intensity.
    form_code
        ``sform_code`` if set, else ``qform_code``.
    description
        The header's ``descrip``.
    """

    data: np.ndarray
    affine: np.ndarray
    slope: float
    inter: float
    form_code: int
    description: str


def read_nifti(content: bytes, image: bytes | None = None, *, max_bytes: int | None = None) -> NiftiVolume:
    """Decode a ``.nii`` or ``.nii.gz`` file, or a ``.hdr`` / ``.img`` pair.

    Parameters
    ----------
    content
        The whole file, gzipped (one or many members) or not; of a pair the header file.
    image
        The image file of a pair, gzipped or not; None for a single file.
    max_bytes
        Images that are larger once inflated are not read.

    Raises
    ------
    ScanError
        ``bad_nifti`` for damaged files, ``bad_image`` for impossible geometry, ``unsupported`` for valid files that
        are not one real-valued volume, ``read_error`` for images of more than `max_bytes`.
    """
    start = _inflate_members(content, _HEADER_BYTES, verify=False) if _is_gzip(content) else content[:_HEADER_BYTES]
    header = _parse_header(start, pair=image is not None)
    shape = _volume_shape(header)
    dtype = _real_dtype(header)
    affine, form_code = _affine(header, shape)
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise ScanError("bad_nifti", f"scl_slope / scl_inter cannot be used: {error}") from None

    offset = _image_offset(header, pair=image is not None)
    voxels = int(np.prod(shape))
    end = offset + voxels * dtype.itemsize
    if max_bytes is not None and end > max_bytes:
        raise ScanError("read_error", f"an image of {end} bytes; --max-memory leaves room for {max(max_bytes, 0)}")
    packed = content if image is None else image
    raw = _inflate(packed, end) if _is_gzip(packed) else packed
    if len(raw) < end:
        raise ScanError("bad_nifti", f"truncated: {len(raw)} bytes where the header announces {end}")
    data = np.frombuffer(raw, dtype, count=voxels, offset=offset).reshape(shape[::-1])
    # Copies only what is rare, byte-swapped, or lies at an odd address: compiled loops want none of that.
    native = dtype.newbyteorder("=")
    data = np.require(data, _LARGER.get(native.str[1:], native), "A")
    data.flags.writeable = False
    return NiftiVolume(
        data=data,
        affine=affine,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        form_code=form_code,
        description=bytes(header["descrip"].item()).decode("latin-1").rstrip("\0"),
    )


def _is_gzip(content: bytes) -> bool:
    return content[:2] == _GZIP_MAGIC


def _parse_header(start: bytes | bytearray, *, pair: bool) -> nib.Nifti1Header:
    """Parse the header; `sizeof_hdr` tells version and byte order (nibabel would guess the order from ``dim[0]``)."""
    endianness = "<" if int.from_bytes(start[:4], "little") in (348, 540) else ">"
    size = int.from_bytes(start[:4], "little" if endianness == "<" else "big")
    if size not in (348, 540):
        raise ScanError("bad_nifti", f"not a NIfTI file: it starts with {start[:4].hex() or 'nothing'}")
    if len(start) < size:
        raise ScanError("bad_nifti", f"truncated: {len(start)} bytes, shorter than a header of {size}")
    kind, version, at = (nib.Nifti1Header, b"1", 344) if size == 348 else (nib.Nifti2Header, b"2", 4)
    magic = bytes(start[at : at + 4])
    if magic == b"ni" + version + b"\0" and not pair:
        raise ScanError("unsupported", "the header of a .hdr/.img pair, without its image; put the .img file beside it")
    expected = (b"ni" if pair else b"n+") + version + b"\0"
    if magic != expected:
        raise ScanError("bad_nifti", f"magic string {magic!r}, expected {expected!r} (Analyze files have none)")
    if size == 540 and start[8:12] not in _EOL_CHECKS:
        raise ScanError("bad_nifti", "line endings were changed: the file was copied in text mode; copy it in binary")
    return kind(bytes(start[:size]), endianness=endianness, check=False)


def _image_offset(header: nib.Nifti1Header, *, pair: bool) -> int:
    least = 0 if pair else int(header["sizeof_hdr"]) + 4
    offset = float(header["vox_offset"])
    if not least <= offset <= least + _MAX_SURPLUS:  # false for NaN
        raise ScanError("bad_nifti", f"vox_offset is {offset:g}, expected {least} to {least + _MAX_SURPLUS}")
    return int(offset)


def _volume_shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return the (x, y, z) shape; a trailing axis of length 1 is dropped."""
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7:
        raise ScanError("bad_nifti", f"dim[0] is {ndim}, expected 3")
    shape = tuple(int(n) for n in header["dim"][1 : ndim + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ScanError("unsupported", f"{len(shape)}-D image of shape {shape}, expected one 3-D volume")
    if min(shape) < 2 or np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise ScanError("bad_image", f"shape {shape} is not that of a brain volume")
    return shape


def _real_dtype(header: nib.Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code in _UNSUPPORTED_DTYPES:
        raise ScanError(
            "unsupported",
            f"voxels of type {_UNSUPPORTED_DTYPES[code]}, expected integers or floats of at most 64 bits",
        )
    if code not in _DTYPES:
        raise ScanError("bad_nifti", f"unknown datatype code {code}")
    return np.dtype(_DTYPES[code]).newbyteorder(header.endianness)


def _affine(header: nib.Nifti1Header, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    """Return the affine and its code: the sform's if set, else the qform's; as in nibabel, unknown codes are unset."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    known = range(1, 6)
    if sform not in known and qform not in known:
        raise ScanError(
            "unsupported",
            f"neither sform nor qform is set (codes {sform} and {qform}), so left and right are unknown; set one, if "
            "you know them (nibabel's set_sform, FSL's fslorient)",
        )
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # the standard's default for the handedness
    with np.errstate(over="ignore", invalid="ignore"):  # absurd numbers become inf or NaN, and are refused below
        try:
            affine = np.asarray(header.get_sform() if sform in known else header.get_qform(), dtype=np.float64)
        except (ValueError, HeaderDataError) as error:
            raise ScanError("bad_nifti", f"the affine cannot be read: {error}") from None
        if not np.isfinite(affine).all():
            raise ScanError("bad_image", "the affine is not finite")
        voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if voxel_mm.min() < 0.05 or voxel_mm.max() > 30:
        raise ScanError("bad_image", f"voxels of {voxel_mm.round(3).tolist()} mm; a brain scan has 0.05 to 30 mm")
    if (voxel_mm * shape).max() > MAX_EXTENT_MM:
        extent = (voxel_mm * shape).round().tolist()
        raise ScanError("bad_image", f"field of view of {extent} mm, expected at most {MAX_EXTENT_MM:g}")
    if abs(np.linalg.det(affine[:3, :3] / voxel_mm)) < 0.1:
        raise ScanError("bad_image", "the affine is singular or sheared flat")
    return affine, sform if sform in known else qform


def _inflate(content: bytes, size: int) -> bytearray:
    """Inflate the first `size` bytes; whatever the file claims, no more memory than that is used."""
    if size > MAX_DEFLATE_RATIO * len(content):
        raise ScanError("bad_nifti", f"truncated: {len(content)} gzipped bytes cannot hold the {size} announced")
    try:
        inflated = deflate.gzip_decompress(content, size)
    except deflate.DeflateError:
        inflated = bytearray()
    if len(inflated) == size:
        return inflated
    del inflated
    # Many members, bytes after the image, or damage: zlib goes through them one by one and says which it is.
    return _inflate_members(content, size, verify=True)


def _inflate_members(content: bytes, size: int, *, verify: bool) -> bytearray:
    """Inflate up to `size` bytes of all members; `verify` reads on to the checksum at the end of the last one."""
    view, at, out = memoryview(content), 0, bytearray()
    while len(out) < size:
        while view[at : at + 1] == b"\0":
            padding = bytes(view[at : at + (1 << 16)])
            at += len(padding) - len(padding.lstrip(b"\0"))
        if view[at : at + 2] != _GZIP_MAGIC:
            break
        at = _inflate_member(view, at, out, size, verify=verify)
    return out


def _inflate_member(view: memoryview, at: int, out: bytearray, size: int, *, verify: bool) -> int:
    """Append the member that begins at byte `at` to `out`, up to `size` bytes; return where the next begins.

    Input goes in by pieces: a member may be 20 bytes of a gigabyte, and zlib copies all of a piece that it leaves.
    """
    member = zlib.decompressobj(wbits=31)
    piece_bytes, surplus = 512, 0
    while not member.eof and (verify or len(out) < size):
        piece = view[at : at + piece_bytes]
        try:
            chunk = member.decompress(piece, min(size - len(out), 1 << 20) or 1 << 20)
        except zlib.error as error:
            raise ScanError("bad_nifti", f"damaged gzip data: {error}") from None
        if not piece and not chunk and not member.eof:
            raise ScanError("bad_nifti", f"truncated: the gzip data end after {len(out)} bytes")
        at += len(piece) - len(member.unconsumed_tail) - len(member.unused_data)
        piece_bytes = min(2 * piece_bytes, 1 << 16)
        if len(out) < size:
            out += chunk
            continue
        surplus += len(chunk)
        if surplus > _MAX_SURPLUS:
            raise ScanError("bad_nifti", f"more than {_MAX_SURPLUS} bytes follow the image")
    return at
