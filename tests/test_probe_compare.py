"""Several embeddings side by side: on the same scans, in the same folds, with paired differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from embedded import make_embeddings

from extract.embeddings import Embeddings
from extract.probing.compare import align, differences, distinct_names, probe_all
from extract.probing.folds import rank_summary
from extract.probing.probe import probe
from extract.probing.scores import paired_interval
from extract.probing.settings import ProbeSettings

ONCE = ProbeSettings(repeats=2)


def chosen(embeddings: Embeddings, rows: np.ndarray, **attrs: object) -> Embeddings:
    """Return some scans of embeddings, in that order."""
    return replace(
        embeddings,
        features=embeddings.features[rows],
        scans=embeddings.scans.iloc[rows].reset_index(drop=True),
        phenotypes=embeddings.phenotypes.iloc[rows].reset_index(drop=True),
        attrs={**embeddings.attrs, **attrs},
    )


@pytest.fixture(scope="module")
def good() -> Embeddings:
    """Return 110 scans of 90 people, some seen twice; features know age."""
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(90), np.arange(20)])
    age = rng.uniform(45, 80, 90)[people]
    features = rng.normal(size=(110, 30))
    features[:, :5] += (age[:, None] - 62) / 10
    embeddings = make_embeddings(
        features, {"age": age, "sex": people % 2}, people=people, variables={"age": {"units": "years"}}
    )
    scans = embeddings.scans.assign(session=["2"] * 90 + ["3"] * 20)
    return replace(embeddings, scans=scans)


@pytest.fixture(scope="module")
def bad(good) -> Embeddings:
    """Return embeddings of the same scans that know nothing, in another order, without three of the scans."""
    rows = np.random.default_rng(1).permutation(110)[3:]
    noise = np.random.default_rng(2).normal(size=(110, 12)).astype(np.float32)
    return chosen(replace(good, features=noise), rows)


def test_shared_scans_are_kept_in_the_order_of_the_first(good, bad):
    aligned, warnings = align({"good": good, "bad": bad})
    identity = ["participant", "session"]
    for one in aligned.values():
        assert len(one.features) == len(one.scans) == len(one.phenotypes) == 107
    kept = good.scans[identity].merge(bad.scans[identity])
    assert aligned["good"].scans[identity].equals(kept)
    for name, source in (("good", good), ("bad", bad)):
        for place in (0, 50, 106):
            who = tuple(aligned[name].scans[identity].iloc[place])
            row = [tuple(pair) for pair in source.scans[identity].to_numpy()].index(who)
            np.testing.assert_array_equal(aligned[name].features[place], source.features[row])
    assert warnings == ["3 of the 110 scans of good are left out, for other embeddings lack them"]


def test_rows_tell_scans_apart_within_one_store(good):
    store = {"store": {"id": "a"}}
    twins = replace(good, scans=good.scans.assign(session="", modality="T1w"), attrs={**good.attrs, **store})
    aligned, warnings = align({"a": twins, "b": chosen(twins, np.arange(109, -1, -1))})
    np.testing.assert_array_equal(aligned["a"].features, aligned["b"].features)
    assert warnings == []
    other = replace(twins, attrs={**good.attrs, "store": {"id": "b"}})
    with pytest.raises(ValueError, match=r"20 scans of a share participant, session, modality"):
        align({"a": twins, "b": other})


def test_rows_of_copies_that_grew_apart_are_not_of_one_person(good):
    one = replace(good, attrs={**good.attrs, "store": {"id": "a"}})
    others = one.scans.assign(participant=[*one.scans["participant"][:100], *(f"new{k}" for k in range(10))])
    aligned, warnings = align({"a": one, "b": replace(one, scans=others)})
    assert len(aligned["a"].scans) == 100
    assert [line[:29] for line in warnings] == ["10 of the 110 scans of a are ", "10 of the 110 scans of b are "]


def test_the_modality_counts_only_where_it_must(good):
    other = replace(good, scans=good.scans.assign(modality="T2_FLAIR"))
    assert len(align({"t1": good, "t2": other})[0]["t2"].features) == 110  # another image of the same session
    both = replace(good, scans=good.scans.assign(session="2", modality=["T1w"] * 90 + ["T2w"] * 20))
    assert len(align({"a": both, "b": both})[0]["a"].features) == 110


def test_people_and_visits_are_the_same_in_all_spellings(good):
    spelt = good.scans.assign(participant="sub-" + good.scans["participant"], session="ses-" + good.scans["session"])
    assert len(align({"a": good, "b": replace(good, scans=spelt)})[0]["b"].features) == 110


def test_strangers_have_nothing_in_common(good):
    others = replace(good, scans=good.scans.assign(participant="x" + good.scans["participant"]))
    with pytest.raises(ValueError, match="good and others have no scan in common"):
        align({"good": good, "others": others})
    nobody = replace(good, scans=good.scans[["row"]])
    with pytest.raises(ValueError, match="which participants"):
        align({"good": good, "nobody": nobody})


def test_phenotypes_are_those_of_the_first_and_others_are_named(good):
    older = good.phenotypes.assign(age=good.phenotypes["age"].where(np.arange(110) > 4, np.nan), new=1.0)
    aligned, warnings = align({"a": good, "b": replace(good, phenotypes=older, variables={})})
    assert warnings == ["age of 5 scans differs between a and b; that of a is taken"]
    assert aligned["b"].phenotypes.equals(good.phenotypes)
    assert aligned["b"].variables == good.variables


def test_differences_are_paired_by_fold(good, bad):
    aligned, _ = align({"good": good, "bad": bad, "again": good})
    probed = probe_all(aligned, ["age", "sex"], settings=ONCE)
    first, second, third = (one.results for one in probed)
    found = {(difference.target, difference.name): difference for difference in differences(probed)}
    assert set(found) == {(target, name) for target in ("age", "sex") for name in ("bad", "again")}
    age = found["age", "bad"]
    assert age.interval == paired_interval(second[0], first[0], "r")
    assert age.interval.score == pytest.approx(second[0].headline.score - first[0].headline.score)
    assert age.interval.high < 0  # knowing age is better than not
    assert (found["age", "again"].interval.low, found["age", "again"].interval.high) == (0, 0)
    assert third[0].metrics == first[0].metrics
    assert age.to_json()["difference"] == pytest.approx(age.interval.score, rel=1e-5)
    assert {"target", "metric", "name", "reference", "low", "high"} <= set(age.to_json())
    assert [one.results[0].n for one in probed] == [107] * 3


def test_perfect_scores_leave_their_differences_open():
    rng = np.random.default_rng(0)
    ill = np.arange(60) < 20
    features = rng.normal(size=(60, 5)) + 40 * ill[:, None] * (np.arange(5) == 0)
    perfect = make_embeddings(features, {"ill": ill, "told": 2.0 * ill + 1, "other": rng.integers(0, 9, 60)})
    noise = replace(perfect, features=rng.normal(size=(60, 5)).astype(np.float32))
    probed = probe_all({"a": perfect, "b": perfect, "noise": noise}, ["ill"], settings=ONCE)
    same, worse = differences(probed)
    left_open = 1 - 0.025 ** (1 / 20)  # what 20 of 20 successes leave open
    assert (same.interval.low, same.interval.high) == pytest.approx((-left_open, left_open))
    assert worse.interval.high == pytest.approx(worse.interval.score + left_open)
    (found,) = probe(perfect, ["ill"], settings=ProbeSettings(repeats=1, confounds=("told",)))
    gain = found.gains["auc"]
    assert (gain.score, gain.low) == (-0.5, -0.5)  # nothing is left of the features
    assert gain.high == pytest.approx(-0.5 + left_open)
    gain = probe(perfect, ["ill"], settings=ProbeSettings(repeats=1, confounds=("other",)))[0].gains["auc"]
    assert gain.low <= gain.score - left_open + 1e-12


def test_what_folds_are_stratified_by_is_computed_once(good, bad, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "extract.probing.probe.rank_summary", lambda values: calls.append(values.shape) or rank_summary(values)
    )
    once = ProbeSettings(repeats=1, folds=2)
    probe_all(align({"good": good, "bad": bad})[0], ["age"], settings=once, curve=[20, 30])
    assert calls == [(107, 1)]
    probe(good, ["sex"], settings=once)
    assert len(calls) == 1, "no regression is asked for"


def test_each_is_what_it_is_alone_on_those_scans(good, bad):
    aligned, _ = align({"good": good, "bad": bad})
    probed = probe_all(aligned, ["age"], settings=ONCE)
    for one in probed:
        assert one.results[0].metrics == probe(aligned[one.name], ["age"], settings=ONCE)[0].metrics


def test_confounds_are_the_same_in_any_space(good):
    rng = np.random.default_rng(3)
    scans = good.scans.assign(brain_voxels=rng.normal(1.2e6, 1e5, 110), head_scale=rng.normal(1.3, 0.1, 110))
    native = replace(good, scans=scans)
    mni = replace(native, attrs={**good.attrs, "store": {"grid": {"space": "MNI152", "voxel_mm": 1.0}}})
    settings = ProbeSettings(repeats=1, confounds=("brain_volume",))
    probed = probe_all(align({"native": native, "mni": mni})[0], ["age"], settings=settings, curve=[30])
    first, second = (one.results[0] for one in probed)
    assert first.confound_metrics == second.confound_metrics
    assert first.metrics == second.metrics
    assert probed[0].curves["age"].points[0] == probed[1].curves["age"].points[0]
    assert first.confound_metrics == probe(native, ["age"], settings=settings)[0].confound_metrics


def test_what_was_skipped_has_no_difference(good):
    few = replace(good, phenotypes=good.phenotypes.assign(age=np.nan))
    aligned, warnings = align({"a": few, "b": few})
    assert warnings == []
    assert {difference.target for difference in differences(probe_all(aligned, ["age", "sex"], settings=ONCE))} == {
        "sex"
    }


@pytest.mark.parametrize(
    ("paths", "layers", "names"),
    [
        (["x/2d.zarr", "y/3d.h5"], [None, None], ["2d", "3d"]),
        (["x/emb.zarr", "x/emb.h5"], [None, None], ["emb.zarr", "emb.h5"]),
        (["x/emb.h5", "y/emb.h5"], [None, None], ["emb.h5 (1)", "emb.h5 (2)"]),
        (["emb.h5", "emb.h5"], ["layer3", "layer4"], ["emb layer3", "emb layer4"]),
        (["a.h5", "b.h5"], ["layer3", "layer3"], ["a", "b"]),
    ],
)
def test_names_are_short_and_different(paths, layers, names):
    assert distinct_names([Path(path) for path in paths], layers) == names
