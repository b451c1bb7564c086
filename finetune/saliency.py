"""Where in a scan the answer of a network comes from: maps over the stored voxels. Here Grad-CAM, of 3D networks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from extract.inputs import crop_volumes, target_size
from finetune.heads import Head
from finetune.network import ScanNetwork
from loaders.views import View


@dataclass(frozen=True)
class SaliencyMap:
    """What each voxel of a scan adds to an answer.

    Attributes
    ----------
    values
        float32 (z, y, x), as the stored volume: above 0 where a voxel speaks for the class that is explained, or for a
        higher value; below 0 where it speaks against it.
    method
        ``Grad-CAM``, whose values are shares of the strongest place; or ``occlusion``, whose values are by how much the
        answer falls if a cube is hidden.
    effort
        What was computed, in words.
    """

    values: np.ndarray
    method: str
    effort: str


def strongest_place(values: np.ndarray, volume: np.ndarray) -> tuple[int, int, int]:
    """Return where in the brain (voxels above 0) a map is largest in size; of a cube the middle of what it holds.

    Well within the brain, for planes at its tips show nothing: in planes along each axis that hold a third as much of
    it as the fullest one, or more.

    Parameters
    ----------
    values, volume
        (z, y, x) of the map and of the scan.

    Returns
    -------
    tuple of int
        (z, y, x) of a voxel; the middle if the map is 0 throughout the brain.
    """
    brain = volume > 0
    size = np.abs(values) * brain
    for axis in range(3):
        held = brain.sum(axis=tuple(other for other in range(3) if other != axis))
        np.moveaxis(size, axis, 0)[held * 3 < held.max()] = 0
    if not size.max() > 0:
        z, y, x = (length // 2 for length in size.shape)
        return z, y, x
    z, y, x = np.median(np.argwhere(size == size.max()), axis=0).astype(int).tolist()
    return z, y, x


def evidence(head: Head, outputs: torch.Tensor, code: int | None = None) -> torch.Tensor:
    """Return the number that a map explains: log odds of a class, or a value in the target's units.

    Probabilities would not do: where a network is sure they hardly change, whatever is hidden from it.

    Parameters
    ----------
    outputs
        float32 (scan, output) of the head.
    code
        The class; None for values.

    Returns
    -------
    torch.Tensor
        float32 (scan,), through which gradients go.
    """
    if head.task == "binary":
        return outputs[:, 0] if code == 1 else -outputs[:, 0]
    if head.task == "multiclass":
        others = [other for other in range(head.outputs) if other != code]
        return outputs[:, code] - torch.logsumexp(outputs[:, others], dim=1)
    if head.task == "ordinal":
        steps = torch.tensor(np.diff(head.levels), dtype=outputs.dtype, device=outputs.device)
        return head.levels[0] + torch.sigmoid(outputs) @ steps
    values = outputs[:, 0] * head.std + head.mean
    return torch.expm1(values.clamp(-1, 80)).clamp(min=0) if head.task == "count" else values


def chosen_class(head: Head, predicted: np.ndarray) -> int | None:
    """Return the class that a scan is given, all taken as equally likely (as for balanced accuracy); None of values.

    Parameters
    ----------
    predicted
        Of `Head.predict`, (class,) or ().
    """
    return int(np.argmax(predicted / np.array(head.frequencies))) if head.labels else None


def grad_cam(network: ScanNetwork, volume: np.ndarray, number: int, code: int | None = None) -> SaliencyMap:
    """Map what the last stage of a 3D network found, weighted by what it does to the answer.

    Selvaraju et al. 2017 (ICCV, 618): each channel of the last stage is weighted by the mean over positions of the
    gradient of the answer with respect to it, and their sum is the map. Of a class only what speaks for it is kept (the
    ReLU of the paper); of a value both directions. One forward pass, and a backward pass through the head alone.

    The map is drawn where the receptive fields of its positions are centred: with torchvision's padding that of
    position i lies around voxel i x stride of the input. Stretched from edge to edge instead, as is common, it would be
    off by up to half a stride, 7.5 voxels.

    Parameters
    ----------
    network
        3D, in evaluation mode.
    volume
        (z, y, x) as stored.
    number
        Of the head.
    code
        The class, see `evidence`.

    Returns
    -------
    SaliencyMap
        Shares of the strongest place; 0 outside the network's crop.

    Raises
    ------
    ValueError
        For a network that sees slices.
    """
    if network.seen.view is not View.volume:
        raise ValueError(f"the network sees {network.seen.view} slices, expected a 3D one; use finetune.occlusion")
    device = next(network.parameters()).device
    found: list[torch.Tensor] = []
    watch = network.encoder.layer4.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        with torch.no_grad():
            network(torch.from_numpy(volume)[None].to(device))
    finally:
        watch.remove()
    stage = found[0].detach().float().requires_grad_()
    with torch.enable_grad():
        outputs = network.outputs(network.encoder.avgpool(stage).flatten(1))
        answer = evidence(network.heads_info[number], outputs[:, network.head_slices[number]], code)
        gradient = torch.autograd.grad(answer.sum(), stage)[0]
    coarse = (gradient.mean(dim=(2, 3, 4), keepdim=True) * stage.detach()).sum(dim=1)[0]
    if code is not None:
        coarse = coarse.clamp(min=0)
    values = _to_voxels(coarse.double().cpu().numpy(), network, (volume.shape[0], volume.shape[1], volume.shape[2]))
    largest = float(np.abs(values).max())
    places = " x ".join(map(str, coarse.shape))
    return SaliencyMap(
        (values / largest if largest > 0 else values).astype(np.float32), "Grad-CAM",
        f"a forward pass, and a backward one to the {places} positions (z, y, x) of the last stage",
    )  # fmt: skip


def _to_voxels(coarse: np.ndarray, network: ScanNetwork, shape: tuple[int, int, int]) -> np.ndarray:
    """Interpolate a map over positions of a stage, float64 (z, y, x), to the stored voxels that the network sees."""
    seen = network.seen
    inside = crop_volumes(torch.empty(shape, device="meta"), seen.crop).shape
    size = target_size(inside, seen.scale, seen.size)
    values = coarse
    for axis, (length, input_length, positions) in enumerate(zip(inside, size, coarse.shape, strict=True)):
        weights = _interpolation(length, input_length, positions)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    whole = np.zeros(shape)
    crop_volumes(torch.from_numpy(whole), seen.crop).copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return whole


def _interpolation(length: int, input_length: int, positions: int) -> np.ndarray:
    """Return what each position of a stage counts at each voxel along an axis, float64 (voxel, position).

    Parameters
    ----------
    length, input_length
        Voxels that the network sees, before and after they are resized.
    """
    # Strides are powers of two, and n positions are the input's length over the stride, rounded up
    stride = 2 ** np.ceil(np.log2(input_length / positions))
    at = ((np.arange(length) + 0.5) * input_length / length - 0.5) / stride
    at = np.clip(at, 0, positions - 1)
    below = np.minimum(at.astype(np.int64), max(positions - 2, 0))
    weights = np.zeros((length, positions))
    weights[np.arange(length), below] = 1 - (at - below)
    if positions > 1:
        weights[np.arange(length), below + 1] = at - below
    return weights
