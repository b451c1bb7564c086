"""What a test set can tell at all: the smallest score that would be told apart from chance."""

from __future__ import annotations

import numpy as np
from scipy import optimize, stats

POWER = 0.8
SIGNIFICANCE = 0.05


def hanley_mcneil_error(auc: float, positives: int, negatives: int) -> float:
    """Return the standard error of an AUC (Hanley & McNeil 1982, Radiology 143:29, equation 1).

    Parameters
    ----------
    positives, negatives
        People tested of either class.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return float(np.sqrt(max(variance, 0.0) / (positives * negatives)))


def smallest_auc(positives: int, negatives: int) -> float:
    """Return the smallest AUC that a two-sided test of 5 % tells apart from 0.5 in 80 % of test sets of such a size.

    The score must exceed 0.5 by 1.96 standard errors of the AUC of nothing, sqrt((n + 1) / (12 positives negatives)) of
    n people (Mann & Whitney 1947), and does so in 80 % if the true one is 0.84 of its own standard errors above that.

    Returns
    -------
    float
        NaN if even an AUC of 1 would not be.
    """
    if min(positives, negatives) < 1:
        return float("nan")
    null = np.sqrt((positives + negatives + 1) / (12 * positives * negatives))
    needed = 0.5 + stats.norm.ppf(1 - SIGNIFICANCE / 2) * null
    quantile = stats.norm.ppf(POWER)

    def beyond(auc: float) -> float:
        return float(auc - needed - quantile * hanley_mcneil_error(auc, positives, negatives))

    return float(optimize.brentq(beyond, 0.5, 1.0)) if beyond(1.0) > 0 else float("nan")


def smallest_correlation(people: int) -> float:
    """Return the smallest r that a two-sided test of 5 % tells apart from 0 in 80 % of test sets of so many people.

    By Fisher's z (1921, Metron 1:3), whose standard error is 1 / sqrt(people - 3).

    Returns
    -------
    float
        NaN with fewer than four people.
    """
    if people < 4:
        return float("nan")
    return float(np.tanh((stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)) / np.sqrt(people - 3)))


def smallest_score(task_labels: tuple[str, ...], class_people: tuple[int, ...], people: int) -> float:
    """Return the smallest headline score that could be told apart from chance: an AUC, or r.

    Parameters
    ----------
    task_labels
        Names of the classes; empty for values.
    class_people
        People tested of each class. With more than two the AUC is the mean of each class against the rest; the mean of
        their smallest AUCs, which is given, is somewhat too large, since a mean varies less than what it is taken of.
    people
        Who were tested.
    """
    if not task_labels:
        return smallest_correlation(people)
    if len(class_people) == 2:
        return smallest_auc(class_people[1], class_people[0])
    total = sum(class_people)
    return float(np.mean([smallest_auc(count, total - count) for count in class_people]))
