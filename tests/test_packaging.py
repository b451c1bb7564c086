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


def test_simulate_ingest_extract_probe_elsewhere(elsewhere, tmp_path):
    run(elsewhere / "ingest", "simulate", "c", "--participants", 24, "--seed", 1, cwd=tmp_path)
    run(elsewhere / "ingest", "c", "s.zarr", "--phenotypes", "c/phenotypes.csv", cwd=tmp_path)
    run(elsewhere / "ingest", "report", "s.zarr", "qc.html", cwd=tmp_path)  # its template is in the wheel
    run(elsewhere / "extract", "s.zarr", "e.h5", "--weights", "random", "--view", "axial", "--slices", 1, cwd=tmp_path)
    probe = (elsewhere / "probe", "e.h5", "--targets", "sex,age", "--folds", 2, "--repeats", 1, "--json")
    found = json.loads(run(*probe, "--report", "r.html", cwd=tmp_path))
    assert {target["name"]: target["status"] for target in found["targets"]} == {"sex": "ok", "age": "ok"}
    page = (tmp_path / "r.html").read_text()
    assert "SIMULATED" in page.upper()
