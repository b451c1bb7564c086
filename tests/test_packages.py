"""``python -m ingest`` and its like are the commands."""

from __future__ import annotations

import runpy
import sys

import pytest


@pytest.mark.parametrize("package", ["ingest", "loaders", "extract", "finetune"])
def test_packages_are_commands(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(package, run_name="__main__")
    assert ended.value.code == 0
    assert "Usage" in capsys.readouterr().out
