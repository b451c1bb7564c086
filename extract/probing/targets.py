"""Targets of a probe: which phenotypes, as what task, in which classes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.folds import class_sizes
from ingest.dictionary import BY_NAME, TASKS, VARIABLES

#: Fewer people than this who have a value: too few to say anything.
MIN_PARTICIPANTS = 20
#: People of the smallest class in each test fold, at least; a target with fewer gets fewer folds, down to two.
MIN_CLASS_PER_FOLD = 2
#: People in each test fold of a regression, at least: a correlation of fewer is noise.
MIN_PER_FOLD = 4

CLASSIFICATIONS = ("binary", "multiclass")
#: Different whole numbers at most that may be codes.
MAX_CODES = 10
#: Codes with labels at most that are classes, unless it is said that they are.
MAX_CLASSES = 100

_MOST_DIGITS = 17  # tell any two float64 apart
_SMALLEST, _LARGEST = 1e-60, 1e60  # of a target's largest value: scores take fourth powers, and float64 ends at 1e308

_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Target:
    """A phenotype to probe.

    Attributes
    ----------
    values
        float64, (scan,), NaN where missing; codes 0 ... classes-1 of a classification.
    labels
        Names of the classes; empty for regressions.
    note
        What was done to the values, in words.
    reason
        Why it cannot be probed; empty if it can.
    """

    name: str
    task: str
    values: np.ndarray
    labels: list[str] = field(default_factory=list)
    units: str | None = None
    note: str = ""
    reason: str = ""

    @property
    def present(self) -> np.ndarray:
        """(scan,) whether there is a value."""
        return ~np.isnan(self.values)


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
                "the embeddings have no phenotype to probe; give a table that has some: --phenotypes FILE"
                + (f", or name a confound: {', '.join(columns)}" if columns else "")
            )
        return names
    names = [column_of(embeddings, target) for target in targets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"targets {list(targets)!r}: expected one or more, each once")
    return names


def column_of(embeddings: Embeddings, name: str, beside: Sequence[str] = ()) -> str:
    """Return the column that `name` or a variable's other name stands for.

    Raises
    ------
    ValueError
        If there is none; `beside` are further names to choose from.
    """
    columns = [str(column) for column in embeddings.phenotypes.columns]
    if name in columns:
        return name
    variable = BY_NAME.get(name.lower())
    same = [c for c in columns if variable is not None and BY_NAME.get(c.lower()) is variable]
    if len(same) != 1:
        there = ", ".join(f'"{column}"' if "," in column else column for column in [*columns, *beside])
        raise ValueError(f"no phenotype {name!r}; there are: {there or 'none'}")
    return same[0]


def by_column(
    embeddings: Embeddings, options: Mapping[str, _Option] | None, columns: Sequence[str]
) -> dict[str, _Option]:
    """Return options that are given by name or alias by column instead: those of some columns.

    Raises
    ------
    ValueError
        If there is no such column, or one is given twice.
    """
    found: dict[str, _Option] = {}
    for name, option in (options or {}).items():
        column = column_of(embeddings, name)
        if column in found:
            raise ValueError(f"{column!r} is given {found[column]!r} and {option!r}; name it once")
        found[column] = option
    return {column: option for column, option in found.items() if column in columns}


def label_names(codes: Sequence[float] | np.ndarray, labels: Mapping[str, str] | None) -> list[str]:
    """Return a name for each code: its label, with the code where others have it too; the code if it has none."""
    labels = labels or {}
    texts = [str(int(code)) if code == int(code) else str(float(code)) for code in codes]
    names = [str(labels.get(text, text)) for text in texts]
    taken = Counter([*map(str, labels.values()), *(text for text in texts if text not in labels)])
    return [name if taken[name] == 1 else f"{name} ({text})" for name, text in zip(names, texts, strict=True)]


def infer_task(values: np.ndarray, labels: Mapping[str, str] | None = None) -> str:
    """Guess the task of a variable of which nothing is said.

    Two different values are ``binary``. Up to ten different whole numbers are ``multiclass`` if the variable has
    labels, else ``count`` if the smallest is 0 or 1. More of them are ``multiclass`` if each has a label, for labels of
    some are those of special answers among numbers. All else is ``continuous``.

    Parameters
    ----------
    values
        float64, without NaN.
    labels
        Of the codes, code -> label; None or empty if there are none.
    """
    if len(np.unique(values)) == 2:
        return "binary"
    if 0 < labelled_codes(values, labels) <= MAX_CLASSES:
        return "multiclass"
    if few_whole_numbers(values):
        if labels:
            return "multiclass"
        if values.min() in (0, 1):
            return "count"
    return "continuous"


def few_whole_numbers(values: np.ndarray) -> int:
    """Return how many different values there are if they may be codes: three to ten whole numbers; else 0."""
    distinct = np.unique(values[~np.isnan(values)])
    return len(distinct) if 2 < len(distinct) <= MAX_CODES and np.all(distinct == np.round(distinct)) else 0


def labelled_codes(values: np.ndarray, labels: Mapping[str, str] | None) -> int:
    """Return how many different values there are if they are more than `MAX_CODES` and each has a label; else 0."""
    if not labels:
        return 0
    distinct = np.unique(values[~np.isnan(values)])
    if not (MAX_CODES < len(distinct) <= len(labels) and np.isfinite(distinct).all()):
        return 0
    return len(distinct) if all(value == np.round(value) and str(int(value)) in labels for value in distinct) else 0


def known_task(embeddings: Embeddings, column: str) -> str:
    """Return the task that the store gives for a variable, else the one that is inferred."""
    attrs = embeddings.variables.get(column, {})
    values = as_numbers(embeddings.phenotypes[column], column)
    return attrs.get("task") or infer_task(values[~np.isnan(values)], attrs.get("labels"))


def read_targets(
    embeddings: Embeddings,
    names: Sequence[str],
    tasks: Mapping[str, str],
    bins: Mapping[str, int | tuple[float, ...]],
    people: np.ndarray,
    beside: Sequence[str] = (),
    complete: Callable[[str], np.ndarray] | None = None,
) -> list[Target]:
    """Return the targets with their tasks: as asked, else by `known_task`; those in bins become classes.

    Parameters
    ----------
    names
        Columns.
    tasks, bins
        By name or alias, of some of them; see `probing.settings.ProbeSettings`.
    people
        int, (scan,).
    beside
        Columns of confounds, for which tasks may be given, too.
    complete
        Returns bool (scan,), which scans can be probed for a target of some name, for their confounds are known: the
        values of others are taken as missing. None takes all.

    Raises
    ------
    ValueError
        If a task is unknown, or a task or bins are given for what is no target.
    """
    everything = [str(column) for column in embeddings.phenotypes.columns]
    asked, binned = by_column(embeddings, tasks, everything), by_column(embeddings, bins, everything)
    for what, columns, known in (("a task is", asked, [*names, *beside]), ("bins are", binned, names)):
        for column in columns:
            if column not in known:
                raise ValueError(f"{what} given for {column!r}, which is not among the targets: {', '.join(names)}")
    return [
        _read_target(
            embeddings, name, asked.get(name), binned.get(name), people, None if complete is None else complete(name)
        )
        for name in names
    ]


def _read_target(
    embeddings: Embeddings,
    name: str,
    asked: str | None,
    bins: int | tuple[float, ...] | None,
    people: np.ndarray,
    complete: np.ndarray | None,
) -> Target:
    attrs = embeddings.variables.get(name, {})
    values = as_numbers(embeddings.phenotypes[name], name)
    present = ~np.isnan(values)
    known = attrs.get("labels") or {}
    units, note = attrs.get("units"), ""
    if bins is not None and (np.abs(values[present]) > _LARGEST).any():
        return Target(name, asked or "multiclass", values, units=units, reason=_unfit(values[present], "", 0))
    if bins is not None and present.any():
        values, known, note = _bin(values, bins, people)
        if len(known) < 2:
            return Target(name, asked or "multiclass", values, units=units, reason=f"{note}: one class only")
    if bins is not None:
        task = asked or ("binary" if len(known) == 2 else "multiclass")
    else:
        task = asked or known_task(embeddings, name)
    if task not in TASKS:
        raise ValueError(f"task {task!r} of {name!r} is unknown; expected one of {', '.join(TASKS)}")
    without = ""
    if complete is not None and not complete[present].all():
        without = f"{int((present & ~complete).sum())} scans that lack a confound left out"
        values, present = np.where(complete, values, np.nan), present & complete
        note = f"{note}; {without}" if note else without
    reason = _unfit(values[present], task, len(np.unique(people[present])))
    if reason or task not in CLASSIFICATIONS:
        return Target(name, task, values, units=units, note=note, reason=_and(reason, without))
    found, codes = np.unique(values[present], return_inverse=True)
    labels = label_names(found, known)
    values = values.copy()
    values[present] = codes
    sizes = class_sizes(people[present], codes)
    if sizes.min() < 2 * MIN_CLASS_PER_FOLD:
        reason = (
            f"class {labels[int(sizes.argmin())]!r} has {sizes.min()} participants, at least "
            f"{2 * MIN_CLASS_PER_FOLD} are needed"
        )
    return Target(name, task, values, labels, units, note, _and(reason, without))


def _and(reason: str, beside: str) -> str:
    """Return a reason with what else may be one, if there is a reason."""
    return f"{reason} ({beside})" if reason and beside else reason


def _bin(
    values: np.ndarray, bins: int | tuple[float, ...], people: np.ndarray
) -> tuple[np.ndarray, dict[str, str], str]:
    """Return codes of classes, NaN where missing, their labels and a note.

    Quantiles are those of people (the mean of each one's scans), over all of them: edges define the classes, as a
    dictionary would, and are no part of a model. Edges that coincide are one.
    """
    present = ~np.isnan(values)
    if isinstance(bins, int):
        who = np.unique(people[present], return_inverse=True)[1]
        means = np.bincount(who, weights=values[present]) / np.bincount(who)
        edges = _few_digits(np.unique(np.quantile(means, np.arange(1, bins) / bins)), np.unique(values[present]))
        kind = f"{bins} quantile classes of all people"
    else:
        edges, kind = np.array(bins, dtype=np.float64), "classes"
    codes = np.where(present, np.searchsorted(edges, values, side="right"), np.nan)
    ends = [str(int(edge)) if edge == int(edge) else str(edge) for edge in edges.tolist()]
    names = [f"<{ends[0]}", *(f"{a}-{b}" for a, b in itertools.pairwise(ends)), f">={ends[-1]}"]
    labels = {str(code): name for code, name in enumerate(names) if np.any(codes == code)}
    return codes, labels, f"{kind} with edges at {', '.join(ends)}"


def _few_digits(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Round edges to the fewest digits that leave every value in its class."""
    classes = np.searchsorted(edges, values, side="right")
    for digits in range(1, _MOST_DIGITS):
        rounded = np.array([float(f"{edge:.{digits}g}") for edge in edges])
        if np.array_equal(np.searchsorted(rounded, values, side="right"), classes):
            return rounded
    return edges


def _unfit(values: np.ndarray, task: str, participants: int) -> str:
    """Return why values cannot be probed, or nothing."""
    if not len(values):
        return "every value is missing"
    if not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} values are infinite"
    distinct = len(np.unique(values))
    if distinct == 1:
        return f"constant: every value is {values[0]:g}"
    largest = np.abs(values).max()
    if not _SMALLEST <= largest <= _LARGEST:
        return f"values reach {largest:.3g}, expected between {_SMALLEST:g} and {_LARGEST:g}; use other units"
    if task == "binary" and distinct > 2:
        return f"{distinct} different values are not binary; name another task"
    if task == "count" and values.min() < 0:
        return f"the smallest value, {values.min():g}, is no count; name another task"
    if participants < MIN_PARTICIPANTS:
        return f"{participants} participants have a value, at least {MIN_PARTICIPANTS} are needed"
    return ""
