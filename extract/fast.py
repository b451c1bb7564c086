"""What a device allows: number type, compiled networks, how many scans at a time, memory that is used again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from extract.grey import GreyConvolution
from ingest.memory import kept_memory
from loaders.views import Images, Picture, as_images

if TYPE_CHECKING:
    from extract.encoder import Encoder

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

MOST_SCANS = 256  # more are no faster
MOST_NUMBERS = 2**31 - 1  # of a tensor; with more, kernels are other ones, and less tried
CPU_SCANS, CPU_VOLUMES = 8, 2  # more are no faster: the slices of a few scans, or one volume of a 3D network, are much
_MEMORY_SHARE = 0.7  # of what is free; allocators lose some between blocks
_WAITING = 4  # batches of bytes that a loader and the network hold at once


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Turn ``auto`` into float32 on a CPU, and on a GPU into bfloat16, or float16 where it has none."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown, expected one of {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("float16 takes minutes per scan on a CPU; use bfloat16 or float32")
    if precision == "auto":
        precision = "float32"
        if device.type == "cuda":
            with torch.cuda.device(device):
                precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


class CompileWarning(UserWarning):
    """A network is not compiled, though that was asked for."""


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Have a GPU multiply float32 as float32: by itself it rounds what it convolves to ten bits (TF32)."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        yield


def to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Have a GPU copy what it computes to the host as soon as it is there, before anything else that it is told to do.

    Returns
    -------
    values : torch.Tensor
        On the CPU.
    there : torch.cuda.Event or None
        Has happened when they have arrived: to wait for it is to wait for no more than them. None if they are there.
    """
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    there = torch.cuda.Event(blocking=True)  # who waits for it sleeps: threads that load have use for the core
    there.record(torch.cuda.current_stream(values.device))
    return host, there


def memory_for(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Keep what a network frees for its next batch: on a CPU by `ingest.memory.kept_memory`, on a GPU torch does."""
    return kept_memory() if device.type == "cpu" else contextlib.nullcontext()


def compile_network(network: nn.Module, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Compile a network for each shape that it meets; on a GPU as a CUDA graph.

    Returns
    -------
    callable
        Takes many seconds for each new shape. None, with a `CompileWarning`, where nothing can be compiled, for
        instance because there is no C++ compiler.
    """
    reason = _why_not_compiled(device)
    if reason:
        message = f"going on without torch.compile, which does not work here: {reason}"
        warnings.warn(message, CompileWarning, stacklevel=3)
        return None
    compiled = torch.compile(network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
    stems = [module for module in network.modules() if isinstance(module, GreyConvolution)]

    def run(images: torch.Tensor) -> torch.Tensor:
        for stem in stems:  # beforehand: working borders out cannot be compiled, and would cut the graph in two
            stem.borders(tuple(images.shape[2:]), images.device, images.dtype)
        features: torch.Tensor = compiled(images)
        return features

    return run


def _why_not_compiled(device: torch.device) -> str | None:
    """Compile next to nothing, and return in one line what went wrong, if anything."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler uses what torch itself has deprecated
            torch.compile(double, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # torch, its C++ and Triton each have errors of their own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


class Numbers(TorchDispatchMode):
    """Watches a network at work: `most` is how many numbers its input has, or the largest result of its convolutions.

    No other tensor has more that grow with the number of pictures.
    """

    def __init__(self, given: int) -> None:
        super().__init__()
        self.most = given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and ("conv" in str(func) or "mm" in str(func)):  # a stem is a product
            self.most = max(self.most, found.numel())
        return found


def choose_batch_size(encoder: Encoder, picture: Picture, held: int = 0) -> int:
    """Choose how many scans to encode at a time, see `scans_at_a_time`."""
    uncompiled = replace(encoder, compiled=None)  # nothing need be compiled for one scan
    return scans_at_a_time(lambda scan: uncompiled(scan, cut=bool(picture.planes)), encoder.device, picture, held)


def scans_at_a_time(
    run: Callable[[Images], torch.Tensor], device: torch.device, picture: Picture, held: int = 0
) -> int:
    """Choose how many scans a network is to see at a time: on a GPU by how much memory one takes, which is tried.

    Parameters
    ----------
    run
        Computes what it gives for one scan, uint8, and keeps nothing for a gradient.
    picture
        What a loader gives of a scan.
    held
        Bytes of a GPU that a loader needs for each scan beside that.
    """
    if device.type != "cuda":
        return CPU_SCANS if picture.planes else CPU_VOLUMES
    scan = torch.zeros((1, *picture.shape), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with Numbers(scan.numel()) as numbers:
        run(as_images(picture.split(scan)))
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what torch keeps for later is free, too
    free, _ = torch.cuda.mem_get_info(device)
    return min(batch_size_for(free, taken + _WAITING * scan.nbytes + held), max(1, MOST_NUMBERS // numbers.most))


def batch_size_for(free: int, bytes_per_scan: int) -> int:
    """Return how many scans go into some free memory: 1 to 256."""
    return max(1, min(MOST_SCANS, int(_MEMORY_SHARE * free) // max(1, bytes_per_scan)))
