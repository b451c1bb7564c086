"""Scans without a volume, grouped by what went wrong: 300 broken archives have one reason, not 300."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

#: What differs between two scans with one reason: quoted names, paths, numbers.
_QUOTED = re.compile(r"(?<!\w)('[^']*'|\"[^\"]*\")(?!\w)")
_PATH = re.compile(r"[^\s(,;:]*/[^\s),;:]*")
_HEX = re.compile(r"\b(?=[a-f]*\d)[\da-f]{4,}\b")
_NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(?:[.,]\d+)*")  # but float32 and T1 stay


@dataclass(frozen=True)
class FailureGroup:
    """Scans that failed alike.

    Attributes
    ----------
    pattern
        The reason, with ``…`` for names and ``#`` for numbers.
    rows
        Ascending.
    """

    status: str
    pattern: str
    rows: list[int]


def reason_pattern(reason: str) -> str:
    """Return a reason without what is of one scan only: names become ``…``, numbers ``#``."""
    return _NUMBER.sub("#", _HEX.sub("#", _PATH.sub("…", _QUOTED.sub("…", reason))))


def group_failures(reasons: Mapping[int, tuple[str, str]]) -> list[FailureGroup]:
    """Group failures by status and pattern, the largest group first.

    Parameters
    ----------
    reasons
        Row to (status, reason).
    """
    patterns = {row: (status, reason_pattern(reason)) for row, (status, reason) in reasons.items()}
    rows: dict[tuple[str, str], list[int]] = {}
    for row in sorted(patterns):
        rows.setdefault(patterns[row], []).append(row)
    return [FailureGroup(*key, rows[key]) for key, _ in Counter(patterns.values()).most_common()]
