"""Where tensors are to be: a CPU or one of the GPUs."""

from __future__ import annotations

import re

import torch


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Turn ``auto``, or None, into a GPU where there is one, else the CPU; ValueError for what is not there."""
    name = "auto" if device is None else str(device)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda, or cuda:N with the number of a GPU")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= gpus:
        there = f"of {gpus} GPUs there is none with this number" if gpus else "no GPU is at hand"
        raise ValueError(f"device is {name}, but {there}; use device 'cpu'" + (" or 'cuda'" if gpus else ""))
    return torch.device(name)
