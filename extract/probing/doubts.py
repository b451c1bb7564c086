"""What may be wrong with the input of a probe though it can be computed: said beside the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.confounds import read_confounds, unseen_shares
from extract.probing.groups import read_groups
from extract.probing.settings import ProbeSettings
from extract.probing.targets import by_column, few_whole_numbers, known_task, label_names, labelled_codes

_FEWEST_PERMUTATIONS = 19  # give a p value of 0.05 at the least
_MANY_UNSEEN = 0.1  # of the scans
_FEWEST_DRAWS = 100  # leave two or three beyond each end of a 95 % interval


def check_not_empty(name: str, embeddings: Embeddings) -> None:
    """Raise ValueError if there is no scan or no feature."""
    scans, features = embeddings.features.shape
    if not scans or not features:
        what = f"{scans} scans" if not scans else f"{features} features of each scan"
        raise ValueError(f"{name} has {what}, expected at least one; extract it again from a store that holds volumes")


def doubts(
    named: Mapping[str, Embeddings], targets: Sequence[str], *, tasks: Mapping[str, str], settings: ProbeSettings
) -> list[str]:
    """Return warnings about features, targets, groups and numbers of draws, a line each.

    Parameters
    ----------
    named
        Name -> embeddings of the same scans.
    targets
        Columns.
    tasks
        By name or alias, of some of the targets and confounds.

    Raises
    ------
    ValueError
        If a task is given for what is not there, or the groups cannot be used.
    """
    first = next(iter(named.values()))
    return [
        *(f"{name}: {note}" for name, embeddings in named.items() for note in _notes(embeddings)),
        *(warning for name, embeddings in named.items() for warning in _constant_features(name, embeddings)),
        *_codes(first, targets, tasks, settings),
        *_lone_groups(first, settings),
        *_unseen_confounds(first, tasks, settings),
        *_few_draws(settings),
    ]


def _notes(embeddings: Embeddings) -> list[str]:
    """Return what `extract` has told of the weights; in files of others it may be anything."""
    notes = embeddings.attrs.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def _constant_features(name: str, embeddings: Embeddings) -> list[str]:
    features = embeddings.features
    constant = int(np.sum(np.ptp(features, axis=0) == 0))
    if constant < features.shape[1]:
        return []
    return [
        f"all {constant} features of {name} are the same in every scan, so they tell nothing of anybody; look at the "
        "scans (ingest report) and at what the network saw of them (--crop, --size, --scale of extract)"
    ]


def _codes(
    embeddings: Embeddings, targets: Sequence[str], tasks: Mapping[str, str], settings: ProbeSettings
) -> list[str]:
    """Name the targets that are taken as numbers and look like codes, or as many classes, of which nothing is said."""
    said = {*by_column(embeddings, tasks, targets), *by_column(embeddings, settings.bins, targets)}
    warnings = []
    for name in targets:
        if name in said or embeddings.variables.get(name, {}).get("task"):
            continue
        values = as_numbers(embeddings.phenotypes[name], name)
        known = values[~np.isnan(values)]
        few, task = few_whole_numbers(known), known_task(embeddings, name)
        labels = embeddings.variables.get(name, {}).get("labels")
        many = labelled_codes(known, labels)
        if (few or many) and task == "continuous":
            what = f"{few} different whole numbers, from {known.min():g} on," if few else f"{many} codes with labels"
            warnings.append(
                f"the target {name} has {what} and is taken as a number; if they are codes, add "
                f"--task {name}=multiclass, else --task {name}=continuous"
            )
        elif many:
            codes, sizes = np.unique(known, return_counts=True)
            smallest = label_names(codes, labels)[int(sizes.argmin())]
            warnings.append(
                f"the target {name} has {many} classes, the smallest {smallest!r} of {sizes.min()} scans: small ones "
                f"lower the number of folds and widen intervals; join some, or add --task {name}=ordinal if their "
                f"order tells something, else --task {name}=multiclass"
            )
    return warnings


def _lone_groups(embeddings: Embeddings, settings: ProbeSettings) -> list[str]:
    if settings.groups is None:
        return []
    groups = read_groups(embeddings, settings.groups, settings.kinship)
    if groups.together.max() < groups.people.max():
        return groups.about_strangers()
    return [
        f"{groups.note}: no two of the people here are in one group, so folds are as without --groups; {groups.advice}"
    ]


def _unseen_confounds(embeddings: Embeddings, tasks: Mapping[str, str], settings: ProbeSettings) -> list[str]:
    if settings.groups is None or not settings.confounds:
        return []
    groups = read_groups(embeddings, settings.groups, settings.kinship)
    confounds = read_confounds(embeddings, settings.confounds, tasks)
    return [
        f"the confound {name} is not removed from {share:.0%} of the scans when they are tested: each of their values "
        f"is of one group that is never split ({groups.note}), so nobody of these values is trained on"
        for name, share in unseen_shares(confounds, groups.together).items()
        if _MANY_UNSEEN <= share < 1  # of all it is refused
    ]


def _few_draws(settings: ProbeSettings) -> list[str]:
    warnings = []
    if 0 < settings.permutations < _FEWEST_PERMUTATIONS:
        least = 1 / (settings.permutations + 1)
        warnings.append(
            f"{settings.permutations} permutations give no p value below {least:.2g}; use --permutations 1000, or "
            f"{_FEWEST_PERMUTATIONS} at the least"
        )
    if 0 < settings.bootstrap < _FEWEST_DRAWS:
        warnings.append(
            f"the ends of a 95 % interval are not known from {settings.bootstrap} draws; use --bootstrap 1000, or "
            f"{_FEWEST_DRAWS} at the least"
        )
    return warnings
