"""What the name of a file says about its scan: UK Biobank bulk archives, BIDS, and anything else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ingest.scan import ScanSource

#: One image type goes into a store. If none is asked for, scans of the lowest rank in the tree are taken.
Ranked = tuple[int, ScanSource]


@dataclass(frozen=True)
class BulkField:
    """A UK Biobank bulk field whose archives hold volumes."""

    modality: str
    folder: str
    image: str


#: Bulk fields, the preferred one first, and the member that is read unless ``--image`` names another.
UKB_FIELDS = {
    "20252": BulkField("T1", "T1", "T1_brain_to_MNI"),
    "20253": BulkField("FLAIR", "T2_FLAIR", "T2_FLAIR_brain_to_MNI"),
}
BIDS_SUFFIX = "T1w"
#: Folders of a BIDS dataset that do not hold its scans.
BIDS_EXTRAS = frozenset({"derivatives", "sourcedata", "code"})

_UKB_NAME = re.compile(r"(?P<eid>\d+)_(?P<field>\d+)_(?P<instance>\d+)_(?P<array>\d+)\.zip", re.IGNORECASE)
_VOLUME = re.compile(r"\.(?P<kind>nii|img|hdr)(\.gz)?$", re.IGNORECASE)


def ukb_scan(root: str, file: str, image: str | None) -> Ranked | None:
    """Return the scan of a UK Biobank archive, None for other files and fields.

    Parameters
    ----------
    root
        Absolute folder that `file` is relative to.
    image
        A member's name as in the archive; its folder and ``.nii.gz`` may be left out: ``T1_brain``,
        ``T1/T1_fast/T1_brain_pve_1``. How it begins (``T1``, ``T2_FLAIR``) decides the bulk field.
    """
    # The id is taken from the file's name alone: folders may hold underscores too.
    match = _UKB_NAME.fullmatch(os.path.basename(file))
    bulk = UKB_FIELDS.get(match["field"]) if match else None
    if match is None or bulk is None:
        return None
    rank = 0
    if image is None:
        image = bulk.image
        rank = list(UKB_FIELDS).index(match["field"])
    elif not image.startswith(bulk.folder):
        return None
    member = image.removesuffix(".gz").removesuffix(".nii").removeprefix(f"{bulk.folder}/")
    member = f"{bulk.folder}/{member}.nii.gz"
    return rank, ScanSource(
        path=os.path.join(root, file),
        name=f"{printable(file)}/{member}",
        participant=match["eid"],
        session=match["instance"],
        modality=bulk.modality,
        member=member,
    )


def bids_scan(root: str, file: str, image: str | None) -> Ranked | None:
    """Return the scan of a BIDS file, None for files of another suffix and those below `BIDS_EXTRAS`.

    The modality is the name without ``sub-`` and ``ses-``: ``T1w``, ``acq-mprage_run-2_T1w``. So runs and acquisitions
    of one session are scans of their own, while the same name twice (``.nii`` and ``.nii.gz``) is a duplicate.

    Parameters
    ----------
    image
        A suffix, after entities that the name must have: ``T1w``, ``space-MNI152NLin2009cAsym_desc-preproc_T1w``; it
        may end in ``.nii.gz``. If None, T1w; scans resampled to another space (``space-``) only where there are no
        others.
    """
    stem = volume_stem(os.path.basename(file))
    if stem is None or not stem.startswith("sub-") or not BIDS_EXTRAS.isdisjoint(file.split(os.sep)[:-1]):
        return None
    *parts, suffix = stem.split("_")
    *wanted, wanted_suffix = (image or BIDS_SUFFIX).removesuffix(".gz").removesuffix(".nii").split("_")
    if suffix != wanted_suffix or not set(wanted) <= set(parts):
        return None
    participant, session, others = "", "", list[str]()
    for part in _entities(parts):
        if part.startswith("sub-"):
            participant = part
        elif part.startswith("ses-"):
            session = part.removeprefix("ses-")
        else:
            others.append(part)
    rank = int(image is None and any(part.startswith("space-") for part in others))
    return rank, ScanSource(
        path=os.path.join(root, file),
        name=printable(file),
        participant=printable(participant),
        session=printable(session),
        modality=printable("_".join([*others, suffix])),
    )


def flat_scan(root: str, file: str, image: str | None) -> Ranked | None:
    """Return the scan of any NIfTI file, named after the file without its suffix; None for other files.

    Parameters
    ----------
    image
        A text that the file's name must hold; it becomes the modality.
    """
    name = os.path.basename(file)
    stem = volume_stem(name)
    if not stem or (image and image not in name):
        return None
    return 0, ScanSource(
        path=os.path.join(root, file),
        name=printable(file),
        participant=printable(stem),
        session="",
        modality=image or "",
    )


def rank_of(layout: str, modality: str) -> int:
    """Return the rank that the scans of a store have by their modality, as the functions above rank files."""
    if layout == "ukb":
        return [bulk.modality for bulk in UKB_FIELDS.values()].index(modality)
    return int(layout == "bids" and "space-" in modality)


def volume_stem(name: str) -> str | None:
    """Return the name without ``.nii``, ``.nii.gz``, ``.img``, ...; None for files that are no volume."""
    match = _VOLUME.search(name)
    return name[: match.start()] if match else None


def one_per_pair(names: Iterable[str]) -> list[str]:
    """Leave the headers of ``.hdr`` / ``.img`` pairs out of the files of a folder; a header alone stays."""
    names = list(names)
    images = {volume_stem(name) for name in names if name.lower().endswith((".img", ".img.gz"))}
    if not images:
        return names
    return [name for name in names if not name.lower().endswith((".hdr", ".hdr.gz")) or volume_stem(name) not in images]


def printable(name: str) -> str:
    r"""Return a file name as text: bytes that are not UTF-8 become ``\xe9``, for tables are UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _entities(parts: list[str]) -> list[str]:
    """Join what belongs together: in ``sub-CON_03`` (not valid, but common) the label holds an underscore."""
    joined: list[str] = []
    for part in parts:
        if joined and "-" not in part:
            joined[-1] += f"_{part}"
        else:
            joined.append(part)
    return joined
