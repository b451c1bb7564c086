"""What a GPU computes in one go is what it replaces: residual blocks, and the first convolution as a matrix product."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_close, grey_levels, trained
from torch import nn
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18

from extract import build_encoder, grey
from extract.fold import fold_batch_norms
from extract.fuse import FusedBlock, can_fuse, fuse_blocks
from extract.grey import convolve_by_products

BLOCKS = {resnet18: 8, resnet50: 16, r3d_18: 8, mc3_18: 8, r2plus1d_18: 8}


@pytest.mark.parametrize("make", BLOCKS)
@torch.inference_mode()
def test_fused_blocks_change_nothing(make):
    plain = trained(make)
    fused = copy.deepcopy(plain)
    fold_batch_norms(fused)
    fuse_blocks(fused)
    found = {name for name, module in fused.named_modules() if isinstance(module, FusedBlock)}
    assert len(found) == BLOCKS[make]
    assert "layer3.0" in found, "layers keep their names"
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.ReLU | nn.Identity)]
    assert not [name for name in left if name.startswith("layer")]
    pictures = torch.randn(2, 3, *((40, 33) if make in (resnet18, resnet50) else (8, 24, 17)))
    assert_close(fused(pictures), plain(pictures))


@torch.inference_mode()
def test_blocks_of_grouped_convolutions_stay_as_they_are():
    network = trained(resnext50_32x4d)
    fold_batch_norms(network)
    before = str(network)
    fuse_blocks(network)
    assert str(network) == before


@pytest.mark.parametrize(("capability", "dtype", "fuses"), [
    ((9, 0), torch.bfloat16, True), ((8, 0), torch.float16, True), ((7, 5), torch.float16, False),
    ((9, 0), torch.float32, False),
])  # fmt: skip
def test_gpus_that_have_such_kernels(monkeypatch, capability, dtype, fuses):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert can_fuse(torch.device("cuda", 0), dtype) == fuses
    assert not can_fuse(torch.device("cpu"), dtype)


def test_a_cpu_has_nothing_fused():
    encoder = build_encoder(weights="random", device="cpu")
    assert not [module for module in encoder.network.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(1, 8, 7, 2, 3), (61, 48)),
        (nn.Conv2d(1, 8, 7, 2, 3, bias=False), (5, 4)),
        (nn.Conv2d(1, 8, (3, 5), (1, 3), (2, 0), dilation=(2, 1)), (20, 19)),
        (nn.Conv2d(1, 8, 3, dilation=(1, 2)), (9, 9)),
        (nn.Conv2d(1, 8, 16, 16), (32, 48)),
        (nn.Conv3d(1, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3)), (5, 18, 17)),
        (nn.Conv3d(1, 8, 3, 2, 1), (1, 2, 9)),
        (nn.Conv3d(1, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3)), (4, 17, 16)),
    ],
)
@pytest.mark.parametrize("at_once", [None, 1])
@torch.inference_mode()
def test_products_of_matrices_give_what_a_convolution_gives(convolution, size, at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(grey, "_MOST_VALUES", at_once)
    pictures = grey_levels(size).float()
    expected = convolution(pictures)
    found = convolve_by_products(pictures, convolution)
    assert_close(found, expected)
    layout = torch.channels_last if found.ndim == 4 else torch.channels_last_3d
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("at_once", [1 << 28, 1])
@torch.inference_mode()
def test_a_compiler_takes_the_whole_stem(at_once, monkeypatch):
    """A graph that is broken in two is no CUDA graph."""
    monkeypatch.setattr(grey, "_MOST_VALUES", at_once)
    convolution = nn.Conv2d(1, 8, 7, 2, 3)

    def product(pictures: torch.Tensor) -> torch.Tensor:
        return convolve_by_products(pictures, convolution)

    pictures = grey_levels((21, 18)).float()
    compiled = torch.compile(product, fullgraph=True, backend="eager", dynamic=False)
    assert_close(compiled(pictures), convolution(pictures))


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["resnet50", "resnext50_32x4d", "mc3_18", "r2plus1d_18"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_gpu_gives_nearly_what_plain_torchvision_gives(model, precision):
    images = torch.randint(0, 256, (3, 24, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = build_encoder(model, weights="random", device="cpu", plain=True)(images)
    encoder = build_encoder(model, weights="random", device="cuda", precision=precision)
    fused = [module for module in encoder.network.modules() if isinstance(module, FusedBlock)]
    assert bool(fused) == (model != "resnext50_32x4d")
    found = encoder(images.cuda()).cpu()
    assert nn.functional.cosine_similarity(found, expected).min() > 0.999
    assert_close(found, expected, 0.05)
