"""The folds of one target as one result: mean scores with intervals, gains over the confounds, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from extract.probing.bootstrap import percentile_interval
from extract.probing.cross_validation import Fold, Outcome, Sample
from extract.probing.folds import class_sizes
from extract.probing.results import Interval, OutOfFold, TargetResult
from extract.probing.scores import RANGES, corrected_interval, difference_interval, independent_parts


def combine_folds(
    result: TargetResult,
    sample: Sample,
    folds: Sequence[Fold],
    outcomes: Sequence[Outcome],
    beside: Sequence[Outcome],
    rows: np.ndarray,
    truth: np.ndarray,
) -> TargetResult:
    """Complete the result of one target by what its folds gave.

    Parameters
    ----------
    result
        What is known of the target.
    outcomes, beside
        Of each fold, of the features and of the confounds alone; the second is empty without confounds.
    rows
        int, (scan,) rows of the embeddings that the sample is of.
    truth
        (scan,) class codes 0 ... classes-1, or values.
    """
    ratio = float(np.mean([len(fold.test) / fold.full for fold in folds]))
    codes = truth.astype(np.int64) if result.labels else None
    many = independent_parts(sample.groups.together, codes)
    smallest = None if codes is None else int(class_sizes(sample.groups.together, codes).min())
    of = {"people": smallest, "groups": many, "folds": int(sample.fold_of.max()) + 1}
    metrics = {name: _interval(outcomes, name, ratio, **of) for name in outcomes[0].scores}
    confound_metrics = {name: _interval(beside, name, ratio, **of) for name in metrics} if beside else {}
    gains = {name: _gain(outcomes, beside, name, ratio, **of) for name in metrics} if beside else {}
    predicted = np.zeros((len(rows), *outcomes[0].predicted.shape[1:]))
    fold_of = np.zeros(len(rows), dtype=np.int64)
    for fold, outcome in zip(folds, outcomes, strict=True):
        if fold.repeat == 0:
            predicted[fold.test] = outcome.predicted
            fold_of[fold.test] = fold.number
    return replace(
        result,
        status="ok",
        metric="auc" if result.labels else "r",
        metrics=metrics,
        out_of_fold=OutOfFold(truth if codes is None else codes, predicted, fold_of, rows),
        confound_metrics=confound_metrics,
        gains=gains,
        fold_scores={name: _scores(outcomes, name) for name in metrics},
        test_to_train=ratio,
        effective_groups=many,
        smallest_class=smallest,
        train_participants=int(np.median([len(np.unique(sample.groups.people[fold.train])) for fold in folds])),
    )


def _scores(outcomes: Sequence[Outcome], name: str) -> np.ndarray:
    return np.array([outcome.scores[name] for outcome in outcomes])


def _interval(outcomes: Sequence[Outcome], name: str, ratio: float, **of: Any) -> Interval:
    interval = corrected_interval(
        _scores(outcomes, name),
        ratio,
        chance=float(np.mean([outcome.chances[name] for outcome in outcomes])),
        bounds=RANGES[name],
        **of,
    )
    return _with_bootstrap(interval, [outcome.draws.get(name) for outcome in outcomes])


def _gain(outcomes: Sequence[Outcome], beside: Sequence[Outcome], name: str, ratio: float, **of: Any) -> Interval:
    a, b = _scores(outcomes, name), _scores(beside, name)
    interval = difference_interval(a, b, ratio, metric=name, **of)
    pairs = zip(outcomes, beside, strict=True)
    return _with_bootstrap(interval, [a.draws[name] - b.draws[name] if a.draws else None for a, b in pairs])


def _with_bootstrap(interval: Interval, draws: Sequence[np.ndarray | None]) -> Interval:
    drawn = [scores for scores in draws if scores is not None]
    ends = percentile_interval(np.stack(drawn)) if drawn else None
    return interval if ends is None else replace(interval, boot_low=ends[0], boot_high=ends[1])
