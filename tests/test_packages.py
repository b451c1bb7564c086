"""What packages offer: ``python -m ingest`` and its like are the commands, and names are imported when asked for."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from types import ModuleType

import pytest

WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
import extract.cli, extract.probing.cli, finetune.cli, ingest.cli, loaders.cli
for module in (extract.cli, extract.probing.cli, finetune.cli, ingest.cli, loaders.cli):
    assert "Usage" in CliRunner().invoke(module.app, ["--help"]).output
assert "target" in CliRunner().invoke(finetune.cli.app, ["curve", "--help"]).output
print(sorted({"torch", "torchvision", "sklearn", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize("package", ["ingest", "loaders", "extract", "finetune"])
def test_packages_are_commands(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(package, run_name="__main__")
    assert ended.value.code == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["ingest", "loaders", "extract", "finetune", "finetune.curves"])
def test_every_name_of_a_package_is_there(package):
    module = importlib.import_module(package)
    assert len(module.__all__) >= 5
    for name in module.__all__:
        assert not isinstance(getattr(module, name), ModuleType)
        assert name in dir(module)


def test_no_help_waits_for_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
