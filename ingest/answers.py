"""Texts of a table -> numbers: codes, decoded labels, refusals, and what is not understood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ingest.dictionary import Variable
from ingest.notes import Notes

#: Texts that stand for nothing, and for refusals, in lower case.
MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "."})
NO_ANSWER = frozenset({"do not know", "prefer not to answer", "not known"})


def normal(column: pd.Series) -> pd.Series:
    """Return texts in lower case, with single blanks, "" where there is nothing."""
    texts = column.fillna("").astype(str)
    return texts.map({text: " ".join(text.lower().split()) for text in texts.unique()})  # there are few different ones


def codes_of(variable: Variable) -> dict[str, float]:
    """Return the code of each of a variable's labels, which are in lower case."""
    return {label.lower(): float(code) for code, label in variable.labels.items()}


def coded(
    column: pd.Series, name: str, variable: Variable, notes: Notes, *, negative_is_missing: bool = True
) -> pd.Series:
    """Turn codes or decoded labels into numbers; special codes, refusals and what is not understood are missing.

    Parameters
    ----------
    name
        Of the column.
    negative_is_missing
        Whether all codes below 0 are special, as in UK Biobank's tables. Elsewhere they may be numbers, such as
        z-scores, and only the variable's own special codes are taken as missing, which is told.
    """
    text = normal(column)
    numbers = text.map(codes_of(variable)).fillna(pd.to_numeric(text, errors="coerce")).astype(np.float64)
    special = numbers < 0 if negative_is_missing else numbers.isin(list(variable.missing))
    strange = (numbers.isna() & ~text.isin(MISSING | NO_ANSWER)) | np.isinf(numbers)
    if variable.labels and not variable.more_codes:
        strange |= numbers.notna() & ~special & ~numbers.isin(list(variable.labels))
    if strange.any():
        notes.bad(
            int(strange.sum()),
            f"{strange.sum()} values of {variable.name} (column {name!r}) are not understood and taken as missing, "
            f"for example {text[strange].iloc[0]!r}"
            + ("" if negative_is_missing else "; rename the column if it tells something else"),
        )
    if special.any() and not negative_is_missing:
        codes = ", ".join(f"{code} ({meaning})" for code, meaning in variable.missing.items())
        notes.add(f"{special.sum()} values of {name!r} are taken as missing: UK Biobank's codes {codes}")
    return numbers.mask(special | strange)


def agreed(columns: Sequence[pd.Series], names: Sequence[str], notes: Notes) -> pd.Series:
    """Return what columns of one and the same thing say; where they contradict each other, nothing."""
    values = columns[0]
    for other in columns[1:]:
        values = values.where(values.notna(), other)
    if len(columns) == 1:
        return values
    differ = np.any([column.notna() & (column != values) for column in columns], axis=0)
    which = f"columns {' and '.join(map(repr, names))} are of one field and instance"
    if differ.any():
        notes.bad(int(differ.sum()), f"{which} and differ in {differ.sum()} scans, where the value is taken as missing")
    else:
        notes.add(f"{which}, and agree")
    return values.mask(differ)
