"""Logistic regression, binary and multinomial, with a penalty that is chosen without splitting groups of scans."""

from __future__ import annotations

import numpy as np
from scipy import optimize

from extract.probing.confounds import fit_residualiser, without_confounds
from extract.probing.linear import Fit, ridge_penalties, rotate

_WORSE = 1.01  # than guessing: by more than what is drawn into folds does


def logistic(
    train: np.ndarray,
    codes: np.ndarray,
    inner_folds: np.ndarray,
    groups: np.ndarray,
    *,
    confounds: np.ndarray | None = None,
    penalty: float | None = None,
) -> Fit:
    """Fit logistic regression.

    Parameters
    ----------
    train
        float64, (training scan, feature).
    codes
        int, (training scan,) 0 ... classes-1; every class occurs.
    inner_folds
        int, (training scan,) folds for choosing the penalty, each of which leaves every class to the others.
    groups
        int, (training scan,); two or more.
    confounds
        (training scan, column), of features that are what these leave of them: to choose the penalty they are removed
        in each inner fold by what the others say, or the others' features would know of those left out.
    penalty
        None chooses among `Rotation.penalties` by the log-loss over the inner folds. Log-loss rather than AUC: AUC
        does not change when all weights shrink together, so on weak effects it picks penalties at random and leaves
        probabilities overconfident; log-loss is a proper score, and every scan counts in it. The search begins with the
        penalty that is best for ridge regressions of the classes' indicators (`probing.linear.ridge_penalties`) times
        the variance of an indicator, which is the curvature of the log-loss over that of squares, and goes on as long
        as the loss falls. From there it is a step or two; from elsewhere it might not get there, for where the axes of
        most variance know nothing the loss rises before it falls.

    Returns
    -------
    Fit
        With one output for two classes (`probabilities` gives both), else one per class. The penalty is on half the
        squared weights, against the summed log-loss: 1 / C of scikit-learn.
    """
    rotation = rotate(train)
    design = _with_constant(rotation.apply(train))
    if penalty is None:
        indicators = np.eye(int(codes.max()) + 1)[codes]
        frequencies = indicators.mean(axis=0)
        unexplained = indicators if confounds is None else without_confounds(indicators, confounds)
        alike = ridge_penalties(rotation, train, unexplained, groups) * frequencies * (1 - frequencies)
        first = float(np.exp(np.log(alike).mean()))
        penalty = _penalty_by_log_loss(first, design, codes, inner_folds, rotation.penalties, confounds)
    weights = fit_logistic(design, codes, penalty, tolerance=1e-6)
    return rotation.unrotate(weights[:-1], weights[-1], np.full(weights.shape[1], penalty))


def probabilities(decisions: np.ndarray) -> np.ndarray:
    """Return class probabilities (scan, class) of decisions of `logistic`, which are (scan, 1) for two classes."""
    return np.exp(_log_probabilities(decisions))


def fit_logistic(
    design: np.ndarray,
    codes: np.ndarray,
    penalty: float,
    start: np.ndarray | None = None,
    *,
    used: np.ndarray | None = None,
    tolerance: float = 1e-3,
) -> np.ndarray:
    """Minimise the summed log-loss plus penalty / 2 times the squared weights, the intercepts (last row) left free.

    L-BFGS (Byrd, Lu, Nocedal & Zhu 1995) in coordinates scaled by the curvature that each weight has at the classes'
    frequencies, where a step of 1 is about one standard error of the weight.

    Parameters
    ----------
    design
        Float, (scan, column), the last column constant.
    codes
        int, (scan,) 0 ... classes-1; every class occurs.
    start
        Weights to start from.
    used
        bool, (scan,): to which scans it is fitted, of which every class has some; None for all.
    tolerance
        Largest slope left, in the scaled coordinates. A thousandth of a standard error will do to compare penalties.

    Returns
    -------
    numpy.ndarray
        float64, (column, 1) for two classes, else (column, class).
    """
    counted = np.ones((len(codes), 1)) if used is None else used[:, None].astype(np.float64)
    frequencies = np.bincount(codes, counted[:, 0]) / counted.sum()
    binary = len(frequencies) == 2
    indicator = (codes == 1).astype(np.float64)[:, None] if binary else np.eye(len(frequencies))[codes]
    shown = frequencies[1:] if binary else frequencies
    ridges = np.full((design.shape[1], 1), penalty)
    ridges[-1] = 0
    squares = np.einsum("ij,ij->j", design, design).astype(np.float64)[:, None] * counted.mean()
    curvature = squares * (shown * (1 - shown)) + ridges
    scale = 1 / np.sqrt(curvature)
    if start is None:
        start = np.zeros_like(scale)
        start[-1] = np.log(frequencies[1] / frequencies[0]) if binary else np.log(frequencies)

    def loss(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        weights = scaled.reshape(scale.shape) * scale
        decisions = _product(design, weights)
        if binary:
            value = float(np.sum((np.logaddexp(0, decisions) - decisions * indicator) * counted))
            predicted = 1 / (1 + np.exp(-np.clip(decisions, -700, 700)))
        else:
            logs = _log_probabilities(decisions)
            value = -float(np.sum(logs * indicator * counted))
            predicted = np.exp(logs)
        slope = _product(design.T, (predicted - indicator) * counted) + ridges * weights
        return value + 0.5 * float(np.sum(ridges * weights**2)), (slope * scale).ravel()

    found = optimize.minimize(
        loss,
        (start / scale).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": tolerance, "ftol": 1e-15, "maxiter": 1000},  # the slope alone decides
    )
    return found.x.reshape(scale.shape) * scale


def _penalty_by_log_loss(
    first: float,
    design: np.ndarray,
    codes: np.ndarray,
    folds: np.ndarray,
    penalties: np.ndarray,
    confounds: np.ndarray | None = None,
) -> float:
    """Return the penalty with the least log-loss that one gets to from the first, step by step.

    Where that is worse than the classes' frequencies alone, the first was a bad one, and the search begins again with
    the strongest, which gives these frequencies.

    All folds are fitted in the coordinates of everybody, so that nothing large is copied; half the digits will do to
    compare penalties, and reading them takes the time.
    """
    design = design.astype(np.float32)
    kept = [folds != fold for fold in np.unique(folds)]
    weights: list[np.ndarray | None] = [None] * len(kept)
    losses: dict[int, float] = {}

    def loss(place: int) -> float:
        if not 0 <= place < len(penalties):
            return np.inf
        if place not in losses:
            losses[place] = 0.0
            for number, used in enumerate(kept):
                seen = design if confounds is None else _residualised(design, confounds, used)
                found = fit_logistic(seen, codes, float(penalties[place]), weights[number], used=used, tolerance=1e-2)
                weights[number] = found
                logs = _log_probabilities(_product(seen[~used], found))
                losses[place] -= float(logs[np.arange(len(logs)), codes[~used]].sum())
        return losses[place]

    def descend(best: int) -> int:
        for step in (-1, 1):  # the stronger one first
            while loss(best + step) < loss(best):
                best += step
        return best

    best = descend(int(np.argmin(np.abs(np.log(penalties / first)))))
    if loss(best) > _WORSE * _loss_of_frequencies(codes, kept):
        weights = [None] * len(kept)  # those of weak penalties are far from these
        best = min(best, descend(0), key=loss)
    return float(penalties[best])


def _loss_of_frequencies(codes: np.ndarray, kept: list[np.ndarray]) -> float:
    """Return the log-loss over folds of the classes' frequencies in the others."""
    loss = 0.0
    for used in kept:
        frequencies = np.bincount(codes[used]) / used.sum()
        loss -= float(np.log(frequencies[codes[~used]]).sum())
    return loss


def _residualised(design: np.ndarray, confounds: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return a design without what confounds explain of it on the scans used; its last column is constant."""
    features = design[:, :-1]
    left = fit_residualiser(features[used].astype(np.float64), confounds[used]).apply(features, confounds)
    return _with_constant(left).astype(design.dtype)


def _product(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return matrix @ columns as float64, one by one: BLAS copies the matrix for a few, and takes thrice as long."""
    given = np.ascontiguousarray(columns.T, dtype=matrix.dtype)
    return np.stack([matrix @ column for column in given], axis=1, dtype=np.float64, casting="safe")


def _with_constant(scores: np.ndarray) -> np.ndarray:
    return np.column_stack([scores, np.ones(len(scores))])


def _log_probabilities(decisions: np.ndarray) -> np.ndarray:
    """Logarithms of class probabilities, (scan, class); scipy's softmax takes five times as long on few scans."""
    if decisions.shape[1] == 1:
        return -np.logaddexp(0, np.column_stack([decisions, -decisions]))
    shifted = decisions - decisions.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
