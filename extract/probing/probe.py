"""Linear probes: what frozen embeddings know of each phenotype, by cross-validation that never splits a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.bootstrap import draw_weights
from extract.probing.combine import combine_folds
from extract.probing.confounds import ConfoundValues, check_seen, fit_coding, read_confounds
from extract.probing.cross_validation import (
    Fold,
    NoInnerFoldsError,
    Sample,
    classification,
    list_folds,
    regression,
    run_folds,
)
from extract.probing.folds import class_strata, folds_with_all_classes, rank_summary, repeated_folds, value_strata
from extract.probing.groups import Groups, read_groups
from extract.probing.method import describe_method
from extract.probing.permutation import permutation_test
from extract.probing.results import TargetResult
from extract.probing.settings import ProbeSettings
from extract.probing.targets import (
    CLASSIFICATIONS,
    MIN_CLASS_PER_FOLD,
    MIN_PER_FOLD,
    Target,
    known_task,
    read_targets,
    target_names,
)

#: Scans to train on for each column of confounds, at least: with fewer the features are fitted away.
MIN_PER_CONFOUND = 3


def probe(
    embeddings: Embeddings,
    targets: Sequence[str] | None = None,
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
    confounds: ConfoundValues | None = None,
    summary: np.ndarray | None = None,
    on_target: Callable[[TargetResult], None] | None = None,
) -> list[TargetResult]:
    """Fit linear probes to embeddings and score them on people whom they have not seen.

    Each repeat deals the people with a value into folds (`probing.folds`): of a classification by its classes, of all
    regressions by the first principal component of the ranks of all phenotypes that are regressions, so that targets
    with the same missing values share their folds and one factorisation of the features per fold. On each training side
    features are standardised and a ridge (``continuous``, ``ordinal`` on its codes, ``count`` on log(1 + count)) or
    logistic regression (``binary``, ``multiclass``) is fitted, its penalty chosen on that side alone without splitting
    people (`probing.linear`, `probing.logistic`). A score is the mean over folds and repeats, never of pooled
    predictions, which are biased under the null; its interval is a t interval corrected for their dependence
    (`probing.scores.corrected_interval`).

    ============================ ===================================================================== =================
    metric                       meaning                                                               chance
    ============================ ===================================================================== =================
    ``auc``                      area under the ROC curve; mean of one-against-rest for more classes   0.5
    ``balanced_accuracy``        mean recall, at probabilities over training frequencies (equal priors) 1 / classes
    ``r``                        Pearson's correlation; of a count: on log(1 + count)                  0
    ``r2``                       against the mean of the training scans; of a count: on log(1 + count) 0
    ``mae``                      in the variable's own units, of a count too                           training median's
    ============================ ===================================================================== =================

    Confounds are removed from the features, by least squares fitted to each training side alone (`probing.confounds`).
    The target stays as it is: scores are then of what the rest of the features tells of the phenotype itself, in its
    own units, and can be set beside those of the same model fitted to the confounds alone, on the same folds. What the
    confounds explain of the target is out of reach of that rest, so a correlation is held below sqrt(1 - R2 of the
    confounds). A target is never a confound of itself. Scans that lack a confound are left out: it would stay in their
    features, and what it tells of the target would pass for what they tell.

    Parameters
    ----------
    embeddings
        See `extract.embeddings.Embeddings`; scans without a value (NaN) are left out target by target.
    targets
        Names of phenotypes, or their aliases (``gender``); None takes all that are not confounds.
    tasks
        Name -> one of `ingest.dictionary.TASKS`, where `probing.targets.infer_task` would choose another; of a confound
        ``multiclass`` makes categories of numbers.
    settings
        Folds, repeats, seed, confounds, groups ...; the defaults of `ProbeSettings` if None. Targets with few people
        get fewer folds; ``method`` says how many. Same seed, same scores, whatever other targets are asked for.
    confounds
        Values of the confounds of `settings`; read from the embeddings if None.
    summary
        Of `summarise_regressions`; computed if None, and there is a regression.
    on_target
        Called with each result as it is ready, not in the order of the targets.

    Returns
    -------
    list of TargetResult
        In the order of the targets; what cannot be probed has the status ``skipped`` and a reason.

    Raises
    ------
    ValueError
        If a target, task, confound or group is unknown, a feature is not finite, or an argument is out of range.
    """
    settings = settings or ProbeSettings()
    names = target_names(embeddings, targets)
    check_embeddings(embeddings)
    groups = read_groups(embeddings, settings.groups, settings.kinship)
    confounds = confounds or read_confounds(embeddings, settings.confounds, tasks)
    if settings.groups is not None:
        check_seen(confounds, groups.together)
    found = read_targets(
        embeddings, names, tasks or {}, settings.bins, groups.people, confounds.names, confounds.complete
    )
    features = embeddings.features.astype(np.float64)
    if summary is None:
        regressions = any(not target.labels and not target.reason for target in found)
        summary = summarise_regressions(embeddings) if regressions else np.zeros(len(features))
    results: dict[str, TargetResult] = {}
    for batch in target_batches(found, confounds):
        for result in _probe_batch(batch, features, groups, confounds.without(batch[0].name), summary, settings):
            results[result.name] = result
            if on_target:
                on_target(result)
    return [results[name] for name in names]


def check_embeddings(embeddings: Embeddings) -> None:
    """Raise ValueError if tables and features do not fit each other, or hold what is no number."""
    rows = {len(embeddings.features), len(embeddings.scans), len(embeddings.phenotypes)}
    if len(rows) != 1 or "participant" not in embeddings.scans:
        raise ValueError(
            f"embeddings of {len(embeddings.features)} scans with tables of {len(embeddings.scans)} scans and "
            f"{len(embeddings.phenotypes)} phenotypes; expected equally many, and a column 'participant' of the scans"
        )
    for name, column in embeddings.phenotypes.items():
        as_numbers(column, str(name))  # all of them: regressions that nobody asked for stratify the folds, too
    strange = np.flatnonzero(~np.isfinite(embeddings.features).all(axis=1))
    if len(strange):
        raise ValueError(
            f"row {strange[0]} of the embeddings (participant {embeddings.scans['participant'].iloc[strange[0]]}) has "
            f"NaN or infinite features, as have {len(strange) - 1} more rows; extract them again"
        )


def summarise_regressions(embeddings: Embeddings) -> np.ndarray:
    """Return (scan,) what folds of regressions are stratified by.

    That is `rank_summary` of all phenotypes that are regressions and no confounds, asked for or not, by their names:
    their order in a file depends on its kind.
    """
    table = embeddings.phenotypes
    columns = [
        name
        for name in sorted(map(str, table.columns))
        if not embeddings.variables.get(name, {}).get("confound")
        and known_task(embeddings, name) not in CLASSIFICATIONS
    ]
    return rank_summary(np.reshape([as_numbers(table[name], name) for name in columns], (len(columns), len(table))).T)


def target_batches(targets: list[Target], confounds: ConfoundValues) -> Iterator[list[Target]]:
    """Put regressions of the same scans and confounds together; all else is alone."""
    shared: dict[tuple[bytes, tuple[str, ...]], list[Target]] = {}
    for target in targets:
        if target.reason or target.labels:
            yield [target]
        else:
            key = target.present.tobytes(), confounds.without(target.name).names
            shared.setdefault(key, []).append(target)
    yield from shared.values()


def _probe_batch(
    batch: list[Target],
    features: np.ndarray,
    all_groups: Groups,
    confounds: ConfoundValues,
    summary: np.ndarray,
    settings: ProbeSettings,
) -> list[TargetResult]:
    """Probe one classification, or regressions of the same scans."""
    present = batch[0].present
    groups = all_groups.rows(present)
    blank = [
        TargetResult(
            target.name,
            target.task,
            "skipped",
            int(present.sum()),
            int(groups.people.max(initial=-1)) + 1,
            reason=target.reason,
            labels=target.labels,
            units=target.units,
        )
        for target in batch
    ]
    if batch[0].reason:
        return blank
    truths = np.column_stack([target.values[present] for target in batch])
    codes = truths[:, 0].astype(np.int64) if batch[0].labels else None
    fold_of = _deal(groups, codes, summary[present], settings)
    if isinstance(fold_of, str):
        return [replace(result, reason=fold_of) for result in blank]
    strata = class_strata(codes, groups.people) if codes is not None else value_strata(summary[present], groups.people)
    measured = confounds.rows(present) if confounds.names else None
    sample = Sample(features[present], groups, measured, fold_of, strata)
    folds = list_folds(sample, settings.train_people, settings.seed)
    reason = _too_few(sample, folds, codes, settings.train_people)
    if reason:
        return [replace(result, reason=reason) for result in blank]
    draws = settings.bootstrap
    weights = draw_weights(int(groups.units.max()) + 1, draws, settings.seed) if draws else None
    if codes is not None:
        model = classification(codes, len(batch[0].labels), groups, settings.seed, weights)
    else:
        model = regression(truths, [target.task == "count" for target in batch], groups, weights)
    try:
        outcomes, confound_outcomes = run_folds(sample, folds, model)
    except NoInnerFoldsError as error:
        return [replace(result, reason=str(error)) for result in blank]
    results = []
    for i, (target, result) in enumerate(zip(batch, blank, strict=True)):
        own = [fold_outcomes[i] for fold_outcomes in outcomes]
        beside = [fold_outcomes[i] for fold_outcomes in confound_outcomes]
        result = combine_folds(result, sample, folds, own, beside, np.flatnonzero(present), truths[:, i])
        result = replace(result, method=describe_method(target, sample, own, settings), confounds=list(confounds.names))
        if settings.permutations:
            p_value, null = permutation_test(
                sample.features,
                truths[:, i],
                target.task,
                groups,
                measured,
                permutations=settings.permutations,
                folds=int(fold_of.max()) + 1,  # as many as the score has: of one person there is no correlation
                seed=settings.seed,
            )
            if p_value is None:
                result = replace(result, method=f"{result.method}; {null}")
            result = replace(result, p_value=p_value, null=null, permutations=settings.permutations)
        results.append(result)
    return results


def _deal(groups: Groups, codes: np.ndarray | None, summary: np.ndarray, settings: ProbeSettings) -> np.ndarray | str:
    """Return folds (repeat, scan), or why there are none.

    Where each group is a fold of its own, every repeat would be the same, and there is one.
    """
    number = int(groups.together.max()) + 1
    repeats = 1 if number <= settings.folds else settings.repeats
    seed = [settings.seed]
    if codes is not None:
        dealt = folds_with_all_classes(
            groups.together, groups.people, codes, settings.folds, repeats, seed, MIN_CLASS_PER_FOLD
        )
        if dealt is None:
            return f"no two folds of {number} groups hold {MIN_CLASS_PER_FOLD} people of every class"
        return dealt
    strata = value_strata(summary, groups.together)
    if number < 2:
        return "everybody who has a value is in one group, which leaves nobody to test on"
    _, first = np.unique(groups.people, return_index=True)
    for folds in range(min(settings.folds, number), 1, -1):
        dealt = repeated_folds(groups.together, strata, folds, repeats, seed)
        if all(np.bincount(fold_of[first], minlength=folds).min() >= MIN_PER_FOLD for fold_of in dealt):
            return dealt
    return f"no two folds of {number} groups hold {MIN_PER_FOLD} people each"


def _too_few(sample: Sample, folds: list[Fold], codes: np.ndarray | None, train_people: int | None) -> str:
    """Return why the training sides are too small, or nothing."""
    people = min(len(np.unique(sample.groups.people[fold.train])) for fold in folds)
    if train_people is not None and people < train_people:
        return f"the smallest training side has {people} people, fewer than the {train_people} to train on"
    scans = min(len(fold.train) for fold in folds)
    if sample.confounds is not None:
        columns = fit_coding(sample.confounds).encode(sample.confounds.values).shape[1]
        if scans < MIN_PER_CONFOUND * columns:
            return f"{columns} columns of confounds are too many for {scans} scans to train on; name fewer"
    if codes is not None and train_people is not None:
        pairs = [np.unique(np.stack([sample.groups.people[f.train], codes[f.train]]), axis=1)[1] for f in folds]
        if min(np.bincount(found, minlength=int(codes.max()) + 1).min() for found in pairs) < 2:
            return f"{train_people} people to train on hold fewer than two of some class"
    return ""
