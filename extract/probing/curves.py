"""Learning curves: how a probe scores when it is fitted to fewer people, tested on the same ones throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from extract.embeddings import Embeddings
from extract.probing.confounds import ConfoundValues, read_confounds
from extract.probing.numbers import rounded
from extract.probing.probe import probe
from extract.probing.results import Interval, TargetResult
from extract.probing.settings import ProbeSettings
from extract.probing.targets import by_column

#: Sizes that are measured unless others are asked for: this one, twice as many, and so on, below everyone.
FIRST_SIZE = 50
#: Fewer than so many sizes begin with half as many people, and a quarter, where these are as many as `LEAST_SIZE`.
FEW_SIZES = 3
LEAST_SIZE = 12

#: A size this close to everyone says nothing more.
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class CurvePoint:
    """The headline score of a probe that was fitted to so many people in each fold."""

    people: int
    interval: Interval


@dataclass(frozen=True)
class LearningCurve:
    """Scores of one target by the number of people trained on.

    Attributes
    ----------
    metric
        The headline metric of the target.
    points
        By ascending number of people; the last is the whole probe.
    missing
        Size -> why it could not be measured.
    """

    target: str
    metric: str
    points: list[CurvePoint]
    missing: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the points as printed by ``--json``, with those that are missing and why."""
        found: list[dict[str, Any]] = [
            {
                "train_participants": point.people,
                "score": rounded(point.interval.score),
                "low": rounded(point.interval.low),
                "high": rounded(point.interval.high),
                "chance": rounded(point.interval.chance),
            }
            for point in self.points
        ]
        absent = [{"train_participants": size, "score": None, "reason": why} for size, why in self.missing.items()]
        return sorted(found + absent, key=lambda point: int(point["train_participants"]))


def default_sizes(people: int) -> list[int]:
    """Return 50, 100, 200 ... below so many people; of few people 25 and 12, too."""
    sizes = []
    size = FIRST_SIZE
    while size < _NEARLY_ALL * people:
        sizes.append(size)
        size *= 2
    size = FIRST_SIZE // 2
    while len(sizes) < FEW_SIZES and size >= LEAST_SIZE:
        if size < _NEARLY_ALL * people:
            sizes.insert(0, size)
        size //= 2
    return sizes


def curve_sizes(results: Sequence[TargetResult], sizes: Sequence[int] | None = None) -> list[int]:
    """Return the sizes to measure, ascending: those asked for, or `default_sizes` of the target with most people.

    Raises
    ------
    ValueError
        If one is asked for twice.
    """
    if sizes:
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes {', '.join(map(str, sizes))} of the learning curve: expected each once")
        return sorted(sizes)
    return default_sizes(max((result.train_participants for result in results if result.status == "ok"), default=0))


def learning_curves(
    embeddings: Embeddings,
    results: Sequence[TargetResult],
    sizes: Sequence[int],
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
    confounds: ConfoundValues | None = None,
    summary: np.ndarray | None = None,
    on_target: Callable[[TargetResult], None] | None = None,
) -> dict[str, LearningCurve]:
    """Probe again with fewer people to learn from.

    The folds are those of the whole probe, so every size is tested on the same people. Who is trained on with fewer
    is among those of more, is another draw in each fold of each repeat, and is spread over classes and values like all
    of them (`probing.settings.ProbeSettings.train_people`). The penalty is chosen anew at each size. Intervals
    are corrected for the dependence of folds as those of the whole probe are: by scans tested over scans that could be
    trained on.

    Parameters
    ----------
    results
        Of the whole probe, with the same settings: the last point of each curve.
    sizes
        People to train on in each fold, of `curve_sizes`. A target that has fewer lacks the point.
    tasks, settings, confounds, summary
        Of the whole probe. Permutations and draws of people are left out: they say nothing of a curve.
    on_target
        Called with each target at each size.

    Returns
    -------
    dict
        Name of each target that was probed -> its curve.
    """
    settings = replace(settings or ProbeSettings(), permutations=0, bootstrap=0)
    confounds = confounds or read_confounds(embeddings, settings.confounds, tasks)
    probed = {result.name: result for result in results if result.status == "ok"}
    points: dict[str, list[CurvePoint]] = {name: [] for name in probed}
    missing: dict[str, dict[int, str]] = {name: {} for name in probed}
    for size in sizes:
        enough = [name for name, result in probed.items() if size < result.train_participants]
        for name in probed.keys() - set(enough):
            most = probed[name].train_participants
            if size > most:
                missing[name][size] = f"{most} people can be trained on in each fold"
        if not enough:
            continue
        at_size = replace(settings, train_people=size, bins=by_column(embeddings, settings.bins, enough))
        found = probe(
            embeddings,
            enough,
            tasks=by_column(embeddings, tasks, [*enough, *confounds.names]),
            settings=at_size,
            confounds=confounds,
            summary=summary,
            on_target=on_target,
        )
        for result in found:
            if result.status == "ok":
                points[result.name].append(CurvePoint(result.train_participants, result.headline))
            else:
                missing[result.name][size] = result.reason
    return {
        name: LearningCurve(
            name,
            result.metric,
            [*points[name], CurvePoint(result.train_participants, result.headline)],
            missing[name],
        )
        for name, result in probed.items()
    }
