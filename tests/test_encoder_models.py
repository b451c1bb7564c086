"""Every model of torchvision that is an encoder: features, layers and pooling are those of plain torchvision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import lru_cache, partial

import pytest
import torch
from networks import TOLERANCE, assert_close, normalised, norms, trained
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import mvit

from extract import build_encoder, encoder
from extract.encoder import describe
from extract.layers import PooledLayers, layer_names
from extract.models import MODELS, check_picture, default_weights, family_of, outline
from extract.weights import load_weights
from loaders import View, slices_of

#: One of each design that `test_fast_networks.py` has not, with settings that keep it quick.
DESIGNS = {
    "resnet50": {},
    "resnext50_32x4d": {},
    "wide_resnet50_2": {},
    "mc3_18": {},
    "r2plus1d_18": {},
    "s3d": {"size": (13, 209, 209)},
    "swin3d_t": {},
}
MVIT = "mvit_v2_s"


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16, 36, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


@lru_cache(maxsize=2)
def trained_network(model: str) -> nn.Module:
    return trained(partial(models.get_model, model, weights=None))


@pytest.fixture
def build(monkeypatch):
    """Return `build_encoder`, but for one slice of a network with batch norms that do something, and that network."""

    def with_trained(model: str, **settings):
        network = trained_network(model)

        def made(_: str) -> nn.Module:
            ours = copy.deepcopy(network)
            setattr(ours, family_of(model).classifier, nn.Identity())
            return ours

        monkeypatch.setattr(encoder, "make_network", made)
        if family_of(model).axes == 2:
            settings = {"view": View.axial, "slices": 1, **settings}
        return build_encoder(model, weights="random", device="cpu", **settings), copy.deepcopy(network)

    return with_trained


def pictures_of(volumes: torch.Tensor, model: str) -> torch.Tensor:
    """Return what a model sees, float32 (item, 1, [z,] y, x)."""
    return (slices_of(volumes, View.axial, 1)[0] if family_of(model).axes == 2 else volumes[:, None]).float()


def three_channels(grey: torch.Tensor, model: str) -> torch.Tensor:
    """Return what torchvision's network takes."""
    weights = load_weights(model, "random")
    return normalised(grey, weights.mean, weights.std)


@torch.inference_mode()
def classifier_input(network: nn.Module, model: str, x: torch.Tensor) -> torch.Tensor:
    """Return what the classifier of torchvision's own network sees, averaged over positions if there are several."""
    seen = []
    classifier = getattr(network, family_of(model).classifier)
    handle = classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(x)
    handle.remove()
    return seen[0].flatten(2).mean(2) if seen[0].ndim > 2 else seen[0]


@pytest.mark.parametrize("model", DESIGNS)
def test_features_are_what_the_classifier_of_torchvision_sees(build, volumes, model):
    settings = DESIGNS[model]
    volumes = volumes[:1]
    fast_one, network = build(model, **settings)
    plain, _ = build(model, plain=True, **settings)
    grey = pictures_of(volumes, model)
    if settings:  # fewer planes, larger ones
        grey = nn.functional.interpolate(grey, size=(13, *grey.shape[3:]), mode="area")
        grey = nn.functional.interpolate(grey, size=settings["size"], mode="trilinear")
    expected = classifier_input(network, model, three_channels(grey, model))
    assert_close(plain(volumes), expected)
    assert_close(fast_one(volumes), expected)
    assert bool(norms(plain.network)) == (model != "swin3d_t")
    assert not norms(fast_one.network)
    assert [layer.features for layer in plain.layers] == [expected.shape[1]]


def small_mvit(_: str, **__: object) -> nn.Module:
    """Return the first blocks of `MVIT`, of few channels: all of it takes seconds."""
    blocks = [
        mvit.MSBlockConfig(1, channels, channels, [3, 3, 3], [3, 3, 3], stride, [1, 8, 8])
        for channels, stride in ((16, [1, 4, 4]), (16, [1, 1, 1]), (16, [1, 2, 2]))
    ]
    settings = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    return mvit.MViT((224, 224), 16, blocks, proj_after_attn=True, **settings)


def test_an_mvit_gives_its_class_token_or_the_other_tokens(build, volumes, monkeypatch):
    monkeypatch.setattr(models, "get_model", small_mvit)
    network = trained_network(MVIT)
    fast_one, _ = build(MVIT, size=(16, 224, 224))
    grey = nn.functional.interpolate(pictures_of(volumes, MVIT), size=(16, 224, 224), mode="trilinear")
    x = three_channels(grey, MVIT)
    assert_close(fast_one(volumes), classifier_input(network, MVIT, x))
    assert [(layer.name, layer.features) for layer in fast_one.layers] == [("class_token", 16)]
    both, _ = build(MVIT, size=(16, 224, 224), layers=["blocks.1", "blocks.0"], pooling="both")
    assert len(both.network.network.blocks) == 2, "what comes later is left out"
    tokens = []
    for block in network.blocks[:2]:
        block.register_forward_hook(lambda *given: tokens.append(given[-1][0][:, 1:]))
    with torch.inference_mode():
        network(x)
    first, second = tokens
    expected = [second.mean(1), second.amax(1), first.mean(1), first.amax(1)]
    assert_close(both(volumes), torch.cat(expected, dim=1))


#: Layers of each design, the last of them not in the order of computation.
LAYERS = {
    "resnet18": ["maxpool", "layer1.0", "layer3", "layer2", "avgpool", "layer4"],
    "r3d_18": ["stem", "layer1", "layer4", "avgpool", "layer3.1"],
    "s3d": ["features.0", "features.1", "features", "features.5"],
    "swin3d_t": ["patch_embed", "features.1", "features.6", "norm", "avgpool", "features.0"],
}


@pytest.mark.parametrize(("model", "plain"), [*((model, False) for model in LAYERS), ("resnet18", True)])
def test_several_layers_in_one_pass(build, volumes, model, plain):
    names = LAYERS[model]
    both, network = build(model, layers=names, pooling="both", plain=plain)
    extractor = create_feature_extractor(network, {name: name for name in names})
    with torch.inference_mode():
        maps = extractor(three_channels(pictures_of(volumes, model), model))
    if model == "swin3d_t":
        maps = {name: found if name == "avgpool" else found.permute(0, 4, 1, 2, 3) for name, found in maps.items()}
    flat = {name: found.flatten(2) for name, found in maps.items()}
    found = both(volumes)
    assert [layer.name for layer in both.layers] == names
    start = 0
    for layer in both.layers:
        means, maxima = flat[layer.name].mean(2), flat[layer.name].amax(2)
        expected = means if layer.name == "avgpool" else torch.cat([means, maxima], dim=1)  # one position, taken once
        assert (layer.start, layer.features) == (start, expected.shape[1])
        assert_close(found[:, layer.start : layer.start + layer.features], expected)
        start += layer.features
    assert found.shape[1] == start


def test_poolings_are_parts_of_both(build, volumes):
    names = ["layer2", "avgpool"]
    mean, maximum, both = (build("resnet18", layers=names, pooling=p, slices=3)[0] for p in ("mean", "max", "both"))
    found = [encode(volumes) for encode in (mean, maximum, both)]
    assert torch.equal(found[2][:, :128], found[0][:, :128])
    assert torch.equal(found[2][:, 128:256], found[1][:, :128])
    assert torch.equal(found[2][:, 256:768], found[0][:, 128:])
    assert torch.equal(found[2][:, 768:], found[1][:, 128:])


@pytest.mark.parametrize("view", [View.coronal, View.triplanar])
def test_slices_are_pooled_as_positions_are(build, volumes, view):
    both, network = build("resnet18", layers=["layer2", "avgpool"], pooling="both", view=view, slices=2)
    extractor = create_feature_extractor(network, ["layer2", "avgpool"])
    means, maxima = ({"layer2": [], "avgpool": []} for _ in range(2))
    for group in slices_of(volumes, view, 2):
        for pictures in group.unbind(1):
            with torch.inference_mode():
                maps = extractor(three_channels(pictures[:, None], "resnet18"))
            for name, found in maps.items():
                means[name].append(found.mean((2, 3)))
                maxima[name].append(found.amax((2, 3)))
    expected = [
        part
        for name in ("layer2", "avgpool")
        for part in (torch.stack(means[name]).mean(0), torch.stack(maxima[name]).amax(0))
    ]
    assert_close(both(volumes), torch.cat(expected, dim=1))
    average, _ = build("resnet18", view=view, slices=2, pooling="max")
    assert_close(average(volumes), expected[3])


def test_one_layer_is_the_default_one_by_name(build, volumes):
    named, _ = build("resnet18", layers=["avgpool"])
    default, _ = build("resnet18")
    assert torch.equal(named(volumes), default(volumes))
    assert describe(named) == describe(default)


@pytest.mark.parametrize(("model", "layer"), [("resnet18", "layer2"), ("resnet18", "layer2.0"), ("s3d", "features.5")])
def test_nothing_is_computed_after_the_last_layer(build, volumes, model, layer):
    early, _ = build(model, layers=[layer, "maxpool" if model == "resnet18" else "features.0"])
    seen = []
    for name, module in early.network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    early(volumes)
    later = ("layer2.1", "layer3", "layer4") if layer == "layer2.0" else ("layer3", "layer4", "features.6")
    assert seen
    assert not [name for name in seen if any(part in name for part in later)]


def test_bfloat16_layers_are_pooled_in_float32(build, volumes):
    exact, _ = build("resnet18", layers=["maxpool", "layer2"], pooling="both")
    rough, _ = build("resnet18", layers=["maxpool", "layer2"], pooling="both", precision="bfloat16")
    found = rough(volumes)
    assert found.dtype is torch.float32
    assert_close(found, exact(volumes), 0.02)


@torch.inference_mode()
def test_layers_of_a_compiled_network():
    """By torch.compile, without the C++ compiler, which takes seconds and sees no hooks."""
    torch._dynamo.reset()
    parts = {"conv1": nn.Conv2d(3, 4, 3), "maxpool": nn.MaxPool2d(2)}
    parts |= {f"layer{n}": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for n in range(1, 5)}
    network = nn.Sequential(OrderedDict(parts, avgpool=nn.AdaptiveAvgPool2d(1))).eval()
    layers = PooledLayers(network, "resnet18", ["layer2.0", "layer1"], "both", vectors_once=False)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for x in (torch.randn(2, 3, 20, 18), torch.randn(2, 3, 20, 18)):
        expected = layers(x)
        assert expected.shape == (2, 16)
        assert_close(compiled(x), expected)


def test_every_resnet_and_video_network_is_known():
    known = set(models.list_models(module=models.video)) | {
        name for name in models.list_models(module=models) if "resnet" in name or "resnext" in name
    }
    assert set(MODELS) == known
    for model, family in MODELS.items():
        names = layer_names(outline(model), family)
        assert names[-1] == family.last
        assert len(set(names)) == len(names)
        assert default_weights(model).name.startswith("IMAGENET" if family.axes == 2 else "KINETICS")


def test_names_that_are_nearly_right():
    with pytest.raises(ValueError, match=r"model 'resnet19' is unknown, .*resnet18.*; did you mean resnet18\?"):
        build_encoder("resnet19", weights="random")
    with pytest.raises(ValueError, match=r"did you mean r3d_18\?"):
        build_encoder("R3D-18", weights="random")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": ["layer5"]}, r"layer 'layer5' is not in resnet18, expected one of maxpool, layer1 \(layer1.0 to"),
        ({"layers": ["layer3", "layer3"]}, "layers are layer3,layer3, expected each once"),
        ({"layers": []}, "expected the name of one or more"),
        ({"layers": [""]}, "layer '' is not in resnet18"),
        ({"layers": ["relu"]}, "layer 'relu' is not in resnet18"),
        ({"pooling": "median"}, "expected one of mean, max, both"),
        ({"pooling": "max", "view": View.axial, "slices": 1}, "nothing to pool; use .* --layers layer4"),
        ({"model": "r3d_18", "pooling": "both"}, "avgpool of r3d_18 has one position"),
        ({"model": MVIT, "layers": ["blocks"]}, r"expected one of blocks.0 to blocks.15, class_token"),
        ({"model": MVIT, "size": 112}, "takes 16 x 224 x 224 voxels and no others, .* use --size 16,224,224"),
    ],
)
def test_layers_and_poolings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build_encoder(**{"weights": "random", **settings})


@pytest.mark.parametrize(
    ("model", "fits", "does_not"),
    [
        ("s3d", (13, 209, 209), [(12, 209, 209), (13, 208, 209), (13, 209, 208)]),
        ("swin3d_t", (2, 4, 8), [(3, 4, 8), (2, 6, 8), (2, 4, 9)]),
        (MVIT, (16, 224, 224), [(16, 220, 224), (14, 224, 224), (80, 96, 80)]),
        ("resnet18", (1, 1), []),
    ],
)
def test_sizes_that_a_network_cannot_take_are_refused(model, fits, does_not):
    """torchvision agrees: it fails, or pads what is normalised already (swin3d)."""
    check_picture(model, fits, [family_of(model).last])
    network = outline(model)
    network(torch.empty((1, 3, *fits), device="meta"))
    for size in does_not:
        with pytest.raises(ValueError, match=rf"{model} (takes|needs) .*use --size"):
            check_picture(model, size, [family_of(model).last])
        if model != "swin3d_t":
            with pytest.raises(RuntimeError):
                network(torch.empty((1, 3, *size), device="meta"))


def test_s3d_takes_smaller_volumes_without_its_last_layer():
    check_picture("s3d", (5, 17, 17), ["features"])
    network = outline("s3d")
    network.avgpool = nn.Identity()
    assert network(torch.empty((1, 3, 5, 17, 17), device="meta")).shape == (1, 1024)
    with pytest.raises(ValueError, match="needs 5 x 17 x 17 voxels or more, not 4 x 17 x 17"):
        check_picture("s3d", (4, 17, 17), ["features"])
    encode = build_encoder("s3d", weights="random", device="cpu")
    with pytest.raises(ValueError, match="use --size 24,209,209, or --layers features"):
        encode(torch.zeros((1, 24, 40, 36), dtype=torch.uint8))
    with pytest.raises(ValueError, match="use --size 24,209,209, or --layers features"):
        encode.check((24, 40, 36))


def test_the_tolerance_would_find_a_network_without_its_tricks(build, volumes):
    """A grey convolution without the right borders, or a batch norm that is not folded, is far outside of it."""
    encode, network = build("resnet18")
    expected = classifier_input(network, "resnet18", three_channels(pictures_of(volumes, "resnet18"), "resnet18"))
    encode.network.conv1.borders = lambda *_: []
    assert (encode(volumes) - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()
