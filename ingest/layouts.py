"""Finding the scans: UK Biobank bulk files, BIDS, any folder of NIfTI files, or a table that lists them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from ingest.discover import folders_of, list_objects, walk_files, with_listing
from ingest.errors import SourceError
from ingest.flat_names import check_nobody_twice
from ingest.manifest import read_manifest
from ingest.names import (
    BIDS_EXTRAS,
    BIDS_SUFFIX,
    UKB_FIELDS,
    Ranked,
    bids_scan,
    flat_scan,
    one_per_pair,
    ukb_scan,
    volume_stem,
)
from ingest.places import Place
from ingest.scan import ScanSource


class Layout(StrEnum):
    """Conventions by which scans are named."""

    auto = "auto"
    ukb = "ukb"
    bids = "bids"
    flat = "flat"
    manifest = "manifest"


#: How each layout reads a name; `Layout.auto` takes the first that finds anything.
_READERS: dict[Layout, Callable[[str, str, str | None], Ranked | None]] = {
    Layout.ukb: ukb_scan,
    Layout.bids: bids_scan,
    Layout.flat: flat_scan,
}
_TABLES = (".csv", ".tsv")

#: Files that are no scans: by kind, how their names end, and what makes scans of them.
_OTHERS = {
    "zip": ((".zip",), ""),
    "DICOM": ((".dcm", ".ima"), "DICOM becomes NIfTI by dcm2niix"),
    "FreeSurfer": ((".mgz", ".mgh"), "FreeSurfer's volumes become NIfTI by mri_convert x.mgz x.nii.gz"),
}


def find_scans(
    source: Place, layout: Layout = Layout.auto, image: str | None = None, rank: int | None = None
) -> tuple[Layout, list[ScanSource]]:
    """List the scans of a folder or of a manifest.

    One image type per store. Without `image` that is T1 in a UK Biobank tree, or FLAIR if there is no T1; and T1w in a
    BIDS tree, not resampled (no ``space-``) if there are such. Files of other types are passed over.

    Parameters
    ----------
    source
        A folder, searched with all its subfolders (hidden ones, and in BIDS ``derivatives``, ``sourcedata`` and
        ``code`` below it are left out); or a CSV or TSV table, see `ingest.manifest.read_manifest`.
    layout
        `Layout.auto` takes a ``.csv`` or ``.tsv`` file for a manifest, and of a folder the first of ukb, bids, flat
        that finds anything.
    image
        UK Biobank: the member, ``T1_brain`` (field 20252) or ``T2_FLAIR_brain_to_MNI`` (20253); BIDS: the suffix,
        with entities that the name must have (``T1w``, ``space-MNI152NLin2009cAsym_T1w``); flat: a text that the file
        name must hold.
    rank
        Which of the images that are taken without `image` it must be, see `ingest.names.rank_of`; None takes the first
        that is found.

    Returns
    -------
    layout : Layout
        The one that was found.
    scans : list of ScanSource
        Sorted by name; no name occurs twice.

    Raises
    ------
    SourceError
        If `source` does not exist, a folder cannot be listed, or there is no scan.
    """
    if layout is Layout.manifest or (layout is Layout.auto and source.suffix.lower() in _TABLES and source.is_file()):
        if not source.is_file():
            raise SourceError(f"no table {source}; --layout manifest expects a CSV or TSV file as SRC")
        return Layout.manifest, _sorted(read_manifest(source, image))
    if not source.is_dir():
        problem = f"{source} is not a folder" if source.exists() else f"no folder {source}"
        raise SourceError(
            f"{problem}; expected a folder of UK Biobank zips, a BIDS tree or NIfTI files, or a manifest (.csv, .tsv)"
        )
    layouts = list(_READERS) if layout is Layout.auto else [layout]
    bids_folders_only = layout is Layout.bids or (
        layout is Layout.auto and (source / "dataset_description.json").is_file()
    )
    root = str(source.absolute())
    best: tuple[int, int] | None = None
    scans: list[ScanSource] = []
    kinds: Counter[str] = Counter()
    skip = BIDS_EXTRAS if bids_folders_only else ()
    listed = {} if isinstance(source, Path) else list_objects(source, skip)
    folders = walk_files(source, skip) if isinstance(source, Path) else folders_of(listed)
    for relative, names in folders:
        for name in one_per_pair(names):
            kinds[_kind(name)] += 1
            file = os.path.join(relative, name)
            for place, candidate in enumerate(layouts):
                if best and place > best[0]:
                    break
                ranked = _READERS[candidate](root, file, image)
                if ranked is None or (rank is not None and ranked[0] != rank):
                    continue
                if best is None or (place, ranked[0]) < best:
                    best, scans = (place, ranked[0]), []
                if (place, ranked[0]) == best:
                    scans.append(with_listing(ranked[1], listed.get(file)))
                break
    if best is None:
        raise SourceError(_nothing_found(source, layout, image, kinds))
    if layout is Layout.auto and layouts[best[0]] is Layout.flat:
        check_nobody_twice(source, scans, image, described=bids_folders_only)
    return layouts[best[0]], _sorted(scans)


def _sorted(scans: list[ScanSource]) -> list[ScanSource]:
    scans.sort(key=lambda scan: scan.name)
    return scans


def _kind(name: str) -> str:
    """Say of which kind a file is, in few different words."""
    if volume_stem(name) is None:
        return next((kind for kind, (endings, _) in _OTHERS.items() if name.lower().endswith(endings)), "other")
    return "BIDS" if name.startswith("sub-") else "NIfTI"


def _nothing_found(source: Place, layout: Layout, image: str | None, kinds: Counter[str]) -> str:
    fields = [f"{field} ({bulk.modality})" for field, bulk in UKB_FIELDS.items()]
    expected = {
        Layout.ukb: f"zips named like 1234567_20252_2_0.zip, of the fields {' or '.join(fields)}",
        Layout.bids: f"files named like sub-01_{image or BIDS_SUFFIX}.nii.gz",
        Layout.flat: "files ending in .nii, .nii.gz, .img or .img.gz",
    }
    if image:
        expected[Layout.flat] += f" with {image!r} in the name"
    starts = [bulk.folder for bulk in UKB_FIELDS.values()]
    if image and not image.startswith(tuple(starts)):
        expected[Layout.ukb] += f" and an --image that begins with {' or '.join(starts)}"
    texts = list(expected.values()) if layout is Layout.auto else [expected[layout]]
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no files"
    chosen = f" for --image {image}" if image else ""
    hints = "".join(f"; {hint}" for kind, (_, hint) in _OTHERS.items() if kinds[kind] and hint)
    return f"no scans{chosen} under {source} (found: {found}); expected {'; or '.join(texts)}{hints}"
