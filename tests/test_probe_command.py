"""The probe command: what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calling import call
from embedded import make_cohort

from extract.embeddings import Embeddings, write_embeddings
from extract.probing.cli import main
from extract.probing.numbers import in_digits
from extract.probing.probe import probe
from extract.probing.results import Interval, TargetResult
from extract.probing.settings import ProbeSettings
from ingest.errors import StoreError
from ingest.writing import write_whole


@pytest.fixture(scope="module")
def cohort() -> Embeddings:
    return make_cohort()


def run_probe(*arguments: object) -> subprocess.CompletedProcess:
    program = "import sys; from extract.probing.cli import main; sys.argv[0] = 'probe'; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "160"})


@pytest.fixture(scope="module", params=[".zarr", ".h5"])
def path(request, cohort, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("emb") / f"emb{request.param}"
    write_embeddings(path, cohort)
    return path


def test_command_prints_a_json_document(path, cohort):
    done = run_probe(path, "--targets", "sex,age", "--task", "age=ordinal", "--repeats", 1, "--seed", 3, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    found = probe(cohort, ["sex", "age"], tasks={"age": "ordinal"}, settings=ProbeSettings(repeats=1, seed=3))
    assert (
        document.items()
        >= {
            "embeddings": path.name,
            "simulated": True,
            "model": "resnet18",
            "weights": {"name": "random", "sha256": "0" * 64},
            "folds": 5,
            "repeats": 1,
            "seed": 3,
            "targets": json.loads(json.dumps([result.to_json() for result in found])),
            "report": None,
        }.items()
    )
    assert {"name", "task", "n", "metric", "score", "low", "high", "chance"} <= set(document["targets"][0])


def test_command_prints_a_table_and_what_was_skipped(cohort, tmp_path):
    phenotypes = cohort.phenotypes.assign(empty=np.nan)[["gender", "age", "empty"]]
    write_embeddings(tmp_path / "emb.h5", replace(cohort, phenotypes=phenotypes))
    done = run_probe(tmp_path / "emb.h5", "--repeats", 1)
    assert done.returncode == 0  # nobody asked for the empty one by name
    assert "simulated data" in done.stdout
    assert "random weights" in done.stdout
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("age"))
    assert all(word in lines[first] for word in ("continuous", "110", " r ", " to "))
    assert " R2 " in lines[first + 1]
    assert " MAE " in lines[first + 2]
    assert done.stderr.strip() == "skipped: empty: every value is missing"


def test_command_fails_if_a_named_target_was_skipped(cohort, tmp_path):
    attrs = {**cohort.attrs, "simulated": False}
    phenotypes = cohort.phenotypes.assign(empty=np.nan)
    write_embeddings(tmp_path / "emb.h5", replace(cohort, phenotypes=phenotypes, attrs=attrs))
    done = run_probe(tmp_path / "emb.h5", "--targets", "gender, empty", "--repeats", 1)
    assert done.returncode == 1
    assert "gender" in done.stdout
    assert "simulated" not in done.stdout


def test_command_fails_if_nothing_was_probed(cohort, tmp_path, monkeypatch, capsys):
    write_embeddings(tmp_path / "emb.h5", replace(cohort, phenotypes=cohort.phenotypes[["age"]] * np.nan))
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "emb.h5")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "skipped: age: every value is missing" in capsys.readouterr().err


def test_command_writes_a_report_into_a_new_folder(cohort, tmp_path):
    write_embeddings(tmp_path / "emb.h5", cohort)
    report = tmp_path / "new" / "report.html"
    done = run_probe(tmp_path / "emb.h5", "--targets", "sex", "--repeats", 1, "--report", report)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {report}"
    assert "gender" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--targets", "height"], 1, ["height", "smoking"]),
        (["--targets", "age", "--task", "age=linear"], 1, ["linear", "continuous"]),
        (["--task", "age"], 2, ["NAME=KIND"]),
        (["--store", "x.zarr"], 2, ["--report"]),
        (["--folds", "1"], 2, ["2"]),
    ],
)
def test_command_refuses_what_it_cannot_do(cohort, tmp_path, monkeypatch, capsys, arguments, code, words):
    write_embeddings(tmp_path / "emb.h5", cohort)
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "emb.h5"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (code, "")
    assert all(word in err for word in words)
    if code == 1:
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "metric", "shown", "written"),
    [
        (0.0123456789, "r", "0.012", 0.0123457),
        (-1e-9, "auc", "0.000", -1e-9),
        (3.14159265, "mae", "3.142", 3.14159),
        (12345.678, "mae", "12345.678", 12345.7),
        (3.4567e-5, "mae", "3.46e-05", 3.4567e-5),
        (2.5e38, "mae", "2.5e+38", 2.5e38),
        (-4e7, "r2", "-4e+07", -4e7),
        (0.0, "mae", "0.000", 0.0),
        (float("nan"), "auc", "nan", None),
    ],
)
def test_numbers_have_digits_that_tell_something(value, metric, shown, written):
    assert in_digits(value, metric) == shown
    interval = Interval(value, value, value, value)
    found = TargetResult("x", "continuous", "ok", 9, 9, metric=metric, metrics={metric: interval}).to_json()
    assert found["score"] == found["metrics"][metric]["low"] == written


def test_command_names_a_missing_file(tmp_path):
    missing = run_probe(tmp_path / "none.h5")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no embeddings at")
    assert len(missing.stderr.splitlines()) == 1


def test_command_names_what_is_no_embedding_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "emb.csv").write_text("1,2\n")
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "emb.csv")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert ".zarr, .h5" in capsys.readouterr().err


def test_files_of_others_are_never_replaced(cohort, tmp_path):
    emb, model, page, table = (tmp_path / name for name in ("emb.h5", "m.json", "r.html", "people.csv"))
    write_embeddings(emb, cohort)
    options = (emb, "--targets", "age", "--repeats", 1)
    for _ in range(2):  # the second time they are replaced
        assert call(main, *options, "--save", model, "--report", page).returncode == 0
    for option, path, text in (("--save", model, '{"name": "mine"}'), ("--report", page, "<html>mine</html>")):
        (tmp_path / f"other{path.suffix}").write_text(text)
        done = call(main, *options, option, tmp_path / f"other{path.suffix}")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"other{path.suffix} exists and is not a" in done.stderr
        assert (tmp_path / f"other{path.suffix}").read_text() == text
    table.write_text("eid,31-0.0")
    done = call(main, "apply", model, emb, table)
    assert (done.returncode, table.read_text()) == (1, "eid,31-0.0")
    assert done.stderr == f"error: {table} exists; add --overwrite to replace it, or choose another name\n"
    assert call(main, "apply", model, emb, table, "--overwrite").returncode == 0
    assert table.read_text().startswith("row,participant")


def test_predictions_never_replace_the_embeddings(cohort, tmp_path):
    write_embeddings(tmp_path / "emb.parquet", cohort)
    assert call(main, tmp_path / "emb.parquet", "--targets", "age", "--save", tmp_path / "m.json").returncode == 0
    done = call(main, "apply", tmp_path / "m.json", tmp_path / "emb.parquet", tmp_path / "emb.parquet", "--overwrite")
    assert done.returncode == 1
    assert "is what is read" in done.stderr
    people = tmp_path / "people.csv"
    cohort.scans[["participant"]].assign(height=170.0).to_csv(people, index=False)
    before = people.read_text()
    emb = tmp_path / "emb.parquet"
    done = call(main, "apply", tmp_path / "m.json", emb, people, "--phenotypes", people, "--overwrite")
    assert (done.returncode, people.read_text()) == (1, before)


def test_ctrl_c_is_told_in_one_line(cohort, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    write_embeddings(tmp_path / "emb.h5", cohort)
    monkeypatch.setattr("extract.probing.cli.open_embeddings", interrupted)
    done = call(main, tmp_path / "emb.h5")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; make room, and run the same command again"),
        (errno.EDQUOT, "Disk quota exceeded; make room, and run the same command again"),
        (errno.EROFS, "Read-only file system; choose another name"),
        (None, "cannot open m.json; choose another name"),
    ],
)
def test_why_a_file_is_not_written_is_said_without_its_temporary_name(tmp_path, monkeypatch, number, words):
    def write(temporary: Path) -> None:
        raise OSError(number, f"at {temporary}", str(temporary)) if number else OSError(f"cannot open {temporary}")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as caught:
        write_whole(Path("m.json"), write)
    assert str(caught.value) == f"m.json cannot be written: {words}"
