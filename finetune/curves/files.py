"""The files that tell of a curve: ``curve.json``, ``curve.png``, ``curve.html``."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.curves.charts import curve_png
from finetune.curves.page import write_curve_page
from finetune.curves.results import CurveResult
from ingest.writing import write_whole

JSON, PNG, PAGE = "curve.json", "curve.png", "curve.html"


def write_files(result: CurveResult) -> None:
    """Write what there is of a curve; each file appears whole."""
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
    _write(result.run_dir / JSON, text.encode())
    if result.targets:
        _write(result.run_dir / PNG, curve_png(result.targets, "SIMULATED DATA" if result.plan.simulated else ""))
    write_curve_page(result.run_dir / PAGE, result)


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda temporary: temporary.write_bytes(content))
