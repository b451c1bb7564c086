"""What was done to probe a target, in one line that can be read beside its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extract.probing.cross_validation import Outcome, Sample
from extract.probing.folds import class_sizes
from extract.probing.groups import Groups
from extract.probing.linear import PENALTY_SCANS
from extract.probing.settings import ProbeSettings
from extract.probing.targets import MIN_CLASS_PER_FOLD, MIN_PER_FOLD, Target

#: Of `scores.corrected_interval`: what it means where it reaches over all that a score can be.
NO_INTERVAL = "two folds, dealt once, are of the same pairs of people and give no interval"


def describe_method(target: Target, sample: Sample, outcomes: Sequence[Outcome], settings: ProbeSettings) -> str:
    """Say in one line what was done."""
    penalty = float(np.median([outcome.penalty for outcome in outcomes]))
    groups = sample.groups
    grouped = groups.together.max() < groups.people.max()
    if target.labels:
        model = f"logistic regression, L2 penalty {penalty:.2g} (median) by log-loss in inner folds of participants"
    else:
        outcome = "log(1 + count)" if target.task == "count" else "the value"
        left_out = "group" if grouped else "participant"
        model = f"ridge regression of {outcome}, penalty {penalty:.2g} (median) by leaving one {left_out} out"
        if len(sample.features) > PENALTY_SCANS:
            model += f" (of {PENALTY_SCANS} scans)"
    number, repeats = int(sample.fold_of.max()) + 1, len(sample.fold_of)
    dealt = f"{number} folds of {'groups' if grouped else 'participants'} x {repeats} repeats"
    there = int(groups.together.max()) + 1
    if number < settings.folds:
        why = f"there are no more {'groups' if grouped else 'people'}"
        if number < there and target.labels:
            codes = target.values[target.present].astype(np.int64)
            why = (
                f"each needs {MIN_CLASS_PER_FOLD} people of every class, and "
                f"{_why_fewer(target.labels, groups, codes, settings.folds)}"
            )
        elif number < there:
            why = f"each needs {MIN_PER_FOLD} people"
        dealt += f" (fewer than {settings.folds}: {why})"
    parts = [model, dealt]
    if number * repeats == 2:
        parts.append(NO_INTERVAL)
    if groups.note:
        parts.append(f"kept together: {groups.note}")
    if settings.train_people is not None:
        parts.append(f"trained on {settings.train_people} participants")
    if target.note:
        parts.append(target.note)
    if sample.confounds is not None:
        names = ", ".join(sample.confounds.names)
        parts.append(f"{names} removed from the features by least squares on each training side, the target as it is")
    if settings.bootstrap:
        parts.append(f"bootstrap of {settings.bootstrap} draws of the people tested, without training anew")
    return "; ".join(parts)


def _why_fewer(labels: Sequence[str], groups: Groups, codes: np.ndarray, folds: int) -> str:
    """Say why classes do not go round: one has few people, they are in few groups, or the groups do not fit."""
    sizes, holders = class_sizes(groups.people, codes), class_sizes(groups.together, codes)
    number = int(groups.together.max()) + 1
    if sizes.min() < MIN_CLASS_PER_FOLD * folds:
        return f"{labels[int(sizes.argmin())]!r} has {sizes.min()}"
    if holders.min() < folds:
        return f"too few groups hold {labels[int(holders.argmin())]!r} ({holders.min()} of {number})"
    return f"the {number} groups are of too unlike sizes"
