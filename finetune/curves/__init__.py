"""Learning curves: transfer, scratch, and frozen with a probe, over sample sizes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune.curves.settings import CurveSettings, make_curve_settings

if TYPE_CHECKING:
    from finetune.curves.page import write_curve_page
    from finetune.curves.printing import print_curve
    from finetune.curves.results import CurveResult
    from finetune.curves.running import read_curve, run_curve
    from finetune.curves.work import CurveProgress

__all__ = [
    "CurveProgress",
    "CurveResult",
    "CurveSettings",
    "make_curve_settings",
    "print_curve",
    "read_curve",
    "run_curve",
    "write_curve_page",
]

_HOMES = {
    "CurveProgress": "work",
    "CurveResult": "results",
    "print_curve": "printing",
    "read_curve": "running",
    "run_curve": "running",
    "write_curve_page": "page",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: torch takes seconds to import."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"finetune.curves.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
