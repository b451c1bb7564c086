"""Maps of what a network uses: the same by the fast path as by the slow one, and in the right place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import trained
from torch import nn

from extract.probing.results import OutOfFold
from finetune.examples import choose
from finetune.heads import Head
from finetune.network import Input, ScanNetwork
from finetune.occlusion import occlusion_map
from finetune.report_plots import map_figure, map_png
from finetune.saliency import SaliencyMap, evidence, grad_cam, strongest_place
from loaders.views import View

GREY = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SEX = Head("sex", "binary", ("female", "male"), frequencies=(0.5, 0.5))
SMOKING = Head("smoking", "multiclass", ("never", "previous", "current"), outputs=3, frequencies=(0.6, 0.3, 0.1))
INCOME = Head("income", "ordinal", outputs=3, levels=(1.0, 2.0, 4.0, 5.0))
HOUSEHOLD = Head("household", "count", mean=1.0, std=0.5)
AGE = Head("age", "continuous", units="years", mean=60.0, std=8.0)
HEADS = (SEX, SMOKING, INCOME, HOUSEHOLD, AGE)


def brain(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a textured ellipsoid on black, uint8 (z, y, x)."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.8
    return (inside * np.random.default_rng(0).integers(30, 256, shape)).astype(np.uint8)


def two_d(
    view: str, *, pool: str = "mean", crop: tuple[int, int, int] | None = None, scale: float = 1.0
) -> ScanNetwork:
    seen = Input(View(view), 2, crop, None, scale, *GREY)
    network = trained(lambda: ScanNetwork("resnet18", seen, HEADS, pool=pool))
    with torch.no_grad():
        for head in network.heads:
            for parameter in head.parameters():
                nn.init.normal_(parameter, std=0.05)
    return network


@pytest.mark.parametrize(
    ("view", "options", "number", "code"),
    [
        ("axial", {}, 0, 1),
        ("sagittal", {"scale": 0.5}, 1, 2),
        ("triplanar", {"pool": "attention", "crop": (16, 14, 16)}, 4, None),
    ],
)
def test_occlusion_is_what_whole_forward_passes_give(view, options, number, code):
    network, volume, edge = two_d(view, **options), brain((24, 20, 18)), 7
    found = occlusion_map(network, volume, number, code, cube=edge, batch=3)
    place = network.head_slices[number]

    def answer(scan: np.ndarray) -> float:
        with torch.no_grad():
            return float(evidence(HEADS[number], network(torch.from_numpy(scan)[None])[:, place], code))

    expected, whole = np.zeros(volume.shape), answer(volume)
    for z, y, x in itertools.product(*[range(0, n, edge) for n in volume.shape]):
        cube = slice(z, z + edge), slice(y, y + edge), slice(x, x + edge)
        if volume[cube].any():
            hidden = volume.copy()
            hidden[cube] = 0
            expected[cube] = whole - answer(hidden)
    assert np.abs(expected).max() > 0.01
    assert np.abs(found.values - expected).max() < 1e-4 * np.abs(expected).max() + 1e-5
    assert len(np.unique(found.values)) > 5


def test_occlusion_of_nothing_is_zero():
    network = two_d("axial", crop=(8, 10, 10))
    found = occlusion_map(network, np.zeros((24, 20, 18), np.uint8), 0, 1)
    assert not found.values.any()
    assert found.effort.startswith("0 cubes of 4 voxels")
    rim = brain((24, 20, 18))
    rim[8:16] = 0  # the network sees nothing else
    assert not occlusion_map(network, rim, 0, 1).values.any()


class _Corner(nn.Module):
    """An encoder that sees a corner of each picture: its upper left quarter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        return x[:, :1, :height, :width].mean(dim=(2, 3)).expand(-1, 512)


def test_a_network_that_looks_at_a_corner_is_found_out():
    network = two_d("axial")
    network.encoder = _Corner()
    nn.init.constant_(network.heads[4].weight, 0.1)
    volume = np.full((24, 20, 18), 200, np.uint8)
    found = occlusion_map(network, volume, 4, cube=4)
    here = np.zeros(volume.shape, bool)
    here[:, 10:, :9] = True  # the upper left of axial slices is the patient's left, and the front
    assert found.values.max() > 0.01
    far = (np.indices(volume.shape)[1] < 8) | (np.indices(volume.shape)[2] >= 12)  # cubes with no part there
    assert np.abs(found.values[far]).max() < 1e-4 * found.values.max()
    z, y, x = strongest_place(found.values, volume)
    assert here[z, y, x]
    assert np.abs(found.values).max() == found.values.max()  # brighter is older: hiding it lowers the age


def test_evidence_is_what_predictions_are_made_of():
    rng = np.random.default_rng(0)
    for head in HEADS:
        outputs = rng.normal(size=(9, head.outputs)).astype(np.float32)
        predicted = head.predict(outputs)
        for code in range(len(head.labels)) if head.labels else [None]:
            found = evidence(head, torch.from_numpy(outputs), code).numpy()
            expected = predicted if code is None else np.log(predicted[:, code] / (1 - predicted[:, code]))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- Grad-CAM ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identity_network() -> ScanNetwork:
    """Return an r3d_18 whose last stage holds, in its first channel, the voxels at multiples of its strides."""
    network = ScanNetwork("r3d_18", Input(View.volume, 1, None, None, 1.0, *GREY), [SEX, AGE]).eval()
    with torch.no_grad():
        for name, module in network.encoder.named_modules():
            if isinstance(module, nn.Conv3d):
                module.weight.zero_()
                if name == "stem.0" or "downsample" in name:
                    middle = tuple(n // 2 for n in module.kernel_size)
                    module.weight[(0, 0, *middle)] = 1
        for head in network.heads:
            head.weight.zero_()
            head.weight[0, 0] = 1
    return network


@pytest.mark.parametrize("crop", [None, (32, 48, 48)])
def test_grad_cam_peaks_at_the_voxel_that_lit_the_last_stage(identity_network, crop):
    network = identity_network
    network.seen = replace(network.seen, crop=crop)
    volume = np.zeros((35, 48, 52) if crop else (32, 48, 48), np.uint8)
    offset = np.array([(n - 32, n - 48, n - 48)[axis] // 2 for axis, n in enumerate(volume.shape)]) if crop else 0
    at = tuple(np.array((16, 32, 16)) + offset)  # strides of the last stage: 8, 16, 16
    volume[at] = 255
    for number, code in ((0, 1), (1, None)):
        found = grad_cam(network, volume, number, code).values
        assert found.shape == volume.shape
        assert np.unravel_index(found.argmax(), found.shape) == at
        assert found[at] == 1
        z, y, x = at
        assert found[z + 4, y, x] == pytest.approx(0.5)  # half a stride away
        assert found[z, y - 8, x] == pytest.approx(0.5)
        assert not found[z, y, x + 17 :].any()
    assert not grad_cam(network, volume, 0, 0).values.any()  # of a class only what speaks for it
    with torch.no_grad():
        network.heads[1].weight[0, 0] = -1
    lowered = grad_cam(network, volume, 1).values
    with torch.no_grad():
        network.heads[1].weight[0, 0] = 1
    assert lowered[at] == -1
    assert strongest_place(lowered, volume) == at


def test_maps_are_for_their_networks(identity_network):
    volume = np.zeros((16, 16, 16), np.uint8)
    with pytest.raises(ValueError, match=r"use finetune\.occlusion"):
        grad_cam(two_d("axial"), volume, 0, 1)
    with pytest.raises(ValueError, match="grad_cam"):
        occlusion_map(identity_network, volume, 0, 1)


# ---- pictures and examples -------------------------------------------------------------------------------------------


def test_a_map_lies_over_the_planes_through_its_strongest_place():
    volume = brain((24, 30, 26))
    values = np.zeros(volume.shape, np.float32)
    values[9, 20, 7] = -2.0
    figure = map_figure(volume, SaliencyMap(values, "Grad-CAM", ""))
    grey, colours = (np.asarray(image.get_array()) for image in figure.axes[0].images)
    assert grey.shape == colours.shape
    assert figure.axes[0].images[1].get_clim() == (-2, 2)
    places = np.argwhere(colours == -2)
    assert len(places) == 3  # once in each plane
    assert np.all(grey[tuple(places.T)] == volume[9, 20, 7])
    # axial: front up; coronal and sagittal: top up; lower planes in the middle of the height of 30
    assert places[np.argsort(places[:, 1])].tolist() == [
        [30 - 1 - 20, 7],
        [3 + 24 - 1 - 9, 26 + 6 + 7],
        [3 + 24 - 1 - 9, 2 * (26 + 6) + 20],
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["L", "R", "L", "R", "P", "A"]
    assert map_png(volume, SaliencyMap(0 * values, "occlusion", "")).startswith(b"\x89PNG")


def test_examples_are_the_surest_and_the_worst():
    truth = np.array([0, 0, 0, 1, 1, 1])
    male = np.array([0.1, 0.3, 0.9, 0.8, 0.95, 0.4])
    found = OutOfFold(truth, np.c_[1 - male, male], np.zeros(6, int), np.arange(6))
    right, wrong = "most surely right", "most surely wrong"
    assert choose(SEX, found, 4) == [(4, right), (0, right), (2, wrong), (5, wrong)]
    assert choose(SEX, found, 100) == [(4, right), (0, right), (3, right), (1, right), (2, wrong), (5, wrong)]
    all_right = OutOfFold(truth, np.eye(2)[truth], np.zeros(6, int), np.arange(6))
    assert {why for _, why in choose(SEX, all_right, 4)} == {right}
    assert [truth[p] for p, _ in choose(SEX, all_right, 4)] == [0, 1, 0, 1]
    ages = OutOfFold(np.array([50.0, 60, 70]), np.array([50.5, 60.1, 62]), np.zeros(3, int), np.arange(3))
    assert choose(AGE, ages, 2) == [(1, "closest"), (2, "furthest off")]
    assert [p for p, _ in choose(AGE, ages, 9)] == [1, 0, 2]
