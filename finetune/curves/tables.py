"""The table of a curve, as the terminal and the page show it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.curves.results import TargetCurve
from finetune.curves.words import ends, number, signed, times

#: The methods as tables call them.
TITLES = {"transfer": "transfer", "scratch": "scratch", "probe": "frozen + probe"}


@dataclass(frozen=True)
class Entry:
    """A number with what belongs to it: an interval, and a verdict (``above``, ``below``, ``within``)."""

    score: str = ""
    interval: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """The scores with one number of people.

    Attributes
    ----------
    seeds
        How many are done; fewest and most, if methods differ.
    scores, gaps
        One for each method, and for each other method than transfer.
    needed
        People that each other method needs for the score that transfer has here.
    """

    size: int
    seeds: str
    scores: tuple[Entry, ...]
    gaps: tuple[Entry, ...]
    needed: tuple[Entry, ...]


@dataclass(frozen=True)
class CurveTable:
    """A table of one target: names of its columns, and rows by ascending number of people.

    Attributes
    ----------
    methods, others, needing
        Whose scores, differences from transfer, and people needed there are.
    """

    methods: tuple[str, ...]
    others: tuple[str, ...]
    needing: tuple[str, ...]
    rows: tuple[Row, ...]


def curve_table(curve: TargetCurve) -> CurveTable:
    """Return the table of a target."""
    methods = tuple(dict.fromkeys(point.method for point in curve.points))
    others = tuple(dict.fromkeys(gap.other for gap in curve.gaps))
    needing = tuple(other for other in others if curve.needed.get(other))
    sizes = sorted({point.size for point in curve.points})
    return CurveTable(methods, others, needing, tuple(_row(curve, size, methods, others, needing) for size in sizes))


def _row(
    curve: TargetCurve, size: int, methods: tuple[str, ...], others: tuple[str, ...], needing: tuple[str, ...]
) -> Row:
    points = [curve.point(method, size) for method in methods]
    scores = []
    for point in points:
        if point is None:
            scores.append(Entry())
            continue
        found = point.estimate
        within = "within" if found.holds(curve.chance) else "above" if found.low > curve.chance else "below"
        scores.append(Entry(number(found.score), ends(found), within))
    gaps = []
    for other in others:
        gap = curve.gap(other, size)
        if gap is None:
            gaps.append(Entry())
            continue
        verdict = {"better": "above", "worse": "below"}.get(gap.verdict, "within")
        gaps.append(Entry(signed(gap.estimate.score), ends(gap.estimate), verdict))
    needed = tuple(_needed(curve, other, size) for other in needing)
    seeds = sorted({0 if point is None else point.estimate.seeds for point in points})
    return Row(size, "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), tuple(scores), tuple(gaps), needed)


def _needed(curve: TargetCurve, other: str, size: int) -> Entry:
    """Write how many people another method needs; outside the sizes tested only that."""
    one = next((one for one in curve.needed.get(other, ()) if one.size == size), None)
    if one is None:
        return Entry()
    sizes = [point.size for point in curve.points if point.method == other]
    low, high = (_people(end, min(sizes), max(sizes)) for end in (one.low, one.high))
    interval = low if low == high else f"{low} to {high}"
    if one.within:
        return Entry(f"{one.people:,.0f}, {times(one.ratio)}", interval)
    return Entry(_people(one.people, min(sizes), max(sizes)), "" if low == high else interval)


def _people(value: float, fewest: int, most: int) -> str:
    if value == 0:
        return f"< {fewest:,}"
    return f"> {most:,}" if math.isinf(value) else f"{value:,.0f}"
