"""Examples of a run: scans of the test people on which the network was most right or wrong, with maps of why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extract.probing.results import OutOfFold, TargetResult
from finetune.checkpoints import LoadedRun
from finetune.heads import Head
from finetune.network import ScanNetwork
from finetune.occlusion import occlusion_map
from finetune.report_plots import limit_of, map_png
from finetune.saliency import SaliencyMap, chosen_class, grad_cam
from ingest.store import VolumeStore
from loaders import CorruptShardError, VolumeReader
from loaders.views import View


@dataclass(frozen=True)
class Example:
    """A scan with its map.

    Attributes
    ----------
    row
        Of the store.
    why
        It is shown, in a few words.
    truth, predicted
        In words.
    explained
        What the map is of, in words.
    png
        Its picture.
    low, high
        Ends of the colours, in words; nothing at both if the map is 0 throughout.
    both
        The colours have two directions; else all that is shown speaks for the answer.
    effort
        See `finetune.saliency.SaliencyMap`.
    """

    row: int
    why: str
    truth: str
    predicted: str
    explained: str
    png: bytes
    low: str
    high: str
    both: bool
    effort: str


@dataclass(frozen=True)
class Examples:
    """Examples of one target.

    Attributes
    ----------
    method
        ``Grad-CAM`` or ``occlusion``.
    warnings
        Why there are none, or fewer; they name no folder and no participant, because reports are passed on.
    """

    target: str
    method: str
    shown: list[Example]
    warnings: list[str]


def make_examples(
    run: LoadedRun, results: Sequence[TargetResult], store: VolumeStore | None, count: int
) -> Examples | None:
    """Read some test scans and map what the network uses of them to predict the first target that was scored.

    Parameters
    ----------
    results
        Of the test people.
    store
        None where it is gone.
    count
        At most so many.

    Returns
    -------
    Examples or None
        None if there is nothing to show: no target was scored, or none are asked for.
    """
    numbers = {head.name: number for number, head in enumerate(run.heads)}
    scored = [result for result in results if result.out_of_fold is not None and result.name in numbers]
    if not scored or not scored[0].out_of_fold or count < 1:
        return None
    result, found = scored[0], scored[0].out_of_fold
    head, number = run.heads[numbers[result.name]], numbers[result.name]
    method = "Grad-CAM" if run.network.seen.view is View.volume else "occlusion"
    made_from = run.attrs.get("store") or {}
    if store is None:
        return Examples(result.name, method, [], ["no maps are shown: the store is not where it was"])
    if store.attrs.get("store_id") != made_from.get("id"):
        reason = "the store is not the one that the network was trained on (its store_id differs)"
        return Examples(result.name, method, [], [f"no maps are shown: {reason}"])
    shown, warnings = [], []
    try:
        with VolumeReader(store) as reader:
            for position, why in choose(head, found, count):
                row = int(found.rows[position])
                try:
                    volume = reader.read([row])[0]
                except (CorruptShardError, IndexError):  # their message names the source, and so the participant
                    warnings.append(f"row {row} of the store is damaged and not shown; see: ingest verify STORE")
                else:
                    shown.append(_example(run, number, found, position, volume, why))
    except (OSError, ValueError, KeyError, TypeError):  # what damaged metadata come to
        return Examples(result.name, method, shown, ["no maps are shown: the store cannot be read"])
    return Examples(result.name, method, shown, warnings)


def choose(head: Head, found: OutOfFold, count: int) -> list[tuple[int, str]]:
    """Choose scans: half of them those that the network was most right about, the others those it was most wrong about.

    Of classes the right ones are of each class in turn, by the probability of the true class; of values by the size of
    the error. Where few are wrong, more that are right are shown, and the other way round.

    Returns
    -------
    list of (int, str)
        Position in `found`, and why.
    """
    n = len(found.truth)
    if not head.labels:
        order = np.argsort(np.abs(found.predicted - found.truth), kind="stable")
        right, wrong = order[: (min(count, n) + 1) // 2], order[::-1][: min(count, n) // 2]
        return [(int(p), "closest") for p in right] + [(int(p), "furthest off") for p in wrong]
    truth = found.truth.astype(np.int64)
    given = np.array([chosen_class(head, row) for row in found.predicted])
    order = np.argsort(-found.predicted[np.arange(n), truth], kind="stable")
    rank = np.empty(n, dtype=np.int64)  # among those of the class that are right
    for code in range(len(head.labels)):
        of_class = order[(truth[order] == code) & (given[order] == code)]
        rank[of_class] = np.arange(len(of_class))
    right = order[given[order] == truth[order]]
    right = right[np.argsort(rank[right], kind="stable")]
    wrong = order[given[order] != truth[order]][::-1]
    few_wrong = min(len(wrong), count // 2)
    rights = right[: count - few_wrong]
    wrongs = wrong[: count - len(rights)]
    return [(int(p), "most surely right") for p in rights] + [(int(p), "most surely wrong") for p in wrongs]


def explain(network: ScanNetwork, volume: np.ndarray, number: int, code: int | None) -> SaliencyMap:
    """Map an answer: by Grad-CAM of a 3D network, by occlusion of a 2D one.

    Parameters
    ----------
    volume
        (z, y, x) as stored.
    number, code
        Of the head, and its class, see `finetune.saliency.grad_cam`.
    """
    if network.seen.view is View.volume:
        return grad_cam(network, volume, number, code)
    return occlusion_map(network, volume, number, code)


def _example(run: LoadedRun, number: int, found: OutOfFold, position: int, volume: np.ndarray, why: str) -> Example:
    head, predicted = run.heads[number], found.predicted[position]
    code = chosen_class(head, predicted)
    saliency = explain(run.network, volume, number, code)
    if code is None:
        units = units_of(head)
        truth, answer, explained = _value(found.truth[position], units), _value(float(predicted), units), head.name
    else:
        truth, explained = head.labels[int(found.truth[position])], head.labels[code]
        answer = f"{explained}, probability {predicted[code]:.3f}"
    both = saliency.method == "occlusion" or code is None
    low, high = _ends(saliency, "log odds" if head.labels else units_of(head), both=both)
    picture = map_png(volume, saliency)
    return Example(int(found.rows[position]), why, truth, answer, explained, picture, low, high, both, saliency.effort)


def units_of(head: Head) -> str:
    """Return the units of a head's values; nothing if they have none."""
    return "categories" if head.task == "ordinal" else "" if head.labels else head.units or ""


def _value(value: float, units: str) -> str:
    return f"{value:.4g} {units}".rstrip()


def _ends(saliency: SaliencyMap, units: str, *, both: bool) -> tuple[str, str]:
    """Return in words what the ends of the colours of a map stand for."""
    if not np.any(saliency.values):
        return "", ""
    if saliency.method == "Grad-CAM":
        return ("lowers it", "raises it") if both else ("0", "strongest")
    limit = f"{limit_of(saliency):.2g} {units}".rstrip()
    return f"−{limit}", f"+{limit}"
