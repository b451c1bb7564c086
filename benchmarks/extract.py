"""Scans a second through frozen networks: a plain loop, plain torchvision, ours fed from memory, and ``extract``.

The plain loop is what users write: MONAI reads .nii.gz files in as many workers as there are cores (which have begun
before the clock does), and torchvision's
network in float32 gets three channels, divided and normalised, in torch's default memory layout. Plain torchvision is
the same fed from memory. It is given channels-last, too, and as many scans at a time as are fastest, to tell what those
alone are worth. Ours works in a process of its own, for how it has memory allocated is one of the things that make it
fast, and would hold for all that a process does. All see the same slices or volumes, and the benchmark checks first
that all give the same features. The limit is the arithmetic of ours, of one channel and without batch norms, at the
highest rate that the device is seen to compute at.

On a CPU the scans are a simulated cohort's; on a GPU, whose machine may have nothing but this package, they are made
up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import arithmetic_speed
from benchmarks.loader_peers import MONAI, Source, open_peer
from benchmarks.loaders import prepare
from benchmarks.made import DIFFERENT, SHAPE, make_files, make_store, make_volumes
from benchmarks.results import Report, Result, failure
from extract import Encoder, build_encoder, extract
from extract.fast import memory_for
from ingest.store import DEFAULT_SLAB, VolumeStore, open_store, package_versions
from loaders import View, VolumeReader, slices_of
from loaders.views import as_images

LOOP = "MONAI and plain torchvision"
PLAIN, CHANNELS_LAST, OURS, EXTRACT = "plain", "plain, channels-last", "folded, grey", "extract"
TUNED = "plain, its best batch"
SLICES = "folded, grey, of slices"  # ready-made ones, where cutting volumes takes a GPU some time
HALF = "folded, grey, bfloat16"  # on a CPU that multiplies such numbers; a GPU does everything in them
_LOOPED = 16  # scans that the plain loop gets before it is measured
_RESIDENT = 1024  # scans in memory, over and over
_MADE = 8192  # scans of a store that is made up, over and over
STORED = 256  # scans of the store, which the benchmark of the loaders uses, too


@dataclass(frozen=True)
class Case:
    """A network: the factor of its input's size, scans at a time, and how many each way gets in a turn.

    Plain torchvision is tried with fewer at a time, too. Ours from memory gets as many as `extract`: a GPU's clock may
    depend on how long it has been at work.
    """

    model: str
    scale: float
    batch: int
    plainly: int
    looped: int
    extracted: int
    loops: int = 1 << 30  # turns that have the plain loop, at most


#: By device. What starts with a run is nothing in one of tens of thousands of scans, and should be little here.
CASES = {
    "cpu": (Case("resnet18", 1.0, 8, 40, 40, 40), Case("r3d_18", 0.5, 2, 4, 4, 4)),
    "cuda": (Case("resnet18", 1.0, 256, 16_384, 256, 100_000, 1), Case("r3d_18", 1.0, 16, 256, 128, 4096, 1)),
}


def run_extract(
    directory: Path,
    *,
    scans: int | None = None,
    repeats: int = 5,
    stored: int = STORED,
    device: str = "cpu",
    cases: Sequence[Case] | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Report:
    """Measure networks with random weights, which take as long as others.

    Parameters
    ----------
    directory
        Of `benchmarks.loaders.prepare`, or of what is made up.
    scans
        Of a turn, at most.
    repeats
        Of everything, in turns; the 3D network gets half as many.
    stored
        Scans of the simulated store.
    cases
        By default `CASES` of the device.
    on_report
        Called with what there is, after each turn: a GPU may be there for minutes only.

    Returns
    -------
    Report
        ``settings["failures"]`` has the ways that did not work, or whose features are others, with their tracebacks.
    """
    cases = [
        replace(
            case,
            plainly=min(case.plainly, most),
            looped=min(case.looped, most),
            extracted=min(case.extracted, most),
        )
        for case in cases or CASES[torch.device(device).type]
        for most in [scans or case.extracted]
    ]
    if device == "cpu":
        store, files = prepare(directory, stored)
    else:
        store, files = make_data(directory, min(_MADE, max(case.extracted for case in cases)))
    source = Source(store, files, np.asarray(store.ok_rows))
    results: dict[str, list[Result]] = {}  # by network
    ratios: dict[str, float] = {}
    settings: dict[str, Any] = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "cases": {case.model: vars(case) for case in cases}, "repeats": repeats, "slices": 9,
        "batch_size": {}, "gflops_per_scan": {}, "hours_for_40000_scans": {}, "failures": {},
        "versions": package_versions("torch", "torchvision", "nvidia-dali-cuda130", "monai"),
    }  # fmt: skip

    def report() -> Report:
        return Report("extract", settings, [one for some in results.values() for one in some], dict(ratios))

    def note(case: Case, measured: _Measured) -> None:
        unit, per = ("scans/s", 1) if case.model == "resnet18" else ("scans/min", 60)
        settings["failures"] |= measured.failures
        settings["batch_size"] |= {f"{case.model}, {name}": size for name, size in measured.batch_sizes.items()}
        settings["gflops_per_scan"][case.model] = round(measured.operations / 1e9, 2)
        middle = {name: median(values) for name, values in measured.speeds.items()}
        results[case.model] = []
        for name, values in measured.speeds.items():
            value, low, high = (round(speed * per, 2) for speed in (middle[name], min(values), max(values)))
            share = round(middle[name] * measured.operations / measured.peaks[name], 3)
            results[case.model].append(Result(f"{case.model}, {name}", value, unit, low, high, limit_share=share))
        for name, of in (
            (OURS, PLAIN),
            (OURS, TUNED),
            (OURS, CHANNELS_LAST),
            (HALF, PLAIN),
            (EXTRACT, OURS),
            (EXTRACT, SLICES),
            (EXTRACT, LOOP),
        ):
            if name in middle and of in middle:
                fed = {OURS: "extract/fed from memory", SLICES: "extract/fed slices from memory"}
                what = fed[of] if name == EXTRACT and of in fed else f"{name}/{of}"
                ratios[f"{case.model}: {what}"] = round(middle[name] / middle[of], 3)
        for name in (EXTRACT, LOOP):
            if name in middle:
                settings["hours_for_40000_scans"][f"{case.model}, {name}"] = round(40_000 / middle[name] / 3600, 3)
        if on_report is not None:
            on_report(report())

    for case in cases:
        turns = repeats if case.model == "resnet18" else max(1, (repeats + 1) // 2)
        try:
            _measure(case, source, turns, device, partial(note, case))
        except Exception as error:  # ours could not begin, or a process has died
            settings["failures"][case.model] = failure(error)
    return report()


def make_data(directory: Path, scans: int) -> tuple[VolumeStore, dict[int, Path]]:
    """Make up a store of so many scans, and files of the same, of which few are different ones."""
    volumes = make_volumes(min(scans, DIFFERENT), SHAPE)
    files = make_files(directory / "files", volumes)
    brightest = [np.percentile(volume[volume > 0], 99.9) for volume in volumes]
    stored = [np.rint(np.clip(v / top, 0, 1) * 255).astype(np.uint8) for v, top in zip(volumes, brightest, strict=True)]
    path = directory / "made.zarr"
    make_store(path, np.stack(stored), slab=DEFAULT_SLAB, scans=scans)
    return open_store(path), {row: files[row % len(files)] for row in range(scans)}


@dataclass
class _Measured:
    """Scans a second of each way, turn by turn, how many scans at a time it takes, and what limits all of them."""

    speeds: dict[str, list[float]]
    batch_sizes: dict[str, int]
    operations: float  # a scan
    peaks: dict[str, float]  # operations a second
    failures: dict[str, str]


def _measure(case: Case, source: Source, turns: int, device: str, on_turn: Callable[[_Measured], None]) -> None:
    speeds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    failures: dict[str, str] = {}
    spawn = get_context("spawn")
    half = device == "cpu" and _multiplies_bfloat16()
    files = {row: source.files[row] for row in source.rows[: case.looped].tolist()}
    given = (case, str(source.store.path), source.rows, files, device)
    with ProcessPoolExecutor(1, mp_context=spawn) as theirs, ProcessPoolExecutor(1, mp_context=spawn) as ours:
        ways = {PLAIN: theirs, TUNED: theirs, CHANNELS_LAST: theirs, OURS: ours, EXTRACT: ours, LOOP: theirs}
        if device != "cpu":  # whose time is dear: on an H100 they made 2,890 and 1,260 scans/s, and plain 2,890
            del ways[TUNED], ways[CHANNELS_LAST]
            if case.model == "resnet18":
                ways[SLICES] = ours
        if half:
            ways[HALF] = ours
        expected: np.ndarray | None = None
        for name, pool in list(ways.items()):
            try:
                begun = time.perf_counter()
                features, sizes[name] = pool.submit(_begin, name, *given).result()
                print(f"{case.model}, {name}: ready after {time.perf_counter() - begun:.1f} s", flush=True)
                expected = features if expected is None else expected
                rounded = device != "cpu" or name in (HALF, LOOP)
                check_features(f"{case.model}, {name}", features, expected[: len(features)], 0.05 if rounded else 1e-4)
            except Exception as error:
                failures[f"{case.model}, {name}"] = failure(error)
                del ways[name]
        operations = ours.submit(_operations, case, str(source.store.path), source.rows).result()
        peaks = {name: pool.submit(_peak, name).result() for name, pool in ways.items()}
        measured = _Measured(speeds, {name: sizes[name] for name in ways}, operations, peaks, failures)
        for turn in range(turns):
            for name, pool in ways.items():
                if name == LOOP and turn >= case.loops:
                    continue
                speeds.setdefault(name, []).append(pool.submit(_turn, name, sizes[name]).result())
                print(f"{case.model}, {name}: {speeds[name][-1]:.2f} scans/s", flush=True)
            on_turn(measured)


def _multiplies_bfloat16() -> bool:
    """Tell whether the CPU has instructions for bfloat16, without which it takes longer than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def check_features(name: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raise a ValueError if features are not those of plain torchvision, up to a part of the greatest."""
    if np.abs(found - expected).max() > tolerance * np.abs(expected).max():
        raise ValueError(f"features of {name}, differ from those of plain torchvision")


_ways: dict[str, Callable[[int], tuple[torch.Tensor, float]]] = {}  # of this process: features, and scans a second
_encoders: dict[str, Encoder] = {}


def _begin(
    name: str, case: Case, store: str, rows: np.ndarray, files: dict[int, Path], device: str
) -> tuple[np.ndarray, int]:
    """Get a way ready in this process; return features of one batch, and how many scans at a time it takes."""
    plain = name in (PLAIN, TUNED, CHANNELS_LAST, LOOP)
    precision = "bfloat16" if name == HALF else "auto"
    encoder = build_encoder(
        case.model, weights="random", scale=case.scale, device=device, plain=plain, precision=precision
    )
    _encoders[name] = encoder
    encode = plain_torchvision(encoder) if name in (PLAIN, TUNED, LOOP) else encoder
    opened = open_store(store)

    def looped(size: int, scans: int) -> tuple[torch.Tensor, float]:
        workers = min(len(os.sched_getaffinity(0)), scans)
        size = max(1, min(size, scans // (4 * workers)))  # each worker makes batches of its own, and should make some
        batches = open_peer(
            MONAI, Source(opened, files, rows[:scans]), Path(), rows[:scans], batch_size=size, workers=workers
        )
        features, begun, left = [], time.perf_counter(), scans
        for number, batch in enumerate(batches):
            # (scan, 1, x, y, z), in [0, 1]
            features.append(encode(batch[:, 0].permute(0, 3, 2, 1).to(encoder.device)))
            if number + 1 == workers and scans > 2 * workers * size:  # all of them are under way
                torch.cat(features).cpu()  # which a GPU may still be at work on
                begun, left = time.perf_counter(), scans - workers * size
        found = torch.cat(features).cpu()
        return found, left / (time.perf_counter() - begun)

    def from_store(size: int, scans: int) -> torch.Tensor:
        return torch.from_numpy(extract(store, encoder, rows=np.resize(rows, scans), batch_size=size).features)

    def fed(size: int, scans: int) -> torch.Tensor:
        split = zip(*(one.split(size) for one in resident), strict=True)
        batches = islice(cycle(map(as_images, split)), -(-scans // size))
        with nullcontext() if plain else memory_for(encoder.device):
            return torch.cat([encode(batch) for batch in batches]).cpu()

    def timed(work: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], tuple[torch.Tensor, float]]:
        def run(size: int, scans: int) -> tuple[torch.Tensor, float]:
            begun = time.perf_counter()
            features = work(size, scans)
            return features, len(features) / (time.perf_counter() - begun)

        return run

    way, scans = {LOOP: (looped, case.looped), EXTRACT: (timed(from_store), case.extracted)}.get(
        name, (timed(fed), case.plainly if plain else case.extracted)
    )
    if name not in (LOOP, EXTRACT):
        view = encoder.view if name == SLICES else View.volume
        with VolumeReader(opened, view=view) as reader:
            resident = [one.to(encoder.device) for one in reader.read_pictures(rows[: min(scans, _RESIDENT)])]
    _ways[name] = lambda size: way(size, scans)
    batch_size = case.batch
    some, _ = way(batch_size, min(batch_size, _LOOPED) if name == LOOP else batch_size)  # also warms up
    if name in (TUNED, CHANNELS_LAST):
        tried = [batch_size >> halved for halved in range(batch_size.bit_length())]
        speeds = {size: max(way(size, batch_size)[1] for _ in range(2)) for size in tried}
        batch_size = max(speeds, key=speeds.__getitem__)
    return some.numpy(), batch_size


def _operations(case: Case, store: str, rows: np.ndarray) -> float:
    """Return the floating-point operations of a scan in our network, on a CPU: torch knows no fused kernels' ones."""
    encoder = build_encoder(case.model, weights="random", scale=case.scale, device="cpu")
    with VolumeReader(open_store(store)) as reader:
        scan = torch.from_numpy(reader.read(rows[:1]))
    with FlopCounterMode(display=False) as counter:
        encoder(scan)
    return counter.get_total_flops()


def _peak(name: str) -> float:
    torch.backends.cuda.matmul.allow_tf32 = name in (PLAIN, TUNED, CHANNELS_LAST, LOOP)  # as convolutions have it
    return arithmetic_speed(_encoders[name].device, _encoders[name].dtype)


def _turn(name: str, size: int) -> float:
    """Return how many scans a second a way does."""
    return _ways[name](size)[1]


def plain_torchvision(encoder: Encoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what a user writes around torchvision's network to encode volumes (scan, z, y, x), bytes or 0 to 1."""
    network = encoder.network.to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(v, device=encoder.device) for v in (encoder.weights.mean, encoder.weights.std))

    def shrunk(x: torch.Tensor) -> torch.Tensor:
        return x if encoder.scale == 1 else nn.functional.interpolate(x, scale_factor=encoder.scale, mode="area")

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if encoder.view is View.volume:
            x = shrunk(images[:, None])
            volumes: torch.Tensor = network((x - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1))
            return volumes
        features = []
        for group in slices_of(images, encoder.view, encoder.slices):
            x = shrunk(group.flatten(0, 1)[:, None])
            found = network((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
            features.append(found.unflatten(0, group.shape[:2]))
        return torch.cat(features, dim=1).mean(dim=1)

    return encode
