"""Which scans of a store a run is about: their labels, who they are, and which part they are in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from extract.embeddings import Embeddings
from extract.probing.folds import class_strata, value_strata
from extract.probing.groups import Groups, read_groups
from extract.probing.targets import Target, read_targets, target_names
from extract.run import scans_table
from finetune.evaluate import why_undefined
from finetune.heads import Head, make_head
from finetune.losses import class_weights, scan_weights
from finetune.predictions import check_names
from finetune.settings import FinetuneSettings
from finetune.split import UNUSED, Split, read_split, split_people, training_people
from ingest.store import VolumeStore
from loaders.select import select_rows


@dataclass(frozen=True)
class Cohort:
    """Scans of which a target is known.

    Attributes
    ----------
    rows
        int64 (scan,), rows of the store.
    groups
        Who they are, and who belongs together.
    targets
        Their values.
    split
        Who is in which part.
    part
        Text (scan,): ``train``, ``validation``, ``test``, or nothing for scans that are left out: the split does not
        name whose they are, or ``train_people`` are enough without them.
    heads
        One per target.
    labels, weights
        float32 (row of the store, target): what is learnt, and how much it counts; 0 where it is not known.
    warnings
        What is to be told.
    """

    rows: np.ndarray
    groups: Groups
    targets: list[Target]
    split: Split
    part: np.ndarray
    heads: list[Head]
    labels: np.ndarray
    weights: np.ndarray
    warnings: list[str]

    def rows_of(self, part: str) -> np.ndarray:
        """Return the rows of a part, int64."""
        return self.rows[self.part == part]

    def people(self) -> dict[str, int]:
        """Return how many people are in each part."""
        return {part: len(np.unique(self.groups.people[self.part == part])) for part in ("train", "validation", "test")}

    def fingerprint(self) -> str:
        """Return a sha256 of whose scans are in which part, and of their labels: equal if nothing has changed."""
        there = self.part != ""
        rows = self.rows[there]
        text = "\n".join(self.part[there])
        return sha256(rows.tobytes() + self.labels[rows].tobytes() + text.encode()).hexdigest()

    def scans(self) -> dict[str, int]:
        """Return how many scans are in each part."""
        return {part: int((self.part == part).sum()) for part in ("train", "validation", "test")}


def read_cohort(store: VolumeStore, settings: FinetuneSettings, split_file: Path | None = None) -> Cohort:
    """Read labels and split people.

    Parameters
    ----------
    split_file
        Of a run that goes on; by default that of the settings, and without one people are drawn.

    Raises
    ------
    ValueError
        If targets are not known, cannot be learnt, or a part that is needed is empty.
    """
    if not settings.target:
        raise ValueError("target is empty, expected a phenotype of the store; see: ingest inspect STORE")
    rows = some_rows(store, settings.where)
    table = as_table(store, rows)
    names = target_names(table, settings.target)
    everybody = read_groups(table, settings.groups, settings.kinship)
    targets = read_targets(table, names, settings.task, {}, everybody.people)
    for target in targets:
        if target.reason:
            raise ValueError(f"{target.name!r} cannot be learnt: {target.reason}")
    check_names(store, targets)
    known = np.any([target.present for target in targets], axis=0)
    rows, groups = rows[known], everybody.rows(known)
    targets = [_of_scans(target, known) for target in targets]
    participants = table.scans["participant"].to_numpy().astype(str)[known]
    goes_on = split_file is not None
    if split_file is None and settings.split is not None:
        split_file = Path(settings.split)
    if split_file is not None:
        split = read_split(split_file)
        if not goes_on:
            split = split.whole()  # of another run, which may have used fewer
    else:
        split = split_people(
            participants, groups.together, strata_of_units(targets[0], groups.together),
            validation=settings.validation, test=settings.test, seed=settings.seed,
        )  # fmt: skip
    part = split.parts(participants)
    if split_file is not None:
        _check_whole(groups, split.whole().parts(participants), split_file)
    warnings = [*everybody.about_strangers(), *_check_parts(settings, part, drawn=split_file is None)]
    strangers = len(np.unique(groups.people[part == ""]))
    if strangers:
        warnings.append(f"{strangers} people are in no part of the split, and left out")
    train = part == "train"
    if not train.any():
        raise ValueError("nobody is in the training part; use more people, or another split")
    unused = part == UNUSED
    part[unused] = ""
    drawn = unused.any()  # before: some may have withdrawn since, and nobody comes in their place
    if settings.train_people is not None and not drawn:
        strata = strata_of_units(targets[0], groups.people)
        people = min(settings.train_people, len(np.unique(groups.people[train]))) if goes_on else settings.train_people
        kept = training_people(groups.people, strata, train, people, seed=settings.seed)
        split = split.without(participants[train & ~kept])
        part[train & ~kept] = ""
        train = kept
    balanced = settings.class_weights == "balanced"
    heads = [make_head(target, train, balanced=balanced) for target in targets]
    if settings.monitor == "score":
        _check_score(heads, targets, part == "validation")
    labels = np.full((len(store.scans), len(heads)), np.nan, np.float32)
    weights = np.zeros_like(labels)
    for column, (head, target) in enumerate(zip(heads, targets, strict=True)):
        encoded = head.encode(target.values)
        labels[rows, column] = encoded
        of_class = class_weights(head, encoded[train], balanced=balanced)
        weights[rows, column] = scan_weights(head, encoded, of_class)
    return Cohort(rows, groups, targets, split, part, heads, labels, weights, warnings)


def some_rows(store: VolumeStore, where: str | None) -> np.ndarray:
    """Return the rows of scans of which a condition is true, or of all; ValueError if there is none."""
    rows = select_rows(store, where=where)
    if not len(rows):
        raise ValueError(f"no scan of {store.path} is left" + (f" of which {where!r} is true" if where else ""))
    return rows


def as_table(store: VolumeStore, rows: np.ndarray) -> Embeddings:
    """Return what is known of scans as embeddings without features, which everything about phenotypes takes."""
    return Embeddings(
        np.empty((len(rows), 0), np.float32),
        scans_table(store, rows),
        store.phenotypes.iloc[rows].reset_index(drop=True),
        store.variables,
    )


def strata_of_units(target: Target, units: np.ndarray) -> np.ndarray:
    """Return the class, or the tenth of the values, of each unit (person or group), int64; -1 of whom it is unknown.

    Parameters
    ----------
    units
        int (scan,) 0 ... units-1.
    """
    strata = np.full(int(units.max()) + 1, -1, np.int64)
    present = target.present
    there, numbers = np.unique(units[present], return_inverse=True)
    values = target.values[present]
    strata[there] = class_strata(values.astype(np.int64), numbers) if target.labels else value_strata(values, numbers)
    return strata - strata.min()


def _check_parts(settings: FinetuneSettings, part: np.ndarray, *, drawn: bool) -> list[str]:
    """Return what is to be told of parts that were asked for, and are empty; ValueError if they are needed.

    Parameters
    ----------
    drawn
        The people were drawn just now, by the shares of the settings.
    """
    warnings = []
    if not (part == "validation").any():
        for name, needed in (("patience", settings.patience is not None), ("monitor", settings.monitor == "score")):
            if needed:
                raise ValueError(
                    f"{name} is {getattr(settings, name)}, but nobody is in the validation part: nothing tells the "
                    "best epoch, or when to stop; use a larger --validation, or another split"
                )
        if settings.validation > 0:
            warnings.append("nobody is in the validation part: the last epoch is kept, whether it is the best or not")
    if settings.test > 0 and not (part == "test").any():
        if drawn:
            raise ValueError(
                f"nobody is in the test part: test is {settings.test:g} of too few people, or groups that stay "
                "together; use a larger share, smaller groups, or --test 0 if that is meant"
            )
        warnings.append("nobody is in the test part of the split: nothing will be scored; --test 0 if that is meant")
    return warnings


def _check_score(heads: list[Head], targets: list[Target], validation: np.ndarray) -> None:
    """Raise ValueError if no score of the validation part is defined, by which the best epoch is to be known."""
    why = [why_undefined(head, one.values[validation & one.present]) for head, one in zip(heads, targets, strict=True)]
    if all(why):
        reasons = "; ".join(f"{head.name}: {reason}" for head, reason in zip(heads, why, strict=True))
        raise ValueError(
            f"monitor is score, but the validation part has none ({reasons}); use a larger --validation, another "
            "split or --seed, or --monitor loss"
        )


def _check_whole(groups: Groups, part: np.ndarray, split_file: Path) -> None:
    """Raise ValueError if a split that was not made for some groups splits them."""
    parts = Counter(group for group, name in set(zip(groups.together.tolist(), part.tolist(), strict=True)) if name)
    split = sum(number > 1 for number in parts.values())
    if split:
        raise ValueError(
            f"{split} of the {groups.note} are in several parts of {split_file}; use a split of a run with these groups"
        )


def _of_scans(target: Target, chosen: np.ndarray) -> Target:
    return replace(target, values=target.values[chosen])
