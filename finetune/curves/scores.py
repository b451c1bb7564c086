"""From the test predictions of all cells to the curve of each target: means, differences, and intervals of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extract.probing.bootstrap import draw_weights, weighted_auc, weighted_pearson
from extract.probing.scores import RANGES, auc, pearson
from finetune.curves.cells import Cell, CellResult, TargetScores
from finetune.curves.intervals import Estimate, PeopleNeeded, Scores, estimate, people_needed
from finetune.curves.power import smallest_score
from finetune.curves.results import Gap, Point, TargetCurve

#: What transfer is compared with.
OTHERS = ("scratch", "probe")


@dataclass(frozen=True)
class _Scored:
    """Cells of one target on the same scans.

    Attributes
    ----------
    score
        Cell -> headline score.
    drawn
        Cell -> (draw,) the same of draws of the people tested, which all cells share.
    best
        The best score that there is, where it may be reached; None for r.
    margin
        People of the smallest class.
    """

    score: dict[Cell, float]
    drawn: dict[Cell, np.ndarray]
    people: int
    bounds: tuple[float, float]
    best: float | None
    margin: int


def target_curves(cells: Sequence[CellResult], *, draws: int) -> tuple[TargetCurve, ...]:
    """Return the curve of each target of which some cell is done.

    Parameters
    ----------
    cells
        Of one run; those that are not ``ok`` do not matter.
    draws
        Of the people tested.
    """
    done = [cell for cell in cells if cell.status == "ok"]
    names = dict.fromkeys(target.name for cell in done for target in cell.targets)
    return tuple(_target_curve(name, done, draws) for name in names)


def _target_curve(name: str, cells: Sequence[CellResult], draws: int) -> TargetCurve:
    of_cell = {cell.cell: target for cell in cells for target in cell.targets if target.name == name}
    first = next(iter(of_cell.values()))
    rows = first.rows
    for target in of_cell.values():
        rows = np.intersect1d(rows, target.rows)
    if not len(rows):
        raise ValueError(f"no scan was predicted by every cell of {name!r}; remove the run's folder, and run it again")
    everything = np.unique(np.concatenate([target.rows for target in of_cell.values()]))
    scored = _score_cells(of_cell, rows, draws)
    sizes = sorted({cell.size for cell in of_cell})
    methods = list(dict.fromkeys(cell.method for cell in of_cell))
    kept = np.isin(first.rows, rows)
    people, truth = first.people[kept], first.truth[kept]
    class_people = tuple(len(np.unique(people[truth == code])) for code in range(len(first.labels)))
    points = tuple(point for method in methods for size in sizes if (point := _point(scored, method, size)) is not None)
    chance = 0.5 if first.labels else 0.0
    others = [other for other in OTHERS if other in methods] if "transfer" in methods else []
    found = {other: [gap for size in sizes if (gap := _gap(scored, other, size)) is not None] for other in others}
    beats = [point for point in points if point.method == "transfer" and point.estimate.low > chance]
    return TargetCurve(
        name=name,
        task=first.task,
        labels=first.labels,
        units=first.units,
        metric=first.metric,
        chance=chance,
        people=len(np.unique(people)),
        class_people=class_people,
        smallest=smallest_score(first.labels, class_people, len(np.unique(people))),
        points=points,
        gaps=tuple(gap for gaps in found.values() for gap in gaps),
        needed={other: tuple(_needed(scored, point, other) for point in beats) for other in others},
        dropped=len(everything) - len(rows),
    )


def _score_cells(of_cell: dict[Cell, TargetScores], rows: np.ndarray, draws: int) -> _Scored:
    """Score the cells on scans that all have, and on draws of the people tested."""
    score: dict[Cell, float] = {}
    drawn: dict[Cell, np.ndarray] = {}
    first = next(iter(of_cell.values()))
    places = _places(first.rows, rows)
    groups = np.unique(first.groups[places], return_inverse=True)[1]
    units = int(groups.max()) + 1
    weights = draw_weights(units, draws, 0)[:, groups].astype(np.float32)
    for cell, target in of_cell.items():
        places = _places(target.rows, rows)
        truth, predicted = target.truth[places], target.predicted[places]
        if target.labels:
            codes = truth.astype(np.int64)
            score[cell], drawn[cell] = auc(codes, predicted), weighted_auc(codes, predicted, weights)
            continue
        if target.task == "count":  # as the trainings themselves score it
            truth, predicted = np.log1p(truth), np.log1p(predicted)
        score[cell], drawn[cell] = pearson(truth, predicted), weighted_pearson(truth, predicted, weights)
    margin = 0
    if first.labels:
        codes = first.truth[_places(first.rows, rows)].astype(np.int64)
        margin = min(len(np.unique(groups[codes == code])) for code in range(len(first.labels)))
    return _Scored(score, drawn, units, RANGES[first.metric], 1.0 if first.labels else None, margin)


def _places(of: np.ndarray, rows: np.ndarray) -> np.ndarray:
    order = np.argsort(of, kind="stable")
    return order[np.searchsorted(of[order], rows)]


def _seeds(scored: _Scored, method: str, size: int) -> list[int]:
    return sorted(cell.seed for cell in scored.score if (cell.method, cell.size) == (method, size))


def _taken(scored: _Scored, method: str, size: int, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (seed,) and those of draws (seed, draw)."""
    cells = [Cell(method, size, seed) for seed in seeds]
    return np.array([scored.score[cell] for cell in cells]), np.stack([scored.drawn[cell] for cell in cells])


def _point(scored: _Scored, method: str, size: int) -> Point | None:
    seeds = _seeds(scored, method, size)
    if not seeds:
        return None
    scores, drawn = _taken(scored, method, size, seeds)
    found = estimate(scores, drawn, scored.people, bounds=scored.bounds, certain=scored.best, margin=scored.margin)
    return Point(method, size, tuple(seeds), tuple(scores.tolist()), found)


def _gap(scored: _Scored, other: str, size: int) -> Gap | None:
    seeds = sorted(set(_seeds(scored, "transfer", size)) & set(_seeds(scored, other, size)))
    if not seeds:
        return None
    mine, drawn = _taken(scored, "transfer", size, seeds)
    theirs, other_drawn = _taken(scored, other, size, seeds)
    both_best = scored.best is not None and bool((mine == scored.best).all() and (theirs == scored.best).all())
    found: Estimate = estimate(
        mine - theirs,
        drawn - other_drawn,
        scored.people,
        bounds=(scored.bounds[0] - scored.bounds[1], scored.bounds[1] - scored.bounds[0]),
        certain=0.0 if both_best else None,
        margin=scored.margin,
    )
    return Gap(other, size, found)


def _needed(scored: _Scored, point: Point, other: str) -> PeopleNeeded:
    """Read off at how many people another method has a score of transfer."""
    sizes = sorted({cell.size for cell in scored.score if cell.method == other})
    return people_needed(_scores(scored, "transfer", point.size), [_scores(scored, other, size) for size in sizes])


def _scores(scored: _Scored, method: str, size: int) -> Scores:
    seeds = _seeds(scored, method, size)
    return Scores(size, np.array(seeds), *_taken(scored, method, size, seeds))
