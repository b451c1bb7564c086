"""What a scan is before (`ScanSource`) and after (`ScanRow`) it was read."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

#: Every status that a row can have. Loaders yield only ``ok`` rows.
STATUSES = (
    "pending",
    "ok",
    "unusable",
    "missing_member",
    "bad_archive",
    "bad_nifti",
    "bad_image",
    "unsupported",
    "wrong_shape",
    "read_error",
    "duplicate",
    "withdrawn",
)

#: Absences that every cohort has; they do not make a run fail.
EXPECTED_ABSENCES = frozenset({"unusable", "missing_member", "withdrawn"})

#: A file that gave a volume before and has one of these now may be damaged, or be written just now.
UNREADABLE_SOURCE = frozenset({"read_error", "bad_archive", "bad_nifti"})


@dataclass(frozen=True, slots=True)
class ScanSource:
    """Where one scan comes from. Small: there may be 100,000.

    Attributes
    ----------
    path
        The file or archive: an absolute path, or ``s3://bucket/key``. Of a ``.hdr`` / ``.img`` pair the image.
    name
        The same relative to the source folder, with the member inside an archive: ``90/9000001_20252_2_0.zip/T1/...``.
        It tells the scans of a source apart.
    member
        Member inside the archive, or None for a plain file.
    size, mtime
        Bytes and seconds since 1970, where the listing of an object store has said so.
    """

    path: str
    name: str
    participant: str
    session: str
    modality: str
    member: str | None = None
    size: int | None = None
    mtime: float | None = None


@dataclass(frozen=True)
class ScanRow:
    """One row of ``scans/``: identity, outcome and quality numbers.

    Attributes
    ----------
    scale, offset
        ``stored * scale + offset`` is the source's intensity.
    brain_voxels
        Non-zero voxels of the stored volume (1 mm3 each). In MNI scans it is the template's.
    head_scale
        Determinant of the linear transform from head to MNI152, as UK Biobank's field 25000; NaN where unknown.
    cut_off_voxels
        Positive source voxels that lie outside the grid (below a whole head the neck is not counted).
    mean
        Mean stored intensity of the non-zero voxels.
    """

    participant: str
    session: str
    modality: str
    source: str
    source_size: int = 0
    source_mtime: float = nan
    status: str = "pending"
    error: str = ""
    scale: float = nan
    offset: float = nan
    brain_voxels: int = 0
    head_scale: float = nan
    cut_off_voxels: int = 0
    mean: float = nan
