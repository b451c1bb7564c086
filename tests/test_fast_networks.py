"""Everything that makes the frozen networks fast leaves their features as they are. How fast they are, no test says."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import TOLERANCE, assert_close, grey_levels, normalised, norms, trained
from small_store import SHAPE, make_store
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18

from extract import build_encoder, extract, fast, open_embeddings, run
from extract.fast import choose_precision, compile_network, exact_float32
from extract.fold import fold_batch_norms, pool_before_relu
from extract.grey import GreyConvolution, collapse_to_grey
from extract.weights import load_weights
from loaders import View, open_loader

CPU = torch.device("cpu")
SIZES = {resnet18: [(61, 47), (32, 33), (3, 20), (1, 1)], r3d_18: [(9, 21, 18), (8, 16, 15), (1, 3, 2)]}
CASES = [(make, size) for make, sizes in SIZES.items() for size in sizes]


def normalisation(make) -> tuple[tuple[float, ...], tuple[float, ...]]:
    weights = load_weights("resnet18" if make is resnet18 else "r3d_18", "random")
    return weights.mean, weights.std


@pytest.mark.parametrize("make", [resnet18, resnet50, r3d_18, mc3_18, r2plus1d_18])
@torch.inference_mode()
def test_folded_batch_norms_change_nothing(make):
    plain = trained(make)
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    assert norms(plain)
    assert not norms(folded)
    pictures = torch.randn(2, 3, *((40, 33) if make in (resnet18, resnet50) else (8, 24, 17)))
    assert_close(folded(pictures), plain(pictures))


@pytest.mark.parametrize("make", [resnet18, resnet50, r3d_18])
@torch.inference_mode()
def test_pooling_first_changes_not_a_bit(make):
    plain = trained(make)
    swapped = copy.deepcopy(plain)
    pool_before_relu(swapped)
    assert (str(swapped) != str(plain)) == (make is not r3d_18)
    pictures = torch.randn(2, 3, *((8, 24, 17) if make is r3d_18 else (40, 33)))
    assert torch.equal(swapped(pictures), plain(pictures))


@pytest.mark.parametrize(("make", "size"), CASES)
@torch.inference_mode()
def test_one_grey_channel_gives_what_three_normalised_ones_give(make, size):
    plain = trained(make)
    mean, std = normalisation(make)
    grey = copy.deepcopy(plain)
    collapse_to_grey(grey, mean, std)
    pictures = grey_levels(size)
    assert_close(grey(pictures.float()), plain(normalised(pictures, mean, std)))
    assert len(norms(grey)) == len(norms(plain)), "nothing but the first convolution is another"


@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(3, 8, 7, 2, 3, bias=False), (61, 48)),
        (nn.Conv2d(3, 8, 7, 2, 3), (5, 4)),
        (nn.Conv2d(3, 8, (3, 5), (1, 3), (2, 0), dilation=(2, 1)), (20, 19)),
        (nn.Conv2d(3, 8, 3), (9, 9)),
        (nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), (5, 18, 17)),
        (nn.Conv3d(3, 8, 3, 2, 1), (1, 2, 9)),
    ],
)
@pytest.mark.parametrize("level", [None, 0, 255])
@torch.inference_mode()
def test_borders_are_as_exact_as_the_middle(convolution, size, level):
    mean, std = (0.1, 0.4, 0.9), (0.2, 0.3, 0.5)  # far from each other: no one level is zero in all channels
    pictures = grey_levels(size) if level is None else torch.full((2, 1, *size), level, dtype=torch.uint8)
    expected = convolution(normalised(pictures, mean, std))
    found = GreyConvolution(convolution, mean, std)(pictures.float())
    scale = expected.abs().max()
    for axis in range(2, expected.ndim):
        for edge in (0, 1, -2, -1):
            if -expected.shape[axis] <= edge < expected.shape[axis]:
                outermost = found.select(axis, edge) - expected.select(axis, edge)
                assert outermost.abs().max() <= TOLERANCE * scale, f"axis {axis}, place {edge}"
    assert_close(found, expected)


@torch.inference_mode()
def test_without_its_borders_a_grey_convolution_would_be_wrong():
    colour = trained(resnet18).conv1
    stem = GreyConvolution(colour, *normalisation(resnet18))
    pictures = grey_levels((61, 47))
    expected = colour(normalised(pictures, *normalisation(resnet18)))
    bare = stem.convolution(pictures.float())
    assert_close(bare[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])
    assert (bare - expected)[..., 0, :].abs().max() > 0.1 * expected.abs().max()


@torch.inference_mode()
def test_borders_are_worked_out_once_per_size_and_type(monkeypatch):
    stem = GreyConvolution(nn.Conv2d(3, 4, 3, padding=1), *normalisation(resnet18))
    count = 0

    def counted(size):
        nonlocal count
        count += 1
        return worked_out(size)

    worked_out = stem._differences
    monkeypatch.setattr(stem, "_differences", counted)
    for size in ((8, 9), (8, 9), (9, 8), (8, 9)):
        stem(torch.zeros(3, 1, *size))
    assert count == 2
    stem.bfloat16()
    (_, difference), *others = stem.borders((8, 9), CPU, torch.bfloat16)
    assert count == 3
    assert difference.dtype is torch.bfloat16
    assert len(others) == 3, "two rows, two columns"
    exact = stem.borders((8, 9), CPU, torch.float32)[0][1]
    torch.testing.assert_close(difference, exact.bfloat16())  # rounded once, not made of rounded weights


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(1, 4, 3), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
     nn.Conv2d(3, 4, 3, padding="same")],
)  # fmt: skip
def test_convolutions_that_cannot_be_collapsed_are_refused(convolution):
    with pytest.raises(ValueError, match="expected 3 channels, one group, zeros"):
        GreyConvolution(convolution, (0.5,) * 3, (0.2,) * 3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Return the files of networks with batch norms that do something, by model."""
    folder = tmp_path_factory.mktemp("weights")
    for make in SIZES:
        torch.save(trained(make).state_dict(), folder / f"{make.__name__}.pth")
    return {make.__name__: str(folder / f"{make.__name__}.pth") for make in SIZES}


@pytest.mark.parametrize(("model", "scale"), [("resnet18", 1.0), ("resnet18", 0.6), ("r3d_18", 1.0), ("r3d_18", 0.5)])
def test_encoders_take_bytes_and_give_what_plain_ones_give(checkpoints, model, scale):
    images = torch.randint(0, 256, (3, 20, 26, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    plain, fast_one = (
        build_encoder(model, weights=checkpoints[model], scale=scale, device="cpu", plain=plain)
        for plain in (True, False)
    )
    assert norms(plain.network)
    assert not norms(fast_one.network)
    assert not any(parameter.requires_grad for parameter in fast_one.network.parameters())
    assert_close(fast_one(images), plain(images))
    assert fast_one.weights.sha256 == plain.weights.sha256


@pytest.mark.parametrize("model", ["resnet18", "r3d_18"])
@torch.inference_mode()
def test_every_layer_is_channels_last(model):
    encoder = build_encoder(model, weights="random", device="cpu")
    layout = torch.channels_last_3d if encoder.view is View.volume else torch.channels_last
    outputs = []
    for module in encoder.network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda *given: outputs.append(given[-1].is_contiguous(memory_format=layout)))
    encoder(torch.zeros(2, 20, 26, 23, dtype=torch.uint8))
    assert len(outputs) >= 20
    assert all(outputs)


@pytest.mark.parametrize("model", ["resnet18", "r3d_18"])
def test_bfloat16_gives_nearly_the_same_direction(checkpoints, model):
    images = torch.randint(0, 256, (3, 24, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = build_encoder(model, weights=checkpoints[model], device="cpu", plain=True)(images)
    encoder = build_encoder(model, weights=checkpoints[model], device="cpu", precision="bfloat16")
    found = encoder(images)
    assert encoder.precision == "bfloat16"
    assert found.dtype is torch.float32
    assert nn.functional.cosine_similarity(found, expected).min() > 0.999
    assert_close(found, expected, 0.05)


def test_precision_follows_the_device(monkeypatch):
    assert choose_precision("auto", CPU) is torch.float32
    assert choose_precision("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(ValueError, match="auto, float32, bfloat16, float16"):
        choose_precision("double", CPU)
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        choose_precision("float16", CPU)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    gpu = torch.device("cuda", 0)
    for known, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda known=known, **_: known)
        assert choose_precision("auto", gpu) is expected
    assert choose_precision("float16", gpu) is torch.float16


def test_float32_is_float32():
    before = torch.backends.cudnn.allow_tf32
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("settings", [{"compiled": True}, {"precision": "bfloat16"}])
def test_plain_networks_have_no_tricks(settings):
    with pytest.raises(ValueError, match="plain network"):
        build_encoder(weights="random", plain=True, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no GPU is at hand"):
        build_encoder(weights="random", device="cuda")


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_a_compiled_network_gives_the_same(monkeypatch):
    # Half the time without vectors and headers that are compiled beforehand, for two small kernels.
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fold_batch_norms(network)
    collapse_to_grey(network, *normalisation(resnet18))
    compiled = compile_network(network, CPU)
    assert compiled is not None
    pictures = grey_levels((21, 18)).float()
    with torch.inference_mode():
        assert_close(compiled(pictures), network(pictures))
        torch._dynamo.reset()
        assert torch._dynamo.explain(network)(pictures).graph_break_count == 0, "borders cut it in two"


def test_without_a_compiler_the_network_is_used_as_it_is(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    network = nn.Conv2d(3, 4, 3)
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(fast.CompileWarning, match="without torch.compile, .*: no C\\+\\+ compiler$"):
        assert compile_network(network, CPU) is None


def test_the_command_line_says_that_there_is_no_compiler(tmp_path):
    make_store(tmp_path / "s.zarr", 3)
    arguments = ["s.zarr", "e.h5", "--weights", "random", "--slices", "1", "--compile", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", "from extract.cli import main; main()", *arguments],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "without torch.compile" in line]
    assert warning.startswith("warning:")
    assert "C++ compiler" in warning
    assert open_embeddings(tmp_path / "e.h5").attrs["compiled"] is False


def test_the_last_batch_of_a_compiled_encoder_is_filled_up(tmp_path):
    make_store(tmp_path / "s.zarr", 5, bad=[1])
    encoder = build_encoder(weights="random", slices=1, device="cpu")
    expected = extract(tmp_path / "s.zarr", encoder).features
    shapes = set()

    def compiled(images: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(images.shape))
        return encoder.network(images)

    noted = replace(encoder, compiled=compiled)
    found = extract(tmp_path / "s.zarr", noted, batch_size=3)
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert len(shapes) == 3, "one for each plane"
    assert found.attrs["compiled"]


def test_features_that_overflow_are_refused(tmp_path):
    make_store(tmp_path / "s.zarr", 3, bad=[0])
    encoder = build_encoder(weights="random", slices=1, device="cpu")
    next(encoder.network.parameters()).data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"2 scans, the first of them row 1, are no finite numbers: .* in float32"):
        extract(tmp_path / "s.zarr", encoder)


@pytest.mark.parametrize(("view", "crop"), [("coronal", None), ("triplanar", None), ("triplanar", (9, 10, 7))])
def test_slices_are_cut_by_the_loader(tmp_path, monkeypatch, view, crop):
    voxels = make_store(tmp_path / "s.zarr", 3)
    given, loaded = [], []
    encoder = build_encoder(weights="random", view=View(view), slices=2, crop=crop, device="cpu")
    monkeypatch.setattr(type(encoder), "_features", noting(type(encoder)._features, given))
    monkeypatch.setattr(
        run, "open_loader", lambda *given, **options: loaded.append(options) or open_loader(*given, **options)
    )
    found = extract(tmp_path / "s.zarr", encoder)
    assert loaded[0]["view"] == view
    z, y, x = crop or SHAPE
    assert given == ([(6, 1, z, x)] if view == "coronal" else [(6, 1, y, x), (6, 1, z, x), (6, 1, z, y)])
    np.testing.assert_allclose(found.features, encoder(torch.from_numpy(voxels)).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="slices is 99"):
        extract(tmp_path / "s.zarr", build_encoder(weights="random", view=View.coronal, slices=99, device="cpu"))


def noting(method, shapes: list):
    def noted(self, grey: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(grey.shape))
        return method(self, grey)

    return noted


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["resnet18", "r3d_18"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("auto", 0.05), ("float16", 0.02)])
def test_a_gpu_gives_what_a_cpu_gives(checkpoints, model, precision, tolerance):
    images = torch.randint(0, 256, (3, 24, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = build_encoder(model, weights=checkpoints[model], device="cpu", plain=True)(images)
    found = build_encoder(model, weights=checkpoints[model], device="cuda", precision=precision)(images.cuda()).cpu()
    assert nn.functional.cosine_similarity(found, expected).min() > 0.999
    assert_close(found, expected, tolerance)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the first one, by which torch begins
@pytest.mark.parametrize("layers", [None, ["layer2", "avgpool"]])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_a_cuda_graph_gives_the_same(tmp_path, layers, precision, tolerance):
    make_store(tmp_path / "s.zarr", 5)
    options = {"weights": "random", "slices": 1, "device": "cuda", "layers": layers}
    expected = extract(tmp_path / "s.zarr", build_encoder(**options, precision="float32"), batch_size=2)
    torch._dynamo.utils.counters.clear()
    found = extract(tmp_path / "s.zarr", build_encoder(**options, precision=precision, compiled=True), batch_size=2)
    assert_close(torch.from_numpy(found.features), torch.from_numpy(expected.features), tolerance)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_a_network_that_gives_something_else_is_not_measured():
    from benchmarks.extract import check_features

    expected = np.linspace(-1, 2, 512, dtype=np.float32).reshape(1, -1)
    check_features("resnet18, plain", expected + np.float32(1e-4), expected, 1e-4)
    with pytest.raises(ValueError, match=r"features of resnet18, plain, differ"):
        check_features("resnet18, plain", expected + np.float32(3e-4), expected, 1e-4)
