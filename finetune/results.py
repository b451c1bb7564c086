"""What came of a run: scores of people whom the network has not seen, and how it got there. Kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.probing.results import Interval, OutOfFold, TargetResult
from finetune.errors import ANEW
from finetune.heads import Head
from finetune.predictions import predicted_of, truth_of
from ingest.writing import write_text_whole

RESULTS, PREDICTIONS, SPLIT, SETTINGS, EPOCHS, REPORT = (
    "results.json", "predictions.parquet", "split.csv", "settings.yaml", "epochs.csv", "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """A run that is finished.

    Attributes
    ----------
    run_dir
        Its folder.
    test, validation
        A score per target of the best epoch; ``skipped`` where it is not defined.
    history
        Per epoch ``epoch``, ``step``, ``lr``, ``train_loss``, ``seconds``, ``scans_per_second``, ``starved`` (share of
        the time), and where it was validated ``validation_loss``, ``validation_score`` (mean of the headlines) and
        ``NAME_METRIC`` of each target.
    best_epoch
        Whose weights are kept.
    epochs, steps
        That were trained.
    stopped
        ``done``, or ``early``.
    seconds
        Of the training.
    scans_per_second, starved
        Of the training, and the share of its time that it waited for scans.
    people, scans
        Of each part.
    skipped
        By row, why scans were left out.
    warnings
        That were told.
    resolved
        What was chosen where settings leave it open: ``weights``, ``view``, ``precision``, ``device``, ``micro_batch``,
        ``processes``, ``augmentation`` (all ranges; None without). Empty of runs of earlier versions.
    """

    run_dir: Path
    test: list[TargetResult]
    validation: list[TargetResult]
    history: list[dict[str, float]]
    best_epoch: int
    epochs: int
    steps: int
    stopped: str
    seconds: float
    scans_per_second: float
    starved: float
    people: dict[str, int]
    scans: dict[str, int]
    skipped: dict[int, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the result as printed by ``--json``; numbers that do not exist are None."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("run_dir", "history", "test")},
            "run_dir": str(self.run_dir),
            "targets": [result.to_json() for result in self.test],
            "validation": [result.to_json() for result in self.validation],
            "skipped": {str(row): reason for row, reason in self.skipped.items()},
        }


def write_result(result: RunResult) -> None:
    """Write ``results.json``, by which a run is known to be finished; predictions are a file of their own."""
    document = {key: value for key, value in vars(result).items() if key != "run_dir"}
    for part in ("test", "validation"):
        document[part] = [asdict(replace(one, out_of_fold=None, fold_scores={})) for one in document[part]]
    text = json.dumps(document, indent=1)  # NaN stays NaN, which Python reads again
    write_text_whole(result.run_dir / RESULTS, text + "\n")


def read_result(run_dir: str | Path, heads: list[Head]) -> RunResult:
    """Read a finished run, with its predictions.

    Parameters
    ----------
    heads
        Of its network.

    Raises
    ------
    ValueError
        If the run is not finished, or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    try:
        document = json.loads((run_dir / RESULTS).read_text(encoding="utf-8"))
        table = pd.read_parquet(run_dir / PREDICTIONS)
        for part in ("test", "validation"):
            document[part] = [
                _read_target(one, table[table["part"] == part], head)
                for one, head in zip(document[part], heads, strict=True)
            ]
        document["skipped"] = {int(row): reason for row, reason in document["skipped"].items()}
        return RunResult(run_dir=run_dir, **document)
    except FileNotFoundError as error:
        missing = next((name for name in (RESULTS, PREDICTIONS) if not (run_dir / name).is_file()), error)
        raise ValueError(f"{run_dir} is no finished run: there is no {missing}") from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(f"{run_dir} is damaged: {reason}; {ANEW}") from None


def _read_target(document: Mapping[str, Any], table: pd.DataFrame, head: Head) -> TargetResult:
    metrics = {name: Interval(**interval) for name, interval in document["metrics"].items()}
    result = TargetResult(**{**document, "metrics": metrics})
    if result.status != "ok":
        return result
    truth = truth_of(table, head)
    known = ~np.isnan(truth)
    fold = np.zeros(int(known.sum()), np.int64)
    rows = table["row"].to_numpy(np.int64)[known]
    return replace(result, out_of_fold=OutOfFold(truth[known], predicted_of(table, head)[known], fold, rows))
