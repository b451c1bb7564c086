"""What is said of a table of phenotypes: warnings, and how many of its values could not be used."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notes:
    """Warnings about one table.

    Attributes
    ----------
    table
        Its name, which every line begins with.
    lines
        What a user should know.
    bad_values
        How many values could not be used; more than none make ``ingest`` end with exit code 1.
    """

    table: str
    lines: list[str] = field(default_factory=list)
    bad_values: int = 0

    def add(self, line: str) -> None:
        """Add a warning of what is as it should be."""
        self.lines.append(f"{self.table}: {line}")

    def bad(self, count: int, line: str) -> None:
        """Add a warning of values that could not be used."""
        self.bad_values += count
        self.add(line)
