"""NIfTI bytes -> voxels and affine, several times faster than reading through nibabel's file objects.

nibabel parses the header; libdeflate inflates the whole file at once, in memory bounded by what the header announces.
The bytes of a NIfTI file keep x fastest, so they already are a C-ordered (z, y, x) array: nothing is transposed.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass

import deflate
import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from ingest.errors import ScanError

#: More voxels than any brain scan has (0.2 mm isotropic whole head); protects from absurd headers.
MAX_VOXELS = 1 << 30

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SURPLUS = 16 << 20  # bytes after the image (extensions, padding) before it is taken for a bomb
_HEADER_BYTES = 540  # a NIfTI-2 header; NIfTI-1 has 348 and at least 4 more bytes


@dataclass(frozen=True)
class NiftiVolume:
    """One volume as it lies in its file.

    Attributes
    ----------
    data
        (z, y, x), the file's own dtype in native byte order, read-only.
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


def read_nifti(content: bytes) -> NiftiVolume:
    """Decode a ``.nii`` or ``.nii.gz`` file.

    Parameters
    ----------
    content
        The whole file, gzipped (one or many members) or not.

    Raises
    ------
    ScanError
        ``bad_nifti`` for damaged files, ``bad_image`` for impossible geometry, ``unsupported`` for valid files that
        are not one real-valued volume.
    """
    gzipped = content[:2] == _GZIP_MAGIC
    start = _inflate_members(content, _HEADER_BYTES, verify=False) if gzipped else content[:_HEADER_BYTES]
    header = _parse_header(start)
    shape = _volume_shape(header)
    dtype = _real_dtype(header)
    affine, form_code = _affine(header)
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise ScanError("bad_nifti", f"scl_slope / scl_inter cannot be used: {error}") from None

    offset = max(int(header["vox_offset"]), int(header["sizeof_hdr"]))
    end = offset + int(np.prod(shape)) * dtype.itemsize
    raw = _inflate(content, end) if gzipped else content
    if len(raw) < end:
        raise ScanError("bad_nifti", f"truncated: {len(raw)} bytes where the header announces {end}")
    data = np.frombuffer(raw, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape[::-1])
    if not dtype.isnative:
        data = data.astype(dtype.newbyteorder("="))
    return NiftiVolume(
        data=data,
        affine=affine,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        form_code=form_code,
        description=bytes(header["descrip"].item()).decode("latin-1").rstrip("\0"),
    )


def _parse_header(start: bytes) -> nib.Nifti1Header:
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 348 in sizes:
        kind, size, magic = nib.Nifti1Header, 348, start[344:348]
    elif 540 in sizes:
        kind, size, magic = nib.Nifti2Header, 540, start[4:8]
    else:
        raise ScanError("bad_nifti", f"not a NIfTI file: it starts with {start[:4].hex() or 'nothing'}")
    if len(start) < size:
        raise ScanError("bad_nifti", f"truncated: {len(start)} bytes, shorter than a header of {size}")
    if magic[:3] in (b"ni1", b"ni2"):
        raise ScanError("unsupported", "the header of a .hdr/.img pair; convert it to one .nii.gz file")
    if magic[:3] not in (b"n+1", b"n+2"):
        raise ScanError("bad_nifti", f"magic string {magic[:4]!r}, expected b'n+1' or b'n+2' (Analyze files have none)")
    return kind(start[:size], check=False)


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
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        raise ScanError("bad_nifti", f"unknown datatype code {int(header['datatype'])}") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError("unsupported", f"voxels of type {dtype}, expected integers or floats of at most 64 bits")
    return dtype


def _affine(header: nib.Nifti1Header) -> tuple[np.ndarray, int]:
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        raise ScanError("unsupported", "neither sform nor qform is set, so left and right are unknown")
    try:
        affine = np.asarray(header.get_sform() if sform > 0 else header.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise ScanError("bad_nifti", f"the affine cannot be read: {error}") from None
    if not np.isfinite(affine).all():
        raise ScanError("bad_image", "the affine is not finite")
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if voxel_mm.min() < 0.05 or voxel_mm.max() > 30:
        raise ScanError("bad_image", f"voxels of {voxel_mm.round(3).tolist()} mm; a brain scan has 0.05 to 30 mm")
    if abs(np.linalg.det(affine[:3, :3] / voxel_mm)) < 0.1:
        raise ScanError("bad_image", "the affine is singular or sheared flat")
    return affine, sform if sform > 0 else qform


def _inflate(content: bytes, size: int) -> bytes | bytearray:
    """Inflate the first `size` bytes; whatever the file claims, no more memory than that is used."""
    with contextlib.suppress(deflate.DeflateError):
        inflated = deflate.gzip_decompress(content, size)
        if len(inflated) == size:
            return inflated
    # Many members, bytes after the image, or damage: zlib goes through them one by one and says which it is.
    return _inflate_members(content, size, verify=True)


def _inflate_members(content: bytes, size: int, *, verify: bool) -> bytes:
    """Inflate up to `size` bytes of all members; `verify` reads on to the checksum at the end of the last one."""
    parts: list[bytes] = []
    wanted, rest = size, content
    while wanted and rest[:2] == _GZIP_MAGIC:
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(rest, wanted))
            wanted -= len(parts[-1])
            surplus = 0
            while verify and not member.eof:
                chunk = member.decompress(member.unconsumed_tail, 1 << 20)
                surplus += len(chunk)
                if not chunk and not member.eof:
                    raise ScanError("bad_nifti", f"truncated: the gzip data end after {size - wanted} bytes")
                if surplus > _MAX_SURPLUS:
                    raise ScanError("bad_nifti", f"more than {_MAX_SURPLUS} bytes follow the image")
        except zlib.error as error:
            raise ScanError("bad_nifti", f"damaged gzip data: {error}") from None
        rest = member.unused_data.lstrip(b"\0")
    return b"".join(parts)
