"""Permutation test: how often a cross-validated score as good comes of labels that were exchanged between people.

The statistic is computed alike for the labels as they are and as they are exchanged, which makes the test exact. So it
is one with a closed form, whatever the probe fits: all permutations are columns of one factorisation per fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from extract.probing.confounds import ConfoundValues, fit_coding, fit_residualiser
from extract.probing.folds import deal_folds
from extract.probing.groups import Groups
from extract.probing.linear import Rotation, rotate

_MOST_AT_ONCE = 8_000_000  # numbers in the exchanged labels
_FREE_SHARE = 0.5  # of the scans: penalties that leave a fit more degrees of freedom are not tried
_LEAST_EXCHANGED = 0.5  # of the scans: where fewer can get another label, a p value says nothing
_SAME = 1e-12  # scores that differ by rounding are equal


@dataclass(frozen=True)
class Exchange:
    """Which rows may take each other's labels.

    Attributes
    ----------
    parts
        Each int (unit, scan) rows of units that are alike: a permutation of its first axis is one of labels.
    """

    parts: list[np.ndarray]

    def free(self, labels: np.ndarray) -> np.ndarray:
        """Return which scans, bool (scan,), can get another label than theirs of labels (scan, ...)."""
        found = np.zeros(len(labels), dtype=bool)
        for rows in self.parts:
            found[rows] = np.any(np.ptp(labels[rows], axis=0) > 0)
        return found

    def draw(self, scans: int, rng: np.random.Generator) -> np.ndarray:
        """Return for each scan the row whose label it gets."""
        source = np.arange(scans)
        for rows in self.parts:
            source[rows] = rows[rng.permutation(len(rows))]
        return source


def permutation_test(
    features: np.ndarray,
    truth: np.ndarray,
    task: str,
    groups: Groups,
    confounds: ConfoundValues | None,
    *,
    permutations: int,
    folds: int,
    seed: int,
) -> tuple[float | None, str]:
    """Test whether features tell anything of a target.

    The statistic is the mean over the test folds of the AUC of ridge regression on indicator codes (of more than two
    classes one against the rest, their mean), or of Pearson's r of ridge regression (a count as log(1 + count)), with
    the penalty by generalised cross-validation (Golub, Heath & Wahba 1979) on the training side. The folds are dealt
    without a look at the labels. Families, else people, are exchanged as wholes with those of as many scans; where
    every person has one label, all people can be exchanged; people of groups by a phenotype are exchanged within these.

    With confounds the features are those that are left of them on each training side, and what is exchanged, and
    correlated with its prediction, are the residuals of the target (of its indicator codes) on the confounds: the null
    is that beyond the confounds the features tell nothing. Exchanged residuals are residualised again, so that they are
    as free of the confounds as those observed. Residuals are exchangeable nearly, not exactly (Freedman & Lane 1983,
    Journal of Business & Economic Statistics 1:292), those of rare classes least.

    Parameters
    ----------
    features
        float64, (scan, feature).
    truth
        (scan,) class codes 0 ... classes-1, or values.
    task
        One of `ingest.dictionary.TASKS`.
    groups, confounds
        Of the scans.
    permutations
        1 or more.
    folds
        At most; two or more groups are needed.
    seed
        Of folds and permutations.

    Returns
    -------
    p_value : float or None
        (1 + permutations that score as well) / (permutations + 1), one-sided; None where fewer than half of the scans
        can get another label.
    null : str
        What was tested, in words, or why nothing was.
    """
    classes = int(truth.max()) + 1 if task in ("binary", "multiclass") else 0
    if classes:
        labels = (truth[:, None] == np.arange(classes))[:, 1 if classes == 2 else 0 :].astype(np.float64)
    else:
        labels = (np.log1p(truth) if task == "count" else truth)[:, None]
    if confounds is not None:
        columns = fit_coding(confounds).encode(confounds.values)
        labels = fit_residualiser(labels, columns).apply(labels, columns)
    exchange, exchanged = _exchange(groups, truth, free=confounds is None)
    free = exchange.free(labels)
    if free.mean() < _LEAST_EXCHANGED:
        return None, f"no p value: only {int(free.sum())} of {len(free)} labels can be exchanged between {exchanged}"
    ranked = bool(classes) and confounds is None
    number = min(folds, int(groups.together.max()) + 1)
    nobody = np.zeros(groups.together.max() + 1, dtype=np.int64)
    fold_of = deal_folds(groups.together, nobody, number, np.random.default_rng([seed, number]))
    total = np.zeros(permutations + 1)
    with threadpool_limits(1 if features.size < _MOST_AT_ONCE else None, user_api="blas"):
        for fold in range(number):
            test = fold_of == fold
            train, tested = features[~test], features[test]
            if confounds is not None:
                coding = fit_coding(confounds.rows(~test))
                known = coding.encode(confounds.values[~test])
                residualiser = fit_residualiser(train, known)
                train = residualiser.apply(train, known)
                tested = residualiser.apply(tested, coding.encode(confounds.values[test]))
            rotation = rotate(train)
            step = max(1, _MOST_AT_ONCE // labels.size)
            for start in range(0, permutations + 1, step):
                numbers = range(start, min(start + step, permutations + 1))
                drawn = np.stack([labels[_source(exchange, number, len(truth), seed)] for number in numbers], axis=1)
                if confounds is not None:
                    flat = drawn.reshape(len(truth), -1)
                    drawn = fit_residualiser(flat, columns).apply(flat, columns).reshape(drawn.shape)
                total[start : start + step] += _fold_statistic(
                    rotation, train, drawn[~test], tested, drawn[test], ranked
                )
    as_good = int(np.sum(total[1:] >= total[0] - _SAME * number))
    what = "AUC of ridge regression on indicator codes" if ranked else "r of ridge regression"
    if confounds is not None:
        null = f"beyond {', '.join(confounds.names)} the features tell nothing: residuals exchanged between {exchanged}"
    else:
        null = f"the features tell nothing: labels exchanged between {exchanged}"
    return (1 + as_good) / (permutations + 1), f"{null}; statistic: cross-validated {what}"


def _source(exchange: Exchange, number: int, scans: int, seed: int) -> np.ndarray:
    """Return the rows of one permutation, the same whenever it is asked for; the first leaves labels as they are."""
    return exchange.draw(scans, np.random.default_rng([seed, number, 3])) if number else np.arange(scans)


def _exchange(groups: Groups, truth: np.ndarray, *, free: bool) -> tuple[Exchange, str]:
    """Return which scans may exchange labels, and that in words.

    Parameters
    ----------
    free
        Whether labels are those of `truth`, so that of people with one label each all may be exchanged.
    """
    scans_of = np.bincount(groups.people)
    order = np.lexsort((groups.people, -scans_of[groups.people], groups.units))
    units, starts = np.unique(groups.units[order], return_index=True)
    members = np.split(order, starts[1:])
    within = f" within {groups.note}" if groups.blocks.any() else ""
    families = bool(np.any(groups.units != groups.people))
    first = np.array([rows[0] for rows in members])
    constant = free and not families and bool(np.all(truth == truth[first][np.searchsorted(units, groups.units)]))
    if constant and scans_of.max() > 1:
        return _by_person(groups, members, within)
    alike: dict[tuple[int, ...], list[np.ndarray]] = {}
    for rows in members:
        shape = (int(groups.blocks[rows[0]]), *scans_of[groups.people[rows]].tolist())
        alike.setdefault(shape, []).append(rows)
    who = "families of like size" if families else "people"
    if scans_of.max() > 1:
        who += " with the same number of scans"
    return Exchange([np.stack(same) for same in alike.values() if len(same) > 1]), who + within


def _by_person(groups: Groups, members: list[np.ndarray], within: str) -> tuple[Exchange, str]:
    """Return an exchange of the one label of each person: people are taken to have as many scans as the most have.

    Rows are repeated for those who have fewer, which writes the same label to them more than once.
    """
    most = max(len(rows) for rows in members)
    rows = np.stack([np.resize(rows, most) for rows in members])
    blocks = groups.blocks[rows[:, 0]]
    parts = [rows[blocks == block] for block in np.unique(blocks)]
    return Exchange([part for part in parts if len(part) > 1]), "people, who have one label each" + within


def _fold_statistic(
    rotation: Rotation,
    features: np.ndarray,
    labels: np.ndarray,
    tested: np.ndarray,
    truth: np.ndarray,
    ranked: bool,
) -> np.ndarray:
    """Return the score of one fold for each permutation, (permutation,).

    Parameters
    ----------
    features, tested
        float64, (scan, feature) of the training and of the test scans.
    labels, truth
        float64, (scan, permutation, class) of the training and of the test scans.
    ranked
        AUC instead of r.
    """
    n, permutations, classes = labels.shape
    flat = labels.reshape(n, -1)
    means = flat.mean(axis=0)
    covariance = rotation.covariance(features, flat)
    penalties = _penalties(rotation, covariance.reshape(-1, permutations, classes), flat.var(axis=0) * n)
    weights = covariance / (rotation.eigenvalues[:, None] + np.repeat(penalties, classes))
    predicted = rotation.unrotate(weights, means, penalties).decide(tested)
    flat_truth = truth.reshape(len(truth), -1)
    scores = _aucs(flat_truth > 0.5, predicted) if ranked else _correlations(flat_truth, predicted)
    by_class = scores.reshape(permutations, classes)
    defined = ~np.isnan(by_class)  # a fold that was dealt without a look at the labels may lack a class
    count = defined.sum(axis=1)
    return np.where(count > 0, np.where(defined, by_class, 0).sum(axis=1) / np.maximum(count, 1), 0.5 if ranked else 0)


def _penalties(rotation: Rotation, covariance: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return for each permutation the penalty of the least generalised cross-validation error, summed over classes."""
    n = rotation.scans
    candidates = rotation.penalties
    free = 1 + np.sum(rotation.eigenvalues[:, None] / (rotation.eigenvalues[:, None] + candidates), axis=0)
    tried = free <= max(_FREE_SHARE * n, float(free.min()))
    candidates, free = candidates[tried], free[tried]
    explained = np.sum(covariance**2, axis=2) / rotation.eigenvalues[:, None]  # (axis, permutation)
    rest = np.maximum(squares.reshape(explained.shape[1], -1).sum(axis=1) - explained.sum(axis=0), 0)
    kept = (candidates / (rotation.eigenvalues[:, None] + candidates)) ** 2  # (axis, penalty)
    errors = (rest + kept.T @ explained) / ((n - free) ** 2)[:, None]
    return candidates[np.argmin(errors, axis=0)]


def _aucs(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each column, NaN where there is one class only."""
    ranks = stats.rankdata(scores, axis=0)
    ups = positive.sum(axis=0)
    pairs = ups * (len(positive) - ups)
    above = np.sum(ranks * positive, axis=0) - ups * (ups + 1) / 2
    return np.where(pairs > 0, above / np.maximum(pairs, 1), np.nan)


def _correlations(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each pair of columns, 0 where one is constant."""
    a, b = truth - truth.mean(axis=0), predicted - predicted.mean(axis=0)
    scale = np.sqrt(np.sum(a**2, axis=0) * np.sum(b**2, axis=0))
    return np.where(scale > 0, np.sum(a * b, axis=0) / np.where(scale > 0, scale, 1), 0.0)
