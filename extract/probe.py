"""Linear probes: what frozen embeddings know of each phenotype, by cross-validation that never splits a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from extract.embeddings import Embeddings
from extract.folds import class_strata, deal_folds, value_strata
from extract.linear import logistic, ridge
from extract.results import Interval, OutOfFold, TargetResult
from extract.scores import RANGES, auc, balanced_accuracy, corrected_interval, mean_absolute_error, pearson, r_squared
from ingest.dictionary import BY_NAME, TASKS, VARIABLES

#: Fewer people than this who have a value: too few to say anything.
MIN_PARTICIPANTS = 20
#: People of the smallest class in each test fold, at least; a target with fewer gets fewer folds, down to two.
MIN_CLASS_PER_FOLD = 2
#: People in each test fold of a regression, at least: a correlation of fewer is noise.
MIN_PER_FOLD = 4

_CLASSES = ("binary", "multiclass")
_INNER_FOLDS = 5
_MAX_INFERRED_CODES = 10


def probe(
    embeddings: Embeddings,
    targets: Sequence[str] | None = None,
    *,
    tasks: Mapping[str, str] | None = None,
    folds: int = 5,
    repeats: int = 5,
    seed: int = 0,
    on_target: Callable[[TargetResult], None] | None = None,
) -> list[TargetResult]:
    """Fit linear probes to embeddings and score them on people whom they have not seen.

    Each repeat deals the people with a value into folds (`extract.folds`). On each training side features are
    standardised and a ridge (``continuous``, ``ordinal`` on its codes, ``count`` on log(1 + count)) or logistic
    regression (``binary``, ``multiclass``) is fitted, its penalty chosen on that side alone without splitting people
    (`extract.linear`). A score is the mean over folds and repeats, never of pooled predictions, which are biased
    under the null; its interval is a t interval corrected for their dependence (`extract.scores.corrected_interval`).

    ============================ ===================================================================== =================
    metric                       meaning                                                               chance
    ============================ ===================================================================== =================
    ``auc``                      area under the ROC curve; mean of one-against-rest for more classes   0.5
    ``balanced_accuracy``        mean recall, at probabilities over training frequencies (equal priors) 1 / classes
    ``r``                        Pearson's correlation; of a count: on log(1 + count)                  0
    ``r2``                       against the mean of the training scans; of a count: on log(1 + count) 0
    ``mae``                      in the variable's own units, of a count too                           training median's
    ============================ ===================================================================== =================

    Parameters
    ----------
    embeddings
        See `extract.embeddings.Embeddings`; missing phenotypes (NaN) are left out target by target.
    targets
        Names of phenotypes, or their aliases (``gender``); None takes all that are not confounds.
    tasks
        Name -> one of `ingest.dictionary.TASKS`, where `infer_task` would choose another.
    folds, repeats
        Of the outer cross-validation. Targets with few people get fewer folds; ``method`` says how many.
    seed
        Of the folds, 0 or more. Same seed, same scores, whatever other targets are asked for.
    on_target
        Called with each result as it is ready.

    Returns
    -------
    list of TargetResult
        In the order of the targets; what cannot be probed has the status ``skipped`` and a reason.

    Raises
    ------
    ValueError
        If a target or task is unknown, a feature is not finite, or an argument is out of range.
    """
    if folds < 2 or repeats < 1 or seed < 0:
        raise ValueError(
            f"folds={folds}, repeats={repeats}, seed={seed}: expected 2 or more folds, 1 or more repeats and a seed "
            "of 0 or more"
        )
    names = target_names(embeddings, targets)
    kinds = _tasks_by_column(embeddings, names, tasks or {})
    _check(embeddings)
    features = embeddings.features.astype(np.float64)
    results = []
    # These matrices are too small for BLAS threads, which cost more than they give, and one thread adds up in one order
    with threadpool_limits(1, user_api="blas"):
        for name in names:
            result = _probe_target(embeddings, features, name, kinds[name], folds, repeats, seed)
            results.append(result)
            if on_target:
                on_target(result)
    return results


def target_names(embeddings: Embeddings, targets: Sequence[str] | None = None) -> list[str]:
    """Return the columns of the targets: those named, or all that are no confounds, the study's variables first.

    Raises
    ------
    ValueError
        If one is not there, is named twice, or there is none at all.
    """
    columns = [str(name) for name in embeddings.phenotypes.columns]
    if targets is None:
        order = {variable.name: place for place, variable in enumerate(VARIABLES)}
        known = {column: BY_NAME[column.lower()].name for column in columns if column.lower() in BY_NAME}
        columns.sort(key=lambda column: order.get(known.get(column, ""), len(order)))
        names = [c for c in columns if not embeddings.variables.get(c, {}).get("confound")]
        if not names:
            raise ValueError(
                "the embeddings have no phenotype to probe; ingest the scans with --phenotypes FILE and extract again"
                + (f", or name a confound: {', '.join(columns)}" if columns else "")
            )
        return names
    names = [_column(embeddings, target) for target in targets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"targets {list(targets)!r}: expected one or more, each once")
    return names


def infer_task(values: np.ndarray, labels: object = None) -> str:
    """Guess the task of a variable of which nothing is said.

    Two different values are ``binary``. Up to ten different whole numbers are ``multiclass`` if the variable has
    labels, else ``count`` if none is negative. All else is ``continuous``.

    Parameters
    ----------
    values
        float64, without NaN.
    labels
        Of the codes; None or empty if there are none.
    """
    distinct = np.unique(values)
    if len(distinct) == 2:
        return "binary"
    if 2 < len(distinct) <= _MAX_INFERRED_CODES and np.all(distinct == np.round(distinct)):
        if labels:
            return "multiclass"
        if distinct[0] >= 0:
            return "count"
    return "continuous"


def _column(embeddings: Embeddings, name: str) -> str:
    """Return the column that `name` or a variable's other name stands for."""
    columns = [str(column) for column in embeddings.phenotypes.columns]
    if name in columns:
        return name
    variable = BY_NAME.get(name.lower())
    same = [c for c in columns if variable is not None and BY_NAME.get(c.lower()) is variable]
    if len(same) != 1:
        raise ValueError(f"no phenotype {name!r} in the embeddings; there are: {', '.join(columns) or 'none'}")
    return same[0]


def _tasks_by_column(embeddings: Embeddings, names: list[str], tasks: Mapping[str, str]) -> dict[str, str]:
    """Return the task of each target: as asked, else that of the variable, else inferred."""
    asked = {_column(embeddings, name): task for name, task in tasks.items()}
    for column in asked:
        if column not in names:
            raise ValueError(f"a task is given for {column!r}, which is not among the targets: {', '.join(names)}")
    found = {}
    for name in names:
        attrs = embeddings.variables.get(name, {})
        values = embeddings.phenotypes[name].to_numpy(np.float64)
        task = asked.get(name) or attrs.get("task") or infer_task(values[~np.isnan(values)], attrs.get("labels"))
        if task not in TASKS:
            raise ValueError(f"task {task!r} of {name!r} is unknown; expected one of {', '.join(TASKS)}")
        found[name] = task
    return found


def _check(embeddings: Embeddings) -> None:
    rows = {len(embeddings.features), len(embeddings.scans), len(embeddings.phenotypes)}
    if len(rows) != 1 or "participant" not in embeddings.scans:
        raise ValueError(
            f"embeddings of {len(embeddings.features)} scans with tables of {len(embeddings.scans)} scans and "
            f"{len(embeddings.phenotypes)} phenotypes; expected equally many, and a column 'participant' of the scans"
        )
    strange = np.flatnonzero(~np.isfinite(embeddings.features).all(axis=1))
    if len(strange):
        raise ValueError(
            f"row {strange[0]} of the embeddings (participant {embeddings.scans['participant'].iloc[strange[0]]}) has "
            f"NaN or infinite features, as have {len(strange) - 1} more rows; extract them again"
        )


@dataclass(frozen=True)
class _Data:
    """What one target's models see: the scans that have a value."""

    features: np.ndarray
    people: np.ndarray  # int, (scan,) 0 ... people-1
    truth: np.ndarray  # (scan,) class codes, or values
    strata: np.ndarray  # (person,)
    classes: int  # 0 for a regression


def _probe_target(
    embeddings: Embeddings, features: np.ndarray, name: str, task: str, folds: int, repeats: int, seed: int
) -> TargetResult:
    attrs = embeddings.variables.get(name, {})
    column = embeddings.phenotypes[name].to_numpy(np.float64)
    present = ~np.isnan(column)
    values = column[present]
    people = np.unique(embeddings.scans["participant"].to_numpy()[present].astype(str), return_inverse=True)[1]
    participants = int(people.max(initial=-1)) + 1
    skipped = TargetResult(name, task, "skipped", len(values), participants, units=attrs.get("units"))

    reason = _unfit(values, task, participants)
    if reason:
        return replace(skipped, reason=reason)
    labels: list[str] = []
    if task in _CLASSES:
        codes, truth = np.unique(values, return_inverse=True)
        known = attrs.get("labels") or {}
        labels = [str(known.get(f"{code:g}", f"{code:g}")) for code in codes]
        strata = class_strata(truth, people)
        smallest = np.bincount(strata, minlength=len(codes))
        folds = min(folds, int(smallest.min()) // MIN_CLASS_PER_FOLD)
        if folds < 2:
            return replace(
                skipped,
                reason=f"class {labels[int(smallest.argmin())]!r} has {smallest.min()} participants, at least "
                f"{2 * MIN_CLASS_PER_FOLD} are needed",
            )
    else:
        truth, strata = values, value_strata(values, people)
        folds = min(folds, participants // MIN_PER_FOLD)
    data = _Data(features[present], people, truth, strata, len(labels))
    metrics, out_of_fold, penalty = _cross_validate(data, task == "count", folds, repeats, seed)
    if labels:
        model = f"logistic regression, L2 penalty {penalty:.2g} (median) by log-loss in inner folds of participants"
    else:
        outcome = "log(1 + count)" if task == "count" else "the value"
        model = f"ridge regression of {outcome}, penalty {penalty:.2g} (median) by leaving one participant out"
    return replace(
        skipped,
        status="ok",
        metric="auc" if labels else "r",
        metrics=metrics,
        labels=labels,
        method=f"{model}; {folds} folds of participants x {repeats} repeats",
        out_of_fold=out_of_fold,
    )


def _unfit(values: np.ndarray, task: str, participants: int) -> str:
    """Return why values cannot be probed, or nothing."""
    if not len(values):
        return "every value is missing"
    if not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} values are infinite"
    distinct = len(np.unique(values))
    if distinct == 1:
        return f"constant: every value is {values[0]:g}"
    if task == "binary" and distinct > 2:
        return f"{distinct} different values are not binary; name another task"
    if task == "count" and values.min() < 0:
        return f"the smallest value, {values.min():g}, is no count; name another task"
    if participants < MIN_PARTICIPANTS:
        return f"{participants} participants have a value, at least {MIN_PARTICIPANTS} are needed"
    return ""


def _cross_validate(
    data: _Data, count: bool, folds: int, repeats: int, seed: int
) -> tuple[dict[str, Interval], OutOfFold, float]:
    """Return the intervals of all metrics, the predictions of the first repeat, and the median penalty."""
    n = len(data.truth)
    scores: list[dict[str, float]] = []
    chances: list[dict[str, float]] = []
    penalties, ratios = [], []
    first = np.zeros((n, data.classes) if data.classes else n)
    first_folds = np.zeros(n, dtype=np.int64)
    for repeat in range(repeats):
        fold_of = deal_folds(data.people, data.strata, folds, np.random.default_rng([seed, repeat]))
        for fold in range(folds):
            test = fold_of == fold
            if data.classes:
                predicted, penalty, score, chance = _classify(data, test, [seed, repeat, fold])
            else:
                predicted, penalty, score, chance = _regress(data, test, count)
            scores.append(score)
            chances.append(chance)
            penalties.append(penalty)
            ratios.append(test.sum() / (~test).sum())
            if repeat == 0:
                first[test] = predicted
                first_folds[test] = fold
    metrics = {
        name: corrected_interval(
            [score[name] for score in scores],
            float(np.mean(ratios)),
            chance=float(np.mean([chance[name] for chance in chances])),
            bounds=RANGES[name],
            people=int(np.bincount(data.strata).min()) if data.classes else None,
        )
        for name in scores[0]
    }
    return metrics, OutOfFold(data.truth, first, first_folds), float(np.median(penalties))


def _classify(
    data: _Data, test: np.ndarray, seed: list[int]
) -> tuple[np.ndarray, float, dict[str, float], dict[str, float]]:
    """Return probabilities of the test scans, the penalty, the fold's scores and their chance."""
    train_codes, test_codes = data.truth[~test], data.truth[test]
    who, people = np.unique(data.people[~test], return_inverse=True)
    strata = data.strata[who]
    inner_folds = deal_folds(
        people, strata, min(_INNER_FOLDS, int(np.bincount(strata).min())), np.random.default_rng(seed)
    )
    probabilities, penalty = logistic(data.features[~test], train_codes, inner_folds, data.features[test])
    frequencies = np.bincount(train_codes, minlength=data.classes) / len(train_codes)
    score = {
        "auc": auc(test_codes, probabilities),
        "balanced_accuracy": balanced_accuracy(test_codes, probabilities, frequencies),
    }
    return probabilities, penalty, score, {"auc": 0.5, "balanced_accuracy": 1 / data.classes}


def _regress(
    data: _Data, test: np.ndarray, count: bool
) -> tuple[np.ndarray, float, dict[str, float], dict[str, float]]:
    """Return predictions of the test scans, the penalty, the fold's scores and their chance."""
    train_values, test_values = data.truth[~test], data.truth[test]
    train, truth = (np.log1p(train_values), np.log1p(test_values)) if count else (train_values, test_values)
    fitted, penalty = ridge(data.features[~test], train, data.people[~test], data.features[test])
    predicted = np.maximum(np.expm1(fitted), 0) if count else fitted
    score = {
        "r": pearson(truth, fitted),
        "r2": r_squared(truth, fitted, float(train.mean())),
        "mae": mean_absolute_error(test_values, predicted),
    }
    chance = {"r": 0.0, "r2": 0.0, "mae": mean_absolute_error(test_values, float(np.median(train_values)))}
    return predicted, penalty, score, chance
