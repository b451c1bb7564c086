"""What a network was fine-tuned on: what an encoder of its weights sees, and how another store differs from that."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from extract.inputs import as_crop, as_size
from extract.models import family_of
from ingest.store import VolumeStore
from loaders.views import View


@dataclass(frozen=True)
class Trained:
    """What a checkpoint of finetune says of its network beside the weights.

    Attributes
    ----------
    view, slices, crop, size, scale
        What it saw of a scan, see `extract.encoder.build_encoder`.
    pool
        Over the slices of a scan: ``mean`` or ``attention``.
    epoch
        Of these weights, if it is known.
    attrs
        As they are in the file: ``store`` (``id``, ``grid``, ``intensity``), ``simulated``, ...
    """

    view: View
    slices: int
    crop: tuple[int, int, int] | None
    size: tuple[int, ...] | None
    scale: float
    pool: str = "mean"
    epoch: int | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def differences(
        self, view: View, slices: int, crop: tuple[int, ...] | None, size: tuple[int, ...] | None, scale: float
    ) -> str:
        """Return in words what of a scan was seen in training but is to be seen in another way; "" if nothing is."""
        now = {"view": view, "slices": slices, "crop": crop, "size": size, "scale": scale}
        if view is View.volume:
            del now["slices"]
        unlike = {name: value for name, value in now.items() if value != getattr(self, name)}
        then = ", ".join(f"{name} {_shown(getattr(self, name))}" for name in unlike)
        return f"{then}, not {', '.join(f'{name} {_shown(value)}' for name, value in unlike.items())}" if unlike else ""

    def warnings(
        self,
        name: str,
        view: View,
        slices: int,
        crop: tuple[int, ...] | None,
        size: tuple[int, ...] | None,
        scale: float,
    ) -> list[str]:
        """Return in words how features of weights of a name are made in another way than these were trained in."""
        found = []
        unlike = self.differences(view, slices, crop, size, scale)
        if unlike:
            found.append(f"{name} was trained with {unlike}: leave that out to see what it was trained on")
        if self.pool == "attention" and view is not View.volume:
            found.append(f"{name} weighs the slices of a scan by attention; the features are their plain mean")
        return found


def read_trained(model: str, content: Mapping[str, Any]) -> Trained | None:
    """Read what a checkpoint says of the input of its network.

    Parameters
    ----------
    content
        Of a checkpoint of ours, whose ``model`` is a mapping.

    Returns
    -------
    Trained
        None if it says nothing of that, as files that are made by hand need not.

    Raises
    ------
    ValueError
        If it is nonsense.
    """
    seen, attrs = content["model"].get("input"), content.get("attrs")
    if seen is None:
        return None
    try:
        view, slices, scale = View(seen["view"]), operator.index(seen["slices"]), float(seen["scale"])
        axes = family_of(model).axes
        crop, size = as_crop(seen["crop"]), as_size(seen["size"], axes)
        attrs = json.loads(json.dumps(attrs))  # plain, whoever made the file
    except (LookupError, OverflowError, RecursionError, RuntimeError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"what its network saw cannot be read: {what}") from None
    if (view is View.volume) != (axes == 3):
        raise ValueError(f"its view {view} does not go with {model}")
    if slices < 1 or not 0 < scale <= 1 or (size is not None and scale != 1):
        raise ValueError(f"slices {slices}, size {size} and scale {scale} do not go together")
    pool = str(content["model"].get("pool", "mean"))[:20]
    attrs = _mapping(attrs)
    epoch = attrs.get("epoch")
    return Trained(view, slices, crop, size, scale, pool, epoch if isinstance(epoch, int) else None, attrs)


def other_store(attrs: Mapping[str, Any], volumes: VolumeStore) -> list[str]:
    """Return in words in what a store differs from the one that a network was trained on, a line for each.

    Parameters
    ----------
    attrs
        Of a checkpoint; what they do not say is not compared.
    """
    was, now = _mapping(attrs.get("store")), volumes.attrs["grid"]
    then = _mapping(was.get("grid"))
    unlike = [name for name in _GRID if name in then and then[name] != now[name]]
    lines = []
    if unlike == ["affine_ras"]:
        lines.append("the grid of the store lies elsewhere in the head than the one that the network was trained on")
    elif unlike:
        here, there = (
            ", ".join(f"{name} {_shown(grid[name])}" for name in unlike if name != "affine_ras") for grid in (now, then)
        )
        lines.append(f"the store has {here}; the network was trained on {there}, and may be wrong about such scans")
    rules = [_mapping(of.get("intensity")) for of in (volumes.attrs, was)]
    if all(rules) and rules[0] != rules[1]:
        here, there = (", ".join(f"{name} {value}" for name, value in rule.items()) for rule in rules)
        lines.append(f"grey levels of the store are by another rule ({here}) than the network was trained on ({there})")
    if attrs.get("simulated") is True and not volumes.attrs["simulated"]:
        lines.append("the network was trained on simulated scans; these are not")
    return lines


def same_store(attrs: Mapping[str, Any], volumes: VolumeStore) -> bool:
    """Tell whether a store is the very one that a network was trained on."""
    return bool(_mapping(attrs.get("store")).get("id") == volumes.attrs["store_id"])


#: What of a grid decides about what a network sees.
_GRID = ("space", "voxel_mm", "shape_zyx", "affine_ras")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: object) -> str:
    text = "none" if value is None else ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text[:60]
