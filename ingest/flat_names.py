"""Names of a flat folder that tell that several of its files are of one person: each would become another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ingest.errors import SourceError
from ingest.names import BIDS_SUFFIX
from ingest.places import Place
from ingest.scan import ScanSource

_BIDS_PERSON = re.compile(r"sub-[^_]+(?=_)")

#: Words for an image, not for a person, in lower case.
_IMAGES = {
    *("t1", "t1w", "t2", "t2w", "t2star", "pd", "pdw", "flair", "swi", "dwi", "adc", "b0", "bold", "rest", "tof", "ct"),
    *("brain", "mask", "brainmask", "bet", "skull", "seg", "dseg", "aseg", "label", "labels", "probseg", "gm", "wm"),
    *("csf", "defaced", "warped", "mprage", "inv1", "inv2", "uni"),
}
_BETWEEN = re.compile(r"[_\-. ]+")

_MANIFEST = "say in a manifest (.csv: path,participant) who is who"
_FLAT = "use --layout flat if each file is of another person"


def check_nobody_twice(source: Place, scans: Sequence[ScanSource], image: str | None, *, described: bool) -> None:
    """Refuse files that by their names are not of a person each.

    Parameters
    ----------
    scans
        Of a folder that is flat only because it is nothing else; participants are the names of the files.
    described
        The folder has a ``dataset_description.json``, as BIDS trees have.

    Raises
    ------
    SourceError
        If it is a BIDS tree without scans of the image; names differ in words for images alone (``01_T1``, ``01_T2``,
        ``01_T1_mask``); or most folders hold files of the same names.
    """
    first = min(scans, key=lambda scan: scan.name)
    stems = [scan.participant for scan in scans]
    people = [found[0] for stem in stems if (found := _BIDS_PERSON.search(stem))]
    if len(set(people)) < len(people) or (people and described):
        wanted = image or BIDS_SUFFIX
        raise SourceError(
            f"{source} has no {wanted} scans by the names of BIDS (such as sub-01_{wanted}.nii.gz), but {len(people)} "
            f"others, such as {first.name}; {_ways_out(first.participant.split('_')[-1])}"
        )
    different = sorted(set(stems))
    if 2 * len(different) < len(stems) and len({scan.name.rpartition("/")[0] for scan in scans}) > 1:
        raise SourceError(
            f"{source} has {len(stems)} scans of only {len(different)} names, such as {first.name}, as where each "
            f"person has a folder; {_MANIFEST}"
        )
    owners = {stem: _without_images(stem) for stem in different}
    times = Counter(owners.values())
    one = next((stem for stem in different if times[owners[stem]] > 1), None)
    if one is not None:
        same = [stem for stem in different if owners[stem] == owners[one]]
        image = next(word for stem in same for word in _BETWEEN.split(stem)[::-1] if word.lower() in _IMAGES)
        raise SourceError(
            f"{source} has files that seem to be of one person, such as {same[0]} and {same[1]}; {_ways_out(image)}"
        )


def _without_images(stem: str) -> str:
    """Return what of a name says who it is; all of it, if nothing does."""
    words = _BETWEEN.split(stem)
    rest = [word for word in words if word.lower() not in _IMAGES]
    return "_".join(rest) if 0 < len(rest) < len(words) else stem


def _ways_out(image: str) -> str:
    return f"choose those of one kind, such as --image {image}, {_MANIFEST}, or {_FLAT}"
