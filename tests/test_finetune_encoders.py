"""Encoders of fine-tuned networks: they see what the run saw, unless options say otherwise."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import assert_close
from trained_networks import MEAN, make_scan_network, sha256, volumes_of, with_network

from extract import build_encoder
from extract.encoder import InputWarning, describe
from extract.errors import WeightsUnavailableError
from finetune.predict import without_idle_work
from loaders.views import View


@pytest.mark.parametrize(
    ("view", "pool", "seen"),
    [
        (View.axial, "mean", {"slices": 2, "crop": (6, 20, 18), "size": (24, 20)}),
        (View.triplanar, "attention", {"scale": 0.5}),
        (View.volume, "mean", {"crop": (7, 24, 20), "scale": 0.75}),
    ],
)
def test_an_encoder_of_a_run_sees_what_the_run_saw(tmp_path, view, pool, seen):
    network = make_scan_network(view, pool, **seen)
    with torch.inference_mode():
        assert_close(without_idle_work(network)(volumes_of()), network(volumes_of()), 1e-4)
    run = with_network(tmp_path / "sex", network)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", InputWarning)
        encoder = build_encoder(weights=str(run), device="cpu")
    assert [str(one.message) for one in told] == (
        ["sex/best.pt (epoch 7) weighs the slices of a scan by attention; the features are their plain mean"]
        if pool == "attention"
        else []
    )
    network.attention = None
    with torch.inference_mode():
        assert_close(encoder(volumes_of()), network.features(volumes_of()), 1e-4)
    about = describe(encoder)
    assert about["weights"] == {
        "name": "sex/best.pt (epoch 7)", "sha256": sha256(run / "best.pt"), "torchvision": None,
    }  # fmt: skip
    assert (about["model"], about["view"], about["input"]["mean"]) == (network.model, str(view), MEAN)
    assert (encoder.crop, encoder.size, encoder.scale) == (network.seen.crop, network.seen.size, network.seen.scale)


def test_options_come_before_what_the_run_saw(tmp_path):
    run = with_network(tmp_path / "sex", make_scan_network(View.axial, scale=0.5, crop=(8, 20, 20)))
    message = (
        r"^sex/best.pt \(epoch 7\) was trained with view axial, size none, scale 0.5, not view coronal, size 24,24, "
        r"scale 1.0: leave that out to see what it was trained on$"
    )
    with pytest.warns(InputWarning, match=message):
        encoder = build_encoder(weights=str(run / "best.pt"), view=View.coronal, size=24, device="cpu")
    assert (encoder.view, encoder.size, encoder.scale, encoder.crop) == (View.coronal, (24, 24), 1.0, (8, 20, 20))
    with pytest.raises(WeightsUnavailableError, match="it is a checkpoint of resnet18; use --model resnet18"):
        build_encoder("resnet34", weights=str(run), device="cpu")
    with pytest.raises(ValueError, match="slices is 0"):
        build_encoder(weights=str(run), slices=0, device="cpu")
