"""Make a curve, and read it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.curves.cells import read_cell
from finetune.curves.files import write_files
from finetune.curves.planning import Plan, make_plan, read_plan, waiting_for
from finetune.curves.results import CurveResult
from finetune.curves.scores import target_curves
from finetune.curves.settings import CurveSettings
from finetune.curves.work import CurveProgress, Work
from finetune.folder import check_no_file
from finetune.settings import FinetuneSettings
from ingest.lock import store_lock
from ingest.places import Place
from ingest.store import open_store
from ingest.withdraw_tables import RUN_LOCK


def run_curve(
    store: str | Place,
    run_dir: str | Path,
    settings: FinetuneSettings,
    curve: CurveSettings | None = None,
    *,
    on_progress: Callable[[CurveProgress], None] | None = None,
) -> CurveResult:
    """Train and probe with more and more people, and score all on the same people.

    Each cell (method, size, seed) is done once, in a folder of its own; one that was killed goes on. Any number of
    processes, on any machines that share the folder, may be started with the same call: each takes cells that nobody
    else is at. Whoever ends writes down what is there by then, so the last one writes the whole.

    - ``transfer``: fine-tuned from the weights of the settings.
    - ``scratch``: the same network from random weights.
    - ``probe``: the network of these weights as it is, and a linear probe of its features.

    The people of a smaller size are among those of a larger one of the same seed, and are the same for all methods of
    a seed. The seed also decides the random numbers of the training. Those who are tested, and those who tell the best
    epoch, are the same throughout.

    Parameters
    ----------
    store
        Path or ``s3://`` address of a store.
    run_dir
        Made if need be. It gets ``plan.json``, ``split.csv``, a folder for each cell (``transfer/n50/seed0`` ...),
        ``embeddings.zarr``, and, of what came of it, ``curve.json``, ``curve.png`` and ``curve.html``.
    settings
        Of the trainings; sizes and seeds are the curve's, the seed here is that of the split.
    curve
        Sizes, methods, seeds.
    on_progress
        Called when a cell begins and ends, and after each step of a training.

    Returns
    -------
    CurveResult
        Whose ``ok`` is whether everything is done. A cell that fails (a loss that is not finite, a class that is
        absent) is one of its rows, with the reason. Cells that others are at are left to them, and counted as
        ``elsewhere``, unless ``wait`` is set: then they are waited for, and done if their process dies.

    Raises
    ------
    ValueError
        If settings cannot be; see `finetune.curves.planning.make_plan`.
    StoreError
        If the folder is of another curve, or people are being removed from it.
    WeightsUnavailableError
        If the weights cannot be had.
    """
    run_dir, curve = Path(run_dir), curve or CurveSettings()
    check_no_file(run_dir, "curve")
    with store_lock(run_dir / RUN_LOCK, shared=True):  # several may work here, but nobody may remove people meanwhile
        volumes = open_store(store)
        plan, cohort = make_plan(volumes, run_dir, settings, curve)
        elsewhere = Work(volumes, run_dir, plan, cohort, curve, on_progress).do_all()
        with waiting_for(run_dir / "curve"):  # so that what is read last is also written last
            result = read_curve(run_dir, plan, elsewhere=elsewhere)
            write_files(result)
    return result


def read_curve(run_dir: str | Path, plan: Plan | None = None, *, elsewhere: int = 0) -> CurveResult:
    """Read what there is of a curve by now, and compute its scores and intervals.

    Parameters
    ----------
    plan
        By default that of the last call of `run_curve` in this folder.
    elsewhere
        Cells that others are known to be at.

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    ValueError
        If it is damaged.
    """
    run_dir = Path(run_dir)
    plan = plan or read_plan(run_dir)
    cells = tuple(read_cell(run_dir, cell) for cell in plan.cells())
    skipped = max((cell.skipped for cell in cells), default=0)
    warnings = [*plan.notes]
    if skipped:
        warnings.append(f"up to {skipped} scans could not be read, and are left out; see: ingest verify STORE")
    unfinished = sum(cell.status == "unfinished" for cell in cells)
    curves = target_curves(cells, draws=plan.draws)
    return CurveResult(run_dir, plan, curves, cells, min(elsewhere, unfinished), tuple(warnings))
