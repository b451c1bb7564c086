"""Phenotype tables joined to four scans of three people, and what is warned of."""

from __future__ import annotations

from pathlib import Path

from ingest.phenotypes import join_phenotypes

PARTICIPANTS = ["9000001", "9000001", "9000002", "9000003"]
SESSIONS = ["2", "3", "2", "2"]


def join(path: Path, text: str, name: str = "p.csv"):
    (path / name).write_text(text, encoding="utf-8")
    return join_phenotypes(path / name, PARTICIPANTS, SESSIONS)


def told(found, *words: str) -> bool:
    """Tell whether one warning holds all the words."""
    return any(all(word in line for word in words) for line in found.warnings)
