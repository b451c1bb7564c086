"""Scans a second through frozen networks: plain torchvision, ours fed from memory, and ``extract`` from a store.

Plain torchvision is what its users write: three channels, divided and normalised, in torch's default memory layout, as
many scans at a time as ours sees. It is given channels-last, too, and as many scans at a time as are fastest, to tell
what those alone are worth. Ours works in a process of its own, for how it has memory allocated is one of the things
that make it fast, and would hold for all that a process does. All see the same slices or volumes, and the benchmark
checks first that all give the same features. The limit is the arithmetic of ours, of one channel and without batch
norms, at the highest rate that the device is seen to compute at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import arithmetic_speed
from benchmarks.loaders import prepare
from benchmarks.results import Report, Result
from extract import Encoder, build_encoder, extract
from extract.fast import memory_for
from ingest.store import open_store, package_versions
from loaders import View, VolumeReader, slices_of

PLAIN, CHANNELS_LAST, OURS, EXTRACT = "plain", "plain, channels-last", "folded, grey", "extract"
TUNED = "plain, its best batch"
HALF = "folded, grey, bfloat16"  # on a CPU that multiplies such numbers; a GPU does everything in them
STORED = 256  # scans of the store, which the benchmark of the loaders uses, too

#: By model: the factor of its input's size, and scans at a time. Plain torchvision is tried with fewer, too.
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
    batch_sizes: dict[str, int] = {}
    gflops: dict[str, float] = {}
    for model, count, unit, per in (("resnet18", scans, "scans/s", 1), ("r3d_18", volumes, "scans/min", 60)):
        turns = repeats if model == "resnet18" else max(1, (repeats + 1) // 2)
        measured = _measure(model, str(store.path), store.ok_rows[:count], turns, device)
        batch_sizes |= {f"{model}, {name}": size for name, size in measured.batch_sizes.items()}
        gflops[model] = round(measured.operations / 1e9, 2)
        middle = {name: median(values) for name, values in measured.speeds.items()}
        for name, values in measured.speeds.items():
            value, low, high = (round(speed * per, 2) for speed in (middle[name], min(values), max(values)))
            share = round(middle[name] * measured.operations / measured.peaks[name], 3)
            results.append(Result(f"{model}, {name}", value, unit, low, high, limit_share=share))
        for name, of in ((OURS, PLAIN), (OURS, TUNED), (OURS, CHANNELS_LAST), (HALF, PLAIN), (EXTRACT, OURS)):
            if name in middle:
                what = "extract/fed from memory" if name == EXTRACT else f"{name}/{of}"
                ratios[f"{model}: {what}"] = round(middle[name] / middle[of], 3)
    settings = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "scans": scans, "volumes": volumes, "repeats": repeats, "slices": 9,
        "scale": {model: scale for model, (scale, _) in MODELS.items()},
        "batch_size": batch_sizes, "gflops_per_scan": gflops,
        "versions": package_versions("torch", "torchvision"),
    }  # fmt: skip
    return Report("extract", settings, results, ratios)


@dataclass
class _Measured:
    """Scans a second of each way, turn by turn, how many scans at a time it takes, and what limits all of them."""

    speeds: dict[str, list[float]]
    batch_sizes: dict[str, int]
    operations: float  # a scan
    peaks: dict[str, float]  # operations a second


def _measure(model: str, store: str, rows: np.ndarray, turns: int, device: str) -> _Measured:
    speeds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    spawn = get_context("spawn")
    half = device == "cpu" and _multiplies_bfloat16()
    with ProcessPoolExecutor(1, mp_context=spawn) as theirs, ProcessPoolExecutor(1, mp_context=spawn) as ours:
        ways = dict.fromkeys((PLAIN, TUNED, CHANNELS_LAST), theirs) | dict.fromkeys((OURS, EXTRACT), ours)
        if half:
            ways[HALF] = ours
        expected: np.ndarray | None = None
        for name, pool in ways.items():
            features, sizes[name] = pool.submit(_begin, name, model, store, rows, device).result()
            expected = features if expected is None else expected
            tolerance = 1e-4 if device == "cpu" and name != HALF else 0.05
            check_features(f"{model}, {name}", features, expected, tolerance)
        for _ in range(turns):
            for name, pool in ways.items():
                speeds.setdefault(name, []).append(pool.submit(_turn, name, sizes[name]).result())
        operations = ours.submit(_operations, store, rows).result()
        peaks = {name: pool.submit(_peak, name).result() for name, pool in ways.items()}
    return _Measured(speeds, sizes, operations, peaks)


def _multiplies_bfloat16() -> bool:
    """Tell whether the CPU has instructions for bfloat16, without which it takes longer than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def check_features(name: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raise a ValueError if features are not those of plain torchvision, up to a part of the greatest."""
    if np.abs(found - expected).max() > tolerance * np.abs(expected).max():
        raise ValueError(f"features of {name}, differ from those of plain torchvision")


_ways: dict[str, tuple[Callable[[int], Any], int]] = {}  # of this process: what is done, and of how many scans
_encoders: dict[str, Encoder] = {}


def _begin(name: str, model: str, store: str, rows: np.ndarray, device: str) -> tuple[np.ndarray, int]:
    """Get a way ready in this process; return features of one batch, and how many scans at a time it takes."""
    scale, batch_size = MODELS[model]
    plain = name in (PLAIN, TUNED, CHANNELS_LAST)
    precision = "bfloat16" if name == HALF else "auto"
    encoder = build_encoder(model, weights="random", scale=scale, device=device, plain=plain, precision=precision)
    _encoders[name] = encoder
    with VolumeReader(open_store(store)) as reader:
        images = torch.from_numpy(reader.read(rows)).to(encoder.device)
    encode = plain_torchvision(encoder) if name in (PLAIN, TUNED) else encoder

    def fed(size: int, scans: int) -> torch.Tensor:
        with nullcontext() if plain else memory_for(encoder.device):
            return torch.cat([encode(batch) for batch in images[:scans].split(size)]).cpu()

    def from_store(size: int, scans: int) -> torch.Tensor:
        return torch.from_numpy(extract(store, encoder, rows=rows[:scans], batch_size=size).features)

    way = from_store if name == EXTRACT else fed
    _ways[name] = partial(way, scans=len(rows)), len(rows)
    some = way(batch_size, batch_size)  # also warms up
    if name in (TUNED, CHANNELS_LAST):
        tried = [batch_size >> halved for halved in range(batch_size.bit_length())]
        taken = {size: min(_seconds(partial(way, size, batch_size)) for _ in range(2)) for size in tried}
        batch_size = min(taken, key=taken.__getitem__)
    return some.numpy(), batch_size


def _operations(store: str, rows: np.ndarray) -> float:
    """Return the floating-point operations of a scan in our network."""
    with VolumeReader(open_store(store)) as reader:
        scan = torch.from_numpy(reader.read(rows[:1]))
    with FlopCounterMode(display=False) as counter:
        _encoders[OURS](scan)
    return counter.get_total_flops()


def _peak(name: str) -> float:
    return arithmetic_speed(_encoders[name].device, _encoders[name].dtype)


def _turn(name: str, size: int) -> float:
    """Return how many scans a second a way does."""
    way, scans = _ways[name]
    return scans / _seconds(partial(way, size))


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


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
