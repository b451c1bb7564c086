"""Do the cells of a curve, one after the other, but for those that other processes are at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.checkpoints import BEST, LAST
from extract.embeddings import Embeddings
from extract.errors import WeightsUnavailableError
from extract.probing.groups import read_groups
from extract.probing.results import TargetResult
from finetune.cohort import Cohort, as_table, read_cohort
from finetune.curves.cells import Cell, CellResult, TargetScores, claim, forget_cell, is_done, read_cell, write_cell
from finetune.curves.frozen import embed_once, probe_cell
from finetune.curves.planning import SPLIT, Plan
from finetune.curves.settings import CurveSettings
from finetune.errors import ANEW
from finetune.run import Progress, finetune
from ingest.errors import StoreBusyError
from ingest.store import VolumeStore

#: What messages of runs and extractions advise -> what there is to do in a curve.
_ADVICE = {
    "Begin anew (--overwrite) with": "Begin another curve with",
    ANEW: "--retry-failed begins it anew",
    "add --overwrite to replace it, or choose another name": "remove it, and try again with --retry-failed",
}

_LOOK_AGAIN_S = (0.2, 20.0)  # while others are at work, the longer they take


@dataclass(frozen=True)
class CurveProgress:
    """Where a curve stands.

    Attributes
    ----------
    done, total
        Cells.
    cell
        The one under way, or that has just come to its end.
    result
        What came of it; None while it is under way.
    training
        Where its training is; None before the first step, and of probes.
    """

    done: int
    total: int
    cell: Cell
    result: CellResult | None = None
    training: Progress | None = None


class Work:
    """The cells of a plan as this process works on them.

    Parameters
    ----------
    store
        Open.
    plan, cohort
        See `finetune.curves.planning.make_plan`.
    curve
        Whether to wait, to try again, to keep networks.
    on_progress
        Called when a cell begins and ends, and after each step of a training.
    """

    def __init__(
        self,
        store: VolumeStore,
        run_dir: Path,
        plan: Plan,
        cohort: Cohort,
        curve: CurveSettings,
        on_progress: Callable[[CurveProgress], None] | None = None,
    ) -> None:
        self.store, self.run_dir, self.plan, self.curve = store, run_dir, plan, curve
        self.on_progress = on_progress or (lambda _: None)
        self.cells = plan.cells()
        self.done = 0
        self.embeddings: Embeddings | None = None
        groups = read_groups(as_table(store, cohort.rows), plan.settings.groups, plan.settings.kinship)
        self.people, self.groups = np.full((2, len(store.scans)), -1)
        self.people[cohort.rows], self.groups[cohort.rows] = groups.people, groups.units

    def do_all(self) -> int:
        """Do every cell that nobody else does; return how many are under way elsewhere in the end."""
        if self.curve.retry_failed:
            self._forget_failed()
        pause = _LOOK_AGAIN_S[0]
        while True:
            worked, busy = False, 0
            for cell in self.cells:
                if is_done(self.run_dir, cell):
                    continue
                with claim(self.run_dir, cell) as mine:
                    if not mine:
                        busy += 1
                    elif not is_done(self.run_dir, cell):  # another process may have come to its end in between
                        did = self._do(cell)
                        worked, busy = worked or did, busy + (not did)
            if worked:
                pause = _LOOK_AGAIN_S[0]
                continue  # others may have died meanwhile
            if not (busy and self.curve.wait):
                return busy
            time.sleep(pause)
            pause = min(1.5 * pause, _LOOK_AGAIN_S[1])

    def _forget_failed(self) -> None:
        for cell in self.cells:
            with claim(self.run_dir, cell) as mine:
                if mine and read_cell(self.run_dir, cell).status == "failed":
                    forget_cell(self.run_dir, cell)

    def _do(self, cell: Cell) -> bool:
        """Do a cell and write what came of it; False if another process holds what it needs."""
        self.done = sum(is_done(self.run_dir, one) for one in self.cells)
        self._tell(cell)
        begun = time.perf_counter()
        try:
            result = self._probe(cell) if cell.method == "probe" else self._train(cell)
        except StoreBusyError:
            return False
        except WeightsUnavailableError:  # which no cell will have
            raise
        except Exception as error:  # whatever it is, other cells may do
            reason = _for_curves(" ".join((str(error) or type(error).__name__).split()), cell)
            result = CellResult(cell, "failed", reason, seconds=time.perf_counter() - begun)
        write_cell(self.run_dir, result)
        if not self.curve.keep_weights:
            for name in (LAST, BEST):
                (cell.folder(self.run_dir) / name).unlink(missing_ok=True)
        self.done += 1
        self._tell(cell, result=result)
        return True

    def _tell(self, cell: Cell, *, result: CellResult | None = None, training: Progress | None = None) -> None:
        self.on_progress(CurveProgress(self.done, len(self.cells), cell, result, training))

    def _train(self, cell: Cell) -> CellResult:
        found = finetune(
            self.store.path,
            cell.folder(self.run_dir),
            self.plan.settings_of(cell, self.run_dir),
            report=False,
            on_progress=lambda training: self._tell(cell, training=training),
        )
        training = {
            "epochs": found.epochs,
            "best_epoch": found.best_epoch,
            "steps": found.steps,
            "stopped": found.stopped,
            "scans_per_second": round(found.scans_per_second, 2),
        }
        return self._result(
            cell, found.test, found.people["train"], found.scans["train"], found.seconds, training, len(found.skipped)
        )

    def _probe(self, cell: Cell) -> CellResult:
        if self.embeddings is None:
            self.embeddings = embed_once(self.store, self.run_dir, self.plan.settings, again=self.curve.retry_failed)
        begun = time.perf_counter()
        settings = self.plan.settings_of(cell, self.run_dir)
        cohort = read_cohort(self.store, settings, self.run_dir / SPLIT)
        found = probe_cell(self.store, self.embeddings, cohort, settings)
        seconds = time.perf_counter() - begun
        return self._result(
            cell, found.results, cohort.people()["train"], found.train_scans, seconds, {"penalty": found.penalties},
            found.skipped,
        )  # fmt: skip

    def _result(
        self,
        cell: Cell,
        results: list[TargetResult],
        train_people: int,
        train_scans: int,
        seconds: float,
        training: dict[str, Any],
        skipped: int,
    ) -> CellResult:
        """Return what came of a cell: failed if a score is not defined."""
        undefined = [f"{result.name}: {result.reason}" for result in results if result.status != "ok"]
        if undefined:
            why = "; ".join(undefined)
            return CellResult(cell, "failed", why, train_people, train_scans, seconds, training, skipped)
        targets = tuple(self._target(result) for result in results)
        return CellResult(cell, "ok", "", train_people, train_scans, seconds, training, skipped, targets)

    def _target(self, result: TargetResult) -> TargetScores:
        found = result.out_of_fold
        assert found is not None  # as of every score that is defined
        rows = np.asarray(found.rows, np.int64)
        return TargetScores(
            name=result.name,
            task=result.task,
            labels=tuple(result.labels),
            units=result.units,
            metric=result.metric,
            scores={name: float(metric.score) for name, metric in result.metrics.items()},
            chances={name: float(metric.chance) for name, metric in result.metrics.items()},
            rows=rows,
            people=self.people[rows],
            groups=self.groups[rows],
            truth=np.asarray(found.truth, np.float64),
            predicted=np.asarray(found.predicted, np.float64),
            participants=self.store.scans["participant"].to_numpy().astype(str)[rows],
        )


def _for_curves(reason: str, cell: Cell) -> str:
    """Return why a cell failed, with what helps by the options of a curve."""
    for advice, here in _ADVICE.items():
        reason = reason.replace(advice, here)
    return reason.replace("a lower --lr", "a lower --scratch-lr") if cell.method == "scratch" else reason
