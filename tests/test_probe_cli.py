"""The probe command with several embeddings, curves, confounds, and models that are saved and applied."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embedded import make_cohort

from extract.embeddings import open_embeddings, write_embeddings
from extract.probing.apply import load_probe
from extract.probing.cli import main
from extract.probing.compare import align, differences, probe_all
from extract.probing.doubts import doubts
from extract.probing.model import refit
from extract.probing.printing import print_json
from extract.probing.settings import ProbeSettings
from ingest.errors import StoreError

LAYERS = [{"name": "layer3", "features": 30, "start": 0}, {"name": "avgpool", "features": 10, "start": 30}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with two embeddings of the same people, of which the second lacks a scan and knows nothing."""
    folder = tmp_path_factory.mktemp("emb")
    cohort = make_cohort()
    cohort = replace(cohort, attrs={**cohort.attrs, "layers": LAYERS, "store": {"path": "/home/jane/t1.zarr"}})
    write_embeddings(folder / "2d.h5", cohort)
    scans = cohort.scans.assign(session=["2"] * 100 + ["3"] * 20)
    write_embeddings(folder / "2d.h5", replace(cohort, scans=scans))
    noise = np.random.default_rng(5).normal(size=(119, 8)).astype(np.float32)
    fewer = replace(cohort, features=noise, scans=scans[:119], phenotypes=cohort.phenotypes[:119])
    write_embeddings(folder / "noise.zarr", replace(fewer, attrs={**cohort.attrs, "layers": None}))
    nobody = replace(fewer, features=noise[:0], scans=scans[:0], phenotypes=cohort.phenotypes[:0])
    write_embeddings(folder / "nobody.npz", nobody)
    (folder / "taken.html").mkdir()
    (folder / "strangers.csv").write_text("participant,family\n1234567,1\n")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Return a function that runs the command in that folder; it returns exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["probe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_several_embeddings_are_compared(run, folder):
    code, out, err = run("2d.h5", "noise.zarr", "--targets", "sex,age", "--repeats", 1, "--json")
    assert code == 0
    assert err == "warning: 1 of the 120 scans of 2d are left out, for other embeddings lack them\n"
    document = json.loads(out)
    named = {name: open_embeddings(folder / file) for name, file in (("2d", "2d.h5"), ("noise", "noise.zarr"))}
    probed = probe_all(align(named)[0], ["gender", "age"], settings=ProbeSettings(repeats=1))
    assert [one["name"] for one in document["embeddings"]] == ["2d", "noise"]
    assert [one["file"] for one in document["embeddings"]] == ["2d.h5", "noise.zarr"]
    for one, expected in zip(document["embeddings"], probed, strict=True):
        assert one["targets"] == json.loads(json.dumps(expected.to_json()))
    assert document["targets"] == document["embeddings"][0]["targets"]
    assert document["differences"] == [difference.to_json() for difference in differences(probed)]
    assert {row["n"] for row in document["targets"]} == {119, 109}


def test_a_comparison_is_one_table(run):
    code, out, _ = run("2d.h5", "noise.zarr", "--targets", "sex,age", "--repeats", 1, "--permutations", 5)
    assert code == 0
    lines = [line for line in out.splitlines() if re.search(r"\d\.\d{3} to", line)]
    assert len(lines) == 4
    assert all("gender" in line or "age" in line for line in lines[::2])
    assert all("noise" in line and line.count(" to ") == 2 for line in lines[1::2])  # its interval, the difference's
    assert "minus 2d" in out


def test_layers_of_one_file_are_compared(run):
    code, out, _ = run("2d.h5", "--layer", "layer3,avgpool", "--targets", "age", "--repeats", 1, "--json")
    assert code == 0
    document = json.loads(out)
    assert [(one["name"], one["features"]) for one in document["embeddings"]] == [("2d layer3", 30), ("2d avgpool", 10)]
    code, out, _ = run("2d.h5", "--layer", "avgpool", "--targets", "age", "--repeats", 1, "--json")
    assert (json.loads(out)["embeddings"], json.loads(out)["features"], code) == ("2d.h5", 10, 0)
    code, _, err = run("2d.h5", "--layer", "layer9")
    assert code == 1
    assert "layer9" in err


def test_confounds_groups_bins_and_draws_reach_the_results(run, folder):
    families = [f"9{person:06d},{person // 2}" for person in range(100)]
    (folder / "families.csv").write_text("\n".join(["participant,family", *families]))
    code, out, _ = run(
        "2d.h5", "--targets", "age", "--bins", "age=3", "--confounds", "site,sex", "--groups", "families.csv",
        "--folds", 2, "--repeats", 1, "--permutations", 4, "--bootstrap", 10, "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    (age,) = document["targets"]
    assert len(age["labels"]) == 3
    assert set(age["confounds"]) == {"site", "gender"}
    assert age["gains"]["auc"]["score"] is not None
    assert age["permutations"] == 4
    assert "boot_low" in age["metrics"]["auc"]
    assert (document["groups"], document["bins"]) == ("families.csv", {"age": 3})
    assert document["confounds"] == ["site", "sex"]
    edges = json.loads(run("2d.h5", "--targets", "age", "--bins", "age=60,", "--repeats", 1, "--json")[1])
    assert edges["targets"][0]["labels"] == ["<60", ">=60"]
    code, out, _ = run("2d.h5", "--targets", "age", "--confounds", "site", "--repeats", 1)
    assert "confounds alone" in out


@pytest.mark.parametrize(
    ("arguments", "sizes"), [(["--curve"], [12, 25, 50, 80]), (["--curve", "20,30"], [20, 30, 80])]
)
def test_curves_have_default_sizes_or_those_asked_for(run, arguments, sizes):
    code, out, _ = run(*arguments, "2d.h5", "--targets", "age", "--repeats", 1, "--json")
    assert code == 0
    curve = json.loads(out)["targets"][0]["curve"]
    assert [point["train_participants"] for point in curve] == sizes
    _, out, _ = run("2d.h5", "--targets", "age", "--repeats", 1, *arguments)
    assert "trained on" in out
    assert f"({sizes[-1]})" in out


def test_points_that_cannot_be_had_are_named(run):
    code, _, err = run("2d.h5", "--targets", "age", "--repeats", 1, "--curve", "20,5000")
    assert code == 1, "not everything that was asked for"
    assert err == "no point at 5000 people: age: 80 people can be trained on in each fold\n"


def test_models_are_saved_and_applied(run, folder):
    code, out, _ = run("2d.h5", "--targets", "sex,age", "--repeats", 1, "--confounds", "site", "--save", "new/m.json")
    assert code == 0
    assert out.splitlines()[-1] == "models: new/m.json"
    embeddings = open_embeddings(folder / "2d.h5")
    code, out, err = run("apply", "new/m.json", "2d.h5", "new/p.csv", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "predictions": "new/p.csv",
        "scans": 120,
        "targets": ["gender", "age"],
        "simulated": True,
        "phenotypes": None,
    }
    predictions = pd.read_csv(folder / "new" / "p.csv")
    expected = refit(embeddings, "age", settings=ProbeSettings(repeats=1, confounds=("site",)))
    np.testing.assert_allclose(predictions["age"], expected.predict_embeddings(embeddings), rtol=1e-12)
    assert set(predictions["gender"]) == {"female", "male"}
    _, out, _ = run("apply", "new/m.json", "2d.h5", "new/p.parquet")
    assert out == "predictions: new/p.parquet: 120 scans x 2 targets (gender, age), simulated data\n"
    document = json.loads(run("2d.h5", "--targets", "age", "--repeats", 1, "--save", "b.json", "--json")[1])
    (model,) = load_probe(folder / "b.json").models
    assert document["save"] == "b.json"
    assert model.score.score == pytest.approx(document["targets"][0]["score"], rel=1e-5)


def test_nothing_to_save_is_an_error(run, folder):
    code, out, err = run("2d.h5", "--targets", "age", "--bins", "age=200,", "--save", "none.json", "--json")
    assert code == 1
    assert json.loads(out)["save"] is None
    assert err == "error: every target was skipped, so there is no model for none.json\n"
    assert not (folder / "none.json").exists()


@pytest.mark.parametrize("options", [["--json"], []])
def test_scores_are_printed_though_a_report_cannot_be_written(run, monkeypatch, options):
    def full(*_: object, **__: object) -> None:
        raise StoreError("r.html cannot be written: the disk is full")

    monkeypatch.setattr("extract.probing.report.write_report", full)
    code, out, err = run("2d.h5", "--targets", "age", "--repeats", 1, "--report", "r.html", *options)
    assert (code, err) == (1, "error: r.html cannot be written: the disk is full\n")
    assert "age" in out
    assert "report: " not in out
    assert not options or json.loads(out)["targets"][0]["status"] == "ok"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"permutations": 18}, "18 permutations give no p value below 0.053"),
        ({"bootstrap": 99}, "are not known from 99 draws"),
        ({"groups": "strangers.csv", "kinship": 0.2}, "0 related pairs in strangers.csv .* no two of the people here"),
        ({"features": 0.0}, "all 40 features of 2d are the same in every scan"),
        ({"values": np.arange(120) % 4 + 11025}, "the target centre has 4 different whole numbers, from 11025 on"),
        ({"values": np.arange(120) % 4}, ""),
        ({"values": np.arange(120) % 12, "labels": 12}, "12 classes, the smallest 'place 0' of 10 scans"),
        ({"values": np.arange(120), "labels": 120}, "120 codes with labels and is taken as a number"),
        ({"values": np.arange(120) % 12, "labels": 12, "tasks": {"centre": "multiclass"}}, ""),
        ({"values": np.arange(120) % 4 + 11025, "tasks": {"centre": "multiclass"}}, ""),
        ({"values": np.arange(120) % 4 + 11025, "bins": {"centre": 2}}, ""),
        ({"permutations": 19, "bootstrap": 100, "groups": "kin.csv"}, ""),
    ],
)
def test_doubtful_input_is_warned_about(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("strangers.csv").write_text("ID1,ID2,Kinship\n9000001,1,0.25\n9000001,9000002,0.1\n")
    Path("kin.csv").write_text("ID1,ID2\n9000001,9000002\n")
    options = dict(options)
    cohort, tasks = make_cohort(), options.pop("tasks", {})
    phenotypes = cohort.phenotypes.assign(centre=options.pop("values", cohort.phenotypes["something"]))
    features = cohort.features * options.pop("features", 1.0)
    labels = {str(code): f"place {code}" for code in range(options.pop("labels", 0))}
    variables = {**cohort.variables, "centre": {"labels": labels}}
    named = {"2d": replace(cohort, features=features, phenotypes=phenotypes, variables=variables)}
    found = doubts(named, ["age", "centre"], tasks=tasks, settings=ProbeSettings(**options))
    assert len(found) == bool(words)
    assert re.search(words, "".join(found))


def test_numbers_that_json_has_not_are_null(capsys):
    print_json({"weights": {"loss": float("nan"), "range": (float("-inf"), 1.0)}, "scores": [np.float64("inf"), 2]})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {"weights": {"loss": None, "range": [None, 1.0]}, "scores": [None, 2]}


def test_scans_that_lack_a_confound_are_counted_everywhere(run, folder):
    arguments = ("2d.h5", "--targets", "sex", "--confounds", "age", "--repeats", 1)
    code, out, err = run(*arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert err.startswith("warning: 10 of 120 scans lack a confound (age 10) and are left out")
    assert document["warnings"] == [err.strip().removeprefix("warning: ")]
    assert document["targets"][0]["n"] == 110
    assert run(*arguments, "--report", "lost.html")[0] == 0
    assert "10 of 120 scans lack a confound (age 10)" in (folder / "lost.html").read_text(encoding="utf-8")


def test_what_is_unknown_of_confounds_is_said(run, folder):
    cohort = open_embeddings(folder / "2d.h5")
    scanner = np.arange(120) % 3 + 1.0
    write_embeddings(folder / "scanner.h5", replace(cohort, phenotypes=cohort.phenotypes.assign(scanner=scanner)))
    options = ("scanner.h5", "--targets", "age", "--confounds", "scanner", "--repeats", 1)
    code, _, err = run(*options)
    assert code == 0
    assert err.startswith("warning: the confound scanner has 3 different whole numbers")
    code, _, err = run(*options, "--task", "scanner=multiclass", "--save", "scanner.json")
    assert (code, err) == (0, "")
    scanner[:2] = 7, np.nan
    write_embeddings(folder / "scanner.h5", replace(cohort, phenotypes=cohort.phenotypes.assign(scanner=scanner)))
    code, _, err = run("apply", "scanner.json", "scanner.h5", "scanner.csv")
    assert code == 0
    missing, unseen = err.splitlines()
    assert missing.startswith("warning: 1 of 120 scans lack the confound scanner")
    assert unseen.startswith("warning: 1 of 120 scans have a scanner that the probe was not fitted to ('7')")


def test_a_saved_layer_is_the_one_applied_to(run, folder):
    assert run("2d.h5", "--targets", "age", "--repeats", 1, "--layer", "avgpool", "--save", "l.json")[0] == 0
    assert run("apply", "l.json", "2d.h5", "l.csv")[0] == 0
    model = load_probe(folder / "l.json").models[0]
    expected = model.predict(open_embeddings(folder / "2d.h5", "avgpool").features)
    np.testing.assert_allclose(pd.read_csv(folder / "l.csv")["age"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["2d.h5", "2d.h5"], 2, ["named twice"]),
        (["2d.h5", "noise.zarr", "--save", "m.json"], 2, ["models are saved of one"]),
        (["2d.h5", "--save", "m.pkl"], 1, [".pkl", ".json"]),
        (["2d.h5", "--report", "r.pdf"], 1, ["'.pdf'; a report is written as .html"]),
        (["2d.h5", "--report", "."], 1, ["error: . ends in ''"]),
        (["2d.h5", "--report", "taken.html"], 1, ["taken.html is a folder"]),
        (["2d.h5", "--save", "2d.h5/m.json"], 1, ["2d.h5 is a file, expected a folder"]),
        (["nobody.npz"], 1, ["nobody has 0 scans"]),
        (["2d.h5", "--groups", "strangers.csv"], 1, ["such as '1234567'", "(such as '9000000')"]),
        (["2d.h5", "--curve", "abc"], 2, ["--curve abc: expected sizes such as 100,1000, or nothing"]),
        (["2d.h5", "--curve=5,5"], 2, ["10 people or more"]),
        (["2d.h5", "--curve=many"], 2, ["100,500,1000"]),
        (["2d.h5", "--bins", "age=x"], 2, ["age=55,65"]),
        (["2d.h5", "--bins", "age"], 2, ["NAME=N"]),
        (["2d.h5", "--bins", "age=2", "--bins", "age=3"], 2, ["age is given 2 times"]),
        (["2d.h5", "--task", "age=count", "--task", "age=ordinal"], 2, ["age is given 2 times"]),
        (["2d.h5", "--task", "sex=binary", "--task", "gender=count"], 1, ["'gender' is given 'binary' and 'count'"]),
        (["noise.zarr", "--layer", "avgpool"], 1, ["does not say which layers it has", "leave the layer out"]),
        (["2d.h5", "--confounds", "height"], 1, ["height"]),
        (["2d.h5", "--groups", "kin.csv"], 1, ["kin.csv"]),
        (["2d.h5", "--kinship", "0.1"], 1, ["kinship=0.1 needs groups"]),
        (["2d.h5", "--groups", "site", "--kinship", "0.1"], 1, ["kinship=0.1 needs groups", "'site'"]),
        (["apply", "none.json", "2d.h5", "p.csv"], 1, ["no saved probe at none.json"]),
        (["apply", "2d.h5", "2d.h5", "p.csv"], 1, ["2d.h5 is no saved probe"]),
        (["apply", "none.json", "2d.h5", "p.txt"], 1, [".csv, .parquet"]),
    ],
)
def test_what_cannot_be_done_is_refused(run, arguments, code, words):
    stopped, out, err = run(*arguments)
    assert (stopped, out) == (code, ""), err
    assert all(word in " ".join(err.split()) for word in words), err
    if code == 1:
        assert len(err.strip().splitlines()) == 1


def test_another_encoder_is_refused_in_one_line(run, folder):
    assert run("2d.h5", "--targets", "age", "--repeats", 1, "--save", "e.json")[0] == 0
    code, out, err = run("apply", "e.json", "noise.zarr", "e.csv")
    assert (code, out) == (1, "")
    assert err.startswith("error: the embeddings are not of the encoder")
    assert "layers unknown instead of" in err
    assert not (folder / "e.csv").exists()


def test_help_names_both_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "probe run --help" in out
    assert "apply" in out
    assert "not of who is trained on" in " ".join(run("run", "--help")[1].replace("│", "").split())
    code, out, err = run()
    assert code != 1
    assert "apply" in out + err


def test_a_name_with_a_comma_is_put_in_quotes(run, folder):
    table = pd.DataFrame({"participant": [f"9{k:06d}" for k in range(120)], "Age, years": np.arange(120.0)})
    table.to_csv(folder / "comma.csv", index=False)
    arguments = ("2d.h5", "--phenotypes", "comma.csv", "--repeats", 1, "--json")
    _, out, _ = run(*arguments, "--targets", 'sex, "Age, years"')
    assert [target["name"] for target in json.loads(out)["targets"]] == ["gender", "Age, years"]
    _, _, err = run(*arguments, "--targets", "Age, years")
    assert '"Age, years"' in err


def test_a_confound_of_one_value_is_told(run, folder):
    table = pd.DataFrame({"participant": [f"9{k:06d}" for k in range(120)], "scanner": 5})
    table.to_csv(folder / "one.csv", index=False)
    _, _, err = run("2d.h5", "--phenotypes", "one.csv", "--targets", "age", "--confounds", "scanner", "--repeats", 1)
    assert "the confound scanner is 5 in every scan" in err
