"""UK Biobank's column names in all their spellings -> field, instance, array."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ingest.dictionary import BY_FIELD, BY_TITLE

#: Names of the column of participant ids, the first that a table has; capitals do not matter.
ID_COLUMNS = (
    "eid",
    "f.eid",
    "participant.eid",
    "n_eid",
    "participant id",
    "participant_id",
    "participant",
    "subject_id",
    "subject",
    "id",
)
_UKB_ID_COLUMNS = frozenset(ID_COLUMNS[:4])  # "participant id" is UK Biobank's too, but not only

# 31-0.0 | f.31.0.0 or x31.0.0 (made by R) | p31, p21003_i2, p399_i2_a1, participant.p20016_i2 | n_31_0_0
_NUMBERED = re.compile(
    r"(?P<f1>\d+)-(?P<i1>\d+)\.(?P<a1>\d+)"
    r"|(?:f\.|x)(?P<f2>\d+)\.(?P<i2>\d+)\.(?P<a2>\d+)"
    r"|(?:participant\.)?p(?P<f3>\d+)(?:_i(?P<i3>\d+))?(?:_a(?P<a3>\d+))?"
    r"|[a-z]{1,2}_(?P<f4>\d+)_(?P<i4>\d+)_(?P<a4>\d+)",
    re.ASCII | re.IGNORECASE,
)
# Age when attended assessment centre | Instance 2 | Array 0
_TITLED = re.compile(r"(?P<title>.+?) \| instance (?P<i>\d+)(?: \| array (?P<a>\d+))?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class UkbColumn:
    """A UK Biobank column name, taken apart."""

    field: int
    instance: int
    array: int


def parse_ukb_column(name: str) -> UkbColumn | None:
    """Take a UK Biobank column name apart, in any of its spellings; None if it is no such name.

    Fields without instances have neither ``_i0`` nor ``| Instance 0`` in their names. Of the Platform's titles, those
    of the fields in `ingest.dictionary` are known.
    """
    titled = _TITLED.fullmatch(name)
    if titled:
        variable = BY_TITLE.get(titled["title"].lower())
        return UkbColumn(variable.ukb_field, int(titled["i"]), int(titled["a"] or 0)) if variable else None
    numbered = _NUMBERED.fullmatch(name)
    if numbered is None:
        return None
    parts = {key[0]: int(value) for key, value in numbered.groupdict().items() if value is not None}
    return UkbColumn(parts["f"], parts.get("i", 0), parts.get("a", 0))


def find_id_column(names: Sequence[str]) -> int | None:
    """Return where the participant ids are, None if nowhere."""
    lower = [name.lower() for name in names]
    return next((lower.index(known) for known in ID_COLUMNS if known in lower), None)


def find_ukb_columns(names: Sequence[str]) -> dict[int, UkbColumn] | None:
    """Return the columns of the fields in `ingest.dictionary`, by position; None if this is no UK Biobank table.

    It is one if such a field is in it, or any field beside an id column named as only UK Biobank does: ``p300`` may be
    a potential, and not a field. Of fields with arrays the first is taken.
    """
    parsed = {place: found for place, name in enumerate(names) if (found := parse_ukb_column(name))}
    known = {place: found for place, found in parsed.items() if found.field in BY_FIELD}
    if not known and not (parsed and _UKB_ID_COLUMNS & {name.lower() for name in names}):
        return None
    for place, name in enumerate(names):  # "Sex": a title without an instance means something in such a table only
        if name.lower() in BY_TITLE:
            known[place] = UkbColumn(BY_TITLE[name.lower()].ukb_field, 0, 0)
    return {place: found for place, found in known.items() if found.array == 0}
