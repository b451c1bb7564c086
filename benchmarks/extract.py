"""Scans a second through frozen networks: plain torchvision, ours fed from memory, and ``extract`` from a store.

Plain torchvision is what its users write: three channels, divided and normalised, in torch's default memory layout. It
is given channels-last, too, to tell what that alone is worth. All see the same slices or volumes, and the benchmark
checks first that all give the same features.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks.loaders import prepare
from benchmarks.results import Report, Result
from extract import Encoder, build_encoder, extract
from ingest.store import VolumeStore, package_versions
from loaders import View, VolumeReader, slices_of

PLAIN, CHANNELS_LAST, OURS, EXTRACT = "plain", "plain, channels-last", "folded, grey", "extract"
STORED = 256  # scans of the store, which the benchmark of the loaders uses, too

#: By model: the factor of its input's size, and scans at a time.
MODELS = {"resnet18": (1.0, 8), "r3d_18": (0.5, 2)}


def run_extract(
    directory: Path,
    *,
    scans: int = 40,
    volumes: int = 4,
    repeats: int = 5,
    stored: int = STORED,
    device: str = "cpu",
) -> Report:
    """Measure networks with random weights, which take as long as others.

    Parameters
    ----------
    directory
        Of `benchmarks.loaders.prepare`.
    scans
        For the 2D network, which sees nine slices of each.
    volumes
        For the 3D network, which sees them at half resolution.
    repeats
        Of everything, in turns; the 3D network gets half as many.
    stored
        Scans of the simulated store.

    Raises
    ------
    ValueError
        If features differ.
    """
    store, _ = prepare(directory, stored)
    results: list[Result] = []
    ratios: dict[str, float] = {}
    for model, count, unit, per in (("resnet18", scans, "scans/s", 1), ("r3d_18", volumes, "scans/min", 60)):
        turns = repeats if model == "resnet18" else max(1, (repeats + 1) // 2)
        speeds = _measure(model, store, store.ok_rows[:count], turns, device)
        middle = {name: median(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            value, low, high = (round(speed * per, 2) for speed in (middle[name], min(values), max(values)))
            results.append(Result(f"{model}, {name}", value, unit, low, high))
        for name, of in ((OURS, PLAIN), (OURS, CHANNELS_LAST), (EXTRACT, OURS)):
            what = "extract/fed from memory" if name == EXTRACT else f"{name}/{of}"
            ratios[f"{model}: {what}"] = round(middle[name] / middle[of], 3)
    settings = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "scans": scans, "volumes": volumes, "repeats": repeats, "slices": 9,
        "scale": {model: scale for model, (scale, _) in MODELS.items()},
        "batch_size": {model: size for model, (_, size) in MODELS.items()},
        "versions": package_versions("torch", "torchvision"),
    }  # fmt: skip
    return Report("extract", settings, results, ratios)


def _measure(model: str, store: VolumeStore, rows: np.ndarray, turns: int, device: str) -> dict[str, list[float]]:
    """Return scans a second of each way, turn by turn."""
    scale, batch_size = MODELS[model]
    ours, channels_last = (
        build_encoder(model, weights="random", scale=scale, device=device, plain=plain) for plain in (False, True)
    )
    with VolumeReader(store) as reader:
        images = torch.from_numpy(reader.read(rows)).to(ours.device)
    users = plain_torchvision(build_encoder(model, weights="random", scale=scale, device=device, plain=True))

    def fed(encode: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor = images) -> torch.Tensor:
        return torch.cat([encode(batch) for batch in given.split(batch_size)]).cpu()

    def from_store(chosen: np.ndarray = rows) -> torch.Tensor:
        return torch.from_numpy(extract(store.path, ours, rows=chosen, batch_size=batch_size).features)

    # Beforehand with one batch: compares, warms up.
    some = images[:batch_size]
    expected = fed(users, some)
    tolerance = 1e-4 if ours.dtype is torch.float32 else 0.05
    for name, found in (
        (CHANNELS_LAST, fed(channels_last, some)), (OURS, fed(ours, some)), (EXTRACT, from_store(rows[:batch_size]))
    ):  # fmt: skip
        if (found - expected).abs().max() > tolerance * expected.abs().max():
            raise ValueError(f"features of {model}, {name}, differ from those of plain torchvision")
    ways: dict[str, Callable[[], torch.Tensor]] = {
        PLAIN: partial(fed, users), CHANNELS_LAST: partial(fed, channels_last), OURS: partial(fed, ours),
        EXTRACT: from_store,
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            speeds[name].append(len(rows) / (time.perf_counter() - started))
    return speeds


def plain_torchvision(encoder: Encoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what a user writes around torchvision's network to encode uint8 volumes (scan, z, y, x)."""
    network = encoder.network.to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(v, device=encoder.device) for v in (encoder.weights.mean, encoder.weights.std))

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        if encoder.view is View.volume:
            x = nn.functional.interpolate(images[:, None].float() / 255, scale_factor=encoder.scale, mode="area")
            volumes: torch.Tensor = network((x - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1))
            return volumes
        features = []
        for group in slices_of(images, encoder.view, encoder.slices):
            x = group.flatten(0, 1)[:, None].float() / 255
            found = network((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
            features.append(found.unflatten(0, group.shape[:2]))
        return torch.cat(features, dim=1).mean(dim=1)

    return encode
