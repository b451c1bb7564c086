"""Cells that train nothing: the network as its weights are, and a linear probe on what it gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from extract import Embeddings, build_encoder, open_embeddings
from extract.blocks import same_scans
from extract.embeddings import read_tables
from extract.encoder import InputWarning
from extract.errors import WeightsUnavailableError
from extract.models import family_of
from extract.probing.cross_validation import fit_classes, fit_values
from extract.probing.groups import Groups
from extract.probing.logistic import probabilities
from extract.probing.results import TargetResult
from extract.probing.targets import Target
from extract.resume import extract_to
from extract.run import scans_table, wanted_rows
from extract.timing import Timing
from finetune.cohort import Cohort
from finetune.evaluate import score_head
from finetune.heads import make_head
from finetune.settings import FinetuneSettings
from ingest.store import VolumeStore
from ingest.withdraw_tables import RUN_EMBEDDINGS
from loaders import View


def embed_once(
    store: VolumeStore,
    run_dir: Path,
    settings: FinetuneSettings,
    on_batch: Callable[[Timing], None] | None = None,
    *,
    again: bool = False,
) -> Embeddings:
    """Return what the frozen network gives for the scans of a store as it is now: only what is new is extracted.

    Parameters
    ----------
    settings
        Of the curve: the network sees the same of a scan as when it is fine-tuned. Slices are pooled by their mean.
    again
        Try scans again that could not be read.

    Raises
    ------
    StoreBusyError
        If another process is extracting.
    WeightsUnavailableError
        If the weights cannot be had, and nothing was extracted before.
    """
    path = run_dir / RUN_EMBEDDINGS
    if path.exists() and not _lacks(store, path, again=again):  # whatever device this process would compute on
        return open_embeddings(path)
    solid = family_of(settings.model).axes == 3
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # it is to see what the fine-tuned ones see
            encoder = build_encoder(
                settings.model,
                weights="random" if settings.weights == "scratch" else settings.weights,
                weights_dir=settings.weights_dir,
                view=View.volume if solid else View(settings.view or "triplanar"),  # or it would be that of the weights
                slices=settings.slices,
                crop=settings.crop or store.grid.shape_zyx,  # ... and so would none be
                size=settings.size,
                scale=settings.scale,
                seed=settings.seed,
                device=settings.device,
                precision=str(read_tables(path).attrs["precision"]) if path.exists() else settings.precision,  # of all
            )
    except WeightsUnavailableError:
        if not path.exists():
            raise
    else:
        extract_to(path, store.path, encoder, backend=settings.backend, threads=settings.threads, on_batch=on_batch)
    return open_embeddings(path)


def _lacks(store: VolumeStore, path: Path, *, again: bool) -> bool:
    """Tell whether scans that are new, have changed, or are to be tried again are not in an embedding file."""
    tables, wanted = read_tables(path), scans_table(store, wanted_rows(store))
    missing = wanted["row"].to_numpy()[same_scans(wanted, tables.scans) < 0]
    tried = [] if again else [int(one["row"]) for one in tables.attrs.get("skipped") or []]
    return bool((~np.isin(missing, tried)).any())


@dataclass(frozen=True)
class Probed:
    """What probes reach on the people tested.

    Attributes
    ----------
    results
        One per target, of `finetune.evaluate.score_head`.
    penalties
        That were chosen, by target.
    train_scans
        Scans that they were fitted to, of which some target is known.
    skipped
        Scans of the training and test parts that have no embedding.
    """

    results: list[TargetResult]
    penalties: dict[str, float]
    train_scans: int
    skipped: int


def probe_cell(store: VolumeStore, embeddings: Embeddings, cohort: Cohort, settings: FinetuneSettings) -> Probed:
    """Fit a linear probe to the people of the training part and score it on those of the test part.

    Ridge or logistic regression, as of the ``probe`` command, the penalty chosen within the training people; those of
    the validation part are not used. Counts are fitted as log(1 + count), levels of ordinal targets as values.

    Parameters
    ----------
    cohort, settings
        Of the cell.

    Raises
    ------
    ValueError
        If a class has fewer than two people to train on, or scans cannot be read and ``on_error`` is ``raise``.
    """
    places = np.full(len(store.scans), -1)
    places[embeddings.scans["row"].to_numpy()] = np.arange(len(embeddings.scans))
    place = places[cohort.rows]
    there = place >= 0
    wanted = np.isin(cohort.part, ("train", "test"))
    missing = cohort.rows[wanted & ~there]
    if len(missing) and settings.on_error == "raise":
        reasons = {int(one["row"]): one["reason"] for one in embeddings.attrs.get("skipped") or []}
        row = int(missing[0])
        why = reasons.get(row, "it was not there when the others were extracted")
        raise ValueError(f"{len(missing)} scans have no embedding, the first is row {row}: {why}")
    results, penalties = [], {}
    for target in cohort.targets:
        known = there & target.present
        train, test = known & (cohort.part == "train"), known & (cohort.part == "test")
        features = embeddings.features[place[train | test]].astype(np.float64)
        of_train = train[train | test]
        head = make_head(target, train)
        predicted, penalties[target.name] = _fit(
            features[of_train], features[~of_train], target, cohort.groups.rows(train), train, settings.seed
        )
        results.append(
            score_head(
                head,
                target.values[test],
                predicted,
                cohort.groups.people[test],
                bootstrap=0,
                rows=cohort.rows[test],
            )
        )
    fitted = there & (cohort.part == "train")
    return Probed(results, penalties, int(fitted.sum()), len(missing))


def _fit(
    train: np.ndarray, test: np.ndarray, target: Target, groups: Groups, chosen: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:
    """Return predictions of the test scans and the penalty that was chosen."""
    values = target.values[chosen]
    with threadpool_limits(1 if train.size < 2_000_000 else None, user_api="blas"):
        if target.labels:
            codes = values.astype(np.int64)
            fit = fit_classes(train, codes, groups, np.arange(len(codes)), [seed])
            return probabilities(fit.decide(test)), float(fit.penalties[0])
        outcome = np.log1p(values) if target.task == "count" else values
        fit = fit_values(train, outcome[:, None], groups, np.arange(len(outcome)))
        decided = fit.decide(test)[:, 0]
    if target.task == "count":
        decided = np.maximum(np.expm1(np.clip(decided, -1, 700)), 0.0)
    return decided, float(fit.penalties[0])
