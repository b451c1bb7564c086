"""Bytes of a scan: a plain file, a ``.hdr`` / ``.img`` pair, or a member of a UK Biobank zip."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import deflate
import numpy as np

from ingest.errors import ScanError
from ingest.places import as_place
from ingest.scan import ScanSource

#: Larger files are not read: an archive of UK Biobank has 100 MB, one brain volume never more than a few GB.
MAX_FILE_BYTES = 4 << 30
#: A member may claim any size; a brain volume is never larger.
MAX_MEMBER_BYTES = 1 << 30
#: Far more members than the 45 of UK Biobank's T1 archives. Python makes an object of each.
MAX_DIRECTORY_BYTES = 4 << 20
MATRIX_MEMBER = "T1/transforms/T1_to_MNI_linear.mat"

_MAX_MATRIX_BYTES = 1 << 16
MAX_DEFLATE_RATIO = 1032  # of the format itself: 258 bytes for two bits
_MAX_GZIP_RATIO = 100  # gzipped data hardly shrink again; deflate's own limit is 1032
_SMALL = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s2xH18xHH")  # magic, flags, lengths of name and extra field
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # the others inflate without a bound on memory
_PAIR_SUFFIXES = {".img": (".hdr", ".hdr.gz"), ".hdr": (".img", ".img.gz")}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class ScanContent:
    """What was read of a scan.

    Attributes
    ----------
    nifti
        The bytes of the .nii or .nii.gz file, or of the header of a pair.
    head_scale
        Determinant of the archive's linear transform to MNI152, NaN where there is none.
    image
        The bytes of the .img or .img.gz file of a pair, else None.
    """

    nifti: bytes
    head_scale: float = float("nan")
    image: bytes | None = None


def read_scan(source: ScanSource, *, max_bytes: int = MAX_FILE_BYTES) -> ScanContent:
    """Read one scan, in bounded time and memory whatever its files claim.

    Nothing is written to disk: members of archives are matched by their exact names, so hostile ones do no harm.

    Parameters
    ----------
    max_bytes
        Larger files are not read.

    Raises
    ------
    ScanError
        ``read_error``, ``bad_archive``, ``missing_member``, ``unusable``, or ``unsupported`` for files of absurd size.
    """
    if source.member is not None:
        content = _read_file(source.path, max_bytes, too_large="bad_archive")
        try:
            _check_directory(content)
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return _read_members(archive, content, source.member)
        except (
            zipfile.BadZipFile, deflate.DeflateError, struct.error, EOFError, LookupError, MemoryError,
            NotImplementedError, OSError, OverflowError, RuntimeError, ValueError,
        ) as error:  # fmt: skip
            raise ScanError("bad_archive", f"the zip cannot be read: {error or type(error).__name__}") from None
    stem, suffix = _split(source.path)
    if suffix not in _PAIR_SUFFIXES:
        return ScanContent(_read_file(source.path, max_bytes))
    try:
        other = next((other for other in _other_halves(stem, suffix) if as_place(other).exists()), None)
    except (OSError, ValueError) as error:
        raise ScanError("read_error", f"{type(error).__name__}: {error}") from None
    if other is None:
        expected = " or ".join(os.path.basename(stem) + s for s in _PAIR_SUFFIXES[suffix])
        raise ScanError("read_error", f"half of a pair: no {expected} beside it")
    header, image = (other, source.path) if suffix == ".img" else (source.path, other)
    return ScanContent(_read_file(header, max_bytes), image=_read_file(image, max_bytes))


def _split(path: str) -> tuple[str, str]:
    """Split off the suffix, in lower case and without ``.gz``."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() == ".gz":
        stem, suffix = os.path.splitext(stem)
    return stem, suffix.lower()


def _other_halves(stem: str, suffix: str) -> Iterator[str]:
    """Yield what the other half of a pair may be called: in lower case, in capitals, in any mixture of them."""
    for other in _PAIR_SUFFIXES[suffix]:
        yield stem + other
    for other in _PAIR_SUFFIXES[suffix]:
        for letters in product(*(sorted({letter.upper(), letter}) for letter in other)):
            yield stem + "".join(letters)


def _read_file(path: str, max_bytes: int, *, too_large: str = "unsupported") -> bytes:
    """Read a file or an object whole, sequentially: the Research Analysis Platform's mount is slow at seeking about."""
    try:
        place = as_place(path)
        size = _regular_file_bytes(path) if isinstance(place, Path) else place.size()
        if size is None:
            raise FileNotFoundError(f"there is no {path}")
        if size > MAX_FILE_BYTES:
            raise ScanError(too_large, f"{size} bytes; files of more than {MAX_FILE_BYTES} are not read")
        if size > max_bytes:
            raise ScanError("read_error", f"{size} bytes; --max-memory leaves room for files of {max_bytes} bytes")
        if not isinstance(place, Path):
            return place.read_pieces(size)
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ScanError("read_error", f"{type(error).__name__}: {error.strerror or error}") from None
    except (MemoryError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ScanError("read_error", f"{type(error).__name__}: {error or 'the file is too large'}") from None


def _regular_file_bytes(path: str) -> int:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ScanError("read_error", f"{kind}, not a regular file")
    return status.st_size


def _check_directory(content: bytes) -> None:
    """Refuse a zip with millions of members before `zipfile` makes millions of objects."""
    end = content.rfind(b"PK\x05\x06", max(0, len(content) - (1 << 16) - 22), max(0, len(content) - 18))
    if end < 0:
        raise zipfile.BadZipFile("no end of a zip; truncated, or another kind of file")
    size = int.from_bytes(content[end + 12 : end + 16], "little")
    if content[max(0, end - 20) : end].startswith(b"PK\x06\x07"):  # zip64
        size64 = int.from_bytes(content[max(0, end - 36) : end - 28], "little")
        size = size64 if size == 0xFFFFFFFF else max(size, size64)
    if size > MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its list of members has {size} bytes, more than any archive of scans")


def _read_members(archive: zipfile.ZipFile, content: bytes, member: str) -> ScanContent:
    # `orig_filename` is what the archive says; `filename` ends at the first NUL.
    members = [info for info in archive.infolist() if not info.is_dir()]
    if not members:
        raise ScanError("bad_archive", "the archive is empty")
    info = _member(members, member)
    if info is None:
        unusable = f"{member.partition('/')[0]}/unusable/"
        if any(other.orig_filename.startswith(unusable) for other in members):
            raise ScanError("unusable", f"UK Biobank's pipeline moved the scan to {unusable}")
        raise ScanError("missing_member", f"the archive has no {member}")
    ratio = _MAX_GZIP_RATIO * info.compress_size
    if member.lower().endswith(".gz") and info.file_size > _SMALL + ratio:
        raise ScanError(
            "bad_archive", f"{member} claims to inflate from {info.compress_size} to {info.file_size} bytes"
        )
    matrix = _member(members, MATRIX_MEMBER)
    head_scale = _determinant(_read_member(content, matrix, _MAX_MATRIX_BYTES)) if matrix else float("nan")
    return ScanContent(_read_member(content, info, MAX_MEMBER_BYTES), head_scale)


def _member(members: list[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo | None:
    found = [info for info in members if info.orig_filename == name]
    if len(found) > 1:
        raise ScanError("bad_archive", f"the archive has {len(found)} members named {name}")
    return found[0] if found else None


def _read_member(content: bytes, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Return a member's bytes by libdeflate, which takes a fifth of zipfile's time."""
    name = info.orig_filename
    if info.flag_bits & 1:
        raise ScanError("bad_archive", f"{name} is encrypted")
    if info.compress_type not in _METHODS:
        method = f"method {info.compress_type}"
        raise ScanError("bad_archive", f"{name} is compressed by {method}, expected 8 (deflate) or 0 (stored)")
    stored = info.compress_type == zipfile.ZIP_STORED
    if info.file_size > min(limit, info.compress_size * (1 if stored else MAX_DEFLATE_RATIO)):
        raise ScanError(
            "bad_archive",
            f"{name} claims {info.file_size} bytes, more than any brain scan or {info.compress_size} hold",
        )
    packed = _packed(content, info)
    member = packed if stored else bytes(deflate.deflate_decompress(packed, info.file_size))
    if len(member) != info.file_size:
        raise ScanError("bad_archive", f"{name} has {len(member)} bytes, the archive announces {info.file_size}")
    if deflate.crc32(member) != info.CRC:
        raise ScanError("bad_archive", f"{name} is damaged: its checksum is wrong")
    return member


def _packed(content: bytes, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes as they are in the archive."""
    at = info.header_offset
    header = content[at : at + _LOCAL_HEADER.size] if at >= 0 else b""
    magic, flags, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = content[at + len(header) : at + len(header) + name_length]
    if magic != b"PK\x03\x04" or name.decode("utf-8" if flags & 0x800 else "cp437") != info.orig_filename:
        raise ScanError("bad_archive", f"{info.orig_filename} is not where the archive says")
    begin = at + len(header) + name_length + extra_length
    packed = content[begin : begin + info.compress_size]
    if len(packed) != info.compress_size:
        raise ScanError(
            "bad_archive", f"truncated: {info.orig_filename} has {len(packed)} of {info.compress_size} bytes"
        )
    return packed


def _determinant(matrix: bytes) -> float:
    """Return the volumetric scaling of an FSL FLIRT matrix (4 rows of 4 numbers), NaN if it is not one."""
    try:
        values = np.array(matrix.split(), dtype=np.float64).reshape(4, 4)
    except ValueError:
        return float("nan")
    if not (np.abs(values) < 1e6).all():  # NaN too
        return float("nan")
    return float(abs(np.linalg.det(values[:3, :3])))
