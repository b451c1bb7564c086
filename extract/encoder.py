"""A frozen torchvision network without its classifier: stored grey levels in, features out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from extract.fast import choose_precision, compile_network, exact_float32
from extract.fold import fold_batch_norms, pool_before_relu
from extract.fuse import can_fuse, fuse_blocks
from extract.grey import collapse_to_grey
from extract.inputs import as_crop, as_size, pictures_of, resize, slices_to_load, target_size
from extract.layers import Layer, PooledLayers, check_layers, plan_layers, pool_slices
from extract.models import check_picture, family_of, make_network
from extract.weights import Weights, find_checkpoint, load_weights, sha256_of_parameters
from loaders.checks import as_whole
from loaders.device import choose_device
from loaders.views import Images, View, as_images, each

#: Of what lies between stored voxels and features: to be raised with every change after which the same settings give
#: other features by more than rounding, for instance of cutting, resizing or normalising. Files of another one are not
#: gone on with.
ENCODING_VERSION = 1

_SEEDS = 1 << 63  # that torch takes


class InputWarning(UserWarning):
    """Features are made in another way than the network was trained in."""


@dataclass(frozen=True)
class Encoder:
    """A frozen network and how its input is prepared.

    Attributes
    ----------
    network
        In evaluation mode, without its last linear layer.
    view, slices
        What a 2D network sees of a volume; `View.volume` for a 3D one, which has no slices.
    scale
        Factor by which the input is resized.
    crop
        (z, y, x) of the central part that it sees of a stored volume, if not all.
    size
        (height, width) or (z, y, x) that pictures are resized to, instead of by ``scale``.
    layers
        Where the features come from, in their order.
    pooling
        ``mean``, ``max`` or ``both``, over the positions of a layer and over slices.
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
    crop: tuple[int, int, int] | None
    size: tuple[int, ...] | None
    layers: tuple[Layer, ...]
    pooling: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    plain: bool = False
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def precision(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def __call__(self, images: Images, *, cut: bool = False) -> torch.Tensor:
        """Return the features of some scans.

        Parameters
        ----------
        images
            uint8 (scan, z, y, x), RAS.
        cut
            They are slices already, (scan, slice, height, width), as `loaders.open_loader` cuts them: those that
            `slices_to_load` names. Of three planes they are a tuple.

        Returns
        -------
        torch.Tensor
            float32 (scan, feature) on the encoder's device, where it may still be worked on; in 2D pooled over all
            slices, see `extract.layers.pool_slices`.

        Raises
        ------
        ValueError
            See `check`.
        """
        images = as_images(tuple(one.to(self.device, non_blocking=True) for one in each(images)))
        rounds = self.device.type == "cuda" and self.dtype is torch.float32
        with exact_float32() if rounds else contextlib.nullcontext():
            pictures = self._pictures(images, cut)
            if self.view is View.volume:
                return self._features(pictures[0])
            features = [
                self._features(group.flatten(0, 1)[:, None]).unflatten(0, group.shape[:2]) for group in pictures
            ]
            return pool_slices(torch.cat(features, dim=1), self.layers, self.pooling)

    def slices_to_load(self, shape_zyx: tuple[int, int, int]) -> list[int] | list[list[int]]:
        """Return the indices of the slices that a loader is to cut of stored volumes, see `extract.inputs`.

        Raises
        ------
        ValueError
            If there are fewer slices, or the crop is larger than a volume.
        """
        return slices_to_load(shape_zyx, self.view, self.slices, self.crop)

    def check(self, shape_zyx: tuple[int, int, int]) -> None:
        """Check that the encoder takes stored volumes of a shape.

        Raises
        ------
        ValueError
            If the crop is larger, there are fewer slices, or the network does not take what it would see.
        """
        names = [layer.name for layer in self.layers]
        for size in self.picture_sizes(shape_zyx):
            check_picture(self.model, size, names)

    def picture_sizes(self, shape_zyx: tuple[int, int, int]) -> list[tuple[int, ...]]:
        """Return how large the pictures of each plane are that the network sees of volumes; errors as `check`."""
        pictures = self._pictures(torch.empty((1, *shape_zyx), dtype=torch.uint8, device="meta"), cut=False)
        return [target_size(picture.shape[2:], self.scale, self.size) for picture in pictures]

    def _pictures(self, images: Images, cut: bool) -> list[torch.Tensor]:
        return pictures_of(images, self.view, self.slices, self.crop, cut=cut)

    def _features(self, grey: torch.Tensor) -> torch.Tensor:
        """uint8 (item, 1, [z,] y, x) -> float32 (item, feature)."""
        spatial = grey.ndim - 2
        size = target_size(grey.shape[2:], self.scale, self.size)
        check_picture(self.model, size, [layer.name for layer in self.layers])
        grey = resize(grey, size)
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
    model: str | None = None,
    *,
    weights: str | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    pooling: str = "mean",
    view: View | None = None,
    slices: int | None = None,
    crop: Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
    scale: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    plain: bool = False,
) -> Encoder:
    """Build a frozen encoder.

    Of weights of a run of finetune, ``model``, ``view``, ``slices``, ``crop``, ``size`` and ``scale`` are by default
    those of the run: the encoder sees what the network was trained on. Where others are given an `InputWarning` says
    so; to see all where the run had a crop, give the volumes' shape as ``crop``.

    Parameters
    ----------
    model
        Any ResNet of torchvision (2D: ``resnet18``, ``wide_resnet50_2``, ...) or video network (3D: ``r3d_18``,
        ``s3d``, ``swin3d_t``, ...), see `extract.models.MODELS`; by default ``resnet18``.
    weights, weights_dir
        See `extract.weights.load_weights`; by default the pretrained ones of the model.
    layers
        Where features are taken, see `extract.layers.check_layers`; by default what the classifier would see.
    pooling
        ``mean``, ``max`` or ``both`` (per layer first the means, then the maxima) over all positions of a layer and, in
        2D, over all slices of all planes: the mean of the slices' means, the greatest of their maxima.
    view
        Slices that a 2D model sees, by default `View.triplanar`; a 3D model takes `View.volume`.
    slices
        Per plane, evenly spaced; by default 3. A 3D model has none.
    crop
        (z, y, x): only the central part of each volume is seen, and cut into slices.
    size
        What each slice or volume is resized to: one number for all axes, or (height, width) or (z, y, x).
    scale
        Resizes the input, for instance 0.5 for half resolution; by default 1. Excludes ``size``.
    seed
        Of random weights, from 0 to 2**63 - 1.
    device
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, or ``cuda:N``.
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
        For an unknown model, layer or device, a view that does not go with the model, or settings that exclude each
        other.
    WeightsUnavailableError
        If the weights cannot be had or do not fit the model.
    """
    own = find_checkpoint(weights)
    model = model or (own.model if own else None) or "resnet18"
    family = family_of(model)
    loaded = load_weights(model, own, weights_dir) if own else None  # others may take a download: they come last
    trained = own.trained if own else None
    if trained is not None:
        view = trained.view if view is None else view
        slices = trained.slices if slices is None else slices
        crop = trained.crop if crop is None else crop
        if size is None and scale is None:
            size, scale = trained.size, trained.scale
    slices, scale = as_whole("slices", 3 if slices is None else slices, 1), 1.0 if scale is None else scale
    solid = family.axes == 3
    if view is None:
        view = View.volume if solid else View.triplanar
    if (view is View.volume) != solid:
        expected = "volume" if solid else "axial, coronal, sagittal or triplanar"
        raise ValueError(f"view {view!s} does not go with {model}, expected {expected}")
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed is {seed}, expected 0 or more, and less than 2**63")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}, expected more than 0 and at most 1")
    if size is not None and scale != 1:
        raise ValueError(f"size is {size} and scale {scale}, expected one of them")
    crop, size = as_crop(crop), as_size(size, family.axes)
    if size is not None:
        check_picture(model, size, layers or [family.last])
    one_picture = solid or (slices == 1 and view is not View.triplanar)
    names = check_layers(model, layers, pooling, one_picture=one_picture)
    if plain and (compiled or precision not in ("auto", "float32")):
        raise ValueError("a plain network is neither compiled nor of another precision than float32")
    chosen = choose_device(device)
    dtype = torch.float32 if plain else choose_precision(precision, chosen)
    loaded = loaded or load_weights(model, weights, weights_dir)
    if trained is not None:
        for message in trained.warnings(loaded.name, view, slices, crop, size, scale):
            warnings.warn(message, InputWarning, stacklevel=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(model)
    if loaded.state_dict is None:
        loaded = replace(loaded, name=f"random (seed {seed})", sha256=sha256_of_parameters(network))
    else:
        network.load_state_dict({**network.state_dict(), **loaded.state_dict})
        loaded = replace(loaded, state_dict=None)  # the network has them now
    network.requires_grad_(False)
    if not plain:
        fold_batch_norms(network)
        pool_before_relu(network)
        collapse_to_grey(network, loaded.mean, loaded.std)
        if can_fuse(chosen, dtype) and not compiled:  # compilers fuse by themselves
            fuse_blocks(network)
    planned = plan_layers(model, names, pooling, vectors_once=one_picture)
    given = "mean", "max" if family.vector else "mean"  # what the last layer's own output is, position by position
    if names != (family.last,) or pooling not in given:
        network = PooledLayers(network, model, names, pooling, vectors_once=one_picture)
    network.to(chosen, dtype)
    network.to(memory_format=torch.channels_last_3d if solid else torch.channels_last)
    return Encoder(
        network, model, loaded, view, slices, scale, crop, size, planned, pooling, chosen, dtype, plain,
        compile_network(network, chosen) if compiled else None,
    )  # fmt: skip


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return what goes into the attributes of embeddings: everything about the encoder that decides about them."""
    return {
        "encoding_version": ENCODING_VERSION,
        "model": encoder.model,
        "weights": {
            "name": encoder.weights.name,
            "sha256": encoder.weights.sha256,
            "torchvision": encoder.weights.entry,
        },
        "layers": [asdict(layer) for layer in encoder.layers],
        "pooling": encoder.pooling,
        "view": str(encoder.view),
        "slices": None if encoder.view is View.volume else encoder.slices,
        "crop": encoder.crop,
        "size": encoder.size,
        "scale": encoder.scale,
        "input": {
            "rule": "stored / 255, minus mean, over std",
            "mean": encoder.weights.mean,
            "std": encoder.weights.std,
        },
        "precision": encoder.precision,
        "compiled": encoder.compiled is not None,
    }
