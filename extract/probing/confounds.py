"""Confounds: read beside the features, coded as columns, and taken out of the features on the training side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.targets import CLASSIFICATIONS, by_column, column_of, few_whole_numbers, label_names
from ingest.dictionary import BY_NAME, TASKS

#: What the store knows of each scan's head, beside the phenotypes.
SCAN_CONFOUNDS = ("brain_volume", "head_scale")

_ROUNDING = 1e-6  # of a feature's spread: what is left below it is float32's rounding
_DEPENDENT = 1e-10  # of the largest singular value: columns below it depend on others, but for float64's rounding
_UNSEEN = np.inf  # a category that training has not seen; no confound is infinite
_NAMED = 5  # categories in a warning


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
    labels
        Of the codes of each: code -> label; empty if none has any.
    scaled
        Whether `brain_volume` was computed with `head_scale`, as it is in MNI152 space.
    """

    names: tuple[str, ...]
    categorical: tuple[bool, ...]
    values: np.ndarray
    labels: tuple[Mapping[str, str], ...] = ()
    scaled: bool = False

    def rows(self, chosen: np.ndarray) -> ConfoundValues:
        """Return those of some scans, by rows or a mask."""
        return replace(self, values=self.values[chosen])

    def without(self, target: str) -> ConfoundValues:
        """Return all but the target itself, which would explain itself.

        `head_scale` is UK Biobank's head size, and a `brain_volume` that was computed with it holds it.
        """
        variable = BY_NAME.get(target.lower())
        same = {target}
        if variable is not None and variable.name == "head_size":
            same |= set(SCAN_CONFOUNDS) if self.scaled else {"head_scale"}
        kept = [i for i, name in enumerate(self.names) if name not in same]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            categorical=tuple(self.categorical[i] for i in kept),
            values=self.values[:, kept],
            labels=tuple(self.labels[i] for i in kept) if self.labels else (),
        )

    def complete(self, target: str) -> np.ndarray:
        """Return bool (scan,), of which scans all confounds of a target are known."""
        return ~np.isnan(self.without(target).values).any(axis=1)


@dataclass(frozen=True)
class ConfoundCoding:
    """How confounds become columns, learnt from training scans.

    Attributes
    ----------
    names
        As of `ConfoundValues`.
    categories
        Of each confound those seen in training, each of which is a column of 0 and 1; none for a number.
    labels
        Names of the categories, each once: codes of the same text differ from file to file.
    means
        Of each confound those of its columns over the training scans that have it: of a number one, of categories
        their shares. They stand where a confound is missing, or has a category that training has not seen: what
        confounds explain of a feature is then that of the average scan.
    """

    names: tuple[str, ...]
    categories: tuple[tuple[float, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    means: tuple[tuple[float, ...], ...]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return columns, float64 (scan, column), of values (scan, confound) that are NaN where missing."""
        columns = []
        for measured, categories, means in zip(values.T, self.categories, self.means, strict=True):
            if categories:
                known = np.isin(measured, categories)
                own = measured[:, None] == np.array(categories)
            else:
                known = ~np.isnan(measured)
                own = measured[:, None]
            columns.append(np.where(known[:, None], own, means))
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


def read_confounds(
    embeddings: Embeddings, names: Sequence[str], tasks: Mapping[str, str] | None = None
) -> ConfoundValues:
    """Read confounds by name or alias.

    ``brain_volume`` is the number of non-zero voxels in mm3; in MNI152 space, where every brain has the template's
    size, divided by ``head_scale``, which gives the size back. It is a brain's volume where the skull was stripped.
    ``head_scale`` is the volumetric scaling from the head to MNI152. Phenotypes of these names come first. What has
    labels, or the task ``binary`` or ``multiclass``, has categories; all else is a number. `tasks`, by name or alias of
    some of them, overrides that.

    Raises
    ------
    ValueError
        If one is unknown, named twice, infinite, or missing in every scan.
    """
    asked = by_column(embeddings, tasks, [str(column) for column in embeddings.phenotypes.columns])
    found: dict[str, tuple[bool, np.ndarray, Mapping[str, str]]] = {}
    scaled = False
    for name in names:
        column, categorical = name, False
        labels: Mapping[str, str] = {}
        if name in SCAN_CONFOUNDS and name not in embeddings.phenotypes:
            values = _scan_confound(embeddings, name)
            scaled |= name == "brain_volume" and _in_mni152(embeddings)
        else:
            column = column_of(embeddings, name, beside=SCAN_CONFOUNDS)
            attrs = embeddings.variables.get(column, {})
            labels = attrs.get("labels") or {}
            categorical = bool(labels) or attrs.get("task") in CLASSIFICATIONS
            if column in asked:
                if asked[column] not in TASKS:
                    raise ValueError(
                        f"task {asked[column]!r} of {name!r} is unknown; expected one of {', '.join(TASKS)}"
                    )
                categorical = asked[column] in CLASSIFICATIONS
            values = as_numbers(embeddings.phenotypes[column], column)
        if column in found:
            raise ValueError(f"the confound {column!r} is named twice; name it once")
        if np.isnan(values).all():
            raise ValueError(f"the confound {name!r} is missing in every scan; add its values, or fit without it")
        if np.isinf(values).any():
            raise ValueError(f"the confound {name!r} is infinite in {int(np.isinf(values).sum())} scans; correct it")
        found[column] = (categorical, values, labels)
    if not found:
        return ConfoundValues((), (), np.zeros((len(embeddings.scans), 0)))
    kinds, columns, labels_of = zip(*found.values(), strict=True)
    return ConfoundValues(tuple(found), kinds, np.column_stack(columns), labels_of, scaled)


def number_warnings(embeddings: Embeddings, confounds: ConfoundValues, tasks: Mapping[str, str]) -> list[str]:
    """Name the confounds that are one value, and those that look like codes and are taken as numbers."""
    asked = by_column(embeddings, tasks, confounds.names)
    warnings = []
    for name, categorical, values in zip(confounds.names, confounds.categorical, confounds.values.T, strict=True):
        known = name in asked or name not in embeddings.phenotypes or embeddings.variables.get(name, {}).get("task")
        few = few_whole_numbers(values)
        there = values[~np.isnan(values)]
        if len(there) and np.ptp(there) == 0:
            warnings.append(f"the confound {name} is {there[0]:g} in every scan, so there is nothing of it to remove")
        elif few and not known and not categorical:
            warnings.append(
                f"the confound {name} has {few} different whole numbers and is taken as a number; if they "
                f"are codes, add --task {name}=multiclass, else --task {name}=continuous"
            )
    return warnings


def missing_warnings(confounds: ConfoundValues) -> list[str]:
    """Say how many scans lack a confound, and so are left out, and which."""
    absent = np.isnan(confounds.values)
    lost = int(absent.any(axis=1).sum())
    if not lost:
        return []
    each = ", ".join(
        f"{name} {count}" for name, count in zip(confounds.names, absent.sum(axis=0).tolist(), strict=True) if count
    )
    return [
        f"{lost} of {len(absent)} scans lack a confound ({each}) and are left out, since it could not be removed from "
        "their features; fill in its values, or name fewer confounds"
    ]


def fit_coding(confounds: ConfoundValues) -> ConfoundCoding:
    """Learn categories, their shares, and means of numbers from training scans."""
    categories: list[tuple[float, ...]] = []
    labels: list[tuple[str, ...]] = []
    means: list[tuple[float, ...]] = []
    for i, categorical in enumerate(confounds.categorical):
        present = confounds.values[~np.isnan(confounds.values[:, i]), i]
        found, counts = np.unique(present, return_counts=True)
        categories.append(tuple(found.tolist()) if categorical else ())
        labels.append(tuple(label_names(categories[-1], confounds.labels[i] if confounds.labels else None)))
        if categorical:
            means.append(tuple((counts / len(present)).tolist()))
        else:
            means.append((float(present.mean()) if len(present) else 0.0,))
    return ConfoundCoding(confounds.names, tuple(categories), tuple(labels), tuple(means))


def match_confounds(coding: ConfoundCoding, confounds: ConfoundValues) -> tuple[np.ndarray, list[str]]:
    """Translate the confounds of another file into the codes of a coding, by their labels.

    Returns
    -------
    values : numpy.ndarray
        float64, (scan, confound), for `ConfoundCoding.encode`.
    warnings : list of str
        How many scans lack a confound, or have a category that training has not seen.
    """
    values, warnings = confounds.values.copy(), []
    scans = len(values)
    for i, name in enumerate(coding.names):
        present = ~np.isnan(values[:, i])
        if not present.all():
            taken = (
                "the shares of its categories among those that the probe was fitted to are taken"
                if coding.categories[i]
                else "the mean of those that the probe was fitted to is taken"
            )
            warnings.append(f"{scans - int(present.sum())} of {scans} scans lack the confound {name}; {taken}")
        own = confounds.labels[i]
        if not coding.categories[i]:
            if own:
                warnings.append(f"{name} is a number in the probe and has labels here; its codes are taken")
            continue
        code_of = dict(zip(coding.labels[i], coding.categories[i], strict=True))
        codes, place = np.unique(values[present, i], return_inverse=True)
        names = label_names(codes, own)
        values[present, i] = np.array([code_of.get(label, _UNSEEN) for label in names])[place]
        strange = [label for label in names if label not in code_of]
        if strange:
            more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
            warnings.append(
                f"{int(np.isinf(values[:, i]).sum())} of {scans} scans have a {name} that the probe was not fitted to "
                f"({', '.join(map(repr, strange[:_NAMED]))}{more}); the shares of its categories there are taken"
            )
    return values, warnings


def fit_residualiser(features: np.ndarray, columns: np.ndarray) -> Residualiser:
    """Regress training features (scan, feature) on confound columns (scan, column) by least squares.

    Of columns that depend on each other, as one-hot ones do, the shortest solution is taken.
    """
    mean = columns.mean(axis=0)
    centred = columns - mean
    spread = centred.std(axis=0)
    scale = np.where(spread > 0, spread, np.inf)
    around = features - features.mean(axis=0)
    coefficients = np.linalg.pinv(centred / scale, rtol=_DEPENDENT) @ around / scale[:, None]
    rest = around - centred @ coefficients
    left = np.sqrt(np.mean(rest**2, axis=0)) > _ROUNDING * np.sqrt(np.mean(around**2, axis=0))
    return Residualiser(mean, coefficients, left)


def without_confounds(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return what confounds (scan, column) leave of values (scan, value) to which they are fitted; the mean stays."""
    return fit_residualiser(values, columns).apply(values, columns)


def unseen_shares(confounds: ConfoundValues, together: np.ndarray) -> dict[str, float]:
    """Return of confounds with categories the share of scans whose category is in one group that is never split.

    Where such a group is tested nobody of that category was trained on, and nothing is removed from its scans.

    Parameters
    ----------
    together
        int, (scan,), see `probing.groups.Groups`.
    """
    shares = {}
    for name, categorical, values in zip(confounds.names, confounds.categorical, confounds.values.T, strict=True):
        known = ~np.isnan(values)
        if categorical and known.any():
            categories, number = np.unique(values[known], return_inverse=True)
            pairs = np.unique(np.stack([number, together[known]]), axis=1)
            groups = np.bincount(pairs[0], minlength=len(categories))
            shares[name] = float((groups[number] == 1).mean())
    return shares


def check_seen(confounds: ConfoundValues, together: np.ndarray) -> None:
    """Raise ValueError if all categories of a confound are of one group each, see `unseen_shares`."""
    for name, share in unseen_shares(confounds, together).items():
        if share == 1:
            raise ValueError(
                f"the confound {name!r} cannot be removed: each of its values is of one group that is never split, so "
                "nobody of the values tested is trained on; leave out the confound, or --groups"
            )


def _scan_confound(embeddings: Embeddings, name: str) -> np.ndarray:
    wanted = {"brain_volume": "brain_voxels", "head_scale": "head_scale"}[name]
    if wanted not in embeddings.scans:
        raise ValueError(f"the confound {name!r} needs the column {wanted!r} of the scans; extract them again")
    values = embeddings.scans[wanted].to_numpy(np.float64)
    if name == "head_scale":
        return values
    if _in_mni152(embeddings):
        head_scale = embeddings.scans["head_scale"].to_numpy(np.float64)
        if np.isnan(head_scale).all():
            raise ValueError(
                "the confound 'brain_volume' is not known: the scans are in MNI152 space, where all brains have the "
                "template's size, and none has a head_scale; fit without it, or with head_size if there is one"
            )
        values = values / head_scale
    return values * float(_grid(embeddings).get("voxel_mm") or 1) ** 3


def _grid(embeddings: Embeddings) -> Mapping[str, Any]:
    return (embeddings.attrs.get("store") or {}).get("grid") or {}


def _in_mni152(embeddings: Embeddings) -> bool:
    return _grid(embeddings).get("space") == "MNI152"
