"""What the README shows runs, from a wheel: every command of its tour, with its own flags, and its Python."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import extract.cli
import extract.probing.cli
import finetune.cli
import ingest.cli
import loaders.cli
from extract import open_embeddings, write_embeddings
from finetune.export import export_run
from loaders import VolumeReader

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LOADING = (ROOT / "docs" / "loading.md").read_text()
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text()
SMALL = {"--participants 200": "--participants 24"}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Return the programs of another environment, which has the wheel and borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run("git", "clone", "--quiet", ROOT, source, cwd=folder)
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:  # as it is now, committed or not
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("*.whl"))
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def test_the_commands_run_elsewhere(elsewhere, tmp_path):
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"ingest", "extract", "probe"} <= set(names)
    assert all((elsewhere / name).is_file() for name in names)
    program = (
        "import importlib.metadata, sys; found = importlib.metadata.distribution('brain-volumes').entry_points; "
        "print(*(sys.modules[one.load().__module__].__file__ for one in found), sep='\\n')"
    )
    files = run(elsewhere / "python", "-c", program, cwd=tmp_path).splitlines()  # one process: torch takes seconds
    assert len(files) == len(names)
    for where in files:
        assert str(elsewhere.parent) in where
        assert str(ROOT) not in where


@pytest.fixture(scope="module")
def tour(elsewhere, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Run the tour on fewer people, with the programs of the wheel; return where, and what each command printed."""
    folder = tmp_path_factory.mktemp("tour")
    path = os.pathsep.join([str(elsewhere), sysconfig.get_path("scripts"), os.environ["PATH"]])
    printed = {}
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            command = line.removeprefix("$ ")
            for full, small in SMALL.items():
                command = command.replace(full, small)
            done = subprocess.run(
                shlex.split(command),
                capture_output=True,
                text=True,
                timeout=300,
                cwd=folder,
                env={**os.environ, "PATH": path},
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed[command] = done.stdout
    return folder, printed


def test_the_tour_runs(tour, elsewhere):
    folder, printed = tour
    assert [command.split()[0] for command in printed] == ["ingest", "ingest", "ingest", "extract", "probe"]
    run(elsewhere / "ingest", "report", "cohort.zarr", "qc.html", cwd=folder)  # its template is in the wheel, too
    for page in ("report.html", "qc.html"):
        text = (folder / page).read_text()
        assert len(text) > 100_000
        assert "SIMULATED" in text.upper()
    shown = "".join(blocks("console"))
    for command, output in printed.items():  # the numbers differ with the people, the words do not
        for line in output.splitlines()[:1]:
            words = re.sub(r"[\d.,]+", "#", line).split()[:3]
            assert " ".join(words) in re.sub(r"[\d.,]+", "#", re.sub(r" +", " ", shown)), (command, line)


def test_the_python_runs(tour, monkeypatch):
    monkeypatch.chdir(tour[0])
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_python_of_the_page_about_loading_runs(tour, monkeypatch):
    monkeypatch.chdir(tour[0])
    names: dict[str, object] = {}
    changes = {'"t1.zarr"': '"cohort.zarr"', "age >= 45": "age >= 65"}  # few are enough
    volumes, planes = (
        functools.reduce(lambda text, change: text.replace(*change), changes.items(), block)
        for block in blocks("python", LOADING)
    )
    exec(compile(volumes, "docs/loading.md", "exec"), names)
    assert names["epoch"] == 1
    assert names["batch"].images.shape[1:] == (1, 160, 192, 160)
    exec(compile(planes, "docs/loading.md", "exec"), names)
    assert names["coronal"].shape[1:] == (5, 160, 160)


def test_the_python_of_the_pages_about_embeddings_and_probes_runs(tour, monkeypatch, capsys):
    monkeypatch.chdir(tour[0])
    for ending in ("parquet", "npz"):
        write_embeddings(f"emb.{ending}", open_embeddings("emb.h5"))
    names: dict[str, object] = {}
    for page in ("embeddings", "probing"):
        for block in blocks("python", (ROOT / "docs" / f"{page}.md").read_text()):
            here = block.replace('"t1.zarr"', '"cohort.zarr"').replace('"imagenet"', '"random"')
            exec(compile(here, f"docs/{page}.md", "exec"), names)
    assert len(open_embeddings("three.h5").features) == 3
    assert names["X"].shape == (len(names["who"]), 512)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["sex", "ok"],
        ["fluid_intelligence", "ok"],
    ]
    assert len(names["predictions"]) == len(pd.read_parquet("predictions.parquet")) == len(names["who"])


def test_the_python_of_the_page_about_fine_tuning_runs(tour, monkeypatch):
    """What is trained, as it is exported, is what the page says."""
    monkeypatch.chdir(tour[0])
    train, state, program = blocks("python", FINETUNING)
    names: dict[str, object] = {}
    exec(compile(train.replace('"t1.zarr"', '"cohort.zarr"'), "docs/finetuning.md", "exec"), names)
    assert names["result"].test[0].name == "sex"
    assert {"participant", "part", "sex", "sex=female", "sex=male"} <= set(names["predictions"].columns)
    assert (names["predictions"]["sex"].isin(["female", "male"])).all()
    for kind in ("pt", "pt2"):
        export_run(Path("runs/sex"), Path(f"network.{kind}"))
    exec(compile(state, "docs/finetuning.md", "exec"), names)
    with VolumeReader("cohort.zarr") as reader:
        names["volumes"] = torch.from_numpy(reader.read(reader.store.ok_rows[:2]))
    exec(
        compile(program.replace("program(volumes)", "predicted = program(volumes)"), "docs/finetuning.md", "exec"),
        names,
    )
    assert names["predicted"]["sex"].shape == (2, 2)


#: What a program does unless its first word says otherwise.
BY_DEFAULT = {"ingest": ["run"], "loaders": ["profile"], "probe": ["run"], "finetune": ["run"], "extract": []}
OTHERS = ("curve", "predict", "export")
APPS = {
    "ingest": ingest.cli.app, "loaders": loaders.cli.app, "probe": extract.probing.cli.app,
    "finetune": finetune.cli.app, "extract": extract.cli.app,
}  # fmt: skip


def test_commands_and_flags_of_the_readme_exist():
    known: dict[tuple[str, ...], str] = {}
    programs = "|".join(BY_DEFAULT)
    for program, rest in re.findall(rf"^({programs}) (.*)$", "\n".join(blocks("sh")), flags=re.MULTILINE):
        first = rest.split()[0]
        command = (program, *([first] if first in OTHERS else BY_DEFAULT[program]))
        if command not in known:
            done = CliRunner(env={"COLUMNS": "200"}).invoke(APPS[program], [*command[1:], "--help"])
            assert done.exit_code == 0, (command, done.output)
            known[command] = done.output
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in known[command], f"{command} has no {flag}"
    assert {command[0] for command in known} == set(BY_DEFAULT)


def test_pictures_and_pages_that_it_links_to_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
