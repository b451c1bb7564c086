"""Phenotypes of a table given to a probe: joined by participant, beside or instead of those of the embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call
from embedded import make_cohort

from extract.embeddings import open_embeddings, write_embeddings
from extract.probing.apply import apply_probe, load_probe
from extract.probing.cli import main
from extract.probing.phenotypes import join_table
from ingest.errors import TableError

PEOPLE = [f"9{person:06d}" for person in range(100)]
FAST = ("--folds", 2, "--repeats", 1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """Work where there are tables, and two embeddings of the same 120 scans that differ in the age."""
    monkeypatch.chdir(tmp_path)
    cohort = make_cohort()
    cohort = replace(cohort, scans=cohort.scans.assign(session=["2"] * 100 + ["3"] * 20))
    write_embeddings("emb.h5", cohort)
    rng = np.random.default_rng(1)
    older = cohort.phenotypes.assign(age=cohort.phenotypes["age"] + 1)
    noise = rng.normal(size=(120, 5)).astype(np.float32)
    write_embeddings("noise.h5", replace(cohort, features=noise, phenotypes=older))
    hours = 8 - 2 * cohort.features[:100, 0] + rng.normal(size=100)
    handed = np.where(cohort.features[:100, 5] > 0.5, "left", "right")
    pd.DataFrame({"participant_id": PEOPLE, "hours": hours, "handed": handed}).to_csv("plain.csv", index=False)
    age = np.round(62 + 8 * cohort.features[:100, 1])
    pd.DataFrame({"eid": PEOPLE, "21003-2.0": age, "31-0.0": np.arange(100) % 2}).to_csv("ukb.csv", index=False)


def probed(*arguments: object) -> tuple[dict, str]:
    done = call(main, *arguments, *FAST, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_plain_table_adds_variables():
    document, _ = probed("emb.h5", "--phenotypes", "plain.csv", "--targets", "hours,handed", "--confounds", "age")
    assert document["phenotypes"] == {"table": "plain.csv", "variables": ["hours", "handed"], "bad_values": 0}
    hours, handed = document["targets"]
    assert (hours["n"], hours["confounds"]) == (110, ["age"])  # which the embeddings have, not of all
    assert hours["score"] > 0.5
    assert handed["labels"] == ["left", "right"]
    assert probed("emb.h5", "--targets", "age")[0]["phenotypes"] is None


def test_a_table_of_uk_biobank_replaces_variables_by_whatever_name():
    joined = join_table(open_embeddings("emb.h5"), Path("ukb.csv")).embeddings
    assert set(joined.phenotypes) == {"site", "something", "smoking", "fluid_intelligence", "age", "sex"}  # no gender
    assert joined.phenotypes["age"].notna().sum() == 100  # no column is of visit 3
    assert joined.variables["sex"]["labels"] == {"0": "female", "1": "male"}
    assert "gender" not in joined.variables
    document, _ = probed("emb.h5", "--phenotypes", "ukb.csv", "--targets", "age,sex")
    assert [(one["name"], one["n"]) for one in document["targets"]] == [("age", 100), ("sex", 120)]


def test_all_embeddings_are_probed_for_the_table():
    document, err = probed("emb.h5", "noise.h5", "--phenotypes", "ukb.csv", "--targets", "age", "--curve", "20")
    assert "differs between" not in err  # their own ages are not those that are probed
    assert [one["targets"][0]["n"] for one in document["embeddings"]] == [100, 100]
    assert [point["train_participants"] for point in document["targets"][0]["curve"]] == [20, 50]
    assert "differs between" in probed("emb.h5", "noise.h5", "--targets", "age")[1]


def test_bad_values_are_told_and_end_with_1_but_name_nobody_in_the_report():
    table = pd.read_csv("plain.csv", dtype=str)
    table.loc[0, "hours"] = "a lot"
    table[:-1].to_csv("bad.csv", index=False)
    done = call(main, "emb.h5", "--phenotypes", "bad.csv", "--targets", "hours", *FAST, "--report", "r.html")
    assert done.returncode == 1
    assert f"1 of 120 scans have no row, {PEOPLE[-1]}" in done.stderr
    assert "a lot" in done.stderr
    assert "phenotypes of bad.csv: hours, handed" in done.stdout
    page = Path("r.html").read_text(encoding="utf-8")
    assert PEOPLE[-1] not in page
    assert all(f"<td>{value}</td>" in page for value in ("bad.csv", "hours, handed"))


def test_models_are_applied_with_the_confounds_of_a_table():
    options = ("--phenotypes", "plain.csv", "--targets", "age", "--confounds", "hours")
    assert call(main, "emb.h5", *options, *FAST, "--save", "m.json").returncode == 0
    assert json.loads(Path("m.json").read_text())["phenotypes"]["table"] == "plain.csv"
    done = call(main, "apply", "m.json", "emb.h5", "p.csv")
    assert (done.returncode, "--phenotypes FILE" in done.stderr) == (1, True)
    done = call(main, "apply", "m.json", "emb.h5", "p.csv", "--phenotypes", "plain.csv", "--json")
    assert (done.returncode, json.loads(done.stdout)["phenotypes"]["table"]) == (0, "plain.csv")
    joined = join_table(open_embeddings("emb.h5"), Path("plain.csv")).embeddings
    expected = apply_probe(load_probe(Path("m.json")), joined)["age"]
    np.testing.assert_allclose(pd.read_csv("p.csv")["age"], expected, rtol=1e-12)
    pd.DataFrame({"participant_id": PEOPLE, "hours": ["a lot", *range(99)]}).to_csv("bad.csv", index=False)
    assert call(main, "apply", "m.json", "emb.h5", "q.csv", "--phenotypes", "bad.csv").returncode == 1
    assert len(pd.read_csv("q.csv")) == 120


def test_tables_that_cannot_be_used_are_refused():
    Path("ids.csv").write_text("participant_id\n9000000\n")
    with pytest.raises(TableError, match=r"ids\.csv has no column beside those of who and when"):
        join_table(open_embeddings("emb.h5"), Path("ids.csv"))
    for table, words in (("none.csv", "none.csv"), ("ids.csv", "ids.csv"), ("emb.h5", "emb.h5")):
        done = call(main, "emb.h5", "--phenotypes", table)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert words in done.stderr
    assert call(main, "emb.h5", "--phenotypes", "gs://bucket/p.csv").returncode == 2
