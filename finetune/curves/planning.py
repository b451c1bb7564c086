"""What a curve is to be: one split, its sizes, methods and seeds, written down so that all who work on it agree."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.errors import WeightsUnavailableError
from extract.models import family_of
from extract.weights import about_store
from finetune.build import check_settings, find_weights
from finetune.cohort import Cohort, read_cohort
from finetune.curves.cells import Cell, held, list_cells, read_cell
from finetune.curves.settings import CurveSettings, choose_methods, choose_sizes, from_scratch
from finetune.folder import FREE
from finetune.settings import FinetuneSettings, make_settings
from finetune.split import read_split, write_split
from ingest.errors import StoreError
from ingest.store import VolumeStore, check_format, package_versions
from ingest.withdraw_tables import RUN_LOCK
from ingest.writing import write_text_whole

FORMAT, VERSION = "brain-curve", 1
PLAN, SPLIT = "plan.json", "split.csv"

#: Before what is noted of weights, to find it again where they are gone.
_OF_WEIGHTS = "of the weights: "

#: Settings that processes may have of their own, or that do not matter. (The split is compared by what is in it.)
_OWN = (*FREE, "split", "bootstrap")

_PATIENCE_S = 0.1  # between two looks at a lock that is held for moments


@dataclass(frozen=True)
class Plan:
    """A curve that is to be made.

    Attributes
    ----------
    settings
        Of the trainings, but for weights, people, seed and split, which the cells have of their own.
    sizes, methods, seeds, scratch_lr, draws
        See `finetune.curves.settings.CurveSettings`.
    people
        In each part of the split.
    store
        Name, id and grid of the store.
    notes
        What was left out, in words.
    weights_sha256
        Of what transfer begins with, which must stay the same; None if nothing does.
    """

    settings: FinetuneSettings
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    scratch_lr: float | None
    draws: int
    people: dict[str, int]
    store: dict[str, Any]
    simulated: bool
    notes: tuple[str, ...] = ()
    created_by: dict[str, str] = field(default_factory=dict)
    weights_sha256: str | None = None

    @property
    def weights(self) -> str:
        """What transfer begins with."""
        return self.settings.weights or family_of(self.settings.model).pretrained

    def cells(self) -> list[Cell]:
        """Return the cells in the order in which they are done."""
        return list_cells(self.methods, self.sizes, self.seeds)

    def settings_of(self, cell: Cell, run_dir: Path) -> FinetuneSettings:
        """Return the settings of one training."""
        of_method = from_scratch(self.settings, self.scratch_lr) if cell.method == "scratch" else self.settings
        own = {"train_people": cell.size, "seed": cell.seed, "split": str((run_dir / SPLIT).resolve()), "bootstrap": 0}
        return of_method.model_copy(update=own)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "sizes": list(self.sizes),
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "scratch_lr": self.scratch_lr,
            "draws": self.draws,
            "people": self.people,
            "simulated": self.simulated,
            "notes": list(self.notes),
            "store": self.store,
            "settings": self.settings.model_dump(mode="json"),
            "weights_sha256": self.weights_sha256,
            "created_by": self.created_by,
        }


def make_plan(
    store: VolumeStore, run_dir: Path, settings: FinetuneSettings, curve: CurveSettings
) -> tuple[Plan, Cohort]:
    """Plan a curve and write that down, with the split of people, which is made once and stays.

    Sizes, methods and seeds may be others than those of a call before: cells that are done count in any curve.

    Returns
    -------
    Plan, Cohort
        The cohort has all people of the training part.

    Raises
    ------
    ValueError
        If settings do not go together, or with the volumes, a size is larger than the training part, or the people
        tested have not every class of a target.
    StoreError
        If the folder is of other settings, weights, another store, or other values of a target, or no curve.
    WeightsUnavailableError
        If the weights cannot be had, and the curve is new.
    """
    if settings.train_people is not None:
        raise ValueError(f"train_people is {settings.train_people}: a curve has sizes; leave it out, or use sizes")
    methods, notes = choose_methods(curve.methods, settings, curve.scratch_lr)
    with waiting_for(run_dir / "plan"):
        before = _read_before(run_dir)
        scratch_lr = curve.scratch_lr
        if before is not None:
            if "scratch" not in methods:
                scratch_lr = before.scratch_lr  # stays, for calls with scratch
            _compare(before, store, settings, scratch_lr, run_dir)
        cohort = _read_people(store, run_dir, settings, begun=before is not None)
        _check_test(cohort)
        check_settings(settings, cohort.heads, store)
        people = cohort.people()
        about, weights_sha256 = _about_weights(store, run_dir, settings, methods, before)
        notes += [*about, *cohort.warnings]
        plan = Plan(
            settings=settings,
            sizes=choose_sizes(curve.sizes, people["train"]),
            methods=methods,
            seeds=curve.seeds,
            scratch_lr=scratch_lr,
            draws=curve.draws,
            people=people,
            store={"name": store.path.name, "id": store.attrs["store_id"], "grid": store.attrs["grid"]},
            simulated=bool(store.attrs["simulated"]),
            notes=tuple(notes),
            created_by=package_versions("torch", "torchvision", "zarr", "numpy"),
            weights_sha256=weights_sha256,
        )
        _compare_truth(run_dir, plan, cohort)
        if before is None or not (run_dir / SPLIT).is_file():  # now that nothing is left to be refused
            write_split(run_dir / SPLIT, cohort.split)
        text = json.dumps(plan.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_text_whole(run_dir / PLAN, text)
    return plan, cohort


def read_plan(run_dir: Path) -> Plan:
    """Read the plan of a curve.

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    StoreError
        If it is damaged, or of a version that is not known.
    """
    path = run_dir / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"no curve at {run_dir}; make one with: finetune curve STORE {run_dir} --target NAME")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_format(document, path, name=FORMAT, known=VERSION)
        return Plan(
            settings=make_settings(document["settings"], str(path)),
            sizes=tuple(document["sizes"]),
            methods=tuple(document["methods"]),
            seeds=tuple(document["seeds"]),
            scratch_lr=document["scratch_lr"],
            draws=int(document["draws"]),
            people=dict(document["people"]),
            store=dict(document["store"]),
            simulated=bool(document["simulated"]),
            notes=tuple(document["notes"]),
            created_by=dict(document["created_by"]),
            weights_sha256=document.get("weights_sha256"),  # earlier versions did not note it
        )
    except (LookupError, TypeError) as error:
        raise StoreError(f"{path} is no plan of a curve: {error!r}; remove the folder, and run it again") from None
    except ValueError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is no plan of a curve: {error}; remove the folder, and run it again") from None


@contextlib.contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold a lock that others hold for moments only."""
    while True:
        with held(path) as mine:
            if mine:
                yield
                return
        time.sleep(_PATIENCE_S)


def _read_before(run_dir: Path) -> Plan | None:
    if (run_dir / PLAN).is_file():
        return read_plan(run_dir)
    if run_dir.is_dir():
        locks = (f"{PLAN}.lock", "plan.lock", f"{RUN_LOCK}.lock")
        others = [path.name for path in run_dir.iterdir() if path.name not in (SPLIT, *locks)]
        if any(not name.startswith(".") for name in others):
            raise StoreError(f"{run_dir} exists and is no curve (it holds {sorted(others)[0]}); choose another folder")
    return None


def _compare(before: Plan, store: VolumeStore, settings: FinetuneSettings, lr: float | None, run_dir: Path) -> None:
    if before.store["id"] != store.attrs["store_id"]:
        raise StoreError(
            f"{run_dir} is the curve of another store, {before.store['name']}, than {store.path.name}; choose another "
            "folder"
        )
    had = before.settings.model_dump(mode="json") | {"scratch_lr": before.scratch_lr}
    now = settings.model_dump(mode="json") | {"scratch_lr": lr}
    differing = [name for name in now if name not in _OWN and had[name] != now[name]]
    if differing:
        words = "; ".join(f"{name} {had[name]!r}, not {now[name]!r}" for name in differing)
        raise StoreError(f"{run_dir} was begun with {words}; use the same settings, or another folder")


def _read_people(store: VolumeStore, run_dir: Path, settings: FinetuneSettings, *, begun: bool) -> Cohort:
    """Split people, or of a curve that was begun read how that was done, and return who is there."""
    path = run_dir / SPLIT
    if not (begun and path.is_file()):  # without a plan it is of a process that was killed before anything was trained
        return read_cohort(store, settings)
    if settings.split is not None and read_split(Path(settings.split)) != read_split(path):
        raise StoreError(f"{run_dir} has another split than {settings.split}; leave it out, or use another folder")
    return read_cohort(store, settings, path)


def _compare_truth(run_dir: Path, plan: Plan, cohort: Cohort) -> None:
    """Raise StoreError if cells were scored by other values of people who are tested than the store has now."""
    targets = {target.name.lower(): target for target in cohort.targets}
    for cell in plan.cells():
        for scored in read_cell(run_dir, cell).targets:
            target = targets[scored.name.lower()]  # as settings name them, whatever the store does by now
            now = pd.Series(target.values, index=cohort.rows).reindex(scored.rows).to_numpy()
            if scored.labels != tuple(target.labels) or (now != scored.truth)[~np.isnan(now)].any():
                raise StoreError(
                    f"{run_dir} has scores by other values of {target.name}, which have changed in the store since; "
                    "use another folder"
                )


def _about_weights(
    store: VolumeStore, run_dir: Path, settings: FinetuneSettings, methods: tuple[str, ...], before: Plan | None
) -> tuple[list[str], str | None]:
    """Return what is to be told of the weights, above all that they know people of the store, and their sha256."""
    sum_before = None if before is None else before.weights_sha256
    if settings.weights == "scratch" or not {"transfer", "probe"} & set(methods):
        return [], sum_before
    try:
        weights = find_weights(settings)
    except WeightsUnavailableError:
        if before is None:
            raise  # cells that are done do without
        return [note for note in before.notes if note.startswith(_OF_WEIGHTS)], sum_before
    if sum_before not in (None, weights.sha256):
        raise StoreError(
            f"{run_dir} was begun with other weights than {weights.name} has now (sha256 {sum_before}, not "
            f"{weights.sha256}); give those, or use another folder"
        )
    return [f"{_OF_WEIGHTS}{line}" for line in about_store(weights, store)], weights.sha256


def _check_test(cohort: Cohort) -> None:
    """Check that scores of the test part are defined, before anything is trained."""
    test = cohort.part == "test"
    if not test.any():
        raise ValueError("nobody is in the test part, by whom all sizes are compared; use a larger test share")
    for target in cohort.targets:
        values = target.values[test & target.present]
        missing = [label for code, label in enumerate(target.labels) if not (values == code).any()]
        if missing:
            raise ValueError(f"nobody of the test part has {target.name} {missing[0]!r}; use a larger test share")
        if not target.labels and (not len(values) or np.ptp(values) == 0):
            raise ValueError(f"the test part has no two different values of {target.name}; use a larger test share")
