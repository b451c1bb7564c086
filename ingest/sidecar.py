"""What a BIDS tree says of the codes of its table: ``participants.json`` beside ``participants.tsv``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ingest.notes import Notes
from ingest.places import Place

#: Column -> code, as in the table -> label.
Levels = Mapping[str, Mapping[str, str]]


def read_sidecar(table: Place) -> str | None:
    """Return the text of the JSON file beside a table, or None if there is none."""
    beside = table.parent / f"{table.name.removesuffix(table.suffix)}.json"
    if table.suffix != ".tsv" or not beside.is_file():
        return None
    return beside.read_bytes().decode("utf-8-sig", errors="replace")


def parse_levels(text: str | None, notes: Notes) -> Levels:
    """Return the ``Levels`` of each column that has some.

    Labels are texts, or objects with a ``Description``, as newer versions of BIDS have them
    (https://bids-specification.readthedocs.io, "Tabular files").
    """
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        notes.add("the JSON file beside it is damaged, so what it says of codes is not known")
        return {}
    found = {}
    for column, about in document.items():
        levels = about.get("Levels") if isinstance(about, dict) else None
        if isinstance(levels, dict) and levels:
            found[column] = {code: _label(label, code) for code, label in levels.items()}
    return found


def _label(label: object, code: str) -> str:
    label = label.get("Description", code) if isinstance(label, dict) else label
    return label if isinstance(label, str) and label.strip() else code
