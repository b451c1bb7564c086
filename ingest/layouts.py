"""Finding the scans in a folder: UK Biobank bulk files, BIDS, or any folder of NIfTI files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ingest.errors import SourceError
from ingest.scan import ScanSource


class Layout(StrEnum):
    """Conventions by which scans are named."""

    auto = "auto"
    ukb = "ukb"
    bids = "bids"
    flat = "flat"


@dataclass(frozen=True)
class BulkField:
    """A UK Biobank bulk field whose archives hold volumes."""

    modality: str
    folder: str
    image: str


#: Bulk fields and the member that is read unless ``--image`` names another.
UKB_FIELDS = {
    "20252": BulkField("T1", "T1", "T1_brain_to_MNI"),
    "20253": BulkField("FLAIR", "T2_FLAIR", "T2_FLAIR_brain_to_MNI"),
}
BIDS_SUFFIX = "T1w"

_UKB_NAME = re.compile(r"^(?P<eid>\d+)_(?P<field>\d+)_(?P<instance>\d+)_(?P<array>\d+)\.zip$")
_BIDS_NAME = re.compile(
    r"^sub-(?P<sub>[0-9A-Za-z]+)(?P<entities>(_[a-z]+-[0-9A-Za-z+]+)*)_(?P<suffix>[0-9A-Za-z]+)\.nii(\.gz)?$"
)
_NIFTI_SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


def find_scans(folder: Path, layout: Layout = Layout.auto, image: str | None = None) -> tuple[Layout, list[ScanSource]]:
    """List the scans of a folder, sorted by name.

    Parameters
    ----------
    folder
        Searched with all its subfolders; hidden ones and BIDS ``derivatives`` are left out.
    layout
        `Layout.auto` takes the first of ukb, bids, flat that finds anything.
    image
        UK Biobank: the member's name without folder and suffix (``T1_brain``); BIDS: the suffix (``T1w``, ``FLAIR``);
        flat: a text that the file name must hold.

    Raises
    ------
    SourceError
        If the folder does not exist or holds no scan of the layout.
    """
    if not folder.is_dir():
        raise SourceError(f"no folder {folder}; expected a folder of UK Biobank zips, a BIDS tree or NIfTI files")
    files = sorted(_walk(folder))
    candidates = [Layout.ukb, Layout.bids, Layout.flat] if layout is Layout.auto else [layout]
    for candidate in candidates:
        if candidate is Layout.ukb:
            scans = [s for s in (_ukb_scan(folder, f, image) for f in files) if s]
        elif candidate is Layout.bids:
            scans = [s for s in (_bids_scan(folder, f, image or BIDS_SUFFIX) for f in files) if s]
        else:
            scans = [s for s in (_flat_scan(folder, f, image) for f in files) if s]
        if scans:
            return candidate, scans
    expected = {
        Layout.auto: "UK Biobank zips (1234567_20252_2_0.zip), BIDS (sub-01_T1w.nii.gz) or NIfTI files (.nii, .nii.gz)",
        Layout.ukb: "zips named like 1234567_20252_2_0.zip (T1) or ..._20253_2_0.zip (FLAIR)",
        Layout.bids: f"files named like sub-01_{image or BIDS_SUFFIX}.nii.gz",
        Layout.flat: "files ending in .nii or .nii.gz" + (f" with {image!r} in their name" if image else ""),
    }[layout]
    raise SourceError(f"no scans among the {len(files)} files under {folder}; expected {expected}")


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "derivatives"]
        relative = os.path.relpath(parent, folder)
        for name in names:
            if not name.startswith("."):
                yield name if relative == "." else os.path.join(relative, name)


def _ukb_scan(folder: Path, file: str, image: str | None) -> ScanSource | None:
    # The id is taken from the file's name alone: folders may hold underscores too.
    match = _UKB_NAME.match(os.path.basename(file))
    bulk = UKB_FIELDS.get(match["field"]) if match else None
    if match is None or bulk is None:
        return None
    member = f"{bulk.folder}/{image or bulk.image}.nii.gz"
    return ScanSource(
        path=str(folder.absolute() / file),
        name=f"{file}/{member}",
        participant=match["eid"],
        session=match["instance"],
        modality=bulk.modality,
        member=member,
    )


def _bids_scan(folder: Path, file: str, suffix: str) -> ScanSource | None:
    match = _BIDS_NAME.match(os.path.basename(file))
    if match is None or match["suffix"] != suffix:
        return None
    entities = dict(pair.split("-", 1) for pair in match["entities"].split("_") if pair)
    return ScanSource(
        path=str(folder.absolute() / file),
        name=file,
        participant=f"sub-{match['sub']}",
        session=entities.get("ses", ""),
        modality=suffix,
    )


def _flat_scan(folder: Path, file: str, image: str | None) -> ScanSource | None:
    name = os.path.basename(file)
    if not _NIFTI_SUFFIX.search(name) or (image and image not in name):
        return None
    return ScanSource(
        path=str(folder.absolute() / file),
        name=file,
        participant=_NIFTI_SUFFIX.sub("", name),
        session="",
        modality=image or "",
    )
