"""What was done to probe a target, in one line that can be read beside its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extract.probing.cross_validation import Outcome, Sample
from extract.probing.linear import PENALTY_SCANS
from extract.probing.settings import ProbeSettings
from extract.probing.targets import MIN_CLASS_PER_FOLD, Target


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
    if target.labels and number < min(settings.folds, int(groups.together.max()) + 1):
        codes = target.values[target.present].astype(np.int64)
        sizes = np.bincount(np.unique(np.stack([groups.people, codes]), axis=1)[1])
        dealt += (
            f" (fewer than {settings.folds}: each needs {MIN_CLASS_PER_FOLD} people of every class, and "
            f"{target.labels[int(sizes.argmin())]!r} has {sizes.min()})"
        )
    parts = [model, dealt]
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
