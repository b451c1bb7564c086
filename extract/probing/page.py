"""What all pages of results share: their frame, and how facts are written on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import jinja2

from ingest.writing import write_whole

#: Instead of what a file does not say.
ABSENT = "not recorded"

Lines = Sequence[tuple[str, str]]


def render_page(
    package: str,
    template: str,
    *,
    simulated: bool,
    summary: Lines,
    provenance: Sequence[tuple[str, Lines]],
    **values: Any,
) -> str:
    """Return a page.

    Parameters
    ----------
    package, template
        A file in the ``templates`` of a package that extends ``page.html``.
    simulated
        Whether it is of simulated data, which it then says above all else.
    summary
        Names and values, for its head.
    provenance
        Tables for its end, each a title with names and values.
    values
        Whatever else the template wants.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("extract.probing")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        date=datetime.now(UTC).date().isoformat(), simulated=simulated, summary=summary, provenance=provenance, **values
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Raises
    ------
    StoreError
        If the file cannot be written.
    """
    # File names may be no UTF-8
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8", errors="replace"))


def settings_lines(settings: Mapping[str, Any], absent: str = "none") -> list[tuple[str, str]]:
    """Write settings for people, in their order."""
    return [
        (name.replace("_", " "), absent if value is None else plain(value) or "none")
        for name, value in settings.items()
    ]


def store_lines(store: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write what is recorded of a store: its ``path`` (or ``name``), ``id`` and ``grid``."""
    grid = store.get("grid") or {}
    size = " × ".join(str(length) for length in reversed(grid.get("shape_zyx", [])))
    name = store.get("path") or store.get("name")
    return [
        ("store", last_component(str(name)) if name else ABSENT),
        ("store id", plain(store.get("id"))),
        (
            "grid",
            f"{size} voxels (x, y, z) of {grid.get('voxel_mm', 0):g} mm, RAS, {grid.get('space')}" if grid else ABSENT,
        ),
    ]


def versions_line(versions: Mapping[str, str] | None) -> tuple[str, str]:
    """Write what something was made by."""
    return "versions", ", ".join(f"{name} {version}" for name, version in (versions or {}).items()) or ABSENT


def plain(value: object) -> str:
    """Write a setting for people; of a path only the last component, since folders may name people."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", ".", "\\"))):
        return last_component(str(value))
    return str(value)


def last_component(path: str) -> str:
    """Return the name of a file without its folders, whose names may be those of people."""
    return PureWindowsPath(path).name or path
