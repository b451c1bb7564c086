"""`open_loader`: what to load, in which order, to where."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ingest.places import Place
from ingest.store import VolumeStore, open_store
from loaders.augmentation import Augmentation
from loaders.cache import ShardCache
from loaders.checks import as_whole
from loaders.device import choose_device
from loaders.layout import check_layout
from loaders.loader import Loader
from loaders.order import Sampling
from loaders.output import Output, torch_dtype
from loaders.select import balancing_weights, phenotype, select_rows, strata_of
from loaders.slots import to_inflate
from loaders.views import Picture, Slices, View, plan_picture

BACKENDS = ("auto", "dali", "torch")
_MOST_THREADS = 8  # so many bring in compressed bytes as fast as a GPU's bus takes them; more are in a network's way
_MOST_DECODING = 16  # for a GPU, which wants all that cores can decode
#: Cores that decode volumes faster than a GPU inflates them beside a ResNet-18 of their slices: on an H100 12 of them
#: made 10,400 scans/s, 8 made 7,000.
_MANY_CORES = 12
_REMOTE_THREADS = 16  # they wait for the network most of the time
_MOST_ASKED_FOR = 1024


def open_loader(
    store: str | Place | VolumeStore,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    where: str | None = None,
    known: str | Sequence[str] = (),
    batch_size: int = 16,
    view: str = "volume",
    slices: Slices = 3,
    dtype: str | torch.dtype = "uint8",
    mean: float = 0.0,
    std: float = 1.0,
    channels: int | None = None,
    channels_last: bool = False,
    augmentation: Augmentation | None = None,
    planes: Sequence[np.ndarray] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    weights: Sequence[float] | np.ndarray | None = None,
    balance: str | None = None,
    stratify: str | None = None,
    drop_last: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    threads: int | None = None,
    on_error: str = "raise",
    deadline: float = 60.0,
    cache_dir: str | Path | None = None,
    cache_bytes: int = 0,
) -> Loader:
    """Open a store for iteration.

    Parameters
    ----------
    store
        Path or ``s3://`` address of a store, or an open one.
    rows, where, known
        Which scans, by default all that hold a volume: row numbers or a mask; a condition such as
        ``"age >= 60 and sex == 1"``; phenotypes that must not be missing. See `loaders.select.select_rows`.
    batch_size
        Scans per batch (of each rank); the last batch may have fewer.
    view, slices
        ``volume``, or ``axial``, ``coronal``, ``sagittal`` slices: so many, evenly spaced, or those positions. Of axial
        slices only the slabs that hold them are read. ``triplanar``: so many of each plane, or the positions of each,
        of which batches hold a tuple of three tensors.
    dtype
        ``uint8`` (as stored), ``float32``, ``float16`` or ``bfloat16``: ``(stored / 255 - mean) / std``.
    mean, std
        Of the normalisation.
    channels, channels_last
        1 or 3: an axis of so many equal channels; in torch's channels-last memory format.
    augmentation
        See `loaders.Augmentation`; each scan's depends on the seed, the epoch, and its place in the epoch alone.
    planes
        Of volumes that are augmented: the only slices that will be looked at, as indices along z, y and x. What they
        show does not change, and takes a fraction of the time; the rest of the volume is 0.
    shuffle, seed
        Visit the scans in an order that depends on the seed and the epoch alone: not on the backend, the batch size,
        the number of threads or ranks.
    weights
        One per row that is visited: as many are drawn, with replacement, in proportion to their weights.
    balance
        A phenotype whose values (tenths of its range of ranks, if there are more than ten) are drawn equally often;
        weights that follow from it.
    stratify
        A phenotype of whose values every batch has nearly the same share. Needs `shuffle`.
    drop_last
        Leave out a last batch that is not full (on every rank).
    rank, world_size
        This process is number `rank` of so many that share each epoch; by default what `torch.distributed` says, if it
        is set up.
    backend
        ``dali`` (needs nvidia-dali; inflates on the GPU where there is one), ``torch``, or ``auto``: DALI where it and
        a GPU are at hand, but for slices that threads cut about as fast, and leave the GPU to the network: axial ones,
        and with 12 cores or more those of three planes. The pixels are the same.
    device
        Where the batches shall be, ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU where there is one, else the CPU.
    threads
        Threads that read and decode, at most 1024; by default one per core, at most 8 (16 where they decode for a GPU),
        and 16 for ``s3://``. Ranks that torchrun starts on a machine share its cores.
    on_error
        ``raise``, or ``skip``: a scan that cannot be read is reported, counted in `Loader.skipped`, and marked in its
        batch.
    deadline
        Seconds that reading a scan may take; then it is an error as `on_error` says.
    cache_dir, cache_bytes
        A folder on a fast disk that keeps compressed shards of a store that is far away, and its greatest size.

    Raises
    ------
    ValueError
        For settings that cannot be, each with what was expected; ``dali`` where DALI is not installed; ``cuda`` where
        there is no GPU.
    IndexError
        If a row holds no volume.
    StoreError
        If the store is of another format or layout.

    Examples
    --------
    >>> with open_loader("out.zarr", batch_size=8, shuffle=True, seed=1) as loader:  # doctest: +SKIP
    ...     for batch in loader:
    ...         batch.images  # uint8 tensor (8, 160, 192, 160)
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, expected raise or skip")
    if not deadline > 0:
        raise ValueError(f"deadline is {deadline}, expected a number of seconds above 0")
    if threads is not None:
        threads = as_whole("threads", threads, 1, _MOST_ASKED_FOR)
    if (cache_dir is None) != (not cache_bytes):
        raise ValueError("a cache needs both cache_dir and cache_bytes, its folder and its greatest size")
    chosen, where_to = choose_backend(backend, device, view)
    opened = store if isinstance(store, VolumeStore) else open_store(store)
    check_layout(opened)
    wanted = select_rows(opened, rows=rows, where=where, known=known)
    drawn, strata = _draws(opened, wanted, weights, balance, stratify, shuffle=shuffle)
    rank, world_size = _choose_rank(rank, world_size)
    sampling = Sampling(wanted, shuffle, seed, drawn, strata, batch_size, rank, world_size, drop_last)
    picture = plan_picture(opened.grid.shape_zyx, opened.slab, view, slices)
    output = Output(picture, torch_dtype(dtype), mean, std, channels, channels_last, augmentation, seed, planes)
    cache = None if cache_dir is None else ShardCache(Path(cache_dir), cache_bytes, opened, picture.slabs)
    if threads is None:
        most = _MOST_DECODING if chosen == "torch" and where_to.type == "cuda" else _MOST_THREADS
        local = min(most, _cores())
        threads = local if isinstance(opened.path, Path) else _REMOTE_THREADS
    return Loader(
        opened,
        sampling,
        output,
        backend=chosen,
        device=where_to,
        threads=threads,
        skip_errors=on_error == "skip",
        deadline=deadline,
        cache=cache,
    )


def choose_backend(
    backend: str, device: str | torch.device | None = None, view: str = "volume"
) -> tuple[str, torch.device]:
    """Turn ``auto`` into ``dali`` or ``torch`` for a view, and choose the device; refuse what is not there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown, expected one of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend == "dali" and not installed:
        raise ValueError("backend 'dali' needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use backend 'torch'")
    wanted = choose_device(device)
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    if backend == "auto":
        cut_here = view == View.axial or (view == View.triplanar and _cores() >= _MANY_CORES)
        backend = "dali" if installed and wanted.type == "cuda" and not cut_here else "torch"
    return backend, wanted


def room_to_inflate(store: VolumeStore, picture: Picture, backend: str, device: str | torch.device) -> tuple[int, int]:
    """Return how many scans a loader can inflate at a time, and how many bytes of the GPU each takes meanwhile.

    Where it inflates nothing, any number, and 0.
    """
    chosen, where = choose_backend(backend, device, picture.view)
    if chosen != "dali" or where.type != "cuda":
        return sys.maxsize, 0
    _, height, width = store.grid.shape_zyx
    return to_inflate(len(picture.slabs), (store.slab, height, width))


def _cores() -> int:
    """Return how many cores this process may use: its share, where torchrun has started several on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(processes) if processes.isdecimal() else 1))


def _choose_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if rank is None or world_size is None:
        raise ValueError(f"rank is {rank} and world_size {world_size}, expected both or neither")
    return rank, world_size


def _draws(
    store: VolumeStore,
    rows: np.ndarray,
    weights: Sequence[float] | np.ndarray | None,
    balance: str | None,
    stratify: str | None,
    *,
    shuffle: bool,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return weights or strata of the rows, whichever was asked for."""
    if sum(option is not None for option in (weights, balance, stratify)) > 1:
        raise ValueError("weights, balance and stratify exclude one another; give one of them")
    if stratify is not None:
        if not shuffle:
            raise ValueError("stratify orders a shuffled epoch; it needs shuffle=True")
        return None, strata_of(phenotype(store, stratify)[rows])
    if balance is not None:
        return balancing_weights(phenotype(store, balance)[rows]), None
    if weights is None:
        return None, None
    drawn = np.asarray(weights, dtype=np.float64).reshape(-1)
    if len(drawn) != len(rows):
        raise ValueError(f"{len(drawn)} weights were given for {len(rows)} rows, expected one for each")
    if len(drawn) and not (np.isfinite(drawn).all() and (drawn >= 0).all() and drawn.sum() > 0):
        raise ValueError("weights must be finite, not negative, and not all zero")
    return drawn, None
