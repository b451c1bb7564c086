"""Confounds: read beside the features, coded as columns, and taken out of the features on the training side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extract.embeddings import Embeddings
from extract.targets import column_of
from ingest.dictionary import BY_NAME

#: What the store knows of each scan's head, beside the phenotypes.
SCAN_CONFOUNDS = ("brain_volume", "head_scale")

_ROUNDING = 1e-6  # of a feature's spread: what is left below it is float32's rounding


@dataclass(frozen=True)
class ConfoundValues:
    """Confounds as they were measured.

    Attributes
    ----------
    names
        Columns of the phenotypes, or of `SCAN_CONFOUNDS`.
    categorical
        Whether each has categories rather than numbers.
    values
        float64, (scan, confound), NaN where missing.
    """

    names: tuple[str, ...]
    categorical: tuple[bool, ...]
    values: np.ndarray

    def rows(self, chosen: np.ndarray) -> ConfoundValues:
        """Return those of some scans, by rows or a mask."""
        return ConfoundValues(self.names, self.categorical, self.values[chosen])

    def without(self, target: str) -> ConfoundValues:
        """Return all but the target itself, which would explain itself; `head_scale` is UK Biobank's head size."""
        variable = BY_NAME.get(target.lower())
        same = {target, "head_scale"} if variable is not None and variable.name == "head_size" else {target}
        kept = [i for i, name in enumerate(self.names) if name not in same]
        return ConfoundValues(
            tuple(self.names[i] for i in kept), tuple(self.categorical[i] for i in kept), self.values[:, kept]
        )


@dataclass(frozen=True)
class ConfoundCoding:
    """How confounds become columns, learnt from training scans.

    Attributes
    ----------
    names
        As of `ConfoundValues`.
    categories
        Of each confound those seen in training, each of which is a column of 0 and 1; none for a number. A scan of
        another category has 0 in all.
    means
        Of the training scans, for missing numbers; 0 for categories.
    missing
        Whether training scans lacked the confound: there is a column then that says so.
    """

    names: tuple[str, ...]
    categories: tuple[tuple[float, ...], ...]
    means: tuple[float, ...]
    missing: tuple[bool, ...]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return columns, float64 (scan, column), of values (scan, confound) that are NaN where missing."""
        columns = []
        for i, (categories, mean) in enumerate(zip(self.categories, self.means, strict=True)):
            measured, absent = values[:, i], np.isnan(values[:, i])
            if categories:
                columns.append(measured[:, None] == np.array(categories))
            else:
                columns.append(np.where(absent, mean, measured)[:, None])
            if self.missing[i]:
                columns.append(absent[:, None])
        return np.hstack(columns).astype(np.float64) if columns else np.zeros((len(values), 0))


@dataclass(frozen=True)
class Residualiser:
    """What confounds explain of features, learnt from training scans.

    Attributes
    ----------
    mean
        (column,) of the confounds.
    coefficients
        (column, feature).
    left
        (feature,) whether more than rounding is left of a feature.
    """

    mean: np.ndarray
    coefficients: np.ndarray
    left: np.ndarray

    def apply(self, features: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return features (scan, feature) without what the confounds (scan, column) explain; the mean stays."""
        return np.where(self.left, features - (columns - self.mean) @ self.coefficients, 0)


def read_confounds(embeddings: Embeddings, names: Sequence[str]) -> ConfoundValues:
    """Read confounds by name or alias.

    ``brain_volume`` is the number of non-zero voxels in mm3; in MNI152 space, where every brain has the template's
    size, divided by ``head_scale``, which gives the size back. It is a brain's volume where the skull was stripped.
    ``head_scale`` is the volumetric scaling from the head to MNI152. Phenotypes of these names come first. What has
    labels, or the task ``binary`` or ``multiclass``, has categories; all else is a number.

    Raises
    ------
    ValueError
        If one is unknown, named twice, infinite, or missing in every scan.
    """
    found: dict[str, tuple[bool, np.ndarray]] = {}
    for name in names:
        column, categorical = name, False
        if name in SCAN_CONFOUNDS and name not in embeddings.phenotypes:
            values = _scan_confound(embeddings, name)
        else:
            column = column_of(embeddings, name, beside=SCAN_CONFOUNDS)
            attrs = embeddings.variables.get(column, {})
            categorical = bool(attrs.get("labels")) or attrs.get("task") in ("binary", "multiclass")
            values = embeddings.phenotypes[column].to_numpy(np.float64)
        if column in found:
            raise ValueError(f"the confound {column!r} is named twice; name it once")
        if np.isnan(values).all():
            raise ValueError(f"the confound {name!r} is missing in every scan; leave it out")
        if np.isinf(values).any():
            raise ValueError(f"the confound {name!r} is infinite in {int(np.isinf(values).sum())} scans; correct it")
        found[column] = (categorical, values)
    values = np.column_stack([v for _, v in found.values()]) if found else np.zeros((len(embeddings.scans), 0))
    return ConfoundValues(tuple(found), tuple(categorical for categorical, _ in found.values()), values)


def fit_coding(confounds: ConfoundValues) -> ConfoundCoding:
    """Learn categories, means and what is missing from training scans."""
    categories: list[tuple[float, ...]] = []
    means: list[float] = []
    for i, categorical in enumerate(confounds.categorical):
        present = confounds.values[~np.isnan(confounds.values[:, i]), i]
        categories.append(tuple(np.unique(present).tolist()) if categorical else ())
        means.append(float(present.mean()) if len(present) and not categorical else 0.0)
    missing = tuple(np.isnan(confounds.values).any(axis=0).tolist())
    return ConfoundCoding(confounds.names, tuple(categories), tuple(means), missing)


def fit_residualiser(features: np.ndarray, columns: np.ndarray) -> Residualiser:
    """Regress training features (scan, feature) on confound columns (scan, column) by least squares.

    Of columns that depend on each other, as one-hot ones do, the shortest solution is taken.
    """
    mean = columns.mean(axis=0)
    centred = columns - mean
    spread = centred.std(axis=0)
    scale = np.where(spread > 0, spread, np.inf)
    around = features - features.mean(axis=0)
    coefficients = np.linalg.pinv(centred / scale) @ around / scale[:, None]
    rest = around - centred @ coefficients
    left = np.sqrt(np.mean(rest**2, axis=0)) > _ROUNDING * np.sqrt(np.mean(around**2, axis=0))
    return Residualiser(mean, coefficients, left)


def _scan_confound(embeddings: Embeddings, name: str) -> np.ndarray:
    wanted = {"brain_volume": "brain_voxels", "head_scale": "head_scale"}[name]
    if wanted not in embeddings.scans:
        raise ValueError(f"the confound {name!r} needs the column {wanted!r} of the scans; extract them again")
    values = embeddings.scans[wanted].to_numpy(np.float64)
    if name == "head_scale":
        return values
    grid = (embeddings.attrs.get("store") or {}).get("grid") or {}
    if grid.get("space") == "MNI152":
        head_scale = embeddings.scans["head_scale"].to_numpy(np.float64)
        if np.isnan(head_scale).all():
            raise ValueError(
                "the confound 'brain_volume' is not known: the scans are in MNI152 space, where all brains have the "
                "template's size, and none has a head_scale; leave it out, or name head_size if the phenotypes have it"
            )
        values = values / head_scale
    return values * float(grid.get("voxel_mm") or 1) ** 3
