"""A probe fitted to everyone, as one linear model of raw features and confounds: to be saved and applied to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from extract.embeddings import Embeddings
from extract.probing.confounds import (
    ConfoundCoding,
    ConfoundValues,
    fit_coding,
    fit_residualiser,
    match_confounds,
    read_confounds,
)
from extract.probing.cross_validation import fit_classes, fit_values
from extract.probing.groups import Groups, read_groups
from extract.probing.logistic import probabilities
from extract.probing.probe import check_embeddings, target_batches
from extract.probing.results import Interval
from extract.probing.settings import ProbeSettings
from extract.probing.targets import Target, by_column, read_targets, target_names


@dataclass(frozen=True)
class ProbeModel:
    """A linear model: features times coefficients plus confounds times theirs plus intercept, and a link function.

    Attributes
    ----------
    name, task, labels, units
        Of the target; see `probing.results.TargetResult`.
    n, participants
        Scans that it was fitted to, and the people they are of.
    coefficients
        float64, (feature, output): one output, or one per class where there are more than two.
    intercept
        float64, (output,).
    penalty
        The one that was chosen, on standardised features.
    confounds
        How confounds become columns; None without any.
    confound_coefficients
        float64, (column, output). Confounds are removed from features before the fit, which is linear, too.
    score
        Of the same model in cross-validation, where known.
    """

    name: str
    task: str
    labels: list[str]
    units: str | None
    n: int
    participants: int
    coefficients: np.ndarray
    intercept: np.ndarray
    penalty: float
    confounds: ConfoundCoding | None
    confound_coefficients: np.ndarray
    score: Interval | None = None

    def predict(self, features: np.ndarray, confounds: np.ndarray | None = None) -> np.ndarray:
        """Predict the target of other scans.

        Parameters
        ----------
        features
            (scan, feature).
        confounds
            (scan, confound) in the order of ``self.confounds.names``, NaN where missing.

        Returns
        -------
        numpy.ndarray
            float64, (scan,) values in the target's units, or (scan, class) probabilities.

        Raises
        ------
        ValueError
            If features or confounds are not as many as the model has.
        """
        if features.ndim != 2 or features.shape[1] != len(self.coefficients):
            raise ValueError(
                f"features of shape {features.shape}: the model of {self.name!r} expects (scan, "
                f"{len(self.coefficients)}), from the encoder that it was fitted to"
            )
        decisions = features.astype(np.float64) @ self.coefficients + self.intercept
        if self.confounds is not None:
            names = self.confounds.names
            if confounds is None or confounds.shape != (len(features), len(names)):
                raise ValueError(f"the model of {self.name!r} needs the confounds {', '.join(names)} of each scan")
            decisions = decisions + self.confounds.encode(confounds) @ self.confound_coefficients
        if self.labels:
            return probabilities(decisions)
        value = decisions[:, 0]
        return np.expm1(np.clip(value, 0, 700)) if self.task == "count" else value

    def predict_embeddings(self, embeddings: Embeddings) -> np.ndarray:
        """Predict for all scans of an embedding file, whose confounds are read from it and matched by their labels.

        Raises
        ------
        ValueError
            If it lacks a confound, or has other features.
        """
        if self.confounds is None:
            return self.predict(embeddings.features)
        return self.predict(embeddings.features, match_confounds(self.confounds, self._measured(embeddings))[0])

    def warnings(self, embeddings: Embeddings) -> list[str]:
        """Return what is unknown of the confounds of an embedding file: see `probing.confounds.match_confounds`."""
        if self.confounds is None:
            return []
        return match_confounds(self.confounds, self._measured(embeddings))[1]

    def _measured(self, embeddings: Embeddings) -> ConfoundValues:
        names = self.confounds.names if self.confounds else ()
        try:
            return read_confounds(embeddings, names)
        except ValueError as error:
            raise ValueError(
                f"the model of {self.name!r} needs {', '.join(names)} of the scans, its confounds (give a table "
                f"that has them: --phenotypes FILE): {error}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        coding, score = self.confounds, self.score
        return {
            "name": self.name,
            "task": self.task,
            "labels": self.labels,
            "units": self.units,
            "n": self.n,
            "participants": self.participants,
            "penalty": self.penalty,
            "coefficients": self.coefficients.tolist(),
            "intercept": self.intercept.tolist(),
            "confounds": None
            if coding is None
            else {
                "names": list(coding.names),
                "categories": [list(values) for values in coding.categories],
                "labels": [list(labels) for labels in coding.labels],
                "means": [list(means) for means in coding.means],
                "coefficients": self.confound_coefficients.tolist(),
            },
            "score": None if score is None else {**score.__dict__},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ProbeModel:
        """Return the model of which `to_json` made a document.

        Raises
        ------
        ValueError
            If it is no such document.
        """
        try:
            coding = document["confounds"]
            outputs = len(document["intercept"])
            score = document.get("score")
            model = cls(
                name=str(document["name"]),
                task=str(document["task"]),
                labels=[str(label) for label in document["labels"]],
                units=document["units"],
                n=int(document["n"]),
                participants=int(document["participants"]),
                coefficients=np.array(document["coefficients"], dtype=np.float64).reshape(-1, outputs),
                intercept=np.array(document["intercept"], dtype=np.float64),
                penalty=float(document["penalty"]),
                confounds=None
                if coding is None
                else ConfoundCoding(
                    tuple(coding["names"]),
                    tuple(tuple(float(value) for value in values) for values in coding["categories"]),
                    tuple(tuple(str(label) for label in labels) for labels in coding["labels"]),
                    tuple(tuple(float(mean) for mean in means) for means in coding["means"]),
                ),
                confound_coefficients=np.array(
                    [] if coding is None else coding["coefficients"], dtype=np.float64
                ).reshape(-1, outputs),
                score=None if score is None else Interval(**score),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no saved probe: {error!r}; expected what ProbeModel.to_json returns") from error
        return model


def refit(
    embeddings: Embeddings,
    target: str,
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
) -> ProbeModel:
    """Fit the probe of one target, see `refit_all`."""
    (model,) = refit_all(embeddings, [target], tasks=tasks, settings=settings)
    return model


def refit_all(
    embeddings: Embeddings,
    targets: Sequence[str],
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
    on_target: Callable[[ProbeModel], None] | None = None,
) -> list[ProbeModel]:
    """Fit probes to everyone who has a value and all confounds; the penalty as on a training side.

    Parameters
    ----------
    targets
        Names of phenotypes, or their aliases.
    tasks
        As of `probing.probe.probe`; those of other targets do not matter.
    settings
        Of which confounds, groups, bins and the seed matter here.
    on_target
        Called after each.

    Raises
    ------
    ValueError
        If a target, a confound or a group is unknown, or a target cannot be fitted.
    """
    settings = settings or ProbeSettings()
    names = target_names(embeddings, targets)
    check_embeddings(embeddings)
    groups = read_groups(embeddings, settings.groups, settings.kinship)
    confounds = read_confounds(embeddings, settings.confounds, tasks)
    asked, bins = by_column(embeddings, tasks, names), by_column(embeddings, settings.bins, names)
    found = read_targets(embeddings, names, asked, bins, groups.people, complete=confounds.complete)
    for target in found:
        if target.reason:
            raise ValueError(f"{target.name!r} cannot be fitted: {target.reason}")
    models: dict[str, ProbeModel] = {}
    for batch in target_batches(found, confounds):
        for model in _fit_batch(batch, embeddings, groups, confounds.without(batch[0].name), settings.seed):
            models[model.name] = model
            if on_target:
                on_target(model)
    return [models[name] for name in names]


def _fit_batch(
    batch: list[Target], embeddings: Embeddings, all_groups: Groups, all_confounds: ConfoundValues, seed: int
) -> list[ProbeModel]:
    """Fit one classification, or regressions of the same scans, which share a factorisation."""
    present = batch[0].present
    groups = all_groups.rows(present)
    features = embeddings.features[present].astype(np.float64)
    confounds = all_confounds.rows(present)
    residualiser, coding, columns = None, None, None
    if confounds.names:
        coding = fit_coding(confounds)
        columns = coding.encode(confounds.values)
        residualiser = fit_residualiser(features, columns)
        features = residualiser.apply(features, columns)
    truths = [target.values[present] for target in batch]
    with threadpool_limits(1 if features.size < 2_000_000 else None, user_api="blas"):
        if batch[0].labels:
            codes = truths[0].astype(np.int64)
            fit = fit_classes(features, codes, groups, np.arange(len(codes)), [seed], columns)
            of_target = [slice(None)]
        else:
            counts = [target.task == "count" for target in batch]
            outcomes = [np.log1p(truth) if count else truth for truth, count in zip(truths, counts, strict=True)]
            fit = fit_values(features, np.column_stack(outcomes), groups, np.arange(len(features)), columns)
            of_target = [slice(i, i + 1) for i in range(len(batch))]
    models = []
    for place, (target, outputs) in enumerate(zip(batch, of_target, strict=True)):
        coefficients, intercept = fit.coefficients[:, outputs], fit.intercept[outputs]
        model = ProbeModel(
            name=target.name,
            task=target.task,
            labels=target.labels,
            units=target.units,
            n=int(present.sum()),
            participants=int(groups.people.max()) + 1,
            coefficients=coefficients,
            intercept=intercept,
            penalty=float(fit.penalties[place]),
            confounds=coding,
            confound_coefficients=np.zeros((0, len(intercept))),
        )
        if residualiser is not None:
            beside = residualiser.coefficients @ coefficients
            intercept = intercept + residualiser.mean @ beside
            model = replace(model, confound_coefficients=-beside, intercept=intercept)
        models.append(model)
    return models
