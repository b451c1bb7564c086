"""What a curve found: the record that `finetune.curves.running` fills, and text, chart and page show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.curves.cells import CellResult
from finetune.curves.intervals import Estimate, PeopleNeeded
from finetune.curves.planning import Plan


@dataclass(frozen=True)
class Point:
    """Score of one method with so many people to train on.

    Attributes
    ----------
    seeds, scores
        Those that are done, and the score of each.
    """

    method: str
    size: int
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    estimate: Estimate


@dataclass(frozen=True)
class Gap:
    """Score of transfer minus that of another method with as many people, of the same seeds."""

    other: str
    size: int
    estimate: Estimate

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``not told apart``."""
        if self.estimate.low > 0:
            return "better"
        return "worse" if self.estimate.high < 0 else "not told apart"


@dataclass(frozen=True)
class TargetCurve:
    """The curve of one target.

    Attributes
    ----------
    metric, chance
        The headline metric, ``auc`` or ``r``, and what guessing reaches.
    people, class_people
        Who were tested, and how many of each class (people who are ever of it).
    smallest
        Score that could be told apart from chance with so many, see `finetune.curves.power.smallest_score`.
    points, gaps
        By method and by size, ascending.
    needed
        Other method -> for each size of transfer at which that beats chance, how many people the other needs for the
        same score.
    dropped
        Scans that not all cells could predict, and which are left out of all.
    """

    name: str
    task: str
    labels: tuple[str, ...]
    units: str | None
    metric: str
    chance: float
    people: int
    class_people: tuple[int, ...]
    smallest: float
    points: tuple[Point, ...]
    gaps: tuple[Gap, ...]
    needed: dict[str, tuple[PeopleNeeded, ...]] = field(default_factory=dict)
    dropped: int = 0

    def point(self, method: str, size: int) -> Point | None:
        """Return a point, None if no seed of it is done."""
        return next((point for point in self.points if (point.method, point.size) == (method, size)), None)

    def gap(self, other: str, size: int) -> Gap | None:
        """Return the difference of transfer from another method, None if no seed of it is done."""
        return next((gap for gap in self.gaps if (gap.other, gap.size) == (other, size)), None)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        smallest = round(self.smallest, 4) if self.smallest == self.smallest else None
        return {
            "name": self.name,
            "task": self.task,
            "labels": list(self.labels),
            "units": self.units,
            "metric": self.metric,
            "chance": self.chance,
            "test_participants": self.people,
            "class_participants": list(self.class_people),
            "smallest_score_told_from_chance": smallest,
            "scores": [
                {
                    "method": point.method,
                    "train_participants": point.size,
                    **point.estimate.to_json(),
                    "by_seed": {
                        str(seed): round(score, 5) for seed, score in zip(point.seeds, point.scores, strict=True)
                    },
                }
                for point in self.points
            ],
            "differences": [
                {
                    "method": "transfer",
                    "from": gap.other,
                    "train_participants": gap.size,
                    **gap.estimate.to_json(),
                    "verdict": gap.verdict,
                }
                for gap in self.gaps
            ],
            "people_needed": {other: [one.to_json() for one in found] for other, found in self.needed.items()},
            "dropped_scans": self.dropped,
        }


@dataclass(frozen=True)
class CurveResult:
    """A curve, whole or as far as it is done.

    Attributes
    ----------
    plan
        What was asked for, see `finetune.curves.planning.Plan`: sizes, methods, seeds, settings, people of each part.
    targets
        Those of which something is done.
    cells
        All that were asked for, in the order in which they are done.
    elsewhere
        Those that another process was working on when this one came to its end.
    warnings
        In words.
    """

    run_dir: Path
    plan: Plan
    targets: tuple[TargetCurve, ...]
    cells: tuple[CellResult, ...]
    elsewhere: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> list[CellResult]:
        """Cells that failed, and will not be tried again unless asked for."""
        return [cell for cell in self.cells if cell.status == "failed"]

    @property
    def unfinished(self) -> list[CellResult]:
        """Cells that are not done: under way in another process, or stopped."""
        return [cell for cell in self.cells if cell.status == "unfinished"]

    @property
    def complete(self) -> bool:
        """Whether every cell came to an end, good or bad."""
        return not self.unfinished

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for is done; to the command what others are at is no failure."""
        return self.complete and not self.failed

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON, as in ``curve.json``."""
        return {
            **self.plan.to_json(),
            "complete": self.complete,
            "failed": len(self.failed),
            "unfinished": len(self.unfinished),
            "elsewhere": self.elsewhere,
            "targets": [target.to_json() for target in self.targets],
            "cells": [cell.to_json() for cell in self.cells],
            "warnings": list(self.warnings),
        }
