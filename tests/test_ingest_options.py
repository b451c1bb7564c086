"""Options of ``ingest`` that cannot be: a line that names them, never a traceback."""

from __future__ import annotations

import pytest
from calling import call

from ingest.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "s.zarr", "--sample", 3), "add --against SRC"),
        (("run", "src", "s.zarr", "--workers", 2, "--scheduler", "tcp://127.0.0.1:1"), "the scheduler has its own"),
        (("run", "src", "s.zarr", "--slab", 3), "slab is 3, expected a divisor"),
        (("run", "src", "s.h5"), "s.h5 ends in '.h5' like a file, but a store is a folder; name it like t1.zarr"),
        (("simulate", "d", "--participants", 1000000), "900000"),
        (("simulate", "d", "--participants", 1, "--seed", -1), "--seed"),
        (("withdraw", "w.csv", "broken.zarr"), "zarr.json is damaged"),
    ],
)
def test_options_that_cannot_be_are_a_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.csv").write_text("eid\n9000001\n")
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text('{"attributes": {"form')
    done = call(main, *arguments)
    assert done.returncode in (1, 2)
    assert words in " ".join(done.stderr.replace("│", " ").split())
