"""The split: nobody is in two parts, families stay together, classes are shared out alike, and it can be used again."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from finetuning import PEOPLE, SCANS, make_brains, people_of_scans, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from finetune.cohort import Cohort, read_cohort, strata_of_units
from finetune.predictions import check_names
from finetune.split import PARTS, Split, read_split, split_people, training_people, write_split
from ingest.store import VolumeStore, open_store, rows_of, write_phenotypes, write_scans


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("split") / "s.zarr"
    table = make_brains(path, without={"age": [0, 1, 2, 40], "education": range(4, SCANS, 2)})
    table.attrs["path"] = path
    return table


@pytest.fixture(scope="module")
def store(table) -> VolumeStore:
    return open_store(table.attrs["path"])


def parts_by_row(cohort: Cohort) -> dict[int, str]:
    return dict(zip(cohort.rows.tolist(), cohort.part.tolist(), strict=True))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=10, max_size=80),
    kinds=st.integers(1, 4),
    test=st.floats(0, 0.5),
    validation=st.floats(0, 0.45),
    seed=st.integers(0, 2**32),
)
def test_groups_are_whole_and_strata_shared_out_alike(sizes, kinds, test, validation, seed):
    rng = np.random.default_rng(seed)
    together = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))  # groups of people with one scan each
    participants = np.array([f"p{k}" for k in range(len(together))])
    strata = rng.integers(0, kinds, len(sizes))
    split = split_people(participants, together, strata, validation=validation, test=test, seed=seed)
    assert set(split.part_of) == set(participants)
    assert split == split_people(participants, together, strata, validation=validation, test=test, seed=seed)
    part = np.array([split.part_of[who] for who in participants])
    of_group = [set(part[together == group]) for group in range(len(sizes))]
    assert all(len(found) == 1 for found in of_group)
    of_group = np.array([found.pop() for found in of_group])
    for name, share in (("test", test), ("validation", validation)):
        assert abs((of_group == name).sum() - len(sizes) * share) <= 1
        for stratum in range(kinds):
            expected = (strata == stratum).sum() * share
            assert abs((of_group[strata == stratum] == name).sum() - expected) <= 2


def test_other_seeds_draw_other_people():
    people = np.array([f"p{k}" for k in range(50)])
    parts = [
        split_people(people, np.arange(50), np.zeros(50, int), validation=0.2, test=0.2, seed=seed) for seed in range(9)
    ]
    tests = {frozenset(who for who, part in split.part_of.items() if part == "test") for split in parts}
    assert len(tests) == 9
    assert {len(found) for found in tests} == {10}


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6, unique=True), seed=st.integers(0, 2**32))
def test_fewer_people_to_train_on_are_among_more(sizes, seed):
    rng = np.random.default_rng(seed)
    who = np.concatenate([np.arange(60), rng.integers(0, 60, 20)])
    participants = np.array([f"p{k:02}" for k in who])
    strata, train = (who % 3 == 0).astype(int)[:60], who < 45
    before: set[str] = set()
    for size in sorted(sizes):
        kept = training_people(participants, strata, train, size, seed=seed)
        people = set(participants[kept])
        assert len(people) == size
        assert before <= people
        assert np.array_equal(kept, train & np.isin(participants, list(people))), "all scans of those who are kept"
        assert abs(sum(int(p[1:]) % 3 == 0 for p in people) - size / 3) <= 1.5, "of all strata alike"
        before = people
    with pytest.raises(ValueError, match="train_people is 46, but the training part has 45"):
        training_people(participants, strata, train, 46, seed=seed)


def test_a_cohort_is_split_by_person_with_the_sexes_alike(store, table):
    cohort = read_cohort(store, tiny_settings(validation=0.25, test=0.25))
    assert cohort.people() == {"train": 20, "validation": 10, "test": 10}
    assert sum(cohort.scans().values()) == SCANS
    who = people_of_scans()
    part = np.array([parts_by_row(cohort)[row] for row in range(SCANS)])
    assert all(len(set(part[who == person])) == 1 for person in range(PEOPLE))
    for name in PARTS:
        of_part = table["sex"].to_numpy()[:PEOPLE][part[:PEOPLE] == name]
        assert abs(of_part.mean() - 0.5) <= 0.1
        assert cohort.rows_of(name).tolist() == np.flatnonzero(part == name).tolist()


def test_by_value_the_parts_are_of_all_ages(store, table):
    cohort = read_cohort(store, tiny_settings(target="age", validation=0.25, test=0.25))
    age = table["age"].to_numpy()
    assert set(cohort.rows) == set(np.flatnonzero(~np.isnan(age)))
    means = [age[cohort.rows_of(name)].mean() for name in PARTS]
    assert np.ptp(means) < 6, "of a range of 40 years"


@pytest.mark.parametrize("kind", ["phenotype", "families", "kinship"])
def test_groups_are_never_split(store, table, tmp_path, kind):
    who = people_of_scans()
    family = np.arange(PEOPLE) // 3
    given_as: dict = {"groups": str(tmp_path / "kin.csv")}
    if kind == "phenotype":
        family = table["drinks"].to_numpy()[:PEOPLE]
        given_as = {"groups": "drinks"}
    elif kind == "families":
        lines = [f"p{person:02},{family[person]}" for person in range(PEOPLE)]
        (tmp_path / "kin.csv").write_text("participant,family\n" + "\n".join(lines))
    else:
        close = [(a, a + 1, 0.3 if family[a] == family[a + 1] else 0.1) for a in range(PEOPLE - 1)]
        (tmp_path / "kin.csv").write_text("ID1 ID2 Kinship\n" + "\n".join(f"p{a:02} p{b:02} {k}" for a, b, k in close))
        given_as["kinship"] = 0.2
    cohort = read_cohort(store, tiny_settings(**given_as, validation=0.2, test=0.3))
    found = parts_by_row(cohort)
    for group in set(family):
        assert len({found[row] for row in range(SCANS) if family[who[row]] == group}) == 1
    assert all(cohort.people().values())


def test_a_split_is_written_and_used_again(store, tmp_path):
    first = read_cohort(store, tiny_settings(seed=3))
    write_split(tmp_path / "split.csv", first.split)
    with open(tmp_path / "split.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["participant", "part"]
    assert lines[1:] == sorted(map(list, first.split.part_of.items()))
    assert read_split(tmp_path / "split.csv") == first.split
    assert [f.name for f in tmp_path.iterdir()] == ["split.csv"]
    again = read_cohort(store, tiny_settings(seed=4, test=0.5, split=str(tmp_path / "split.csv")))
    assert parts_by_row(again) == parts_by_row(first)
    of_run = read_cohort(store, tiny_settings(seed=5), tmp_path / "split.csv")
    assert parts_by_row(of_run) == parts_by_row(first)
    assert first.warnings == again.warnings == []


def test_a_person_is_one_in_all_spellings(tmp_path):
    """As phenotypes and withdrawals have it: ``sub-p03`` and ``p03`` are the same."""
    path = tmp_path / "s.zarr"
    make_brains(path)
    rows = rows_of(open_store(path).scans)
    write_scans(path, [replace(row, participant=f"sub-{row.participant}") for row in rows[:PEOPLE]] + rows[PEOPLE:])
    cohort = read_cohort(open_store(path), tiny_settings())
    assert sum(cohort.people().values()) == PEOPLE
    part, who = parts_by_row(cohort), people_of_scans()
    for row in range(PEOPLE, SCANS):
        assert part[row] == part[who[row]], "another scan of the same person"
    assert len(cohort.split.part_of) == PEOPLE
    write_split(
        tmp_path / "s.csv",
        Split({f"sub-{who.removeprefix('sub-')}": name for who, name in cohort.split.part_of.items()}),
    )
    again = read_cohort(open_store(path), tiny_settings(split=str(tmp_path / "s.csv")))
    assert parts_by_row(again) == part
    assert again.warnings == []


def test_people_whom_the_table_of_families_lacks_are_told(store, tmp_path):
    lines = [f"sub-p{k:02},{k // 2}\n" for k in range(PEOPLE - 3)]
    (tmp_path / "f.csv").write_text("subject_id,family\n" + "".join(lines))
    (warning,) = read_cohort(store, tiny_settings(groups=str(tmp_path / "f.csv"))).warnings
    assert "19 groups in f.csv: 3 of 40 people are not in it" in warning


def test_people_who_are_not_in_the_split_are_left_out_and_told(store, tmp_path):
    first = read_cohort(store, tiny_settings())
    known = {who: part for who, part in first.split.part_of.items() if who not in ("p03", "p30")}
    write_split(tmp_path / "s.csv", Split({**known, "elsewhere": "train"}))
    cohort = read_cohort(store, tiny_settings(split=str(tmp_path / "s.csv")))
    assert cohort.warnings == ["2 people are in no part of the split, and left out"]
    found = parts_by_row(cohort)
    assert {row for row, part in found.items() if not part} == {3, 30, 43}, "one of them has two scans"
    assert sum(cohort.people().values()) == PEOPLE - 2
    assert np.isin(["p03", "p30"], list(cohort.split.part_of)).sum() == 0


def test_a_split_that_splits_groups_is_refused(store, tmp_path):
    write_split(tmp_path / "s.csv", read_cohort(store, tiny_settings()).split)
    with pytest.raises(ValueError, match=r"3 of the 3 groups by site are in several parts of .*s\.csv"):
        read_cohort(store, tiny_settings(split=str(tmp_path / "s.csv"), groups="site"))
    write_split(tmp_path / "t.csv", read_cohort(store, tiny_settings(groups="site")).split)
    again = read_cohort(store, tiny_settings(split=str(tmp_path / "t.csv"), groups="site"))
    assert again.warnings == ["nobody is in the validation part: the last epoch is kept, whether it is the best or not"]
    assert read_cohort(store, tiny_settings(groups="site")).warnings == again.warnings
    assert read_cohort(store, tiny_settings(groups="site", validation=0)).warnings == []


def test_a_split_without_anybody_to_test_is_told(store, tmp_path):
    part_of = read_cohort(store, tiny_settings()).split.part_of
    write_split(tmp_path / "s.csv", Split({who: part.replace("test", "train") for who, part in part_of.items()}))
    warning = "nobody is in the test part of the split: nothing will be scored; --test 0 if that is meant"
    assert read_cohort(store, tiny_settings(split=str(tmp_path / "s.csv"))).warnings == [warning]
    assert read_cohort(store, tiny_settings(split=str(tmp_path / "s.csv"), test=0)).warnings == []


def test_a_split_of_other_people_is_refused(store, tmp_path):
    write_split(tmp_path / "s.csv", Split({"a": "train"}))
    with pytest.raises(ValueError, match="nobody is in the training part"):
        read_cohort(store, tiny_settings(split=str(tmp_path / "s.csv")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none, expected participant,part"),
        ("who,part\na,train", "has the columns who,part, expected participant,part"),
        ("participant,part\na,train\nb,training", "line 3: expected a participant and one of train, validation, test"),
        ("participant,part\na,train\n\n", "line 3: expected a participant"),
        ("participant,part\na,train\na,test", "line 3: this participant has a line already"),
        (b"participant,part\n\xff,train", "cannot be read as a split"),
        (None, r"^no split at .*s\.csv; expected the split\.csv of a run$"),
    ],
)
def test_a_split_that_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "s.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_split(path)
    assert str(path) in str(error.value)


def test_any_name_of_a_person_is_written_and_read(tmp_path):
    split = Split({'a "b", c': "train", "ü\n2": "test", " 3": "validation", "": "train"})
    write_split(tmp_path / "s.csv", split)
    assert read_split(tmp_path / "s.csv") == split


def test_who_was_not_drawn_is_written_down(store, tmp_path):
    settings, path = tiny_settings(train_people=8, seed=2), tmp_path / "split.csv"
    first = read_cohort(store, settings)
    write_split(path, first.split)
    parts = Counter(read_split(path).part_of.values())
    assert parts["train"] == 8
    assert parts["unused"] == read_cohort(store, tiny_settings(seed=2)).people()["train"] - 8
    assert read_cohort(store, settings, path).fingerprint() == first.fingerprint()
    gone = next(who for who, part in first.split.part_of.items() if part == "train")
    write_split(path, Split({who: part for who, part in first.split.part_of.items() if who != gone}))
    assert read_cohort(store, settings, path).people()["train"] == 7
    everybody = tiny_settings(train_people=first.people()["train"] + parts["unused"], seed=2)
    write_split(path, read_split(path).whole())
    assert (
        read_cohort(store, everybody, path).people()["train"] == 7 + parts["unused"]
    )  # who is left, of those asked for
    write_split(path, Split({who: part for who, part in first.split.part_of.items() if who != gone}))
    other = tiny_settings(train_people=5, split=str(path))  # of a run of its own
    assert read_cohort(store, other).people()["train"] == 5
    assert read_cohort(store, other.model_copy(update={"train_people": None})).people()["train"] == 7 + parts["unused"]
    assert first.split.whole() == read_cohort(store, tiny_settings(seed=2)).split


def test_train_people_are_nested_and_the_test_is_the_same(store):
    parts = {n: read_cohort(store, tiny_settings(train_people=n, seed=2)) for n in (8, 16, None)}
    rows = {n: set(cohort.rows_of("train")) for n, cohort in parts.items()}
    assert rows[8] < rows[16] < rows[None]
    assert [parts[n].people()["train"] for n in (8, 16)] == [8, 16]
    for name in ("validation", "test"):
        assert len({tuple(cohort.rows_of(name)) for cohort in parts.values()}) == 1
    assert parts[8].split.whole() == parts[None].split


def test_strata_are_classes_or_tenths_or_unknown(store):
    cohort = read_cohort(store, tiny_settings(target="age,sex"))
    age, sex = cohort.targets
    people = people_of_scans()
    strata = strata_of_units(age, people)
    known = np.bincount(people, ~np.isnan(age.values)) > 0
    assert (strata[~known] == strata.min()).all() or known.all()
    assert len(np.unique(strata[known])) == 10
    assert len(np.unique(strata_of_units(sex, people))) == 2


def test_scans_without_any_label_are_no_part_of_it(store, table):
    cohort = read_cohort(store, tiny_settings(target="education,age"))
    education, age = table["education"].to_numpy(), table["age"].to_numpy()
    assert cohort.rows.tolist() == np.flatnonzero(~(np.isnan(education) & np.isnan(age))).tolist()
    assert np.array_equal(np.isnan(cohort.labels), np.stack([np.isnan(education), np.isnan(age)], axis=1))
    assert np.array_equal(cohort.weights == 0, np.isnan(cohort.labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": "sex"}, "nobody is in the test part: test is 0.2 of too few people, or groups .*--test 0 if that"),
        ({"monitor": "score", "validation": 0}, "monitor is score, but nobody is in the validation part"),
        (
            {"monitor": "score", "validation": 0.03},
            r"monitor is score, but the validation part has none \(sex: 1 scans .*or --monitor loss",
        ),
        ({"target": ""}, "target is empty"),
        ({"target": "height"}, "no phenotype 'height'.*age, .*sex"),
        ({"task": {"age": "count"}}, "a task is given for 'age', which is not among the targets: sex"),
        ({"task": {"sex": "count"}, "where": "sex == 1"}, "'sex' cannot be learnt: constant"),
        ({"where": "age >"}, "age >"),
        ({"where": "age > 79"}, "no scan of .* is left of which 'age > 79' is true"),
        ({"train_people": 400}, "train_people is 400, but the training part has"),
        ({"groups": "nowhere"}, "groups 'nowhere' are neither a file nor a phenotype"),
        ({"task": {"age": "ordinal"}, "target": "age"}, "age has 39 levels, expected 20 at most"),
    ],
)
def test_a_cohort_that_cannot_be_is_named(store, changes, message):
    with pytest.raises(ValueError, match=message):
        read_cohort(store, tiny_settings(**changes))


@pytest.mark.parametrize(
    ("name", "column"), [("row", "row"), ("part", "part"), ("session", "session"), ("true sex", "true sex")]
)
def test_names_of_targets_that_are_columns_of_predictions_are_refused(store, name, column):
    targets = read_cohort(store, tiny_settings(target="sex,age")).targets
    with pytest.raises(ValueError, match=rf"target '{name}' would make a column '{column}' .*rename"):
        check_names(store, [targets[0], replace(targets[1], name=name)])


def test_values_that_are_infinite_are_refused(tmp_path):
    make_brains(tmp_path / "s.zarr")
    made = open_store(tmp_path / "s.zarr")
    write_phenotypes(made.path, made.phenotypes.assign(age=np.inf), made.variables)
    with pytest.raises(ValueError, match="'age' cannot be learnt: 48 values are infinite"):
        read_cohort(open_store(made.path), tiny_settings(target="age"))


def test_where_takes_only_some_scans(store, table):
    cohort = read_cohort(store, tiny_settings(where="session == '2' and site != 1"))
    expected = (np.arange(SCANS) < PEOPLE) & (table["site"] != 1)
    assert cohort.rows.tolist() == np.flatnonzero(expected).tolist()
