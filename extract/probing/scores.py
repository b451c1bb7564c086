"""Scores of one test fold, and the interval around their mean over the folds of repeated cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from extract.probing.folds import class_sizes
from extract.probing.results import Interval, TargetResult

#: What a score can be at all: intervals are cut off there.
RANGES = {
    "auc": (0.0, 1.0),
    "balanced_accuracy": (0.0, 1.0),
    "r": (-1.0, 1.0),
    "r2": (-np.inf, 1.0),
    "mae": (0.0, np.inf),
}


def auc(codes: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; with more than two classes the plain mean over classes of one against the rest.

    Computed from ranks (Mann & Whitney 1947), ties counting half.

    Parameters
    ----------
    codes
        int, (scan,) 0 ... classes-1; every class occurs.
    probabilities
        (scan, class).
    """
    classes = probabilities.shape[1]
    if classes == 2:
        return _rank_auc(codes == 1, probabilities[:, 1])
    return float(np.mean([_rank_auc(codes == k, probabilities[:, k]) for k in range(classes)]))


def _rank_auc(positive: np.ndarray, score: np.ndarray) -> float:
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    ranks = stats.rankdata(score)
    above = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


def balanced_accuracy(codes: np.ndarray, probabilities: np.ndarray, frequencies: np.ndarray) -> float:
    """Mean over classes of the share of scans that are given their class, for classes taken as equally likely.

    The most probable class of a model fitted to unequal classes is nearly always the common one, which holds the
    balanced accuracy at chance whatever the model knows. So probabilities are divided by the classes' frequencies in
    the training data before the largest is taken (Bayes' rule for equal priors; Saerens, Latinne & Decaestecker 2002,
    Neural Computation 14:21), which is the decision that maximises balanced accuracy.

    Parameters
    ----------
    codes
        int, (scan,) 0 ... classes-1; every class occurs.
    probabilities
        (scan, class).
    frequencies
        (class,) in the training data.
    """
    chosen = np.argmax(probabilities / frequencies, axis=1)
    return float(np.mean([np.mean(chosen[codes == k] == k) for k in range(len(frequencies))]))


def pearson(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation; 0 if either side is constant, for a constant predicts nothing."""
    if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return 0.0
    a, b = truth - truth.mean(), predicted - predicted.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else 0.0


def r_squared(truth: np.ndarray, predicted: np.ndarray, training_mean: float) -> float:
    """1 - squared error over that of the training mean, which is what one would predict without features.

    Against the mean of the test scans themselves a baseline would know the test data.
    """
    baseline = float(np.sum((truth - training_mean) ** 2))
    return 1 - float(np.sum((truth - predicted) ** 2)) / baseline if baseline > 0 else 0.0


def mean_absolute_error(truth: np.ndarray, predicted: np.ndarray | float) -> float:
    """Mean absolute difference, in the units of both."""
    return float(np.mean(np.abs(truth - predicted)))


def corrected_interval(
    scores: Sequence[float] | np.ndarray,
    test_to_train: float,
    *,
    chance: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    confidence: float = 0.95,
    people: int | None = None,
    groups: float = np.inf,
    folds: int | None = None,
) -> Interval:
    """Return the mean of fold scores with a t interval that allows for their dependence.

    Fold scores are correlated, so their plain standard error is too small. With a correlation rho between any two of m
    scores of sample variance S2, the variance of their mean is (1/m + rho / (1 - rho)) S2, with m - 1 degrees of
    freedom (Nadeau & Bengio 2003, Machine Learning 52:239; for K folds repeated R times, m = K R, Bouckaert & Frank
    2004, PAKDD, LNCS 3056:3). No estimate of rho from the scores is unbiased (Bengio & Grandvalet 2004, JMLR 5:1089);
    it has to be assumed. With q the share of scans that a fold tests:

    - Nadeau & Bengio take rho = q, which makes the second term n_test / n_train. That counts the scans that two test
      sets share, and no dependence through training: right for a strong effect.
    - Without an effect there is nothing but that dependence. A fold's score is then, to first order, a sum over pairs
      of a tested and a training scan, and each pair counts twice: once with either scan in the test set, with the
      same value (a degenerate U-statistic). Counting pairs over many repeats gives rho = 2 q (1 - q).

    The second is taken: the two agree at q = 1/2, and below that it is the wider, by a third for five folds, so an
    interval holds chance as often as it says if there is nothing to find, and is cautious if there is. In 300
    simulations of nothing (120 scans, 150 features, ridge, 5 x 5 folds) the 95 % interval of r held 0 in 94 to 95 %,
    that of Nadeau & Bengio in 85 to 89 %.

    Parameters
    ----------
    scores
        One score per fold and repeat, two or more.
    test_to_train
        Scans tested over scans trained on, q / (1 - q).
    chance
        The score of guessing; kept in the result.
    bounds
        What the score can be: the ends are clipped to it.
    confidence
        Of the interval.
    people
        Of the smallest class, or groups of it where these are not split. Where every fold has the best score that there
        is (an AUC of 1 in each) the scores do not vary, which is no certainty: the lower end is then the exact one of
        so many successes in as many trials (Clopper & Pearson 1934, Biometrika 26:404).
    groups
        How many groups of about the same size people come in that are never split, or people of the smallest class, if
        they are fewer (`independent_parts`). Where they are few, repeats deal the same ones again and tell nothing new:
        no more scores than that are counted.
    folds
        Of each repeat. Without an effect both scores of two folds are of the same pairs of scans, and nearly the same:
        they count as one then. One repeat of two folds is one score, of which nothing is known: the interval is all
        that there can be. In 800 simulations of nothing (two groups of 100) the interval of two scores held 0 in 86 %.
    """
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    half = _half_width(values, test_to_train, confidence, groups)
    if folds == 2:
        repeats = values.reshape(-1, 2).mean(axis=1)
        half = max(half, _half_width(repeats, test_to_train, confidence, groups)) if len(repeats) > 1 else np.inf
    low, high = (float(np.clip(end, *bounds)) for end in (mean - half, mean + half))
    if people and low == high == bounds[1]:
        low = least_after_successes(people, confidence)
    return Interval(mean, low, high, chance)


def _half_width(values: np.ndarray, test_to_train: float, confidence: float, groups: float) -> float:
    m = max(2.0, min(len(values), groups))
    dependence = 2 * test_to_train / (1 + test_to_train**2)  # rho / (1 - rho)
    error = float(np.sqrt(values.var() * m / (m - 1) * (1 / m + dependence)))
    return float(stats.t.ppf((1 + confidence) / 2, m - 1)) * error


def least_after_successes(trials: int, confidence: float = 0.95) -> float:
    """Return the lower end of the exact interval of as many successes as trials (Clopper & Pearson 1934)."""
    return float(((1 - confidence) / 2) ** (1 / trials))


def difference_interval(
    a: np.ndarray,
    b: np.ndarray,
    test_to_train: float,
    *,
    metric: str,
    people: int | None = None,
    groups: float = np.inf,
    folds: int | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean of a's scores minus b's, fold by fold, with the corrected interval, against a chance of 0.

    Where one of both has the best score that there is in every fold, its own scores do not vary, which is no certainty
    (see `corrected_interval`): the difference may then lie further on that side by what its exact interval leaves open.

    Parameters
    ----------
    a, b
        (repeat x fold,) scores of the same folds.
    metric
        One of `RANGES`.
    test_to_train, people, groups, folds, confidence
        See `corrected_interval`.
    """
    reach = RANGES[metric][1] - RANGES[metric][0]
    found = corrected_interval(
        a - b, test_to_train, chance=0.0, bounds=(-reach, reach), groups=groups, folds=folds, confidence=confidence
    )
    if not people:
        return found
    best, open_to = RANGES[metric][1], 1 - least_after_successes(people, confidence)
    low, high = (open_to if np.all(scores == best) else 0.0 for scores in (a, b))
    return replace(found, low=min(found.low, found.score - low), high=max(found.high, found.score + high))


def effective_number(groups: np.ndarray) -> float:
    """Return how many groups of the same size would be as many as these: the inverse of the sum of squared shares.

    Parameters
    ----------
    groups
        int, (scan,) 0 ... groups-1.
    """
    sizes = np.bincount(groups).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def independent_parts(together: np.ndarray, codes: np.ndarray | None) -> float:
    """Return how many parts scores are of, whatever the number of folds and repeats, for `corrected_interval`.

    That is the effective number of groups; of a classification no more than the groups, or people, who hold the
    smallest class: every repeat deals these same few again, and scores vary with where they come to lie. In 200
    simulations of nothing (100 scans, 10 features, 5 x 5 folds) the 95 % interval of an AUC held 0.5 in 91, 95 and
    96 % with 4, 8 and 10 people in the smallest class; without that limit in 75, 91 and 93 %.

    Parameters
    ----------
    together
        int, (scan,) 0 ... groups-1.
    codes
        int, (scan,) 0 ... classes-1; None for a regression.
    """
    many = effective_number(together)
    return many if codes is None else min(many, float(class_sizes(together, codes).min()))


def paired_interval(a: TargetResult, b: TargetResult, metric: str) -> Interval:
    """Return the mean of a's scores minus b's, fold by fold, with the corrected interval, against a chance of 0.

    Parameters
    ----------
    a, b
        The same target of the same scans, probed on the same folds.
    metric
        One of those that both have.

    Raises
    ------
    ValueError
        If they have not the metric, or other folds.
    """
    if metric not in a.fold_scores or metric not in b.fold_scores:
        raise ValueError(f"{metric!r} is not among the scores of both {a.name!r} and {b.name!r}")
    mine, other = a.fold_scores[metric], b.fold_scores[metric]
    if (
        a.out_of_fold is None
        or b.out_of_fold is None
        or len(mine) != len(other)
        or not np.array_equal(a.out_of_fold.fold, b.out_of_fold.fold)
    ):
        raise ValueError(f"{a.name!r} and {b.name!r} were probed on other folds; probe the same scans with one seed")
    return difference_interval(
        mine, other, a.test_to_train, metric=metric, people=a.smallest_class, groups=a.effective_groups,
        folds=int(a.out_of_fold.fold.max()) + 1,
    )  # fmt: skip
