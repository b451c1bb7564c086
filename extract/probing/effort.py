"""How long a probe of many targets takes, before it begins."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from extract.embeddings import Embeddings
from extract.probing.confounds import ConfoundValues
from extract.probing.cross_validation import threads_for
from extract.probing.groups import read_groups
from extract.probing.linear import rotate
from extract.probing.probe import target_batches
from extract.probing.settings import ProbeSettings
from extract.probing.targets import read_targets

#: Patterns of missing values from which on it is worth saying how long it takes.
MANY_PATTERNS = 20

#: Times of one factorisation that a fold takes in all, measured on 32,000 x 512 where folds run side by side: copies,
#: penalties and scores of regressions, more for each target, and of a classification, which has inner folds.
_REGRESSION, _EACH_TARGET, _CLASSIFICATION = 3.0, 0.06, 9.0
_TRIED_SCANS = 8192  # more are extrapolated


@dataclass(frozen=True)
class Effort:
    """What a probe has to do.

    Attributes
    ----------
    targets
        That can be probed.
    patterns
        Factorisations per fold: regressions of the same scans, that is with the same missing values, share one, and
        each classification has its own.
    seconds
        About how long that takes on this machine.
    """

    targets: int
    patterns: int
    seconds: float

    def in_words(self) -> str:
        """Return one line for people."""
        took = f"{self.seconds:.0f} s" if self.seconds < 90 else f"{self.seconds / 60:.0f} min"
        return (
            f"{self.targets:,} targets have {self.patterns:,} patterns of missing values (classifications one each); "
            f"for every pattern the features are factorised anew in each fold, which takes about {took}"
        )


def estimate_effort(
    embeddings: Embeddings,
    targets: Sequence[str],
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
    confounds: ConfoundValues,
) -> Effort:
    """Count factorisations, and try how long one takes.

    Permutations, draws of the bootstrap and learning curves are not counted.

    Parameters
    ----------
    targets
        Columns of the phenotypes.
    tasks, settings, confounds
        See `probing.probe.probe`.
    """
    settings = settings or ProbeSettings()
    groups = read_groups(embeddings, settings.groups, settings.kinship)
    found = read_targets(
        embeddings, targets, tasks or {}, settings.bins, groups.people, confounds.names, confounds.complete
    )
    batches = [batch for batch in target_batches(found, confounds) if not batch[0].reason]
    if not batches:
        return Effort(0, 0, 0.0)
    folds = settings.folds * settings.repeats
    cost = 0.0  # in factorisations of everybody
    for batch in batches:
        weight = _CLASSIFICATION if batch[0].labels else _REGRESSION + _EACH_TARGET * len(batch)
        cost += weight * folds * batch[0].present.mean() * (settings.folds - 1) / settings.folds
    if confounds.names:
        cost *= 2  # they are taken out of the features, and fitted alone
    seconds = float(cost) * _factorisation(embeddings) / threads_for(embeddings.features.size)
    return Effort(sum(map(len, batches)), len(batches), seconds)


def _factorisation(embeddings: Embeddings) -> float:
    """Return the seconds of one factorisation of all scans."""
    scans = len(embeddings.features)
    tried = embeddings.features[:_TRIED_SCANS].astype(np.float64)
    taken = []
    with threadpool_limits(1, user_api="blas"):
        for _ in range(3):  # the first one has memory allocated
            begun = time.perf_counter()
            rotate(tried)
            taken.append(time.perf_counter() - begun)
    return min(taken) * scans / len(tried)
