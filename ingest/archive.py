"""Bytes of a scan: a plain file, or a member of a UK Biobank zip."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingest.errors import ScanError
from ingest.scan import ScanSource

#: A member may claim any size; a .nii.gz of a brain is never larger.
MAX_MEMBER_BYTES = 1 << 30
MATRIX_MEMBER = "T1/transforms/T1_to_MNI_linear.mat"


@dataclass(frozen=True)
class ScanContent:
    """What was read of a scan.

    Attributes
    ----------
    nifti
        The bytes of the .nii or .nii.gz file.
    head_scale
        Determinant of the archive's linear transform to MNI152, NaN where there is none.
    """

    nifti: bytes
    head_scale: float = float("nan")


def read_scan(source: ScanSource) -> ScanContent:
    """Read one scan.

    Raises
    ------
    ScanError
        ``read_error``, ``bad_archive``, ``missing_member`` or ``unusable``.
    """
    try:
        # One sequential read: the Research Analysis Platform's mount is slow at seeking about in an archive.
        content = Path(source.path).read_bytes()
    except OSError as error:
        raise ScanError("read_error", f"{type(error).__name__}: {error.strerror or error}") from None
    if source.member is None:
        return ScanContent(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read_members(archive, source.member)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ScanError("bad_archive", f"the zip cannot be read: {error or type(error).__name__}") from None


def _read_members(archive: zipfile.ZipFile, member: str) -> ScanContent:
    names = set(archive.namelist())
    if member not in names:
        folder, _, name = member.rpartition("/")
        if f"{folder}/unusable/{name}" in names or any(n.startswith(f"{folder}/unusable/") for n in names):
            raise ScanError("unusable", f"UK Biobank's pipeline moved the scan to {folder}/unusable/")
        raise ScanError("missing_member", f"the archive has no {member}")
    info = archive.getinfo(member)
    if info.file_size > MAX_MEMBER_BYTES:
        raise ScanError("bad_archive", f"{member} claims {info.file_size} bytes, more than any brain scan")
    matrix = archive.read(MATRIX_MEMBER) if MATRIX_MEMBER in names else None
    return ScanContent(archive.read(member), _determinant(matrix))


def _determinant(matrix: bytes | None) -> float:
    """Return the volumetric scaling of an FSL FLIRT matrix (4 rows of 4 numbers), NaN if there is none."""
    if matrix is None:
        return float("nan")
    try:
        values = np.array(matrix.split(), dtype=np.float64).reshape(4, 4)
    except ValueError:
        return float("nan")
    return float(abs(np.linalg.det(values[:3, :3])))
