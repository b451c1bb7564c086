"""How many scans a device takes at a time when their gradient is wanted."""

from __future__ import annotations

import torch

from extract.fast import CPU_SCANS, CPU_VOLUMES, MOST_NUMBERS, Numbers
from finetune.losses import scan_losses
from finetune.network import ScanNetwork
from loaders.views import Picture, View, as_images

MOST_SCANS = 64
_SHARE = 0.8  # of what is free; allocators lose some between blocks


def most_scans(network: ScanNetwork, picture: Picture, held: int, dtype: torch.dtype) -> int:
    """Return how many scans to train on at a time: on a GPU by how much memory one takes, which is tried.

    Parameters
    ----------
    network
        On its device, in training mode; nothing of it is changed.
    picture
        What a loader gives of each scan.
    held
        Bytes of a GPU that a loader needs for each scan beside that.
    dtype
        Of what is computed.
    """
    device = next(network.parameters()).device
    if device.type != "cuda":
        return CPU_VOLUMES if network.seen.view is View.volume else CPU_SCANS
    kept = {name: value.clone() for name, value in network.named_buffers()}  # statistics of batch norms
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    memory = torch.rand((2, *picture.shape), device=device)  # two: batch norms want more than one
    images = as_images(picture.split(memory))
    with Numbers(memory.numel()) as numbers, torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        outputs = network(images, cut=network.seen.cut)
    losses = [
        scan_losses(outputs[:, place], head, torch.zeros(2, device=device))
        for head, place in zip(network.heads_info, network.head_slices, strict=True)
    ]
    torch.stack(losses).sum().backward()
    network.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    taken = (torch.cuda.max_memory_allocated(device) - before) / 2 + held
    for name, value in network.named_buffers():
        value.copy_(kept[name])
    del memory, images, outputs, losses, kept
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    optimiser = 2 * sum(p.numel() * p.element_size() for p in network.parameters())
    most = min(MOST_SCANS, 2 * MOST_NUMBERS // numbers.most)
    return max(1, min(most, int(_SHARE * (free - optimiser) / max(1.0, taken))))
