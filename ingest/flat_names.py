"""Names of a flat folder that tell that several of its files are of one person: each would become another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ingest.errors import SourceError
from ingest.names import BIDS_SUFFIX
from ingest.places import Place
from ingest.scan import ScanSource

_BIDS_PERSON = re.compile(r"[A-Za-z0-9]*(sub-[^_]+)(?=_)")  # SPM and CAT12 put letters before it: mwp1sub-01_T1w

#: Words for an image, not for a person, in lower case.
_IMAGES = {
    *("t1", "t1w", "t2", "t2w", "t2star", "pd", "pdw", "flair", "swi", "dwi", "adc", "b0", "bold", "rest", "tof", "ct"),
    *("brain", "mask", "brainmask", "bet", "skull", "seg", "dseg", "aseg", "label", "labels", "probseg", "gm", "wm"),
    *("csf", "defaced", "warped", "mprage", "inv1", "inv2", "uni"),
}
#: Of these, what a store may be of.
_SCANS = {"t1", "t1w", "mprage", "t2", "t2w", "flair", "pd", "pdw", "swi", "brain"}
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
    people = [found[1] for stem in stems if (found := _BIDS_PERSON.match(stem))]
    if len(set(people)) < len(people) or (people and described):
        wanted = image or BIDS_SUFFIX
        first = min((scan for scan in scans if _BIDS_PERSON.match(scan.participant)), key=lambda scan: scan.name)
        raise SourceError(
            f"{source} has no {wanted} scans by the names of BIDS (such as sub-01_{wanted}.nii.gz), but {len(people)} "
            f"others, such as {first.name}; {_ways_out(first.participant.split('_')[-1:], image)}"
        )
    different = sorted(set(stems))
    if 2 * len(different) <= len(stems) and len({scan.name.rpartition("/")[0] for scan in scans}) > 1:
        raise SourceError(
            f"{source} has {len(stems)} scans of only {len(different)} names, such as {first.name}, as where each "
            f"person has a folder; {_MANIFEST}"
        )
    owners = {stem: _without_images(stem) for stem in different}
    times = Counter(owners.values())
    one = next((stem for stem in different if times[owners[stem]] > 1), None)
    if one is not None:
        same = [stem for stem in different if owners[stem] == owners[one]]
        words = [word for stem in same for word in _BETWEEN.split(stem)[1:] if word.lower() in _SCANS]
        raise SourceError(
            f"{source} has files that seem to be of one person, such as {same[0]} and {same[1]}; "
            f"{_ways_out(words, image)}"
        )


def _without_images(stem: str) -> str:
    """Return what of a name says who it is; the first word may be a group of people, such as PD and CT."""
    first, *words = _BETWEEN.split(stem)
    rest = [word for word in words if word.lower() not in _IMAGES]
    return "_".join([first, *rest]) if len(rest) < len(words) else stem


def _ways_out(words: Sequence[str], image: str | None) -> str:
    """Return what to do, by words of names for an image to take, unless one was asked for already."""
    choose = f"choose those of one kind, such as --image {words[0]}, " if words and image is None else ""
    return f"{choose}{_MANIFEST}, or {_FLAT}"
