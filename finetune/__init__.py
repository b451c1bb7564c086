"""Fine-tuning of networks for phenotypes: transfer against scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from finetune.checkpoints import LoadedRun, load_run
    from finetune.predict import Predicted, predict_to
    from finetune.results import RunResult
    from finetune.run import finetune

__all__ = ["FinetuneSettings", "LoadedRun", "Predicted", "RunResult", "finetune", "load_run", "predict_to"]

_HOMES = {
    "LoadedRun": "checkpoints",
    "Predicted": "predict",
    "RunResult": "results",
    "finetune": "run",
    "load_run": "checkpoints",
    "predict_to": "predict",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: torch takes seconds to import."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"finetune.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
