"""Bootstrap of the people tested: scores of many draws with replacement at once, as scores with weights.

A draw takes each unit (a person, or a family) some number of times, and that number weights all of its scans, in every
fold and every repeat alike: repeats test the same people and must not count as more of them. Models are not trained
anew, so the intervals tell how scores vary with who is tested, and say nothing of who is trained on.
"""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.95
_MOST_AT_ONCE = 4_000_000  # weights, which keeps temporary arrays small


def draw_weights(units: int, draws: int, seed: int) -> np.ndarray:
    """Return how often each unit is drawn, uint8 (draw, unit); a draw takes as many units as there are."""
    rng = np.random.default_rng([seed, units, draws])
    drawn = np.empty((draws, units), dtype=np.uint8)
    for row in drawn:
        row[:] = np.minimum(np.bincount(rng.integers(0, units, units), minlength=units), 255)
    return drawn


def weighted_auc(codes: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`probing.scores.auc` of each draw, (draw,); NaN where a class was not drawn.

    Parameters
    ----------
    codes
        int, (scan,) 0 ... classes-1.
    probabilities
        (scan, class).
    weights
        (draw, scan).
    """
    classes = probabilities.shape[1]
    shown = [1] if classes == 2 else range(classes)
    return np.mean([_weighted_rank_auc(codes == k, probabilities[:, k], weights) for k in shown], axis=0)


def _weighted_rank_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(score[order]) > 0))  # of equal scores
    parts = np.array_split(weights, max(1, weights.size // _MOST_AT_ONCE))
    return np.concatenate([_area(part[:, order], positive[order], starts) for part in parts])


def _area(ordered: np.ndarray, positive: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the area of each draw; scans are in the order of their scores, of which equal ones begin at `starts`."""
    ups = np.add.reduceat(ordered * positive, starts, axis=1, dtype=np.float64)
    downs = np.add.reduceat(ordered * ~positive, starts, axis=1, dtype=np.float64)
    above = np.sum(ups * (np.cumsum(downs, axis=1) - downs / 2), axis=1)
    with np.errstate(invalid="ignore"):
        return above / (ups.sum(axis=1) * downs.sum(axis=1))


def weighted_balanced_accuracy(
    codes: np.ndarray, probabilities: np.ndarray, frequencies: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """`probing.scores.balanced_accuracy` of each draw, (draw,); NaN where a class was not drawn."""
    right = np.argmax(probabilities / frequencies, axis=1) == codes
    of_class = np.eye(len(frequencies))[codes]  # (scan, class)
    with np.errstate(invalid="ignore"):
        return np.mean((weights @ (of_class * right[:, None])) / (weights @ of_class), axis=1)


def weighted_pearson(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`probing.scores.pearson` of each draw, (draw,)."""
    total = weights.sum(axis=1)
    a, b = truth - truth.mean(), predicted - predicted.mean()
    with np.errstate(invalid="ignore"):
        mean_a, mean_b = weights @ a / total, weights @ b / total
        covariance = weights @ (a * b) / total - mean_a * mean_b
        spread = np.sqrt(
            np.maximum(weights @ a**2 / total - mean_a**2, 0) * np.maximum(weights @ b**2 / total - mean_b**2, 0)
        )
        r = np.where(spread > 1e-12 * a.std() * b.std(), covariance / np.where(spread > 0, spread, 1), 0.0)
    return np.where(total > 0, np.clip(r, -1, 1), np.nan)


def weighted_r_squared(
    truth: np.ndarray, predicted: np.ndarray, training_mean: float, weights: np.ndarray
) -> np.ndarray:
    """`probing.scores.r_squared` of each draw, (draw,)."""
    baseline = weights @ (truth - training_mean) ** 2
    error = weights @ (truth - predicted) ** 2
    r2 = np.where(baseline > 0, 1 - error / np.where(baseline > 0, baseline, 1), 0.0)
    return np.where(weights.sum(axis=1) > 0, r2, np.nan)


def weighted_mean_absolute_error(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`probing.scores.mean_absolute_error` of each draw, (draw,)."""
    with np.errstate(invalid="ignore"):
        return weights @ np.abs(truth - predicted) / weights.sum(axis=1)


def percentile_interval(scores: np.ndarray) -> tuple[float, float] | None:
    """Return the ends of the middle 95 % of scores of draws, each the mean over folds.

    Parameters
    ----------
    scores
        (fold, draw); NaN where a fold's score is not defined in a draw, which then counts in the other folds alone.
    """
    defined = ~np.isnan(scores)
    count = defined.sum(axis=0)
    means = np.where(defined, scores, 0).sum(axis=0)[count > 0] / count[count > 0]
    if not len(means):
        return None
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
