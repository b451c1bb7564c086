"""Groups that are never split: families, pairs of relatives, sites; classes of numbers; fewer people to train on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from embedded import make_cohort, make_embeddings

from extract.probing.doubts import doubts
from extract.probing.groups import read_groups
from extract.probing.probe import probe
from extract.probing.scores import paired_interval
from extract.probing.settings import ProbeSettings

KIN = """ID1 ID2 HetHet IBS0 Kinship
9000000 9000001 0.02 0.01 0.25
9000001 9000002 0.02 0.01 0.10
9000003 9000004 0.02 0.01 0.05
9000005 9000006 0.02 0.01 0.02
9000007 1111111 0.02 0.01 0.25
"""


def people_of(count: int = 10, **phenotypes):
    return make_embeddings(np.zeros((count, 1)), phenotypes or {"y": np.zeros(count)})


@pytest.mark.parametrize(("kinship", "families"), [(0.0442, [3, 2]), (0.09, [3]), (0.01, [3, 2, 2]), (0.3, [])])
def test_relatives_are_connected_components(tmp_path, kinship, families):
    (tmp_path / "ukb_rel.dat").write_text(KIN)
    groups = read_groups(people_of(), tmp_path / "ukb_rel.dat", kinship)
    sizes = np.bincount(groups.together)
    assert sorted(sizes[sizes > 1], reverse=True) == families
    assert len(set(groups.together[:3])) == 1 or not families
    assert "ukb_rel.dat" in groups.note


@pytest.mark.parametrize(
    "text",
    ["participant,group\n9000000,a b\n9000004,a b\n9000002,c\n", "eid\tfamily\n9000000\t1\n9000004\t1\n"],
)
def test_families_by_number(tmp_path, text):
    (tmp_path / "families.txt").write_text(text)
    together = read_groups(people_of(), str(tmp_path / "families.txt")).together
    assert together[0] == together[4]
    assert len(set(together)) == 9


def test_people_are_known_in_all_spellings_and_strangers_are_told(tmp_path):
    (tmp_path / "f.csv").write_text("Subject_ID,family,\nsub-9000000,1,,\n9000004.0,1,,\n9000002,2,,\n")
    groups = read_groups(people_of(), tmp_path / "f.csv")
    assert groups.together[0] == groups.together[4]
    (warning,) = groups.about_strangers()
    assert warning.startswith("2 groups in f.csv: 7 of 10 people are not in it")
    settings = ProbeSettings(groups=str(tmp_path / "f.csv"))
    assert warning in doubts({"e": people_of(age=np.arange(10))}, [], tasks={}, settings=settings)


def test_one_person_in_two_spellings_is_one():
    embeddings = people_of()
    ids = ["sub-9000000", "9000000", *(f"900000{i}" for i in range(2, 10))]
    groups = read_groups(replace(embeddings, scans=embeddings.scans.assign(participant=ids)), None)
    assert groups.people[0] == groups.people[1]
    assert groups.people.max() == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["cannot be read"]),
        ("a,b\n1,2\n", ["a, b", "participant and group", "ID1"]),
        ("participant,group\n1,2\n", ["none of the people", "'1'", "9000000"]),
        ("ID1 ID2\n1 2\n", ["none of the people"]),
        ("ID1 ID2 Kinship\n9000000 9000001 close\n", ["row 2", "close"]),
        ("participant,group\n" + "".join(f"900000{i},1\n" for i in range(10)), ["everybody is in one group"]),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, text, words):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_groups(people_of(), tmp_path / "table.csv")
    assert all(word in str(caught.value) for word in words)


def test_scans_of_nobody_known_are_refused():
    embeddings = people_of()
    for missing in (None, np.nan, "", "  "):
        ids = ["9000000", missing, missing, *map(str, range(7))]
        with pytest.raises(ValueError, match=r"2 of 10 scans have no participant .*expected an id of each"):
            read_groups(replace(embeddings, scans=embeddings.scans.assign(participant=ids)), None)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("weak.dat", "2 pairs of them are in the table, the closest with a kinship of 0.02; take a lower --kinship"),
        ("strangers.dat", "expected a table with the participants of these scans"),
        ("age", "each has a group of their own; name a phenotype whose values people share, such as site"),
    ],
)
def test_groups_of_one_each_come_with_advice(tmp_path, monkeypatch, groups, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weak.dat").write_text("ID1 ID2 Kinship\n9000000 9000001 0.02\n9000001 9000002 0.01\n9000003 1 0.3\n")
    (tmp_path / "strangers.dat").write_text("ID1 ID2 Kinship\n9000003 1 0.3\n")
    (warning,) = doubts({"e": people_of(age=np.arange(10))}, [], tasks={}, settings=ProbeSettings(groups=groups))[1:]
    assert "no two of the people here are in one group" in warning
    assert warning.endswith(words) or f"{words} if these are relatives" in warning


def test_groups_may_be_a_phenotype():
    embeddings = people_of(site=np.array([1, 1, 1, 2, 2, 2, 3, 3, np.nan, np.nan]))
    groups = read_groups(embeddings, "site")
    assert len(set(groups.together)) == 5  # three sites, and two people alone
    assert len(set(groups.units)) == 10
    assert len(set(groups.blocks)) == 4  # those without a site are one block
    with pytest.raises(ValueError, match=r"'nothing' are neither a file nor a phenotype.*site"):
        read_groups(embeddings, "nothing")
    scans = embeddings.scans.assign(participant=["9", *embeddings.scans["participant"][1:6], "9", "7", "6", "5"])
    moved = read_groups(replace(embeddings, scans=scans), "site")  # one person at sites 1 and 3
    assert moved.together[0] == moved.together[6] == moved.together[7] != moved.together[3]


def test_groups_are_blocks_if_few_or_large_else_units(tmp_path):
    rng = np.random.default_rng(0)
    for of in (np.arange(200) % 6, np.arange(800) % 25):
        groups = read_groups(people_of(len(of), site=of), "site")
        assert len(set(groups.units)) == len(of)
        np.testing.assert_array_equal(groups.blocks, of)
    family = np.repeat(np.arange(100), 2)
    own = rng.normal(size=100)[family]
    features = rng.normal(size=(200, 5)) + 2 * own[:, None]
    embeddings = make_embeddings(features, {"y": own, "family": family})
    settings = ProbeSettings(repeats=1, groups="family", permutations=19, bootstrap=50)
    (found,) = probe(embeddings, ["y"], settings=settings)
    assert found.p_value == 1 / 20
    groups = read_groups(embeddings, "family")
    assert (len(set(groups.units)), len(set(groups.blocks))) == (100, 1)

    sizes = [10, 14, 18, 22, 26, 30]  # a table of sites, whose wholes cannot be exchanged
    of = np.repeat(np.arange(6), sizes)
    rows = [f"9{person:06d},{one}" for person, one in enumerate(of)]
    (tmp_path / "sites.csv").write_text("\n".join(["participant,group", *rows]))
    y = rng.normal(size=len(of))
    embeddings = make_embeddings(y[:, None] + 0.1 * rng.normal(size=(len(of), 4)), {"y": y, "same": of + 0.0})
    settings = ProbeSettings(repeats=1, groups=tmp_path / "sites.csv", permutations=19)
    found, same = probe(embeddings, ["y", "same"], settings=settings)
    assert found.p_value == 1 / 20
    assert same.p_value is None  # what all people of a site share
    assert "no p value: only 0 of 120 labels can be exchanged" in same.null
    assert same.null in same.method


def test_a_kinship_needs_a_table_that_has_some(tmp_path):
    (tmp_path / "families.csv").write_text("participant,family\n9000000,1\n9000001,1\n")
    (tmp_path / "kin.dat").write_text(KIN)
    embeddings = people_of(site=np.arange(10) % 3)
    for groups in ("site", tmp_path / "families.csv"):
        with pytest.raises(ValueError, match=r"kinship=0\.1 needs .*Kinship"):
            read_groups(embeddings, groups, 0.1)
    assert "(kinship of 0.0442 or more)" in read_groups(embeddings, tmp_path / "kin.dat").note
    with pytest.raises(ValueError, match=r"kinship=0\.1 needs groups"):
        ProbeSettings(kinship=0.1)


@pytest.mark.parametrize("task", ["binary", "continuous"])
def test_families_are_never_split_and_what_they_share_does_not_score(tmp_path, task):
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(40), 3)
    pairs = [f"9{a:06d} 9{a + 1:06d} 0.25" for a in range(120) if a % 3 < 2]
    (tmp_path / "kin.dat").write_text("ID1 ID2 Kinship\n" + "\n".join(pairs) + "\n")
    features = rng.normal(size=(40, 60))[family] + 0.1 * rng.normal(size=(120, 60))
    label = rng.permutation(np.arange(40) % 2)[family] if task == "binary" else rng.normal(size=40)[family]
    embeddings = make_embeddings(features, {"y": label}, variables={"y": {"task": task}})
    (split,) = probe(embeddings, settings=ProbeSettings(repeats=2))
    (whole,) = probe(embeddings, settings=ProbeSettings(repeats=2, groups=tmp_path / "kin.dat"))
    assert split.headline.score > 0.85
    assert whole.headline.holds_chance
    assert pd.Series(whole.out_of_fold.fold).groupby(family).nunique().max() == 1
    assert "families of 80 related pairs in kin.dat" in whole.method


def test_identity_of_60_people_with_4_scans_does_not_score():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(60), 4)
    features = rng.normal(size=(60, 64))[people] + 0.1 * rng.normal(size=(240, 64))
    label = rng.permutation(np.arange(60) % 2)[people]
    rows = cross_val_score(
        LogisticRegression(max_iter=1000), features, label, cv=StratifiedKFold(5, shuffle=True), scoring="roc_auc"
    )
    assert rows.mean() > 0.9
    settings = ProbeSettings(permutations=99, bootstrap=200)
    (found,) = probe(make_embeddings(features, {"x": label}, people=people), settings=settings)
    assert found.headline.holds_chance
    assert found.headline.boot_low < 0.5 < found.headline.boot_high
    assert found.p_value > 0.05


def test_sites_are_folds_and_repeats_that_would_be_the_same_are_not_made():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 4, 120)
    features = rng.normal(size=(120, 10))
    embeddings = make_embeddings(
        features, {"site": site, "y": features[:, 0], "sex": features[:, 1] + rng.normal(size=120) > 0}
    )
    for found in probe(embeddings, ["y", "sex"], settings=ProbeSettings(groups="site")):
        dealt = (
            "4 folds of groups x 1 repeats (fewer than 5: there are no more groups); kept together: 4 groups by site"
        )
        assert dealt in found.method
        assert pd.Series(found.out_of_fold.fold).groupby(site).nunique().max() == 1
        assert found.headline.low > found.headline.chance


@pytest.mark.parametrize(("sizes", "alone"), [([50, 50, 50, 50], 4), ([98, 99], 3), ([70, 40, 30, 30, 25], 5)])
def test_people_without_a_site_are_no_fold_of_their_own(sizes, alone):
    rng = np.random.default_rng(0)
    site = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(alone, np.nan)])
    features = rng.normal(size=(len(site), 5))
    phenotypes = {
        "y": features[:, 0] + rng.normal(size=len(site)),
        "c": rng.integers(0, 2, len(site)) * 1.0,
        "site": site,
    }
    settings = ProbeSettings(groups="site", repeats=4)
    value, code = probe(make_embeddings(features, phenotypes), ["y", "c"], settings=settings)
    for result in (value, code):
        tested = np.bincount(result.out_of_fold.fold)
        assert tested.min() >= min(sizes)
        assert len(tested) == len(sizes)
        assert result.effective_groups < len(sizes) + 1
    assert value.headline.score > 0.5
    assert value.metrics["r2"].score > 0.2


def test_of_two_sites_each_is_tested_once():
    rng = np.random.default_rng(0)
    site, features = np.arange(80) % 2, rng.normal(size=(80, 6))
    table = {"site": site, "y": features[:, 0] + rng.normal(size=80), "sex": features[:, 1] > 0}
    for found in probe(make_embeddings(features, table), ["y", "sex"], settings=ProbeSettings(groups="site")):
        assert "2 folds of groups x 1 repeats" in found.method
        assert found.headline.score > found.headline.chance + 0.2


# ---- classes of numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bins", "labels"),
    [((55, 65), ["<55", "55-65", ">=65"]), ((62.5,), ["<62.5", ">=62.5"]), (4, None)],
)
def test_numbers_become_classes(bins, labels):
    embeddings = make_cohort()
    (found,) = probe(embeddings, ["age"], settings=ProbeSettings(repeats=1, bins={"age": bins}))
    assert (found.metric, found.task) == ("auc", "binary" if bins == (62.5,) else "multiclass")
    assert found.headline.low > 0.5
    age = embeddings.phenotypes["age"].dropna().to_numpy()
    if labels:
        assert found.labels == labels
        np.testing.assert_array_equal(found.out_of_fold.truth, np.digitize(age, bins))
    else:
        assert len(found.labels) == 4
        people = embeddings.scans["participant"][embeddings.phenotypes["age"].notna()]
        counts = np.bincount(found.out_of_fold.truth[~people.duplicated().to_numpy()])
        assert np.ptp(counts) <= 3
    assert "edges at" in found.method


def test_classes_of_numbers_may_be_ordinal():
    settings = ProbeSettings(repeats=1, bins={"age": 4})
    (found,) = probe(make_cohort(), ["age"], tasks={"age": "ordinal"}, settings=settings)
    assert (found.metric, sorted(set(found.out_of_fold.truth))) == ("r", [0, 1, 2, 3])


def test_bins_that_hold_everybody_are_skipped_and_those_of_no_target_refused():
    (found,) = probe(make_cohort(), ["age"], settings=ProbeSettings(bins={"age": (200,)}))
    assert (found.status, "one class only" in found.reason) == ("skipped", True)
    with pytest.raises(ValueError, match=r"bins are given for 'age', which is not among the targets: gender"):
        probe(make_cohort(), ["sex"], settings=ProbeSettings(bins={"age": 2}))


def test_edges_have_the_digits_that_keep_classes_equal_and_no_more():
    values = np.arange(120) / 1000 + 1234.5
    (found,) = probe(people_with(values), ["y"], settings=ProbeSettings(repeats=1, bins={"y": 4}))
    assert np.bincount(found.out_of_fold.truth).tolist() == [30] * 4
    assert found.labels == ["<1234.53", "1234.53-1234.56", "1234.56-1234.59", ">=1234.59"]
    (found,) = probe(people_with(np.append(np.inf, values[1:])), ["y"], settings=ProbeSettings(bins={"y": 4}))
    assert found.reason == "1 values are infinite"


def test_classes_have_names_of_their_own():
    codes = np.repeat([1_000_001.0, 1_000_002.0, 3.0], 20)
    (found,) = probe(people_with(codes, task="multiclass"), settings=ProbeSettings(repeats=1))
    assert found.labels == ["3", "1000001", "1000002"]
    labels = {"3": "other", "1000001": "other", "1000002": "none"}
    (found,) = probe(people_with(codes, task="multiclass", labels=labels), settings=ProbeSettings(repeats=1))
    assert found.labels == ["other (3)", "other (1000001)", "none"]


def test_people_may_be_of_every_class_and_few_of_one_are_few_folds():
    rng = np.random.default_rng(0)
    ill = np.repeat([0, 1], 30)  # everyone before and after
    both = make_embeddings(rng.normal(size=(60, 4)), {"y": ill}, people=np.tile(np.arange(30), 2))
    (found,) = probe(both, settings=ProbeSettings(repeats=1))
    assert (found.status, found.participants) == ("ok", 30)
    (found,) = probe(people_with(np.arange(60) < 6), settings=ProbeSettings(repeats=1))
    assert "3 folds of participants x 1 repeats (fewer than 5: each needs 2 people of every class" in found.method
    assert "'1' has 6)" in found.method
    site = np.repeat(np.arange(6), 20)  # one class is large, and at two sites
    features = rng.normal(size=(120, 4))
    table = {"site": site, "y": (site < 2) & (np.arange(120) % 2 == 0)}
    (found,) = probe(make_embeddings(features, table), ["y"], settings=ProbeSettings(repeats=1, groups="site"))
    assert "2 folds of groups" in found.method
    assert "2 people of every class, and too few groups hold '1' (2 of 6))" in found.method


def people_with(values: np.ndarray, **attrs: object):
    features = np.random.default_rng(0).normal(size=(len(values), 4))
    return make_embeddings(features, {"y": values}, variables={"y": attrs})


# ---- fewer people to train on, and embeddings compared ---------------------------------------------------------------


def test_fewer_people_are_trained_on_and_the_same_are_tested():
    cohort = make_cohort()
    names = ["gender", "age", "smoking"]
    whole = probe(cohort, names, settings=ProbeSettings(repeats=2))
    part = probe(cohort, names, settings=ProbeSettings(repeats=2, train_people=30))
    for all_people, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_people.out_of_fold.fold, some.out_of_fold.fold)
        assert some.train_participants == 30 < all_people.train_participants
        assert some.headline.score < all_people.headline.score
        assert some.test_to_train == all_people.test_to_train
    same = probe(cohort, ["gender"], settings=ProbeSettings(repeats=2, train_people=80))[0]
    assert same.metrics == whole[0].metrics
    many = probe(cohort, ["gender"], settings=ProbeSettings(train_people=81))[0]
    assert (many.status, many.reason) == (
        "skipped",
        "the smallest training side has 80 people, fewer than the 81 to train on",
    )


def test_embeddings_are_compared_fold_by_fold():
    cohort = make_cohort()
    worse = replace(cohort, features=cohort.features + np.float32(3) * np.random.default_rng(0).normal(size=(120, 40)))
    good, bad = (probe(one, ["sex"], settings=ProbeSettings(repeats=2))[0] for one in (cohort, worse))
    found = paired_interval(good, bad, "auc")
    assert found.score == pytest.approx(good.headline.score - bad.headline.score)
    assert (found.chance, found.low > 0) == (0, True)
    other = probe(cohort, ["sex"], settings=ProbeSettings(repeats=2, seed=1))[0]
    with pytest.raises(ValueError, match="other folds"):
        paired_interval(good, other, "auc")
    with pytest.raises(ValueError, match="'r' is not among"):
        paired_interval(good, bad, "r")
