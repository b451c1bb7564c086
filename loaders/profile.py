"""Where the time goes: a pass over a store, the limit of each stage measured by itself, and what to do about it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ingest.places import Place
from ingest.store import VolumeStore, open_store
from loaders.errors import as_shard_error, describe_scan
from loaders.fetch import Buffer, Payload, ShardFetcher
from loaders.opening import open_loader
from loaders.output import Output, make_decoder, torch_dtype
from loaders.timing import Timing
from loaders.views import plan_picture

_DECODED_FROM = 32  # scans whose compressed bytes are held to measure decoding


@dataclass(frozen=True)
class Stage:
    """One stage by itself, with all threads.

    Attributes
    ----------
    name
        ``read`` (as found), ``read again`` (from the system's memory), ``check``, ``decode`` (with the checks),
        ``copy`` to a GPU.
    scans_per_second
        What the whole loader could do if all else cost nothing.
    gigabytes_per_second
        Of what it moves: compressed bytes; of `decode` and `copy` pictures.
    """

    name: str
    scans_per_second: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Profile:
    """What `profile_store` found.

    Attributes
    ----------
    timing
        Of the pass, without a model behind it.
    stages
        Limits.
    bottleneck
        Name of the stage with the lowest limit.
    advice
        What would help, in words.
    settings
        What was measured.
    """

    timing: Timing
    stages: list[Stage]
    bottleneck: str
    advice: list[str]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "settings": self.settings,
            "scans_per_second": self.timing.scans_per_second,
            "timing": asdict(self.timing),
            "stages": [asdict(stage) for stage in self.stages],
            "bottleneck": self.bottleneck,
            "advice": self.advice,
        }


def profile_store(
    store: str | Place | VolumeStore, *, scans: int = 512, batch_size: int = 16, threads: int | None = None,
    view: str = "volume", slices: int = 3, dtype: str = "uint8", backend: str = "auto", device: str | None = None,
) -> Profile:  # fmt: skip
    """Measure loading from a store.

    Parameters
    ----------
    scans
        How many to read, at most; they are chosen at random.
    batch_size, threads, view, slices, dtype, backend, device
        See `loaders.open_loader`.

    Raises
    ------
    ValueError
        If the store holds no volume, and as `loaders.open_loader`.
    ShardError
        Naming the scan that cannot be read.
    """
    opened = store if isinstance(store, VolumeStore) else open_store(store)
    if not len(opened.ok_rows):
        raise ValueError(f"{opened.path} holds no volume with status ok; see: ingest inspect {opened.path}")
    rows = np.random.default_rng().permutation(opened.ok_rows)[:scans]
    picture = plan_picture(opened.grid.shape_zyx, opened.slab, view, slices)
    with open_loader(
        opened, rows=rows, batch_size=batch_size, threads=threads, view=view, slices=slices, dtype=dtype,
        backend=backend, device=device, shuffle=True,
    ) as loader:  # fmt: skip
        count = loader.timing.threads
        fetcher = ShardFetcher(opened, picture.slabs)
        fetch = _naming(opened, rows, lambda number, buffer: fetcher.fetch(int(rows[number]), buffer))
        stages = [_read(fetch, len(rows), count, name) for name in ("read", "read again")]
        output = Output(picture, torch_dtype(dtype))
        stages += _decode(opened, output, fetch, rows, count, loader.device)
        if loader.device.type == "cuda":
            stages.append(_copy(stages, picture.shape, loader.backend, loader.device))
        for _ in loader:
            pass
        timing = loader.timing
        settings = {
            "store": str(opened.path), "scans": len(rows), "batch_size": batch_size, "threads": count, "view": view,
            "slices": slices if view != "volume" else None, "dtype": dtype, "backend": loader.backend,
            "device": str(loader.device), "cores": len(os.sched_getaffinity(0)),
            "compressed_mb_per_scan": round(timing.bytes_read / max(1, timing.scans) / 1e6, 3),
        }  # fmt: skip
        inflates = loader.backend == "dali" and loader.device.type == "cuda"
    bottleneck, advice = judge(timing, stages, inflates=inflates, remote=not isinstance(opened.path, Path), view=view)
    return Profile(timing, stages, bottleneck, advice, settings)


def judge(timing: Timing, stages: list[Stage], *, inflates: bool, remote: bool, view: str) -> tuple[str, list[str]]:
    """Return the stage that limits the loader, and advice in words.

    Parameters
    ----------
    inflates
        A GPU inflates: the CPU checks, and does not decode.
    remote
        The store is in an object store.
    view
        What is loaded.
    """
    speed = {stage.name: stage.scans_per_second for stage in stages}
    used = ["read", "check" if inflates else "decode", *(["copy"] if "copy" in speed else [])]
    bottleneck = min(used, key=lambda name: speed[name])
    advice = [
        f"{bottleneck} is the slowest stage: by itself it makes {speed[bottleneck]:,.0f} scans/s; "
        f"the loader as a whole made {timing.scans_per_second:,.0f}"
    ]
    if bottleneck == "read":
        if remote:
            advice.append("the network or the object store limits: more threads=, or cache_dir= and cache_bytes= for "
                          "a folder on a local disk")  # fmt: skip
        elif speed["read again"] > 1.5 * speed["read"]:
            advice.append("the storage limits, not this machine: from the system's memory reading makes "
                          f"{speed['read again']:,.0f} scans/s; a faster disk, a machine whose memory holds the "
                          "store, or cache_dir= on a local disk would help")  # fmt: skip
        else:
            advice.append("the system's own copying limits: more cores")
        if view == "volume":
            advice.append("a 2D network needs only some slabs: view='axial' reads a fraction of the bytes")
    elif bottleneck in ("decode", "check"):
        advice.append(f"the {timing.threads} threads limit: more cores and threads="
                      + ("" if inflates else ", or a GPU with DALI, which inflates there"))  # fmt: skip
    else:
        advice.append("the way to the GPU limits")
        if not inflates:
            advice.append("the DALI backend would carry compressed bytes, fewer by the store's ratio")
    both = 1 / (1 / speed["read again"] + 1 / speed[used[1]])
    if timing.scans_per_second < 0.7 * min(both, speed[bottleneck]):
        seconds = f"({timing.augment:.2f} s of {timing.elapsed:.2f})"
        advice.append("the loader is slower than its stages: other programs use this machine, or scaling, augmenting "
                      + (f"{seconds} and inflating take" if inflates else f"and DALI {seconds} take")
                      + " their time")  # fmt: skip
    return bottleneck, advice


def _in_threads(work: Callable[[int, Buffer], int], count: int, threads: int) -> tuple[float, int]:
    """Run ``work(number, buffer)`` for all numbers below `count`; return seconds and the sum of what it gave."""
    numbers = itertools.count()
    totals: list[int] = []
    errors: list[BaseException] = []

    def run() -> None:
        buffer, total = Buffer(), 0
        try:
            while (number := next(numbers)) < count:
                total += work(number, buffer)
        except BaseException as error:
            errors.append(error)
        totals.append(total)

    pool = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    started = time.perf_counter()
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started, sum(totals)


def _naming(store: VolumeStore, rows: np.ndarray, work: Callable[[int, Buffer], Any]) -> Callable[[int, Buffer], Any]:
    """Return ``work(number, buffer)`` with errors that name the scan; numbers go over the rows again and again."""

    def named(number: int, buffer: Buffer) -> Any:
        try:
            return work(number, buffer)
        except (OSError, ValueError) as error:
            raise as_shard_error(error, describe_scan(store, int(rows[number % len(rows)]))) from error

    return named


def _read(fetch: Callable[[int, Buffer], Payload], count: int, threads: int, name: str) -> Stage:
    seconds, nbytes = _in_threads(lambda number, buffer: len(fetch(number, buffer).content), count, threads)
    return Stage(name, count / seconds, nbytes / seconds / 1e9)


def _decode(
    store: VolumeStore, output: Output, fetch: Callable[[int, Buffer], Payload], rows: np.ndarray, threads: int,
    device: torch.device,
) -> list[Stage]:  # fmt: skip
    """Measure checking, and decoding with it, of bytes that are in memory."""
    payloads: list[Payload] = [fetch(number, Buffer()) for number in range(min(len(rows), _DECODED_FROM))]
    decoder = make_decoder(store, output, device)
    out = np.zeros((len(payloads), *output.picture.shape), decoder.table.dtype)
    count = max(len(rows), 4 * len(payloads))

    def check(number: int, _: Buffer) -> int:
        payload = payloads[number % len(payloads)]
        decoder.check(payload)
        return len(payload.content)

    def decode(number: int, _: Buffer) -> int:
        at = number % len(payloads)
        decoder.decode(payloads[at], out[at])
        return out[at].nbytes

    stages = []
    for name, stage in (("check", check), ("decode", decode)):
        work = _naming(store, rows[: len(payloads)], stage)
        _in_threads(work, threads, threads)  # compiles what is compiled
        seconds, nbytes = _in_threads(work, count, threads)
        stages.append(Stage(name, count / seconds, nbytes / seconds / 1e9))
    return stages


def _copy(stages: list[Stage], shape: tuple[int, ...], backend: str, device: torch.device) -> Stage:
    """Measure the way to the GPU, of compressed bytes if it inflates, else of pictures."""
    read = stages[0]
    compressed = int(read.gigabytes_per_second * 1e9 / read.scans_per_second)
    nbytes = compressed if backend == "dali" else int(np.prod(shape))
    host = torch.empty(64 * nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    there.copy_(host)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(4):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return Stage("copy", 4 * 64 / seconds, 4 * host.numel() / seconds / 1e9)
