"""What is given to the ``probe`` command as text, read into what its settings take."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import typer

from extract.formats import KINDS
from ingest.places import Place, as_place

_SIZES = re.compile(r"\d{1,9}(,\d{1,9})*,?", re.ASCII)


def split_names(text: str | None) -> list[str]:
    """Read ``a, b``, or ``a, "b, with a comma"``; nothing is none."""
    return [part.strip() for part in next(csv.reader([text or ""], skipinitialspace=True), []) if part.strip()]


def name_or_table(text: str | None) -> str | Path | None:
    """Return a table if there is such a file, else the name of a phenotype."""
    return Path(text) if text is not None and Path(text).is_file() else text


def parse_pairs(options: Sequence[str], hint: str, example: str) -> dict[str, str]:
    """Read ``NAME=TEXT`` of a repeatable option, of which errors give an example."""
    pairs = [option.partition("=") for option in options]
    for option, (name, _, value) in zip(options, pairs, strict=True):
        if not name.strip() or not value.strip():
            kind = "KIND" if hint == "--task" else "N"
            raise typer.BadParameter(f"{option!r} is not NAME={kind}, such as {example}", param_hint=hint)
    names = [name.strip() for name, _, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"{twice} is given {names.count(twice)} times; give it once", param_hint=hint)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_bins(options: Sequence[str]) -> dict[str, int | tuple[float, ...]]:
    """Read ``age=3`` (classes) and ``age=55,65`` or ``age=55,`` (inner edges)."""
    found: dict[str, int | tuple[float, ...]] = {}
    for name, text in parse_pairs(options, "--bins", "age=3").items():
        try:
            found[name] = tuple(map(float, split_names(text))) if "," in text else int(text)
        except ValueError:
            raise typer.BadParameter(
                f"{name}={text} is neither a number of classes (age=3) nor inner edges (age=55,65; one edge: age=60,)",
                param_hint="--bins",
            ) from None
    return found


def parse_place(text: str, hint: str) -> Place:
    """Read a path or the address of an object."""
    try:
        return as_place(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def sizes_follow(words: Sequence[str]) -> bool:
    """Tell whether the word after ``--curve``, if there is one, is its sizes, and not embeddings or an option.

    Raises
    ------
    typer.BadParameter
        If it can be neither.
    """
    word = words[0] if words else "-"
    if _SIZES.fullmatch(word):
        return True
    if not (word.startswith("-") or Path(word).suffix in KINDS or Path(word).exists()):
        raise typer.BadParameter(f"--curve {word}: expected sizes such as 100,1000, or nothing")
    return False


def parse_sizes(text: str) -> list[int]:
    """Read ``100,500,1000``; ``auto`` is none."""
    if text == "auto":
        return []
    if not _SIZES.fullmatch(text):
        raise typer.BadParameter(f"{text!r} are no numbers of people, such as 100,500,1000", param_hint="--curve")
    sizes = [int(part) for part in split_names(text)]
    if min(sizes) < 10 or len(set(sizes)) < len(sizes):
        raise typer.BadParameter(f"{text!r}: expected 10 people or more, each number once", param_hint="--curve")
    return sizes
