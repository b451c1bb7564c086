"""Several embeddings of the same people, probed side by side: same scans, same folds, paired differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.checks import as_numbers
from extract.embeddings import Embeddings
from extract.probing.confounds import read_confounds
from extract.probing.curves import LearningCurve, curve_sizes, learning_curves
from extract.probing.numbers import rounded
from extract.probing.probe import probe, summarise_regressions
from extract.probing.results import Interval, TargetResult
from extract.probing.scores import paired_interval
from extract.probing.settings import ProbeSettings
from ingest.people import participant_key, session_key


@dataclass(frozen=True)
class Probed:
    """One embedding and what was found with it.

    Attributes
    ----------
    name
        As shown: unlike that of any other.
    curves
        Learning curves by target; empty if none were asked for.
    """

    name: str
    embeddings: Embeddings
    results: list[TargetResult]
    curves: dict[str, LearningCurve] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the targets as printed by ``--json``, each with its curve if there is one."""
        found = []
        for result in self.results:
            target = result.to_json()
            if result.name in self.curves:
                target["curve"] = self.curves[result.name].to_json()
            found.append(target)
        return found


@dataclass(frozen=True)
class Difference:
    """Headline scores of an embedding minus those of the first one, fold by fold.

    Attributes
    ----------
    interval
        Mean with its corrected 95 % interval, against a chance of 0.
    """

    target: str
    metric: str
    name: str
    reference: str
    interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Return the difference as printed by ``--json``."""
        return {
            "target": self.target,
            "metric": self.metric,
            "name": self.name,
            "reference": self.reference,
            "difference": rounded(self.interval.score),
            "low": rounded(self.interval.low),
            "high": rounded(self.interval.high),
        }


def distinct_names(paths: Sequence[Path], layers: Sequence[str | None]) -> list[str]:
    """Return a short name for each embedding that no other has.

    That is the file's stem, with its ending where stems are the same, with its layer where files are, and with a
    number where nothing else tells them apart. Folders do not appear: reports are passed on.
    """
    stems, files = ([getattr(path, part) for path in paths] for part in ("stem", "name"))
    counts = Counter(dict(zip(paths, stems, strict=True)).values())
    names = [stem if counts[stem] == 1 else file for stem, file in zip(stems, files, strict=True)]
    if len(set(layers)) > 1:
        names = [f"{name} {layer}" if layer else name for name, layer in zip(names, layers, strict=True)]
    seen: Counter[str] = Counter()
    taken = Counter(names)
    for place, name in enumerate(names):
        seen[name] += 1
        if taken[name] > 1:
            names[place] = f"{name} ({seen[name]})"
    return names


def align(named: Mapping[str, Embeddings]) -> tuple[dict[str, Embeddings], list[str]]:
    """Keep the scans that all embeddings share, in the order of the first.

    Scans are the same if they are rows of the same store; of different stores, if participant and session are the
    same, and the modality, too, where a session has several scans.

    Parameters
    ----------
    named
        Name -> embeddings, two or more.

    Returns
    -------
    aligned : dict
        Name -> embeddings with the same scans. Identities and phenotypes are the first's, so that all are probed for
        the same values.
    warnings : list of str
        How many scans dropped out of each, and which phenotypes differ. They name no participant.

    Raises
    ------
    ValueError
        If no scan is shared, or it cannot be told which scans are the same.
    """
    keys = _keys(named)
    common = set.intersection(*(set(of) for of in keys.values()))
    if not common:
        raise ValueError(
            f"{' and '.join(named)} have no scan in common: participants and sessions are other ones, or are spelt "
            "in another way"
        )
    first, *others = named
    order = [key for key in keys[first] if key in common]
    chosen = [place for place, key in enumerate(keys[first]) if key in common]
    scans, phenotypes = (
        table.iloc[chosen].reset_index(drop=True) for table in (named[first].scans, named[first].phenotypes)
    )
    aligned, warnings = {}, []
    for name, embeddings in named.items():
        place_of = {key: place for place, key in enumerate(keys[name])}
        rows = np.array([place_of[key] for key in order])
        if len(rows) < len(keys[name]):
            warnings.append(
                f"{len(keys[name]) - len(rows)} of the {len(keys[name])} scans of {name} are left out, for other "
                "embeddings lack them"
            )
        if name in others:
            warnings += _other_values(first, phenotypes, name, embeddings.phenotypes.iloc[rows])
        aligned[name] = replace(
            embeddings,
            features=embeddings.features[rows],
            scans=scans,
            phenotypes=phenotypes,
            variables=named[first].variables,
        )
    return aligned, warnings


def probe_all(
    named: Mapping[str, Embeddings],
    targets: Sequence[str],
    *,
    tasks: Mapping[str, str] | None = None,
    settings: ProbeSettings | None = None,
    curve: Sequence[int] | None = None,
    on_target: Callable[[TargetResult], None] | None = None,
    on_plan: Callable[[int], None] | None = None,
) -> list[Probed]:
    """Probe each of several embeddings for the same targets on the same folds.

    Parameters
    ----------
    named
        Name -> embeddings, with the same scans if there are several (`align`). Confounds are the first's: a volume of
        the brain depends on the space that the scans are in.
    targets, tasks, settings
        See `probing.probe.probe`.
    curve
        Sizes of learning curves; empty takes those of `probing.curves.curve_sizes`, None makes no curves.
    on_target
        Called with each target of each embedding, and at each size of the curves.
    on_plan
        Called with how often `on_target` will be called at most, and again when the sizes of the curves are known.
    """
    settings = settings or ProbeSettings()
    first = next(iter(named.values()))
    confounds = read_confounds(first, settings.confounds, tasks)
    summary = summarise_regressions(first)  # of phenotypes that all of them share
    if on_plan:
        on_plan(len(named) * len(targets))
    results = {
        name: probe(
            embeddings,
            targets,
            tasks=tasks,
            settings=settings,
            confounds=confounds,
            summary=summary,
            on_target=on_target,
        )
        for name, embeddings in named.items()
    }
    curves: dict[str, dict[str, LearningCurve]] = {}
    if curve is not None:
        sizes = curve_sizes([result for found in results.values() for result in found], curve)
        if on_plan:
            on_plan(len(named) * len(targets) * (1 + len(sizes)))
        for name, embeddings in named.items():
            curves[name] = learning_curves(
                embeddings, results[name], sizes, tasks=tasks, settings=settings, confounds=confounds,
                summary=summary, on_target=on_target,
            )  # fmt: skip
    return [Probed(name, named[name], results[name], curves.get(name, {})) for name in named]


def differences(probed: Sequence[Probed]) -> list[Difference]:
    """Compare each embedding with the first, target by target; folds are the same, so scores are paired.

    Targets that could not be probed with both are left out.
    """
    first, *others = probed
    reference = {result.name: result for result in first.results if result.status == "ok"}
    return [
        Difference(
            result.name,
            result.metric,
            other.name,
            first.name,
            paired_interval(result, reference[result.name], result.metric),
        )
        for other in others
        for result in other.results
        if result.status == "ok" and result.name in reference
    ]


#: By column: what is one person or visit in all spellings.
_SPELT_ALIKE: dict[str, Callable[[object], str]] = {"participant": participant_key, "session": session_key}


def _keys(named: Mapping[str, Embeddings]) -> dict[str, list[tuple[str, ...]]]:
    """Return what identifies each scan in all embeddings alike."""
    stores = {(embeddings.attrs.get("store") or {}).get("id") for embeddings in named.values()}
    columns = [
        column
        for column in ("row", "participant", "session", "modality")
        if all(column in embeddings.scans for embeddings in named.values())
    ]
    if columns[:1] == ["row"]:
        if len(stores) == 1 and None not in stores:  # of copies that grew apart a row is not of the same person
            return {name: _column_keys(embeddings.scans, columns[:3]) for name, embeddings in named.items()}
        del columns[0]
    if "participant" not in columns:
        raise ValueError("the embeddings do not say of which participants they are; extract them again")
    for used in (columns[:2], columns):
        keys = {name: _column_keys(embeddings.scans, used) for name, embeddings in named.items()}
        if all(len(set(of)) == len(of) for of in keys.values()):
            return keys
    twice = next(name for name, of in keys.items() if len(set(of)) < len(of))
    raise ValueError(
        f"{len(keys[twice]) - len(set(keys[twice]))} scans of {twice} share {', '.join(columns)} with another one, so "
        "it is unknown which scans of the other embeddings are the same; extract all of them from one store"
    )


def _column_keys(scans: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(scans[column].map(_SPELT_ALIKE.get(column, str)) for column in columns), strict=True))


def _other_values(first: str, ours: pd.DataFrame, name: str, theirs: pd.DataFrame) -> list[str]:
    """Return warnings about phenotypes that differ between two embeddings of the same scans."""
    warnings = []
    for column in ours.columns.intersection(theirs.columns):
        a, b = as_numbers(ours[column], str(column)), as_numbers(theirs[column], str(column))
        unlike = int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
        if unlike:
            warnings.append(f"{column} of {unlike} scans differs between {first} and {name}; that of {first} is taken")
    return warnings
