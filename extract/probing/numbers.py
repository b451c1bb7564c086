"""How numbers are written: scores have three decimals, errors the digits that tell something in any unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: What metrics are called in tables.
SHORT_NAMES = {"auc": "AUC", "balanced_accuracy": "bal. acc.", "r": "r", "r2": "R2", "mae": "MAE"}

_FEW_DECIMALS = 0.1  # errors below it have fewer than three digits among three decimals
_MANY_DIGITS = 1e6


def rounded(value: float) -> float | None:
    """Return a number as documents for machines have it, with six digits; None if it is not finite."""
    return None if not math.isfinite(value) else float(f"{value:.6g}")


def finite(document: Any) -> Any:
    """Return a document for machines, None for numbers in it that are not finite: JSON has no NaN."""
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def in_digits(value: float, metric: str = "") -> str:
    """Write the value of a metric for a table: with three decimals, or three digits where these would tell nothing.

    Only errors (``mae``) are ever small without being nothing: they are in the units of a variable.
    """
    size = abs(value)
    if size >= _MANY_DIGITS or (metric == "mae" and 0 < size < _FEW_DECIMALS):
        return f"{value:.3g}"
    return f"{value:.3f}".replace("-0.000", "0.000")


def in_time(seconds: float) -> str:
    """Write how long something took."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
