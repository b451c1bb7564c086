"""Ridge regression, with a penalty per target that is chosen without splitting groups of scans.

Ridge and logistic regression (`probing.logistic`) penalise the squared length of the weights, which a rotation of the
features leaves as it is. So the standardised training features are rotated to their principal axes once per fold: never
more axes than scans, and a closed form for every penalty and every target. The predictions are those of the unrotated
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

#: Penalties over the number of features. For standardised features that share the explained variance R2 evenly the
#: best is (1 - R2) / R2, at any number of scans (Hoerl, Kennard & Baldwin 1975), so these reach from R2 near 1 to none.
PENALTIES = np.logspace(5, -5, 21)

#: Scans at most, in whole groups, that are left out in turn to choose a penalty; the model that they are left out of is
#: fitted to all scans.
PENALTY_SCANS = 3000

_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: below it an axis is rounding
_CHUNK_ROWS = 1024  # of which the squares stay in a cache
_FEWEST_GROUPS = 20  # to leave out, where groups are large


@dataclass(frozen=True)
class Fit:
    """A linear model of raw features.

    Attributes
    ----------
    coefficients
        float64, (feature, output).
    intercept
        float64, (output,).
    penalties
        float64, (output,).
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    penalties: np.ndarray

    def decide(self, features: np.ndarray) -> np.ndarray:
        """Return what the model says before any link function: (scan, feature) to (scan, output)."""
        return features @ self.coefficients + self.intercept


@dataclass(frozen=True)
class Rotation:
    """The principal axes of standardised training features.

    Attributes
    ----------
    mean, scale
        (feature,) of the training scans; `scale` is infinite for a constant feature, which makes it 0.
    axes
        (feature, axis), orthonormal columns.
    eigenvalues
        (axis,) sums of squares of the training scans on the axes, on which they are uncorrelated.
    scans
        Number of training scans.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    eigenvalues: np.ndarray
    scans: int

    @property
    def penalties(self) -> np.ndarray:
        """`PENALTIES` times the number of features that vary, from the strongest to the weakest."""
        return PENALTIES * max(1, int(np.isfinite(self.scale).sum()))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Standardise and rotate scans: (scan, feature) to (scan, axis)."""
        standard = features - self.mean
        standard /= self.scale
        return standard @ self.axes

    def covariance(self, features: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return sums of products of the training scans on the axes and targets (scan, target): (axis, target)."""
        products = features.T @ (targets - targets.mean(axis=0))
        return self.axes.T @ (products / self.scale[:, None])

    def unrotate(self, weights: np.ndarray, intercept: np.ndarray, penalties: np.ndarray) -> Fit:
        """Return the model of raw features whose weights on the axes, (axis, output), are given."""
        coefficients = (self.axes @ weights) / self.scale[:, None]
        return Fit(coefficients, intercept - self.mean @ coefficients, penalties)


def rotate(features: np.ndarray) -> Rotation:
    """Standardise features and find their principal axes.

    Parameters
    ----------
    features
        float64, (training scan, feature).
    """
    mean = features.mean(axis=0)
    varies = np.ptp(features, axis=0) > 0
    standard = features - mean
    spread = np.sqrt(np.einsum("ij,ij->j", standard, standard) / len(features))
    scale = np.where(varies, spread, np.inf)
    standard /= scale
    if not varies.any():
        return Rotation(mean, scale, np.zeros((features.shape[1], 0)), np.zeros(0), len(features))
    wide = standard.shape[1] > standard.shape[0]
    gram = standard @ standard.T if wide else standard.T @ standard  # the smaller one has the same eigenvalues
    eigenvalues, vectors = linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    axes = standard.T @ (vectors / np.sqrt(eigenvalues)) if wide else vectors
    return Rotation(mean, scale, axes, eigenvalues, len(features))


def leave_group_out_errors(
    rotation: Rotation,
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    penalties: np.ndarray,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Mean squared error of ridge regression for each group when fitted to all others, for every penalty and target.

    In closed form: with the hat matrix H of the fit to everyone, the errors of the scans g of a group left out are
    (I - H_gg)^-1 times their residuals (Allen 1974 for single rows; blocks in Hastie, Tibshirani & Friedman 2009,
    section 7.10). A group of more scans than there are axes is taken out of the normal equations instead. Leaving out
    scans one by one would let a person's other scans choose the penalty. Means and scales stay those of all training
    scans.

    Parameters
    ----------
    rotation
        Of the features.
    features
        float64, (training scan, feature).
    targets
        float64, (training scan, target).
    groups
        int, (training scan,); two or more different ones.
    penalties
        (penalty,), all > 0.
    rows
        Of the groups that are left out, whole ones; None for all.

    Returns
    -------
    numpy.ndarray
        float64, (penalty, target).
    """
    n = len(features)
    rows = np.arange(n) if rows is None else rows
    scores = rotation.apply(features[rows])
    centred = targets[rows] - targets.mean(axis=0)
    covariance = rotation.covariance(features, targets)
    axes, count = covariance.shape
    shrink = 1 / (rotation.eigenvalues[:, None] + penalties)  # (axis, penalty)
    weights = (shrink[:, :, None] * covariance[:, None, :]).reshape(axes, len(penalties) * count)
    _, number, counts = np.unique(groups[rows], return_inverse=True, return_counts=True)
    size = counts[number]
    total = np.zeros((len(penalties), count))

    single = np.flatnonzero(size == 1)
    for start in range(0, len(single), _CHUNK_ROWS):
        chosen = single[start : start + _CHUNK_ROWS]
        part = scores[chosen]
        residuals = _residuals(part, weights, centred[chosen])
        residuals /= (1 - 1 / n - part**2 @ shrink)[:, :, None]
        total += np.einsum("ipt,ipt->pt", residuals, residuals)
    order = np.argsort(number, kind="stable")
    for scans in np.unique(counts[counts > 1]):
        members = order[size[order] == scans].reshape(-1, scans)  # (group, scan)
        if scans > axes:
            for chosen in members:
                left_out = _refit_without(rotation, scores[chosen], centred[chosen], covariance, penalties)
                total += np.sum(left_out**2, axis=1)
            continue
        step = max(1, _CHUNK_ROWS // int(scans))
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            part = scores[chosen]  # (group, scan, axis)
            residuals = _residuals(part.reshape(-1, axes), weights, centred[chosen.ravel()])
            residuals = residuals.reshape(*chosen.shape, len(penalties), count)
            for p in range(len(penalties)):
                block = np.eye(scans) - 1 / n - (part * shrink[:, p]) @ part.transpose(0, 2, 1)
                left_out = np.linalg.solve(block, residuals[:, :, p])
                total[p] += np.einsum("gst,gst->t", left_out, left_out)
    return total / len(rows)


def _residuals(scores: np.ndarray, weights: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Return (scan, penalty, target) residuals of targets from which the mean was taken."""
    return centred[:, None, :] - (scores @ weights).reshape(len(scores), -1, centred.shape[1])


def _refit_without(
    rotation: Rotation, scores: np.ndarray, centred: np.ndarray, covariance: np.ndarray, penalties: np.ndarray
) -> np.ndarray:
    """Return errors (penalty, scan, target) of one group's scans, by normal equations from which it is taken out."""
    out = np.column_stack([scores, np.ones(len(scores))])
    moments = np.vstack([covariance, np.zeros(centred.shape[1])]) - out.T @ centred
    gram = np.diag(np.append(rotation.eigenvalues, rotation.scans)) - out.T @ out
    ridges = np.diag(np.append(np.ones(len(gram) - 1), 0))  # none for the intercept
    fits = [linalg.solve(gram + penalty * ridges, moments, assume_a="sym") for penalty in penalties]
    return centred - out @ np.stack(fits)


def ridge(
    train: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    *,
    unexplained: np.ndarray | None = None,
    penalty: float | None = None,
) -> Fit:
    """Fit ridge regressions of any number of targets with one factorisation.

    Parameters
    ----------
    train
        float64, (training scan, feature).
    targets
        float64, (training scan, target).
    groups
        int, (training scan,).
    unexplained
        Of features that are what confounds leave of them, what these leave of the targets, (training scan, target). The
        model is the same, but the penalty is chosen by it: without a scan the others' features do know of the
        confounds, and would tell its target with the wrong sign.
    penalty
        None chooses for each target among `Rotation.penalties` by `leave_group_out_errors`, of `PENALTY_SCANS` scans at
        most.
    """
    rotation = rotate(train)
    if penalty is None:
        penalties = ridge_penalties(rotation, train, targets if unexplained is None else unexplained, groups)
    else:
        penalties = np.full(targets.shape[1], float(penalty))
    weights = rotation.covariance(train, targets) / (rotation.eigenvalues[:, None] + penalties)
    return rotation.unrotate(weights, targets.mean(axis=0), penalties)


def ridge_penalties(rotation: Rotation, train: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the best penalty for each target, see `ridge`."""
    errors = leave_group_out_errors(rotation, train, targets, groups, rotation.penalties, _penalty_rows(groups))
    best: np.ndarray = rotation.penalties[np.argmin(errors, axis=0)]
    return best


def _penalty_rows(groups: np.ndarray) -> np.ndarray | None:
    """Return rows of groups chosen at random, with about `PENALTY_SCANS` scans; None for all."""
    if len(groups) <= PENALTY_SCANS:
        return None
    names, number = np.unique(groups, return_inverse=True)
    many = max(len(names) * PENALTY_SCANS // len(groups), min(len(names), _FEWEST_GROUPS))
    chosen = np.random.default_rng(len(groups)).permutation(len(names)) < many
    return np.flatnonzero(chosen[number])
