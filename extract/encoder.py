"""A frozen torchvision network without its classifier: stored grey levels in, features out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.video import r3d_18

from extract.fast import choose_precision, compile_network, exact_float32
from extract.fold import fold_batch_norms, pool_before_relu
from extract.grey import collapse_to_grey
from extract.weights import Weights, WeightsUnavailableError, load_weights
from loaders.views import View, slices_of

MODELS = {"resnet18": resnet18, "r3d_18": r3d_18}

#: The 3D models take whole volumes, the 2D ones slices.
MODELS_3D = frozenset({"r3d_18"})


@dataclass(frozen=True)
class Encoder:
    """A frozen network and how its input is prepared.

    Attributes
    ----------
    network
        In evaluation mode, without its last linear layer.
    view, slices
        What a 2D network sees of a volume; `View.volume` for a 3D one.
    scale
        Factor by which the input is resized (by area averaging).
    dtype
        Of the network and what it computes.
    plain
        The network is torchvision's own, and takes three normalised channels; others take one, of stored grey levels.
    compiled
        Does what `network` does, if that was compiled.
    """

    network: nn.Module
    model: str
    weights: Weights
    view: View
    slices: int
    scale: float
    device: torch.device
    dtype: torch.dtype = torch.float32
    plain: bool = False
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def precision(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, *, cut: bool = False) -> torch.Tensor:
        """Return the features of some scans.

        Parameters
        ----------
        images
            uint8 (scan, z, y, x), RAS.
        cut
            They are slices already, (scan, slice, height, width), as `loaders.open_loader` cuts them.

        Returns
        -------
        torch.Tensor
            float32 (scan, feature) on the encoder's device, where it may still be worked on; in 2D the mean over all
            slices.
        """
        images = images.to(self.device, non_blocking=True)
        rounds = self.device.type == "cuda" and self.dtype is torch.float32
        with exact_float32() if rounds else contextlib.nullcontext():
            if self.view is View.volume:
                return self._features(images[:, None])
            groups = [images] if cut else slices_of(images, self.view, self.slices)
            features = [self._features(group.flatten(0, 1)[:, None]).unflatten(0, group.shape[:2]) for group in groups]
            return torch.cat(features, dim=1).mean(dim=1)

    def _features(self, grey: torch.Tensor) -> torch.Tensor:
        """uint8 (item, 1, [z,] y, x) -> float32 (item, feature)."""
        spatial = grey.ndim - 2
        if self.scale != 1:
            size = [max(1, round(n * self.scale)) for n in grey.shape[2:]]
            grey = nn.functional.interpolate(grey.float(), size=size, mode="area")
        x = grey.to(self.dtype)
        if self.plain:
            mean, std = (
                torch.tensor(values, device=x.device).view(1, 3, *[1] * spatial)
                for values in (self.weights.mean, self.weights.std)
            )
            x = (x / 255 - mean) / std  # one grey channel becomes three
        x = x.to(memory_format=torch.channels_last_3d if spatial == 3 else torch.channels_last)
        features: torch.Tensor = (self.compiled or self.network)(x)
        # A copy in any case: what a CUDA graph gives is overwritten by the next run.
        return features.to(torch.float32, copy=self.compiled is not None)


def build_encoder(
    model: str = "resnet18",
    *,
    weights: str | None = None,
    view: View | None = None,
    slices: int = 3,
    scale: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    plain: bool = False,
) -> Encoder:
    """Build a frozen encoder.

    Parameters
    ----------
    model
        ``resnet18`` (2D) or ``r3d_18`` (3D).
    weights
        See `extract.weights.load_weights`; by default the pretrained ones of the model.
    view
        Slices that a 2D model sees, by default `View.triplanar`; a 3D model takes `View.volume`.
    slices
        Per view, evenly spaced.
    scale
        Resizes the input, for instance 0.5 for half resolution.
    seed
        Of random weights.
    device
        ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
    precision
        ``float32``, ``bfloat16``, ``float16``, or ``auto``: float32 on a CPU; on a GPU bfloat16, or float16 where that
        is unknown.
    compiled
        Use `torch.compile`, which takes a while for each shape of input. Where it does not work, a `CompileWarning`
        says so, and the network is used as it is.
    plain
        Leave the network as torchvision makes it, in float32. Otherwise batch norms are folded into convolutions, and
        the first convolution is collapsed to one grey channel; features are the same but for rounding.

    Raises
    ------
    ValueError
        For an unknown model, a view that does not go with it, or settings that exclude each other.
    WeightsUnavailableError
        If the weights cannot be had or do not fit the model.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown, expected one of {', '.join(MODELS)}")
    if view is None:
        view = View.volume if model in MODELS_3D else View.triplanar
    if (view is View.volume) != (model in MODELS_3D):
        expected = "volume" if model in MODELS_3D else "axial, coronal, sagittal or triplanar"
        raise ValueError(f"view {view!s} does not go with {model}, expected {expected}")
    if slices < 1:
        raise ValueError(f"slices is {slices}, expected 1 or more")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}, expected more than 0 and at most 1")
    if plain and (compiled or precision not in ("auto", "float32")):
        raise ValueError("a plain network is neither compiled nor of another precision than float32")
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, but no GPU is at hand; use device 'cpu'")
    dtype = torch.float32 if plain else choose_precision(precision, chosen)
    loaded = load_weights(model, weights or ("kinetics" if model in MODELS_3D else "imagenet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = MODELS[model](weights=None)
    network.fc = nn.Identity()
    if loaded.state_dict is None:
        loaded = replace(loaded, name=f"random (seed {seed})", sha256=_sha256_of_parameters(network))
    else:
        _fill(network, loaded, model)
    network.eval().requires_grad_(False)
    if not plain:
        fold_batch_norms(network)
        pool_before_relu(network)
        collapse_to_grey(network, loaded.mean, loaded.std)
    network.to(chosen, dtype)
    network.to(memory_format=torch.channels_last_3d if model in MODELS_3D else torch.channels_last)
    return Encoder(
        network, model, loaded, view, slices, scale, chosen, dtype, plain,
        compile_network(network, chosen) if compiled else None,
    )  # fmt: skip


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return what goes into the attributes of embeddings: everything about the encoder that decides about them."""
    return {
        "model": encoder.model,
        "weights": {"name": encoder.weights.name, "sha256": encoder.weights.sha256},
        "layer": "avgpool",
        "view": str(encoder.view),
        "slices": encoder.slices,
        "pooling": "mean over slices",
        "scale": encoder.scale,
        "input": {
            "rule": "stored / 255, minus mean, over std",
            "mean": encoder.weights.mean,
            "std": encoder.weights.std,
        },
        "precision": encoder.precision,
        "compiled": encoder.compiled is not None,
    }


def _fill(network: nn.Module, weights: Weights, model: str) -> None:
    """Load a state dict; its classifier is left out, all else must fit."""
    assert weights.state_dict is not None
    state = {key: value for key, value in weights.state_dict.items() if not key.startswith("fc.")}
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise WeightsUnavailableError(f"{weights.name} does not fit {model}: {detail[:400]}") from None


def _sha256_of_parameters(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
