"""A wheel built from the project installs its commands elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
    for name in names:
        assert "Usage:" in run(elsewhere / name, "--help", cwd=tmp_path)
    where = run(elsewhere / "python", "-c", "import ingest.cli; print(ingest.cli.__file__)", cwd=tmp_path)
    assert str(elsewhere.parent) in where
    assert str(ROOT) not in where


def test_simulate_ingest_extract_probe_elsewhere(elsewhere, tmp_path):
    run(elsewhere / "ingest", "simulate", "c", "--participants", 24, "--seed", 1, cwd=tmp_path)
    run(elsewhere / "ingest", "c", "s.zarr", "--phenotypes", "c/phenotypes.csv", cwd=tmp_path)
    run(elsewhere / "ingest", "report", "s.zarr", "qc.html", cwd=tmp_path)  # its template is in the wheel
    run(elsewhere / "extract", "s.zarr", "e.h5", "--weights", "random", "--view", "axial", cwd=tmp_path)
    probe = (elsewhere / "probe", "e.h5", "--targets", "sex,age", "--folds", 3, "--repeats", 1, "--json")
    scores, again = (json.loads(run(*probe, *more, cwd=tmp_path)) for more in (("--report", "r.html"), ()))
    assert scores == {**again, "report": "r.html"}  # a re-run gives the same scores
    page = (tmp_path / "r.html").read_text()
    assert "SIMULATED" in page.upper()
