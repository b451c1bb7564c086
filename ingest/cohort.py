"""Who is in a simulated cohort: people, visits, and phenotypes as a biobank would record them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ingest.brains import Anatomy
from ingest.dictionary import BY_FIELD

FIRST_VISIT, REPEAT_VISIT = "2", "3"

_REPEATS = 0.05
_UNUSABLE = 0.02
_MISSING_MEMBER = 0.01
_WITHOUT_SCAN = 0.05
_SITES = (11025, 11026, 11027)


def draw_people(participants: int, seed: int) -> pd.DataFrame:
    """Draw the people of a cohort.

    Parameters
    ----------
    participants
        People with a scan; one in twenty more are in the phenotype table only.
    seed
        Same seed, same people.

    Returns
    -------
    pandas.DataFrame
        One row per person: ``eid`` (7 digits, invented), ``male``, ``age`` at the first visit and ``age_repeat``
        (years), ``intelligence`` (standard deviations), ``head_scale``, ``scanned``, ``repeat`` (has a second visit),
        ``fault`` (of the first visit's archive: "", ``unusable`` or ``missing_member``) and the answers
        ``household_size``, ``income``, ``fluid_intelligence``, ``smoking`` and ``site``. NaN is no answer; codes below
        0 are UK Biobank's.
    """
    rng = np.random.default_rng([seed, 0])
    count = participants + int(np.ceil(participants * _WITHOUT_SCAN))
    male = rng.permutation(np.arange(count) % 2 == 1)
    age = np.round(np.clip(rng.normal(64, 9, count), 45, 82))
    intelligence = rng.normal(size=count)
    people = pd.DataFrame(
        {
            "eid": 9_000_000 + rng.choice(1_000_000, count, replace=False),
            "male": male,
            "age": age,
            "age_repeat": age + rng.integers(2, 4, count),
            "intelligence": intelligence,
            # Men's heads are 12 % larger, so they are scaled less to reach the template.
            "head_scale": 1.30 * np.exp(rng.normal(0, 0.07, count)) * np.where(male, 1 / 1.12**0.5, 1.12**0.5),
            "scanned": np.arange(count) < participants,
            "household_size": _household_sizes(count, rng),
            "income": rng.choice([1, 2, 3, 4, 5, -1, -3], count, p=[0.13, 0.22, 0.28, 0.22, 0.06, 0.02, 0.07]),
            "fluid_intelligence": np.clip(np.round(6.6 + 2.0 * intelligence), 0, 13),
            "smoking": rng.choice([0, 1, 2, -3], count, p=[0.60, 0.33, 0.06, 0.01]),
            "site": rng.choice(_SITES, count, p=[0.55, 0.15, 0.30]),
        }
    )
    for name, share in (("fluid_intelligence", 0.08), ("household_size", 0.02), ("income", 0.03), ("smoking", 0.01)):
        people[name] = people[name].astype(np.float64).mask(rng.random(count) < share)
    order = rng.permutation(participants)
    repeats = max(round(participants * _REPEATS), participants >= 2)
    unusable = max(round(participants * _UNUSABLE), participants >= 20)
    missing = max(round(participants * _MISSING_MEMBER), participants >= 50)
    people["repeat"] = np.isin(np.arange(count), order[:repeats])
    people["fault"] = ""
    people.loc[order[repeats : repeats + unusable], "fault"] = "unusable"
    people.loc[order[repeats + unusable : repeats + unusable + missing], "fault"] = "missing_member"
    return people


def anatomy_of(person: pd.Series, session: str, seed: int) -> Anatomy:
    """Return what the brain of a row of `draw_people` looks like at a visit."""
    return Anatomy(
        age=float(person["age_repeat"] if session == REPEAT_VISIT else person["age"]),
        male=bool(person["male"]),
        intelligence=float(person["intelligence"]),
        head_scale=float(person["head_scale"]),
        seed=(seed, 1, int(person["eid"])),
    )


def visits_of(people: pd.DataFrame) -> list[tuple[int, str]]:
    """Return (row of `people`, session) of every visit with a scan, archives with a fault included."""
    return [
        (int(row), session)
        for row in np.flatnonzero(people["scanned"])
        for session in (FIRST_VISIT, REPEAT_VISIT)
        if session == FIRST_VISIT or people["repeat"].iloc[row]
    ]


def ukb_table(people: pd.DataFrame) -> pd.DataFrame:
    """Return the cohort's phenotypes as a UK Biobank table: ``31-0.0``, ``21003-2.0``, ..., codes, gaps and all."""
    codes = {variable.name: number for number, variable in BY_FIELD.items()}
    table = pd.DataFrame({"eid": people["eid"], f"{codes['sex']}-0.0": people["male"].astype("Int64")})
    ages = {FIRST_VISIT: people["age"], REPEAT_VISIT: people["age_repeat"]}
    for name in ("age", "household_size", "income", "fluid_intelligence", "smoking", "site", "head_size"):
        for session in (FIRST_VISIT, REPEAT_VISIT):
            if name == "age":
                values = ages[session]
            elif name == "head_size":
                values = people["head_scale"].round(5)
            else:
                values = people[name]
            there = people["repeat"] if session == REPEAT_VISIT else people["scanned"]
            if name == "head_size":
                there = there & (people["fault"] == "")
            column = values.where(there)
            table[f"{codes[name]}-{session}.0"] = column if name == "head_size" else column.astype("Int64")
    return table.sort_values("eid", ignore_index=True)


def bids_table(people: pd.DataFrame) -> pd.DataFrame:
    """Return the cohort's phenotypes as a BIDS ``participants.tsv``; answers that were not given are missing."""
    scanned = people[people["scanned"]]
    columns = {
        "participant_id": [f"sub-{eid}" for eid in scanned["eid"]],
        "sex": np.where(scanned["male"], "male", "female"),
        "age": scanned["age"].astype("Int64"),
    }
    for name in ("household_size", "income", "fluid_intelligence", "smoking"):
        columns[name] = scanned[name].where(scanned[name] >= 0).astype("Int64")
    return pd.DataFrame(columns).sort_values("participant_id", ignore_index=True)


def _household_sizes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Mostly couples, up to 100 people in a few households, and refusals."""
    sizes = rng.choice([1, 2, 3, 4, 5, 6, 7], count, p=[0.19, 0.47, 0.16, 0.12, 0.04, 0.015, 0.005]).astype(float)
    rare = rng.random(count)
    sizes = np.where(rare < 0.01, rng.integers(8, 101, count), sizes)
    return np.where(rare > 0.985, rng.choice([-1, -3], count), sizes)
