"""Settings of learning curves: sizes, seeds, methods, and what training from scratch leaves out."""

from __future__ import annotations

import pytest
from finetuning import call_command

from finetune.curves.settings import choose_methods, choose_sizes, from_scratch, make_curve_settings
from finetune.settings import FinetuneSettings


def test_sizes_double_up_to_all_and_are_refused_beyond():
    assert choose_sizes("auto", 240) == (25, 50, 100, 200, 240)
    assert choose_sizes("auto", 210) == (25, 50, 100, 210)  # 200 say nothing that 210 do not
    assert choose_sizes("auto", 20) == (20,)
    assert choose_sizes((100, 25), 100) == (25, 100)
    with pytest.raises(ValueError, match="size 101 of the curve is more than the 100 people of the training part"):
        choose_sizes((25, 101), 100)


def test_settings_are_read_from_text_and_checked():
    found = make_curve_settings({"sizes": "25, 50", "seeds": "3", "methods": "transfer,scratch"})
    assert (found.sizes, found.seeds, found.methods) == ((25, 50), (0, 1, 2), ("transfer", "scratch"))
    assert make_curve_settings({"seeds": "4,7"}).seeds == (4, 7)
    assert make_curve_settings({"seeds": 2}).seeds == (0, 1)
    for given, message in (
        ({"seed": 3}, "'seed' is no setting; did you mean seeds"),
        ({"sizes": "50,50"}, "sizes are 50,50, expected one or more, each once"),
        ({"sizes": "1,50"}, "expected 2 or more each"),
        ({"seeds": 0}, "seeds are none"),
        ({"methods": "transfer,probes"}, "'probes'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_curve_settings(given)


def test_from_scratch_nothing_is_kept_and_with_scratch_there_is_nothing_to_transfer():
    settings = FinetuneSettings(weights="imagenet", freeze_until="layer2", layer_decay=0.5, pool="attention", lr=1e-4)
    scratch = from_scratch(settings, 1e-3)
    assert (scratch.weights, scratch.freeze_until, scratch.layer_decay, scratch.lr) == ("scratch", None, 1.0, 1e-3)
    methods, notes = choose_methods(("transfer", "scratch", "probe"), settings)
    assert methods == ("transfer", "scratch", "probe")
    assert notes[0].startswith("scratch goes without freeze_until layer2 and layer_decay 0.5")
    assert "attention" in notes[1]
    methods, notes = choose_methods(("transfer", "scratch", "probe"), FinetuneSettings(weights="scratch"))
    assert methods == ("scratch", "probe")
    assert "transfer is left out" in notes[0]
    with pytest.raises(ValueError, match=r"scratch_lr is 0\.001, but of the methods transfer,probe none trains from"):
        choose_methods(("transfer", "probe"), settings, 1e-3)
    with pytest.raises(ValueError, match="there is nothing to transfer"):
        choose_methods(("transfer",), FinetuneSettings(weights="scratch"))


def test_options_of_the_curve_in_a_file_are_named(monkeypatch, capsys, tmp_path):
    config = tmp_path / "c.yaml"
    for line, option in (
        ("train_sizes: [10]", "--train-sizes"),
        ("seeds: 3", "--seeds"),
        ("sizes: 3", "--train-sizes"),
    ):
        config.write_text(f"target: sex\n{line}\n")
        assert call_command(monkeypatch, "curve", "s.zarr", tmp_path, "--config", config) == 1
        assert f"is not of a training, but of the curve; take it out of the file, and give the command {option}\n" in (
            capsys.readouterr().err
        )
