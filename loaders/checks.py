"""Are settings the numbers that they should be?"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


def as_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a setting as a whole number.

    Raises
    ------
    ValueError
        If it is something else (text, a fraction, true or false), less than `least`, or more than `most`.
    """
    expected = f"{least} or more" if most is None else f"{least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected a whole number, {expected}")
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} is {number}, expected {expected}")
    return number


def check_number(name: str, value: Any) -> None:
    """Raise ValueError if a setting is not one number, whole or not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected one number: channels are all the same")
