"""Cross-validation folds that split people (or groups of them), never their scans, and spread classes and values."""

from __future__ import annotations

import numpy as np
from scipy import linalg, stats

#: Loadings are equally large from this share of the largest on: of two variables both are, but for rounding.
_AS_LARGE = 1 - 1e-6


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


def class_sizes(units: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return of each class how many people (or groups of them) have a scan of it, int64 (class,).

    Parameters
    ----------
    units
        int, (scan,).
    codes
        int, (scan,) 0 ... classes-1.
    """
    return np.bincount(np.unique(np.stack([units, codes]), axis=1)[1])


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


def rank_summary(values: np.ndarray) -> np.ndarray:
    """Return one number per scan that goes along with many variables: the first principal component of their ranks.

    Its sign, which is arbitrary, is that of the variable that counts most (the first of several such).

    Parameters
    ----------
    values
        float64, (scan, variable); NaN where missing, which counts as the middle rank.

    Returns
    -------
    numpy.ndarray
        float64, (scan,); all 0 where nothing varies.
    """
    ranks = np.zeros_like(values)
    for column, measured in zip(ranks.T, values.T, strict=True):
        known = np.isfinite(measured)
        if known.any() and np.ptp(measured[known]) > 0:
            column[known] = stats.zscore(stats.rankdata(measured[known]))
    if not ranks.any():
        return np.zeros(len(values))
    scans, variables = ranks.shape
    # Of one decomposition, the largest vector alone, of the smaller of both matrices of products.
    gram = ranks.T @ ranks if variables <= scans else ranks @ ranks.T
    last = len(gram) - 1
    vector = linalg.eigh(gram, subset_by_index=(last, last))[1][:, 0]
    loadings = vector if variables <= scans else ranks.T @ vector
    size = np.abs(loadings)
    first = np.flatnonzero(size >= size.max() * _AS_LARGE)[0]
    return ranks @ loadings * np.sign(loadings[first])


def deal_folds(people: np.ndarray, strata: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Assign each scan to the fold in which it is tested; a person's scans share one fold.

    People (or groups of them) are put in order of stratum and number of scans, at random among equals, and dealt out
    like cards. Within a stratum the folds differ by one person at most, and a stratum of at least `folds` people
    reaches every fold. That is guaranteed, where the greedy search of scikit-learn's ``StratifiedGroupKFold`` can leave
    a fold without a rare class, and takes one sort, where that search takes a loop over people and folds.

    Groups of more than half a fold, such as sites, go before all others, the largest first and each into the emptiest
    fold, and the cards then begin with the emptiest: else a fold might hold no more than a person without a site.

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
    draw = rng.random(len(strata))
    large = (scans > len(people) / (2 * folds)) & (scans > 2)
    fold_of_person = np.empty(len(strata), dtype=np.int64)
    filled = np.zeros(folds, dtype=np.int64)
    largest_first = np.lexsort((draw, strata, -scans))
    for group in largest_first[large[largest_first]]:
        fold_of_person[group] = filled.argmin()
        filled[fold_of_person[group]] += scans[group]
    order = np.lexsort((draw, scans, strata))
    order = order[~large[order]]
    fold_of_person[order] = filled.argsort(kind="stable")[np.arange(len(order)) % folds]
    return fold_of_person[people]


def repeated_folds(groups: np.ndarray, strata: np.ndarray, folds: int, repeats: int, seed: list[int]) -> np.ndarray:
    """Deal folds anew for each repeat.

    Returns
    -------
    numpy.ndarray
        int64, (repeat, scan).
    """
    return np.stack(
        [deal_folds(groups, strata, folds, np.random.default_rng([*seed, repeat])) for repeat in range(repeats)]
    )


def folds_with_all_classes(
    groups: np.ndarray, people: np.ndarray, codes: np.ndarray, folds: int, repeats: int, seed: list[int], least: int
) -> np.ndarray | None:
    """Deal as many folds as leave people of every class to each of them.

    Parameters
    ----------
    groups
        int, (scan,) 0 ... groups-1, each of which occurs; never split.
    people
        int, (scan,).
    codes
        int, (scan,) 0 ... classes-1.
    folds
        At most.
    least
        People of each class in each test fold, and on each training side.

    Returns
    -------
    numpy.ndarray or None
        int64, (repeat, scan); None where not even two folds do.
    """
    strata = class_strata(codes, groups)
    _, first = np.unique(np.stack([people, codes]), axis=1, return_index=True)  # each person once per class
    for number in range(min(folds, len(strata)), 1, -1):
        dealt = repeated_folds(groups, strata, number, repeats, seed)
        if all(_sees_all(fold_of[first], codes[first], number, least) for fold_of in dealt):
            return dealt
    return None


def _sees_all(fold_of: np.ndarray, codes: np.ndarray, folds: int, least: int) -> bool:
    classes = int(codes.max()) + 1
    count = np.bincount(fold_of * classes + codes, minlength=folds * classes).reshape(folds, classes)
    return bool((count >= least).all())


def limit_people(
    people: np.ndarray, strata: np.ndarray, train: np.ndarray, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Keep some of the people to train on, of all strata alike; those kept of fewer are among those kept of more.

    Parameters
    ----------
    people
        int, (scan,) 0 ... people-1.
    strata
        int, (person,).
    train
        bool, (scan,).
    most
        People to keep; all are kept if there are no more.

    Returns
    -------
    numpy.ndarray
        bool, (scan,) those of `train` whose people are kept.
    """
    candidates = np.unique(people[train])
    order = np.lexsort((rng.random(len(candidates)), strata[candidates]))
    sizes = np.bincount(strata[candidates])
    starts = np.cumsum(sizes) - sizes
    mine = strata[candidates][order]
    within = np.arange(len(candidates)) - starts[mine]  # place in one's own stratum, at random
    turn = np.where(within < 2, -1.0, (within + 0.5) / sizes[mine])  # two of each stratum come first
    kept = candidates[order][np.lexsort((within, turn))][:most]
    chosen = np.zeros(len(strata), dtype=bool)
    chosen[kept] = True
    return train & chosen[people]
