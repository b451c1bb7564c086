"""Groups of people whom cross-validation must not split: participants, sites, families, kinship."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.settings import THIRD_DEGREE
from extract.probing.targets import column_of
from ingest.people import participant_key
from ingest.ukb_columns import find_id_column

#: Groups are few below this number, and large from so many people on average.
FEW_GROUPS = LARGE_GROUPS = 20

_NOBODY = ("", "nan", "None", "<NA>")  # what a missing id is as a text
_MEMBER = ("iid",)  # of PLINK's tables, beside what phenotype tables call it
_GROUP = ("group", "family", "family_id", "fid")


@dataclass(frozen=True)
class Groups:
    """Who belongs together; all arrays are int64, (scan,).

    Attributes
    ----------
    people
        Participants, 0 ... people-1; ``sub-01`` and ``01`` are one.
    together
        Groups that are never split, 0 ... groups-1.
    units
        What is independent of each other, and so drawn and exchanged as a whole: groups if they are many and small,
        such as families, else participants.
    blocks
        Units are exchanged within these only: groups if they are few or large, such as sites, else all are one. People
        who are alone are one block.
    note
        Of the groups in words; empty where they are the participants.
    advice
        What may help where no two people are in one group.
    strangers
        People whom a table of groups does not name: each is alone. (Tables of pairs name those who are related only.)
    """

    people: np.ndarray
    together: np.ndarray
    units: np.ndarray
    blocks: np.ndarray
    note: str = ""
    advice: str = ""
    strangers: int = 0

    def about_strangers(self) -> list[str]:
        """Return a warning, if there are people whom the table of groups does not name."""
        if not self.strangers:
            return []
        people = int(self.people.max()) + 1
        return [
            f"{self.note}: {self.strangers} of {people} people are not in it, and taken for people who belong to "
            "nobody; add them, if they have relatives here"
        ]

    def rows(self, chosen: np.ndarray) -> Groups:
        """Return those of some scans (a mask), numbered anew without gaps."""
        again = (np.unique(part[chosen], return_inverse=True)[1] for part in (self.people, self.together, self.units))
        people, together, units = again
        return replace(self, people=people, together=together, units=units, blocks=self.blocks[chosen])


def read_groups(embeddings: Embeddings, groups: str | Path | None, kinship: float | None = None) -> Groups:
    """Read who must not be split.

    Parameters
    ----------
    groups
        A phenotype, by name or alias: people of one value stay together, those without a value alone, and values that
        one person has in different scans are joined. Or a file, with blanks, commas or tabs between its columns and a
        header: ``participant`` (or ``eid``) and ``group`` (or ``family``); or pairs of relatives as in UK Biobank's
        ``ukb_rel.dat``: ``ID1``, ``ID2`` and, optionally, ``Kinship``, of which the connected components stay together.
    kinship
        Pairs with a coefficient of this or more are related; None takes `THIRD_DEGREE` where there are coefficients.

    Raises
    ------
    ValueError
        If a scan has no participant, a kinship is given and there are no coefficients, there is no such phenotype or
        file, the file is no such table or knows none of the people, or everybody is in one group.
    """
    participants = _participants(embeddings)
    names, people = np.unique(np.array([participant_key(who) for who in participants]), return_inverse=True)
    alone = np.zeros(len(people), dtype=np.int64)
    if groups is None:
        return Groups(people, people, people, alone)
    path = Path(groups)
    if path.is_file():
        first, second, note, advice, strangers = _read_table(path, names, kinship)
        together = _components(first, second, len(names))[people]
        _check(together, note)
        return replace(_units_and_blocks(people, together, note), advice=advice, strangers=strangers)
    if kinship is not None:
        raise ValueError(f"kinship={kinship} needs groups from a table with a column Kinship, not {str(groups)!r}")
    try:
        column = column_of(embeddings, str(groups))
    except ValueError as error:
        raise ValueError(f"groups {str(groups)!r} are neither a file nor a phenotype: {error}") from None
    values = as_numbers(embeddings.phenotypes[column], column)
    known = np.flatnonzero(~np.isnan(values))
    code = np.unique(values[known], return_inverse=True)[1] + len(names)  # nodes after those of the people
    together = _components(people[known], code, len(names) + len(known))[people]
    together = np.unique(together, return_inverse=True)[1]
    note = f"{together.max() + 1} groups by {column}"
    _check(together, note)
    advice = "each has a group of their own; name a phenotype whose values people share, such as site"
    return replace(_units_and_blocks(people, together, note), advice=advice)


def _participants(embeddings: Embeddings) -> np.ndarray:
    """Return whose each scan is, text (scan,); ValueError where that is unknown, for all such would be one person."""
    found = embeddings.scans["participant"].to_numpy().astype(str)
    nobody = np.isin(np.char.strip(found), _NOBODY)
    if nobody.any():
        raise ValueError(
            f"{int(nobody.sum())} of {len(found)} scans have no participant (the first is {str(found[nobody][0])!r}), "
            "expected an id of each, by which people are never split; leave these scans out, or name whose they are"
        )
    return found


def _units_and_blocks(people: np.ndarray, together: np.ndarray, note: str) -> Groups:
    """Return groups that are blocks if they are few or large, else units."""
    first = np.unique(people, return_index=True)[1]
    sizes = np.bincount(together[first])
    shared = sizes > 1
    if shared.sum() >= FEW_GROUPS and sizes[shared].mean() < LARGE_GROUPS:
        return Groups(people, together, together, np.zeros(len(people), dtype=np.int64), note)
    blocks = np.unique(np.where(shared[together], together, -1), return_inverse=True)[1]
    return Groups(people, together, people, blocks, note)


def _check(together: np.ndarray, note: str) -> None:
    if together.max(initial=0) == 0:
        raise ValueError(
            f"{note}: everybody is in one group, which leaves nobody to test on; people who have several values join "
            "their groups; choose other groups"
        )


def _components(first: np.ndarray, second: np.ndarray, nodes: int) -> np.ndarray:
    """Return the connected component of each node: first[i] and second[i] are linked."""
    links = sparse.coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _read_table(path: Path, names: np.ndarray, kinship: float | None) -> tuple[np.ndarray, np.ndarray, str, str, int]:
    """Read a table of groups or pairs.

    Returns
    -------
    first, second : numpy.ndarray
        Linked people, by their places in `names`.
    note, advice : str
        What they are in words, and what helps if there are none.
    strangers : int
        How many people a table of groups does not name.
    """
    advice = "expected a table with the participants of these scans"
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = next((mark for mark in "\t,;" if mark in header), r"\s+")
        table = pd.read_csv(
            path, sep=separator, dtype=str, encoding="utf-8-sig", skipinitialspace=True,
            index_col=False,  # or rows that end in separators would begin a column early
        )  # fmt: skip
    except (ValueError, OSError) as error:  # pandas' parser errors, empty files and undecodable texts are ValueErrors
        raise ValueError(
            f"the groups in {path} cannot be read: {error}; expected a text table with a header"
        ) from error
    table.columns = [str(name).strip().lower() for name in table.columns]
    place = {name: i for i, name in enumerate(names.tolist())}
    pairs = {"id1", "id2"} <= set(table.columns)
    if kinship is not None and not (pairs and "kinship" in table.columns):
        raise ValueError(f"kinship={kinship} needs a table with ID1, ID2 and Kinship; {path} has no such column")
    if pairs:
        related, of = table, ""
        if "kinship" in table.columns:
            coefficients = pd.to_numeric(table["kinship"], errors="coerce")
            if coefficients.isna().any():
                row = int(np.flatnonzero(coefficients.isna())[0])
                raise ValueError(
                    f"row {row + 2} of {path} has the kinship {table['kinship'].iloc[row]!r}; expected a number"
                )
            least = THIRD_DEGREE if kinship is None else kinship
            related, of = table[coefficients >= least], f" (kinship of {least} or more)"
            here = (_places(table["id1"], place) >= 0) & (_places(table["id2"], place) >= 0)
            if here.any():
                advice = (
                    f"{int(here.sum())} pairs of them are in the table, the closest with a kinship of "
                    f"{coefficients[here].max():g}; take a lower --kinship if these are relatives"
                )
        first, second = (_places(related[column], place) for column in ("id1", "id2"))
        if len(table) and not max(_places(table[c], place).max() for c in ("id1", "id2")) >= 0:
            raise ValueError(_stranger(path, table["id1"].iloc[0], names))
        both = (first >= 0) & (second >= 0)
        note = f"families of {int(both.sum())} related pairs in {path.name}{of}"
        return first[both], second[both], note, advice, 0
    place_of_ids = find_id_column(list(table.columns))
    participant = next((name for name in _MEMBER if name in table.columns), None)
    if place_of_ids is not None:
        participant = table.columns[place_of_ids]
    group = next((name for name in _GROUP if name in table.columns), None)
    if participant is None or group is None:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}; expected participant and group, or ID1, ID2, Kinship"
        )
    named = _places(table[participant], place)
    known = (named >= 0) & table[group].notna().to_numpy()
    if not known.any():
        raise ValueError(_stranger(path, table[participant].iloc[0] if len(table) else "", names))
    who, family = named[known], np.unique(table[group].to_numpy()[known].astype(str), return_inverse=True)[1]
    representative = np.zeros(family.max() + 1, dtype=np.int64)
    representative[family] = who  # everyone is linked to one member of the family
    strangers = len(names) - len(np.unique(named[named >= 0]))
    return who, representative[family], f"{family.max() + 1} groups in {path.name}", advice, strangers


def _places(column: pd.Series, place: dict[str, int]) -> np.ndarray:
    """Return the place of each participant, -1 for those without scans."""
    return np.array([place.get(participant_key(name), -1) for name in column], dtype=np.int64)


def _stranger(path: Path, name: object, names: np.ndarray) -> str:
    return (
        f"none of the people in {path} (such as {name!r}) has a scan here (such as {str(names[0])!r}); "
        "expected the participants' numbers of the same study or application"
    )
