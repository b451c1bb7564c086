"""Cross-validation folds that split people, never their scans, and keep classes and values spread evenly."""

from __future__ import annotations

import numpy as np


def class_strata(codes: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Return for each person the rarest class among their scans.

    With strata made like this, `deal_folds` puts a scan of every class into every fold as long as every stratum has
    at least as many people as there are folds, even where people change class between scans.

    Parameters
    ----------
    codes
        int, (scan,) 0 ... classes-1.
    people
        int, (scan,) 0 ... people-1, each of which occurs.

    Returns
    -------
    numpy.ndarray
        int64, (person,).
    """
    rarity = np.argsort(np.argsort(np.bincount(codes), kind="stable"), kind="stable")  # 0 = rarest
    rarest = np.full(people.max() + 1, len(rarity))
    np.minimum.at(rarest, people, rarity[codes])
    return np.argsort(rarity)[rarest]


def value_strata(values: np.ndarray, people: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return for each person the quantile bin of the mean over their scans.

    Parameters
    ----------
    values
        (scan,).
    people
        int, (scan,) 0 ... people-1, each of which occurs.
    bins
        Bins of equally many people.

    Returns
    -------
    numpy.ndarray
        int64, (person,).
    """
    means = np.bincount(people, weights=values) / np.bincount(people)
    ranks = np.argsort(np.argsort(means, kind="stable"), kind="stable")
    return ranks * bins // len(ranks)


def deal_folds(people: np.ndarray, strata: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Assign each scan to the fold in which it is tested; a person's scans share one fold.

    People are put in order of stratum and number of scans, at random among equals, and dealt out like cards. Within a
    stratum the folds differ by one person at most, and a stratum of at least `folds` people reaches every fold. That
    is guaranteed, where the greedy search of scikit-learn's ``StratifiedGroupKFold`` can leave a fold without a rare
    class, and takes one sort, where that search takes a loop over people and folds.

    Parameters
    ----------
    people
        int, (scan,) 0 ... people-1, each of which occurs.
    strata
        int, (person,).
    folds
        Number of folds.
    rng
        Source of the shuffle.

    Returns
    -------
    numpy.ndarray
        int64, (scan,) 0 ... folds-1.
    """
    scans = np.bincount(people, minlength=len(strata))
    order = np.lexsort((rng.random(len(strata)), scans, strata))
    fold_of_person = np.empty(len(strata), dtype=np.int64)
    fold_of_person[order] = np.arange(len(strata)) % folds
    return fold_of_person[people]
