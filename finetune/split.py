"""Who is trained on, who tells the best epoch, who is tested: by person, written down, and used again."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.probing.folds import limit_people
from ingest.people import participant_key
from ingest.writing import write_whole

PARTS = ("train", "validation", "test")
UNUSED = "unused"  # of the training part, but ``train_people`` are enough without them
_COLUMNS = ("participant", "part")


@dataclass(frozen=True)
class Split:
    """Which part each person is in.

    Attributes
    ----------
    part_of
        Participant -> one of `PARTS`, or `UNUSED`.
    """

    part_of: dict[str, str]

    def without(self, unused: Iterable[object]) -> Split:
        """Return a split in which people are not used who may be trained on."""
        left_out = {participant_key(who) for who in unused}
        return Split({who: UNUSED if participant_key(who) in left_out else part for who, part in self.part_of.items()})

    def whole(self) -> Split:
        """Return the split with all who may be trained on."""
        return Split({who: PARTS[0] if part == UNUSED else part for who, part in self.part_of.items()})

    def parts(self, participants: Iterable[object]) -> np.ndarray:
        """Return the part of each scan, text (scan,), by whose it is; nothing for people whom it does not name."""
        known = {participant_key(who): part for who, part in self.part_of.items()}
        return np.array([known.get(participant_key(who), "") for who in participants], dtype=object)


def split_people(
    participants: np.ndarray,
    together: np.ndarray,
    strata: np.ndarray,
    *,
    validation: float,
    test: float,
    seed: int,
) -> Split:
    """Draw who is in which part; each stratum is shared out alike, to within one group.

    Parameters
    ----------
    participants
        Text, (scan,).
    together
        int (scan,) 0 ... groups-1: people of a group are never split (a group of one for each person, or families).
    strata
        int (group,).
    validation, test
        Shares of the groups.
    seed
        Of the draw.
    """
    rng = np.random.default_rng([seed, 0x73706C6974])  # "split": sets this apart from other uses of the seed
    order = np.lexsort((rng.random(len(strata)), strata))
    part_of_group = np.full(len(strata), PARTS[0], dtype=object)
    rest = order
    for part, share in (("test", test), ("validation", validation / (1 - test) if test < 1 else 0.0)):
        chosen = _every(len(rest), share, rng)
        part_of_group[rest[chosen]] = part
        rest = rest[~chosen]
    spelt = {participant_key(who): str(who) for who in participants}  # each person once
    part_of = zip(map(participant_key, participants), part_of_group[together], strict=True)
    return Split({spelt[who]: str(part) for who, part in part_of})


def _every(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a share of things in a row, evenly spaced from a random start: bool (count,)."""
    wanted = round(count * share)
    if not wanted:
        return np.zeros(count, dtype=bool)
    chosen = np.zeros(count, dtype=bool)
    chosen[np.floor((np.arange(wanted) + rng.random()) * count / wanted).astype(np.int64)] = True
    return chosen


def training_people(
    participants: np.ndarray, strata: np.ndarray, train: np.ndarray, people: int, *, seed: int
) -> np.ndarray:
    """Choose some of the people to train on, of all strata alike; those of fewer are among those of more.

    Parameters
    ----------
    participants
        (scan,), numbers of people.
    strata
        int (person,), in the order of the numbers.
    train
        bool (scan,), scans of the training part.
    people
        How many.
    seed
        Which ones.

    Returns
    -------
    numpy.ndarray
        bool (scan,).

    Raises
    ------
    ValueError
        If there are fewer.
    """
    there = len(np.unique(participants[train]))
    if people > there:
        raise ValueError(f"train_people is {people}, but the training part has {there}")
    number = np.unique(participants, return_inverse=True)[1]
    return limit_people(number, strata, train, people, np.random.default_rng([seed, 0x70656F70]))


def write_split(path: Path, split: Split) -> None:
    """Write a split as CSV: participant, part."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(sorted(split.part_of.items()))

    write_whole(path, write)


def read_split(path: Path) -> Split:
    """Read what `write_split` wrote.

    Raises
    ------
    ValueError
        If it cannot be read, has other columns or parts, or names a person twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        raise ValueError(f"no split at {path}; expected the split.csv of a run") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as a split: {getattr(error, 'strerror', None) or error}; expected the split.csv of "
            "a run"
        ) from None
    if not lines or tuple(lines[0]) != _COLUMNS:
        raise ValueError(f"{path} has the columns {','.join(lines[0]) if lines else 'none'}, expected participant,part")
    part_of: dict[str, str] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines[1:], 2):
        if len(line) != 2 or line[1] not in (*PARTS, UNUSED):
            raise ValueError(f"{path}, line {number}: expected a participant and one of {', '.join(PARTS)}, {UNUSED}")
        if participant_key(line[0]) in seen:
            raise ValueError(f"{path}, line {number}: this participant has a line already")
        seen.add(participant_key(line[0]))
        part_of[line[0]] = line[1]
    return Split(part_of)
