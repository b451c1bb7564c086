"""One fold after the other: confounds are removed, models fitted and scored, on the training side and the test side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits

from extract.probing.bootstrap import (
    weighted_auc,
    weighted_balanced_accuracy,
    weighted_mean_absolute_error,
    weighted_pearson,
    weighted_r_squared,
)
from extract.probing.confounds import ConfoundValues, fit_coding, fit_residualiser, without_confounds
from extract.probing.folds import folds_with_all_classes, limit_people
from extract.probing.free_memory import free_memory
from extract.probing.groups import Groups
from extract.probing.linear import Fit, ridge
from extract.probing.logistic import logistic, probabilities
from extract.probing.scores import auc, balanced_accuracy, mean_absolute_error, pearson, r_squared

#: Inner folds for the penalty of a logistic regression; of many scans fewer tell as much.
_INNER_FOLDS, _FOLDS_OF_MANY, _MANY_SCANS = 5, 3, 2000
_LARGE = 2_000_000  # numbers in the features: below, threads cost more than they give
_MOST_THREADS = 8
_COPIES = 3  # of the training features as float64, that each thread holds


@dataclass(frozen=True)
class Sample:
    """The scans that have a value of a target, and how they are dealt into folds.

    Attributes
    ----------
    features
        float64, (scan, feature).
    groups
        Of the scans.
    confounds
        To be removed from the features; None for none.
    fold_of
        int64, (repeat, scan).
    strata
        int64, (person,): people to train on are taken from all of these alike.
    """

    features: np.ndarray
    groups: Groups
    confounds: ConfoundValues | None
    fold_of: np.ndarray
    strata: np.ndarray


@dataclass(frozen=True)
class Fold:
    """Rows of a sample to train and to test on; `full` counts those that are not tested, trained on or not."""

    repeat: int
    number: int
    train: np.ndarray
    test: np.ndarray
    full: int


@dataclass(frozen=True)
class Outcome:
    """What one model reached in one fold.

    Attributes
    ----------
    predicted
        (test scan, class) probabilities, or (test scan,) values.
    penalty
        The one that was chosen.
    scores, chances
        Metric -> score, and that of guessing.
    draws
        Metric -> (draw,) scores of the bootstrap; empty without.
    """

    predicted: np.ndarray
    penalty: float
    scores: dict[str, float]
    chances: dict[str, float]
    draws: dict[str, np.ndarray] = field(default_factory=dict)


#: Fits to training features (scan, feature) and predicts of test features: one outcome per target. Last come the
#: confounds (training scan, column) of which features are free, if there are any.
Model = Callable[[np.ndarray, np.ndarray, Fold, np.ndarray | None], list[Outcome]]


def list_folds(sample: Sample, train_people: int | None, seed: int) -> list[Fold]:
    """Return the folds of all repeats, repeat after repeat, with at most `train_people` people to train on."""
    folds = []
    for repeat, fold_of in enumerate(sample.fold_of):
        for number in range(int(fold_of.max()) + 1):
            test = fold_of == number
            train = ~test
            if train_people is not None:
                rng = np.random.default_rng([seed, repeat, number, 1])
                train = limit_people(sample.groups.people, sample.strata, train, train_people, rng)
            folds.append(Fold(repeat, number, np.flatnonzero(train), np.flatnonzero(test), int((~test).sum())))
    return folds


def run_folds(sample: Sample, folds: Sequence[Fold], model: Model) -> tuple[list[list[Outcome]], list[list[Outcome]]]:
    """Fit and score a model in each fold: on the features, and on the confounds alone.

    Without confounds the second list is empty. Confounds are coded, and removed from the features, by what the training
    side alone says of them.
    """

    def run(fold: Fold) -> tuple[list[Outcome], list[Outcome]]:
        train, test = sample.features[fold.train], sample.features[fold.test]
        if sample.confounds is None:
            return model(train, test, fold, None), []
        measured = sample.confounds.rows(fold.train)
        coding = fit_coding(measured)
        train_columns = coding.encode(measured.values)
        test_columns = coding.encode(sample.confounds.values[fold.test])
        residualiser = fit_residualiser(train, train_columns)
        left, tested = residualiser.apply(train, train_columns), residualiser.apply(test, test_columns)
        return model(left, tested, fold, train_columns), model(train_columns, test_columns, fold, None)

    # BLAS gets one thread: more cost more than they give on small matrices, one adds up in one order, and of large ones
    # the folds run side by side.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads_for(sample.features.size)) as pool:
        pairs = list(pool.map(run, folds))
    return [first for first, _ in pairs], [second for _, second in pairs if second]


def threads_for(numbers: int) -> int:
    """Return how many folds of so many features in all run side by side: as many as there are cores and memory for."""
    if numbers < _LARGE:
        return 1
    most = free_memory() // (_COPIES * 8 * numbers)
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_THREADS, most))


def regression(truths: np.ndarray, counts: Sequence[bool], groups: Groups, weights: np.ndarray | None) -> Model:
    """Return a model that fits ridge regressions of all targets with one factorisation.

    Parameters
    ----------
    truths
        float64, (scan, target).
    counts
        Of each target, whether it is a count: fitted as log(1 + count).
    groups
        Of the scans; the penalty is chosen by leaving each group out, or each person where one group is trained on.
    weights
        (draw, unit) of a bootstrap; None for none.
    """
    outcomes = np.where(np.array(counts), np.log1p(np.where(counts, truths, 0)), truths)

    def model(train: np.ndarray, test: np.ndarray, fold: Fold, confounds: np.ndarray | None) -> list[Outcome]:
        fit = fit_values(train, outcomes[fold.train], groups, fold.train, confounds)
        fitted = fit.decide(test)
        drawn = None if weights is None else weights[:, groups.units[fold.test]].astype(np.float32)
        return [
            _score_regression(
                truths[:, i], outcomes[:, i], fold, fitted[:, i], float(fit.penalties[i]), bool(count), drawn
            )
            for i, count in enumerate(counts)
        ]

    return model


def classification(codes: np.ndarray, classes: int, groups: Groups, seed: int, weights: np.ndarray | None) -> Model:
    """Return a model that fits a logistic regression of classes; see `regression` for what the parameters are."""

    def model(train: np.ndarray, test: np.ndarray, fold: Fold, confounds: np.ndarray | None) -> list[Outcome]:
        train_codes, test_codes = codes[fold.train], codes[fold.test]
        fit = fit_classes(train, train_codes, groups, fold.train, [seed, fold.repeat, fold.number], confounds)
        predicted = probabilities(fit.decide(test))
        frequencies = np.bincount(train_codes, minlength=classes) / len(train_codes)
        scores = {
            "auc": auc(test_codes, predicted),
            "balanced_accuracy": balanced_accuracy(test_codes, predicted, frequencies),
        }
        draws = {}
        if weights is not None:
            drawn = weights[:, groups.units[fold.test]].astype(np.float32)
            draws = {
                "auc": weighted_auc(test_codes, predicted, drawn),
                "balanced_accuracy": weighted_balanced_accuracy(test_codes, predicted, frequencies, drawn),
            }
        chances = {"auc": 0.5, "balanced_accuracy": 1 / classes}
        return [Outcome(predicted, float(fit.penalties[0]), scores, chances, draws)]

    return model


def fit_values(
    train: np.ndarray, outcomes: np.ndarray, groups: Groups, rows: np.ndarray, confounds: np.ndarray | None = None
) -> Fit:
    """Fit ridge regressions to a training side, (training scan, target); see `fit_classes`."""
    unexplained = None if confounds is None else without_confounds(outcomes, confounds)
    return ridge(train, outcomes, left_out(groups, rows), unexplained=unexplained)


def fit_classes(
    train: np.ndarray,
    codes: np.ndarray,
    groups: Groups,
    rows: np.ndarray,
    seed: list[int],
    confounds: np.ndarray | None = None,
) -> Fit:
    """Fit a logistic regression to a training side, its penalty chosen there.

    Parameters
    ----------
    train, codes
        (training scan, feature), (training scan,).
    rows
        int, (training scan,) rows of `groups`.
    confounds
        (training scan, column), which were removed from the features; None for none.

    Raises
    ------
    NoInnerFoldsError
        If a class has too few people.
    """
    inner = penalty_folds(groups, codes, rows, seed, _FOLDS_OF_MANY if len(rows) > _MANY_SCANS else _INNER_FOLDS)
    return logistic(train, codes, inner, left_out(groups, rows), confounds=confounds)


def left_out(groups: Groups, rows: np.ndarray) -> np.ndarray:
    """Return who is left out together to choose a penalty: groups, or people if one group is trained on (of two).

    Parameters
    ----------
    rows
        int, (training scan,) rows of `groups`.
    """
    together = groups.together[rows]
    return together if len(np.unique(together)) > 1 else groups.people[rows]


class NoInnerFoldsError(ValueError):
    """People of a training side cannot be dealt into folds that all hold every class."""


def penalty_folds(groups: Groups, codes: np.ndarray, rows: np.ndarray, seed: list[int], folds: int) -> np.ndarray:
    """Deal the scans of a training side into folds for choosing a penalty.

    Groups are not split, unless some class would then be missing from a side: if so, people are not.

    Parameters
    ----------
    codes, rows
        See `fit_classes`.

    Raises
    ------
    NoInnerFoldsError
        If that cannot be done.
    """
    people, together = (np.unique(of[rows], return_inverse=True)[1] for of in (groups.people, groups.together))
    for whole in (together, people):
        dealt = folds_with_all_classes(whole, people, codes, folds, 1, seed, 1)
        if dealt is not None:
            return dealt[0]
    raise NoInnerFoldsError(
        "the people of a training side cannot be halved so that both halves hold every class, by which the penalty is "
        "chosen: a class has one person, or people are of several classes; take fewer classes, or more people"
    )


def _score_regression(
    truths: np.ndarray,
    outcomes: np.ndarray,
    fold: Fold,
    fitted: np.ndarray,
    penalty: float,
    count: bool,
    weights: np.ndarray | None,
) -> Outcome:
    truth, outcome = truths[fold.test], outcomes[fold.test]
    mean = float(outcomes[fold.train].mean())
    predicted = np.expm1(np.clip(fitted, 0, 700)) if count else fitted
    scores = {
        "r": pearson(outcome, fitted),
        "r2": r_squared(outcome, fitted, mean),
        "mae": mean_absolute_error(truth, predicted),
    }
    median = float(np.median(truths[fold.train]))
    chances = {"r": 0.0, "r2": 0.0, "mae": mean_absolute_error(truth, median)}
    draws = {}
    if weights is not None:
        draws = {
            "r": weighted_pearson(outcome, fitted, weights),
            "r2": weighted_r_squared(outcome, fitted, mean, weights),
            "mae": weighted_mean_absolute_error(truth, predicted, weights),
        }
    return Outcome(predicted, penalty, scores, chances, draws)
