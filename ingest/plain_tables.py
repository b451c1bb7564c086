"""Variables of any table of participants: numbers are taken as they are, the texts of a few categories become codes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ingest.answers import MISSING, NO_ANSWER, agreed, coded, codes_of, normal
from ingest.dictionary import BY_NAME, Variable
from ingest.notes import Notes
from ingest.sidecar import Levels

_MAX_CATEGORIES = 20  # more different texts than this are names or remarks, not categories
_MAX_NAME_BYTES = 255  # of a folder on most disks
_SHOWN = 60  # characters of a name that is too long
_NO_LABELS = NO_ANSWER | {"", "n/a", "na", "nan"}  # of levels; "none" may be one, of a disease
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ t]|$)", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,9}(\.\d{0,9})?", re.ASCII)
_LONG = re.compile(r"[+-]?\d{16,}", re.ASCII)  # of which different ones are the same float64
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
    rows: pd.DataFrame, names: Sequence[str], notes: Notes, levels: Levels
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Turn the columns of a plain table into numbers.

    Where most of the different answers are numbers, or the column is called like a variable of `ingest.dictionary`
    that has no labels, all else in it is a bad value. Other columns are categories. Codes for which there are levels
    are what those say; for what is called like a variable with labels they are else taken for UK Biobank's, which is
    told.

    Parameters
    ----------
    rows
        One per scan; columns are called by their position.
    names
        Of all columns of the table.
    levels
        By column, the labels of its codes.
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
        a_number = known is not None and not known.labels
        labels = {} if a_number else _labels_of(levels.get(names[places[0]], {}), answers)
        if labels and known:
            text = text.map(labels)  # which are read as any labels are: their codes are others here
            answers = pd.Series(text.dropna().unique(), dtype=object)
        elif labels:
            codes = _codes_of_levels(labels)
            table[name], variables[name] = text.map(codes), _level_attributes(codes, labels, known, source)
            continue
        numeric = pd.to_numeric(answers, errors="coerce").notna()
        mostly = 2 * (numeric | answers.map(_WITH_COMMA.fullmatch).notna()).sum() > len(answers) or answers.empty
        if known and (mostly or not known.labels or (numeric | answers.isin(codes_of(known))).all()):
            if known.labels and numeric.any():
                codes_in_words = ", ".join(f"{code} {label}" for code, label in known.labels.items())
                notes.add(
                    f"the codes of {name!r} are taken for UK Biobank's: {codes_in_words}; if they mean something else, "
                    "write words instead, or rename the column"
                )
            table[name] = coded(text, name, known, notes, negative_is_missing=False)
            variables[name] = _known_attributes(known, source)
        elif mostly and answers.map(_LONG.fullmatch).notna().any():
            notes.add(f"column {name!r} left out: it has whole numbers of more than 15 digits, as ids have")
        elif mostly:
            table[name], variables[name] = _numbers(text, name, notes), _attributes(None, source)
        elif len(answers) > _MAX_CATEGORIES:
            notes.add(f"column {name!r} left out: {len(answers)} different texts are no categories")
        else:
            if answers.map(_DATE.match).notna().all():
                notes.add(
                    f"column {name!r} has dates, which are taken as categories; write days as numbers if they count"
                )
            codes = {label: float(code) for code, label in enumerate(sorted(answers))}
            table[name], variables[name] = text.map(codes), _category_attributes(codes, known, source)
    return table, variables


def _labels_of(levels: Mapping[str, str], answers: pd.Series) -> dict[str, str]:
    """Return the label of each answer that is one, both in lower case; nothing if the code of one is not there."""
    by_code = {_plain_code(code): " ".join(label.lower().split()) for code, label in levels.items()}
    if answers.empty or not answers.map(_plain_code).isin(by_code).all():
        return {}
    labels = {answer: by_code[_plain_code(answer)] for answer in answers}
    return {answer: label for answer, label in labels.items() if label not in _NO_LABELS}


def _plain_code(code: str) -> str:
    """Make ``1``, ``01`` and ``1.0`` the same."""
    code = code.strip().lower()
    return f"{float(code):g}" if _NUMBER.fullmatch(code) else code


def _codes_of_levels(labels: Mapping[str, str]) -> dict[str, float]:
    """Return the number of each answer: its own, if all are whole ones, else by the order of the labels."""
    if all(_NUMBER.fullmatch(answer) and float(answer).is_integer() for answer in labels):
        return {answer: float(answer) for answer in labels}
    order = {label: float(code) for code, label in enumerate(sorted(set(labels.values())))}
    return {answer: order[label] for answer, label in labels.items()}


def _level_attributes(
    codes: Mapping[str, float], labels: Mapping[str, str], known: Variable | None, source: str
) -> dict[str, Any]:
    of_code = {str(int(code)): labels[answer] for answer, code in sorted(codes.items(), key=lambda item: item[1])}
    return _attributes(known, source) | {
        "coding": "levels of its JSON file",
        "task": "binary" if len(of_code) == 2 else "multiclass",
        "labels": of_code,
    }


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
