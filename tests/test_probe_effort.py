"""Probing many targets: what share a factorisation is counted, and how long it takes is said before it begins."""

from __future__ import annotations

import numpy as np
import pytest
from embedded import make_embeddings
from typer.testing import CliRunner

from extract.embeddings import Embeddings, write_embeddings
from extract.probing import cli
from extract.probing.confounds import read_confounds
from extract.probing.effort import MANY_PATTERNS, Effort, estimate_effort
from extract.probing.settings import ProbeSettings


def many(targets: int, patterns: int, scans: int = 60) -> Embeddings:
    rng = np.random.default_rng(0)
    phenotypes = {}
    for number in range(targets):
        values = rng.normal(size=scans)
        values[: number % patterns] = np.nan
        phenotypes[f"p{number:02d}"] = values
    phenotypes["sex"] = np.arange(scans) % 2
    phenotypes["empty"] = np.full(scans, np.nan)
    return make_embeddings(rng.normal(size=(scans, 6)), phenotypes)


def effort_of(embeddings: Embeddings, **settings: object) -> Effort:
    given = ProbeSettings(**settings)
    names = [name for name in embeddings.phenotypes if name not in given.confounds]
    confounds = read_confounds(embeddings, given.confounds)
    return estimate_effort(embeddings, names, settings=given, confounds=confounds)


def test_targets_with_the_same_missing_values_are_one_pattern():
    found = effort_of(many(12, 3))
    assert (found.targets, found.patterns) == (13, 4), "three of regressions, one of the classification; one is empty"
    assert 0 < found.seconds < 5
    nothing = many(1, 1)
    nothing.phenotypes.loc[:, :] = np.nan
    assert effort_of(nothing) == Effort(0, 0, 0.0)


def test_the_time_grows_with_what_is_to_be_done(monkeypatch):
    monkeypatch.setattr("extract.probing.effort._factorisation", lambda _: 1.0)
    one = effort_of(many(12, 3), repeats=1).seconds
    assert effort_of(many(12, 12), repeats=1).seconds > 2 * one
    assert effort_of(many(12, 3), repeats=4).seconds == pytest.approx(4 * one)
    assert effort_of(many(13, 3), repeats=1, confounds=("p12",)).seconds == pytest.approx(2 * one)


@pytest.mark.parametrize(("targets", "patterns", "said"), [(30, 30, True), (30, 5, False), (MANY_PATTERNS, 20, True)])
def test_the_time_of_many_patterns_is_said_before_it_begins(tmp_path, monkeypatch, targets, patterns, said):
    write_embeddings(tmp_path / "e.h5", many(targets, patterns))

    def stop(*_: object, **__: object) -> None:
        raise ValueError("it begins")

    monkeypatch.setattr(cli, "probe_all", stop)
    done = CliRunner().invoke(cli.app, [str(tmp_path / "e.h5")])
    assert isinstance(done.exception, ValueError)
    expected = f"{targets + 1} targets have {patterns + 1} patterns of missing values"
    assert (expected in done.output) == said
    assert ("takes about" in done.output) == said


def test_words():
    assert Effort(1000, 312, 80.4).in_words().endswith("which takes about 80 s")
    assert Effort(1000, 312, 840.0).in_words().startswith("1,000 targets have 312 patterns")
    assert Effort(1000, 312, 840.0).in_words().endswith("14 min")
