"""A curve in words with numbers: where transfer is better and by how much, and how many people that is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from extract.probing.numbers import SHORT_NAMES
from extract.probing.results import Interval
from finetune.curves.intervals import Estimate, PeopleNeeded
from finetune.curves.results import CurveResult, Gap, TargetCurve

#: Share of the people to train on from which on two seeds have more people in common than not.
_MOSTLY_SHARED = 0.5

#: The other methods as they are called within a sentence.
NAMES = {"transfer": "transfer", "scratch": "scratch", "probe": "the frozen probe"}


def number(value: float | None, digits: int = 3) -> str:
    """Write a score."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def ends(found: Estimate | Interval) -> str:
    """Write the ends of an interval."""
    return f"{number(found.low)} to {number(found.high)}"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    text = number(value)
    return f"+{text}" if value > 0 and float(text) != 0 else text


def listed(values: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def describe_target(curve: TargetCurve) -> list[str]:
    """Return sentences about a target: who was tested, where transfer is better, what that is worth in people."""
    metric = SHORT_NAMES.get(curve.metric, curve.metric)
    return [
        *_tested(curve, metric),
        *(sentence for other in ("scratch", "probe") for sentence in _compared(curve, other, metric)),
        *(sentence for other in ("scratch", "probe") for sentence in _worth(curve, other, metric)),
        *_against_chance(curve, metric),
    ]


def describe_state(result: CurveResult) -> list[str]:
    """Return sentences about what is not done, or was left out."""
    sentences = []
    if result.unfinished:
        where = f", {result.elsewhere} of them under way in other processes" if result.elsewhere else ""
        others = "the last of these processes writes the whole curve, and should one die, " if result.elsewhere else ""
        sentences.append(
            f"Incomplete: {len(result.unfinished)} of {len(result.cells)} cells not done{where}; {others}the same "
            "command goes on with them."
        )
    sentences += [f"Failed: {cell.cell}: {cell.reason}." for cell in result.failed]
    if result.failed:
        sentences.append("What failed stays so; --retry-failed begins it anew.")
    sentences += _shared_people(result)
    sentences += [f"{warning[0].upper()}{warning[1:]}." for warning in result.warnings]
    return sentences


def _shared_people(result: CurveResult) -> list[str]:
    """Say at which sizes the seeds cannot differ much in who is trained on: they draw from the same people."""
    people = result.plan.people["train"]
    several = {point.size for curve in result.targets for point in curve.points if point.estimate.seeds > 1}
    sizes = [f"{size:,}" for size in sorted(several) if size > _MOSTLY_SHARED * people]
    if not sizes:
        return []
    return [
        f"With {listed(sizes)} of the {people:,} people to train on, the seeds share most of their people, so that the "
        "interval tells little of who was trained on, and is too narrow."
    ]


def _tested(curve: TargetCurve, metric: str) -> list[str]:
    classes = ""
    if curve.labels:
        counts = zip(curve.class_people, curve.labels, strict=True)
        classes = f" ({', '.join(f'{count:,} {label}' for count, label in counts)})"
    found = f"Tested on {curve.people:,} people{classes} throughout; chance is {metric} {curve.chance:g}."
    if math.isfinite(curve.smallest):
        found += (
            f" The smallest {metric} that a test of so many would tell apart from chance in 80 % of cases is "
            f"{number(curve.smallest, 2)}{'' if len(curve.labels) <= 2 else ' or somewhat less'}."
        )
    else:
        found += f" So few cannot tell any {metric} apart from chance in 80 % of cases."
    sentences = [found]
    if curve.dropped:
        sentences.append(f"{curve.dropped:,} scans that not every cell could read are left out of all.")
    if any(point.estimate.seeds == 1 for point in curve.points):
        sentences.append(
            "Where there is one seed, intervals tell of the people tested alone, not of who was trained on: they are "
            "too narrow."
        )
    return sentences


def _compared(curve: TargetCurve, other: str, metric: str) -> list[str]:
    gaps = [gap for gap in curve.gaps if gap.other == other]
    sentences = []
    for verdict, words in (("better", "better than"), ("worse", "worse than")):
        found = [gap for gap in gaps if gap.verdict == verdict]
        if not found:
            continue
        each = [f"with {gap.size:,} people by {number(abs(gap.estimate.score))} ({_span(gap)})" for gap in found]
        sentences.append(f"Transfer is {words} {NAMES[other]} ({metric}, 95 % interval): {'; '.join(each)}.")
    unclear = [gap for gap in gaps if gap.verdict == "not told apart"]
    if unclear:
        each = [f"with {gap.size:,} people ({signed(gap.estimate.score)}, {ends(gap.estimate)})" for gap in unclear]
        sentences.append(f"Transfer and {NAMES[other]} cannot be told apart {'; '.join(each)}.")
    return sentences


def _span(gap: Gap) -> str:
    """Write the interval of a difference without sign, smaller end first."""
    low, high = sorted((abs(gap.estimate.low), abs(gap.estimate.high)))
    return f"{number(low)} to {number(high)}"


def _worth(curve: TargetCurve, other: str, metric: str) -> list[str]:
    """Say how many people another method needs for the scores that transfer has, as far as that can be read off."""
    needed = curve.needed.get(other, ())
    if not needed:
        return []
    subject = NAMES[other][0].upper() + NAMES[other][1:]
    sizes = sorted({point.size for point in curve.points if point.method == other})
    sentences = [
        f"{subject} needs {times(one.ratio)} the people for the {metric} that transfer has with {one.size:,} people "
        f"({number(one.score)}): about {one.people:,.0f} ({_people_span(one, sizes)})."
        for one in needed
        if one.within
    ]
    early = [f"{one.size:,} ({number(one.score)})" for one in needed if one.people == 0]
    if early:
        sentences.append(
            f"{subject} has with {sizes[0]:,} people, the fewest tested, the {metric} that transfer has with "
            f"{listed(early)} people already: how few it needs is not within the sizes tested."
        )
    never = [f"{one.size:,} ({number(one.score)})" for one in needed if math.isinf(one.people)]
    if never:
        sentences.append(
            f"{subject} does not reach with {sizes[-1]:,} people, the most tested, the {metric} that transfer has with "
            f"{listed(never)} people: how many it needs is not within the sizes tested."
        )
    return sentences


def times(ratio: float) -> str:
    """Write a ratio of people."""
    return f"{ratio:.1f} times"


def _people_span(one: PeopleNeeded, sizes: Sequence[int]) -> str:
    low = f"fewer than {sizes[0]:,}" if one.low == 0 else f"{one.low:,.0f}"
    high = f"more than {sizes[-1]:,}" if math.isinf(one.high) else f"{one.high:,.0f}"
    return f"95 % interval {low} to {high}"


def _against_chance(curve: TargetCurve, metric: str) -> list[str]:
    sentences = []
    for method in dict.fromkeys(point.method for point in curve.points):
        within = [
            f"{point.size:,}" for point in curve.points if point.method == method and point.estimate.holds(curve.chance)
        ]
        if within:
            name = NAMES[method][0].upper() + NAMES[method][1:]
            sentences.append(f"{name} cannot be told apart from chance ({metric}) with {listed(within)} people.")
    return sentences
