"""The two linear models of a probe, ridge and logistic regression, with penalties chosen without splitting people.

Both penalise the squared length of the weights, which a rotation of the features leaves as it is. So the standardised
training features are rotated to their principal axes once per fold: never more axes than scans, a closed form for
every ridge penalty, and a scale per axis that lets logistic regression converge in a few steps. The predictions are
those of the unrotated model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize

#: Penalties over the number of features. For standardised features that share the explained variance R2 evenly the
#: best is (1 - R2) / R2, at any number of scans (Hoerl, Kennard & Baldwin 1975), so these reach from R2 near 1 to none.
PENALTIES = np.logspace(5, -5, 21)

_FLAT = 1e-3  # nats over all scans: less is no rise, for the strongest penalties all give nearly the frequencies
_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: below it an axis is rounding


@dataclass(frozen=True)
class Rotation:
    """Standardised training features on their principal axes.

    Attributes
    ----------
    mean, scale
        (feature,) of the training scans; `scale` is infinite for a constant feature, which makes it 0.
    axes
        (feature, axis), orthonormal columns.
    scores
        (training scan, axis), centred and uncorrelated.
    eigenvalues
        (axis,) sums of squares of the columns of `scores`.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    scores: np.ndarray
    eigenvalues: np.ndarray

    @property
    def penalties(self) -> np.ndarray:
        """`PENALTIES` times the number of features that vary, from the strongest to the weakest."""
        return PENALTIES * max(1, int(np.isfinite(self.scale).sum()))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Standardise and rotate other scans: (scan, feature) to (scan, axis)."""
        return ((features - self.mean) / self.scale) @ self.axes


def rotate(features: np.ndarray) -> Rotation:
    """Standardise features and rotate them to their principal axes.

    Parameters
    ----------
    features
        float64, (training scan, feature).
    """
    mean = features.mean(axis=0)
    varies = np.ptp(features, axis=0) > 0
    scale = np.where(varies, features.std(axis=0), np.inf)
    standard = (features - mean) / scale
    wide = standard.shape[1] > standard.shape[0]
    gram = standard @ standard.T if wide else standard.T @ standard  # the smaller one has the same eigenvalues
    if not varies.any():
        none = np.zeros((len(features), 0))
        return Rotation(mean, scale, np.zeros((features.shape[1], 0)), none, np.zeros(0))
    eigenvalues, vectors = linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if wide:
        roots = np.sqrt(eigenvalues)
        return Rotation(mean, scale, standard.T @ (vectors / roots), vectors * roots, eigenvalues)
    return Rotation(mean, scale, vectors, standard @ vectors, eigenvalues)


def leave_person_out_errors(
    rotation: Rotation, target: np.ndarray, people: np.ndarray, penalties: np.ndarray
) -> np.ndarray:
    """Mean squared error of ridge regression for each person when fitted to all others, for every penalty.

    In closed form: with the hat matrix H of the fit to everyone, the errors of the scans g of a person left out are
    (I - H_gg)^-1 times their residuals (Allen 1974 for single rows; blocks in Hastie, Tibshirani & Friedman 2009,
    section 7.10). Leaving out scans one by one instead would let a person's other scans choose the penalty.
    Means and scales stay those of all training scans.

    Parameters
    ----------
    target
        float64, (training scan,).
    people
        int, (training scan,).
    penalties
        (penalty,), all > 0.

    Returns
    -------
    numpy.ndarray
        float64, (penalty,).
    """
    scores, n = rotation.scores, len(target)
    shrink = 1 / (rotation.eigenvalues[:, None] + penalties)  # (axis, penalty)
    fitted = target.mean() + scores @ (shrink * (scores.T @ target)[:, None])
    residuals = target[:, None] - fitted  # (scan, penalty)
    _, number, counts = np.unique(people, return_inverse=True, return_counts=True)
    errors = np.empty_like(residuals)
    single = counts[number] == 1
    errors[single] = residuals[single] / (1 - 1 / n - scores[single] ** 2 @ shrink)
    for person in np.flatnonzero(counts > 1):
        rows = np.flatnonzero(number == person)
        block = (scores[rows] * shrink.T[:, None, :]) @ scores[rows].T + 1 / n  # (penalty, row, row)
        solved = np.linalg.solve(np.eye(len(rows)) - block, residuals[rows].T[:, :, None])
        errors[rows] = solved[:, :, 0].T
    return np.mean(errors**2, axis=0)


def ridge(
    train: np.ndarray, target: np.ndarray, people: np.ndarray, test: np.ndarray, *, penalty: float | None = None
) -> tuple[np.ndarray, float]:
    """Fit ridge regression and predict.

    Parameters
    ----------
    train, test
        float64, (scan, feature).
    target
        float64, (training scan,).
    people
        int, (training scan,).
    penalty
        None chooses among `Rotation.penalties` by `leave_person_out_errors`.

    Returns
    -------
    predicted : numpy.ndarray
        float64, (test scan,).
    penalty : float
        On the sum of squares.
    """
    rotation = rotate(train)
    if penalty is None:
        errors = leave_person_out_errors(rotation, target, people, rotation.penalties)
        penalty = float(rotation.penalties[np.argmin(errors)])
    weights = rotation.scores.T @ target / (rotation.eigenvalues + penalty)
    return target.mean() + rotation.apply(test) @ weights, penalty


def logistic(
    train: np.ndarray, codes: np.ndarray, inner_folds: np.ndarray, test: np.ndarray, *, penalty: float | None = None
) -> tuple[np.ndarray, float]:
    """Fit multinomial logistic regression and predict.

    Parameters
    ----------
    train, test
        float64, (scan, feature).
    codes
        int, (training scan,) 0 ... classes-1; every class occurs.
    inner_folds
        int, (training scan,) folds for choosing the penalty, each of which leaves every class to the others.
    penalty
        None chooses among `Rotation.penalties` by the log-loss over the inner folds. Log-loss rather than AUC: AUC
        does not change when all weights shrink together, so on weak effects it picks penalties at random and leaves
        probabilities overconfident; log-loss is a proper score, and every scan counts in it. From the strongest
        penalty down, the search ends when the loss has risen twice.

    Returns
    -------
    probabilities : numpy.ndarray
        float64, (test scan, class).
    penalty : float
        On half the squared weights, against the summed log-loss: 1 / C of scikit-learn's multinomial model. Two
        classes have two weight vectors here, so their penalty is twice that of a model with one.
    """
    rotation = rotate(train)
    design = _with_constant(rotation.scores)
    if penalty is None:
        penalty = _penalty_by_log_loss(design, codes, inner_folds, rotation.penalties)
    weights = fit_softmax(design, codes, penalty, tolerance=1e-6)
    return np.exp(_log_softmax(_with_constant(rotation.apply(test)) @ weights)), penalty


def fit_softmax(
    design: np.ndarray, codes: np.ndarray, penalty: float, start: np.ndarray | None = None, *, tolerance: float = 1e-3
) -> np.ndarray:
    """Minimise the summed log-loss plus penalty / 2 times the squared weights, the intercepts (last column) left free.

    L-BFGS (Byrd, Lu, Nocedal & Zhu 1995) in coordinates scaled by the curvature that each weight has at the classes'
    frequencies, where a step of 1 is about one standard error of the weight.

    Parameters
    ----------
    design
        float64, (scan, column), the last column constant.
    codes
        int, (scan,) 0 ... classes-1; every class occurs.
    start
        Weights to start from.
    tolerance
        Largest slope left, in the scaled coordinates. A thousandth of a standard error will do to compare penalties.

    Returns
    -------
    numpy.ndarray
        float64, (column, class).
    """
    frequencies = np.bincount(codes) / len(codes)
    indicator = np.eye(len(frequencies))[codes]
    ridges = np.full((design.shape[1], 1), penalty)
    ridges[-1] = 0
    curvature = np.sum(design**2, axis=0)[:, None] * (frequencies * (1 - frequencies)) + ridges
    scale = 1 / np.sqrt(curvature)
    if start is None:
        start = np.zeros_like(scale)
        start[-1] = np.log(frequencies)

    def loss(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        weights = scaled.reshape(scale.shape) * scale
        logs = _log_softmax(design @ weights)
        value = 0.5 * np.sum(ridges * weights**2) - np.sum(logs * indicator)
        slope = design.T @ (np.exp(logs) - indicator) + ridges * weights
        return float(value), (slope * scale).ravel()

    found = optimize.minimize(
        loss,
        (start / scale).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": tolerance, "ftol": 1e-15, "maxiter": 1000},  # the slope alone decides
    )
    return found.x.reshape(scale.shape) * scale


def _penalty_by_log_loss(
    design: np.ndarray, codes: np.ndarray, inner_folds: np.ndarray, penalties: np.ndarray
) -> float:
    """Return the penalty with the least log-loss over the inner folds; `penalties` fall from strong to weak."""
    folds = [inner_folds == fold for fold in np.unique(inner_folds)]
    parts = [(design[~test], codes[~test], design[test], codes[test]) for test in folds]
    weights: list[np.ndarray | None] = [None] * len(parts)
    best, best_loss, risen = penalties[0], np.inf, 0
    for penalty in penalties:
        loss = 0.0
        for i, (train, train_codes, test, test_codes) in enumerate(parts):
            weights[i] = fitted = fit_softmax(train, train_codes, float(penalty), weights[i])
            loss -= float(_log_softmax(test @ fitted)[np.arange(len(test_codes)), test_codes].sum())
        if loss < best_loss:
            best, best_loss = penalty, loss
        risen = risen + 1 if loss > best_loss + _FLAT else 0
        if risen == 2:
            break
    return float(best)


def _with_constant(scores: np.ndarray) -> np.ndarray:
    return np.column_stack([scores, np.ones(len(scores))])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of class probabilities, (scan, class); scipy's takes five times as long on few scans."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
