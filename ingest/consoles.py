"""Where commands print, and how: as it is, whatever a path or the name of a phenotype contains."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def print_line(text: str, to: Console = console) -> None:
    """Print a line that is not broken, and in which nothing is markup or highlighted."""
    to.print(text, soft_wrap=True, highlight=False, markup=False)
