"""What a benchmark measured, on which machine; printed as a table and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ingest.store import package_versions


@dataclass(frozen=True)
class Result:
    """One measured speed.

    Attributes
    ----------
    value
        Median over the repeats.
    low, high
        Slowest and fastest repeat.
    limit_share
        `value` over that of the physical limit, where one was measured in the same run.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    limit_share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A benchmark's results and the ratios between them.

    Attributes
    ----------
    settings
        What was measured, enough to repeat it.
    """

    name: str
    settings: dict[str, Any]
    results: list[Result]
    ratios: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return machine, results and ratios as written by ``--json``."""
        results = [{key: value for key, value in vars(r).items() if value not in (None, "")} for r in self.results]
        return {
            "benchmark": self.name,
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "machine": machine(),
            "settings": self.settings,
            "results": results,
            "ratios": self.ratios,
        }


def failure(error: Exception) -> str:
    """Return what is kept of an error that is being handled: a GPU may be there for minutes, and the rest goes on."""
    return f"{error!r}\n{traceback.format_exc(limit=-3)}"


def machine() -> dict[str, Any]:
    """Describe this machine and the versions of what is measured."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": package_versions("torch", "zarr", "numcodecs", "nvidia-dali-cuda130", "monai", "nibabel", "numpy"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    table = Table(title=f"benchmark {report.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["what", "median", "slowest", "fastest", "unit", "of the limit"]
    noted = any(result.note for result in report.results)
    for column in [*columns, "note"] if noted else columns:
        table.add_column(column, justify="left" if column in ("what", "unit", "note") else "right")
    for result in report.results:
        share = "" if result.limit_share is None else f"{result.limit_share:.2f}"
        speeds = (f"{speed:,.1f}" for speed in (result.value, result.low, result.high))
        table.add_row(result.name, *speeds, result.unit, share, *([result.note] if noted else []))
    console.print(table, highlight=False)
    for name, ratio in report.ratios.items():
        console.print(f"{name}: {ratio:.3g}", highlight=False)


def save(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n")
