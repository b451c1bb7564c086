"""Occlusion: how the answer of a network changes if a part of a scan is hidden from it (Zeiler & Fergus 2014)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from extract.inputs import pictures_of
from finetune.network import ScanNetwork
from finetune.saliency import SaliencyMap, evidence
from loaders.views import View

_CUBES_ALONG = 6  # the longest axis: 32 voxels of 192
_BATCH = 16  # slices at a time

Cube = tuple[slice, slice, slice]


def occlusion_map(
    network: ScanNetwork,
    volume: np.ndarray,
    number: int,
    code: int | None = None,
    *,
    cube: int | None = None,
    batch: int = _BATCH,
) -> SaliencyMap:
    """Map by how much the answer falls if a cube of a scan is set to 0.

    Zeiler & Fergus 2014 (ECCV, LNCS 8689:818), in cubes of the stored volume whatever the slices are, so that the
    map is one of the brain. Cubes without a voxel above 0 are left out. A cube changes a few slices of a scan only:
    these are encoded anew, and the others taken from the scan as it is, which is several times faster than whole
    forward passes and gives the same.

    Parameters
    ----------
    network
        2D, in evaluation mode.
    volume
        (z, y, x) as stored.
    number
        Of the head.
    code
        The class, see `finetune.saliency.evidence`.
    cube
        Edge in voxels; by default a sixth of the longest axis.
    batch
        Slices that are encoded at a time.

    Returns
    -------
    SaliencyMap
        By how much what `finetune.saliency.evidence` gives falls; 0 in cubes that are left out or on no slice.

    Raises
    ------
    ValueError
        For a network that sees volumes.
    """
    seen = network.seen
    if seen.view is View.volume:
        raise ValueError("the network sees volumes, expected slices; use finetune.saliency.grad_cam")
    head, columns = network.heads_info[number], network.head_slices[number]
    edge = cube or max(1, round(max(volume.shape) / _CUBES_ALONG))
    hidden = np.array(volume)
    with torch.inference_mode():
        whole = _cut(network, hidden)
        features = [_encode(network, plane, batch) for plane in whole]
        base = torch.cat(features)
        cubes: list[Cube] = []
        changed: list[list[tuple[int, int, torch.Tensor]]] = [[] for _ in whole]  # by plane: cube, slice, picture
        for place in _cubes(volume, edge):
            hidden[place] = 0
            seen_at_all = False
            for plane, (pictures, before) in enumerate(zip(_cut(network, hidden), whole, strict=True)):
                for k in torch.nonzero((pictures != before).flatten(1).any(dim=1)).flatten().tolist():
                    changed[plane].append((len(cubes), k, pictures[k].clone()))
                    seen_at_all = True
            hidden[place] = volume[place]
            if seen_at_all:
                cubes.append(place)
        slices = base.repeat(len(cubes) + 1, 1, 1)  # (cube, slice, feature), and last the scan as it is
        start = 0
        for pictures, found in zip(whole, changed, strict=True):
            if found:
                encoded = _encode(network, torch.stack([picture for _, _, picture in found]), batch)
                slices[[where for where, _, _ in found], [start + k for _, k, _ in found]] = encoded
            start += len(pictures)
        outputs = network.outputs(network.pool_slices(slices))
        answers = evidence(head, outputs[:, columns], code).double().cpu().numpy()
    values = np.zeros(volume.shape, np.float32)
    for place, answer in zip(cubes, answers[:-1], strict=True):
        values[place] = answers[-1] - answer
    encoded_slices = len(base) + sum(map(len, changed))
    effort = (
        f"{len(cubes):,} cubes of {edge} voxels that hold something the network sees; {encoded_slices:,} slices "
        f"computed, as many as {encoded_slices / len(base):.0f} forward passes"
    )
    return SaliencyMap(values, "occlusion", effort)


def _cubes(volume: np.ndarray, edge: int) -> Iterator[Cube]:
    """Yield the cubes that hold a voxel above 0; at the far ends of the axes they may be cut off."""
    starts = [range(0, length, edge) for length in volume.shape]
    for z, y, x in itertools.product(*starts):
        place = slice(z, z + edge), slice(y, y + edge), slice(x, x + edge)
        if volume[place].any():
            yield place


def _cut(network: ScanNetwork, volume: np.ndarray) -> list[torch.Tensor]:
    """Return the slices of a volume, per plane (slice, height, width)."""
    seen = network.seen
    images = torch.from_numpy(volume)[None]
    return [group[0] for group in pictures_of(images, seen.view, seen.slices, seen.crop, cut=False)]


def _encode(network: ScanNetwork, pictures: torch.Tensor, batch: int) -> torch.Tensor:
    """(slice, height, width) -> (slice, feature)."""
    device = next(network.parameters()).device
    parts = pictures.split(batch)
    return torch.cat([network.encode(part[:, None].to(device)).float() for part in parts])
