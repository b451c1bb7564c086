"""Variables of any table of participants: numbers are taken as they are, the texts of a few categories become codes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ingest.answers import MISSING, NO_ANSWER, agreed, coded, codes_of, normal
from ingest.dictionary import BY_NAME, Variable
from ingest.notes import Notes

_MAX_CATEGORIES = 20  # more different texts than this are names or remarks, not categories
_MAX_NAME_BYTES = 255  # of a folder on most disks
_SHOWN = 60  # characters of a name that is too long
_WITH_COMMA = re.compile(r"[+-]?\d[\d.]*(,[\d.]+)+", re.ASCII)  # 60,5 or 1,234.5


def columns_to_store(names: Sequence[str], others: Sequence[int | None], notes: Notes) -> list[int]:
    """Return which columns of a plain table become variables; tell of those whose names no store can have.

    Parameters
    ----------
    others
        Columns that tell who and when. Neither is a nameless one taken: it numbers the rows of whatever program wrote
        the table.
    """
    wanted = []
    for place, name in enumerate(names):
        if not name or place in others:
            continue
        problem = _name_problem(stored_name(name))
        if problem:
            shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
            notes.add(f"column {shown!r} left out: {problem}; rename it")
        else:
            wanted.append(place)
    return wanted


def stored_name(name: str) -> str:
    """Return the name of a column in a store, where a slash would make a folder."""
    return re.sub(r"[/\\]", "_", name)


def _name_problem(name: str) -> str | None:
    """Say why Zarr, or the disk below it, has no array of that name."""
    size = len(name.encode())
    if size > _MAX_NAME_BYTES:
        return f"its name has {size} bytes, at most {_MAX_NAME_BYTES} can be stored"
    if "\0" in name:
        return "its name holds a NUL character"
    if name == "zarr.json" or name.startswith("__") or not name.strip("."):
        return "Zarr keeps that name for itself"
    return None


def plain_variables(
    rows: pd.DataFrame, names: Sequence[str], notes: Notes
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Turn the columns of a plain table into numbers.

    Where most of the different answers are numbers, or the column is called like a variable of `ingest.dictionary`
    that has no labels, all else in it is a bad value. Other columns are categories.

    Parameters
    ----------
    rows
        One per scan; columns are called by their position.
    names
        Of all columns of the table.
    """
    columns: dict[str, list[int]] = {}
    for place in map(int, rows.columns):
        columns.setdefault(stored_name(names[place]), []).append(place)
    table: dict[str, Any] = {}
    variables: dict[str, dict[str, Any]] = {}
    for name, places in columns.items():
        known = BY_NAME.get(name.lower())
        source = f"column {name!r} of {notes.table}"
        texts = [normal(rows[place]) for place in places]
        text = agreed([t.mask(t.isin(MISSING | NO_ANSWER)) for t in texts], [names[p] for p in places], notes)
        answers = pd.Series(text.dropna().unique(), dtype=object)
        numeric = pd.to_numeric(answers, errors="coerce").notna()
        mostly = 2 * (numeric | answers.map(_WITH_COMMA.fullmatch).notna()).sum() > len(answers) or answers.empty
        if known and (mostly or not known.labels or (numeric | answers.isin(codes_of(known))).all()):
            table[name] = coded(text, name, known, notes, negative_is_missing=False)
            variables[name] = _known_attributes(known, source)
        elif mostly:
            table[name], variables[name] = _numbers(text, name, notes), _attributes(None, source)
        elif len(answers) > _MAX_CATEGORIES:
            notes.add(f"column {name!r} left out: {len(answers)} different texts are no categories")
        else:
            codes = {label: float(code) for code, label in enumerate(sorted(answers))}
            table[name], variables[name] = text.map(codes), _category_attributes(codes, known, source)
    return table, variables


def _numbers(text: pd.Series, name: str, notes: Notes) -> pd.Series:
    values = pd.to_numeric(text, errors="coerce").astype(np.float64)
    strange = text.notna() & values.isna()
    if strange.any():
        example = text[strange].iloc[0]
        hint = "; decimal commas are read where semicolons separate the columns" if "," in example else ""
        notes.bad(
            int(strange.sum()),
            f"{strange.sum()} values of {name!r} are no numbers, as most of its values are, and taken as missing, "
            f"for example {example!r}{hint}",
        )
    infinite = np.isinf(values)
    if infinite.any():
        notes.bad(int(infinite.sum()), f"infinite values of {name!r} are taken as missing")
    return values.mask(infinite)


def _attributes(known: Variable | None, source: str) -> dict[str, Any]:
    return {
        "field": known.ukb_field if known else None,
        "instance": None,
        "coding": None,
        "units": None,
        "task": None,
        "labels": None,
        "confound": bool(known and known.confound),
        "source": source,
    }


def _known_attributes(known: Variable, source: str) -> dict[str, Any]:
    special = ", ".join(map(str, known.missing))
    return known.attributes(None, source, f"its codes {special} are missing" if special else None)


def _category_attributes(codes: dict[str, float], known: Variable | None, source: str) -> dict[str, Any]:
    return _attributes(known, source) | {
        "coding": "texts in alphabetical order",
        "task": "binary" if len(codes) == 2 else "multiclass",
        "labels": {str(int(code)): label for label, code in codes.items()},
    }
