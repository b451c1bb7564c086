"""Settings of fine-tuning: one class, a YAML file or flags; what is wrong is said by name, with what was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from finetuning import call_command
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from finetune.build import make_augmentation
from finetune.cli import app
from finetune.options import settings_from
from finetune.settings import FinetuneSettings, make_settings, read_settings
from loaders import Augmentation

NAMES = list(FinetuneSettings.model_fields)


def test_every_setting_has_a_flag_with_a_help_text():
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["run", "--help"]).stdout
    for name, field in FinetuneSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag}\b", shown), flag
        assert field.description
        assert field.description.split()[0] in shown


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        FinetuneSettings().epochs = 3  # type: ignore[misc]


def test_a_file_holds_all_settings_and_gives_them_back(tmp_path):
    settings = make_settings({
        "target": "sex,age", "task": {"age": "ordinal"}, "where": 'site == 1 and age > 50 or "ü"', "crop": "4,6,8",
        "size": 64, "patience": 3, "clip": None, "augmentation": {"noise": 0.01}, "lr": 3e-05, "layer_decay": 0.7,
        "tensorboard": False, "train_people": 7, "split": "./a b.csv",
    })  # fmt: skip
    assert (settings.target, settings.crop, settings.size) == (("sex", "age"), (4, 6, 8), (64,))
    path = tmp_path / "settings.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == NAMES
    assert make_settings(read_settings(path)) == settings
    assert make_settings(yaml.safe_load(FinetuneSettings().to_yaml())) == FinetuneSettings()


@given(
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    test=st.floats(0, 0.49),
    where=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    task=st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.just("ordinal"), max_size=2),
    clip=st.none() | st.floats(1e-9, 1e9),
)
def test_yaml_gives_any_settings_back(lr, test, where, task, clip):
    settings = make_settings({"lr": lr, "test": test, "where": where, "task": task, "clip": clip})
    assert make_settings(yaml.safe_load(settings.to_yaml())) == settings


def test_flags_come_before_the_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("target: [sex, age]\nepochs: 7\nlr: 1e-3\naugmentation: none\npatience: 4\n")
    flags = {"epochs": 9, "task": ["age=ordinal"], "augmentation": [], "lr": None, "tensorboard": False}
    settings = settings_from(path, flags)
    assert settings == make_settings({
        "target": ("sex", "age"), "epochs": 9, "task": {"age": "ordinal"}, "lr": 0.001, "augmentation": "none",
        "patience": 4, "tensorboard": False,
    })  # fmt: skip
    assert settings_from(path, {"augmentation": ["noise=0", "gain = .3"]}).augmentation == {"noise": 0, "gain": 0.3}
    assert settings_from(None, {"augmentation": ["none"]}).augmentation == "none"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert settings_from(tmp_path / "empty.yaml", {}) == FinetuneSettings()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epoch": 3}, "'epoch' is no setting; did you mean epochs?"),
        ({"weight-decay": 3}, "did you mean weight_decay?"),
        ({"targets": "sex"}, "did you mean target?"),
        ({"Batch-Size": 3}, "did you mean batch_size?"),
        ({"weight_decay_of_heads": 3}, "did you mean weight_decay?"),
        ({"zzz": 3}, "'zzz' is no setting; there are target, task, where"),
        ({"epochs": 0}, "epochs is 0: input should be greater than or equal to 1"),
        ({"epochs": "many"}, "epochs is 'many': input should be a valid integer"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf: input should be a finite number"),
        ({"view": "axle"}, "view is 'axle': input should be 'axial', 'coronal', 'sagittal' or 'triplanar'"),
        ({"target": "sex,sex"}, "target is sex,sex, expected each once"),
        ({"task": {"sex": "binry"}}, "task of sex is 'binry', expected one of binary"),
        ({"validation": 0.5, "test": 0.5}, "leaves nobody to train on"),
        ({"size": 32, "scale": 0.5}, "size is (32,) and scale 0.5, expected one of them"),
        ({"patience": 3, "validation": 0}, "validation is 0: nothing tells when to stop"),
        ({"kinship": 0.1}, "kinship is 0.1, which needs groups"),
        ({"micro_batch": 33}, "micro_batch is 33, expected no more than batch_size, 32"),
        ({"augmentation": {"noise": "loud"}}, "augmentation"),
        ({"epochs": True}, "epochs is True, expected no true or false"),
        ({"size": True}, "size is True, expected no true or false"),
        ({"crop": [8, True, 8]}, "crop is [8, True, 8], expected no true or false"),
        ({"augmentation": {"noise": False}}, "augmentation is {'noise': False}, expected no true or false"),
        ({"seed": 2**63}, "input should be less than or equal to 9223372036854775807"),
        ({"crop": "1,2"}, "crop is 1,2, expected 3 values"),
        ({"crop": "1,2,3,4"}, "crop is ('1', '2', '3', '4'): tuple should have at most 3 items"),
    ],
)
def test_what_is_wrong_is_named(wrong, message):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        make_settings(wrong, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, ValidationError)


def test_an_unknown_part_of_augmentation_names_the_nearest():
    with pytest.raises(ValueError, match=r"augmentation 'rotation' is unknown; did you mean rotation_deg\?"):
        make_augmentation(make_settings({"augmentation": {"rotation": 3}}), "native")
    with pytest.raises(ValueError, match=r"noise is -1\.0, expected 0 <= noise"):
        make_augmentation(make_settings({"augmentation": {"noise": -1}}), "native")
    assert make_augmentation(make_settings({"augmentation": "none"}), "native") is None


def test_scans_in_a_standard_space_are_moved_less_unless_told():
    assert make_augmentation(make_settings({}), "native") == Augmentation()
    found = make_augmentation(make_settings({"augmentation": {"rotation_deg": 7, "noise": 0}}), "MNI152")
    assert found == Augmentation(rotation_deg=7, translation_mm=1, scale=0.01, noise=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "is no YAML"),
        ("- epochs", "holds list, expected settings, one in a line: epochs: 30"),
        ("batchsize: 3", "s.yaml: 'batchsize' is no setting; did you mean batch_size?"),
        (b"\xff\xfe\x00", "is no YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, monkeypatch, capsys, text, message):
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert call_command(monkeypatch, "none.zarr", tmp_path / "run", "--config", path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == (["s.yaml"] if text is not None else [])


def test_flags_that_are_wrong_are_named(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert call_command(monkeypatch, "none.zarr", run, "--task", "sex") == 1
    assert "task is 'sex', expected NAME=VALUE, such as income=ordinal" in capsys.readouterr().err
    assert call_command(monkeypatch, "none.zarr", run, "--view", "up") == 1
    assert "the command: --view is 'up'" in capsys.readouterr().err
    for flags, message in (
        (("--train-sizes", "abc"), "--train-sizes has 'abc': input should be a valid integer"),
        (("--methods", "transfr"), "--methods has 'transfr': input should be 'transfer', 'scratch' or 'probe'"),
        (("--train-sizes", "5,5"), "--train-sizes are 5,5, expected one or more, each once"),
    ):
        assert call_command(monkeypatch, "curve", "none.zarr", run, *flags) == 1
        assert f"error: the command: {message}" in capsys.readouterr().err
    assert call_command(monkeypatch, "none.zarr", run, "--epoch", "3") == 2
    assert "--epochs" in capsys.readouterr().err


def test_flags_show_what_they_take_and_their_defaults():
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["run", "--help"]).output
    for flag, words in (
        ("--crop", r"Z,Y,X "),
        ("--size", r"N\|H,W\|Z,Y,X "),
        ("--kinship", r"<float> .*default: \(0\.0442\)"),
    ):
        assert re.search(rf"{flag} +{words}", shown), flag


def test_each_choice_is_shown_by_its_flag():
    for name, field in FinetuneSettings.model_fields.items():
        for choice in get_args(field.annotation):
            if isinstance(choice, str):
                assert getattr(settings_from(None, {name: choice}), name) == choice


def test_where_settings_come_from_is_told(tmp_path):
    path = Path(tmp_path / "mine.yaml")
    path.write_text("epochs: 0")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: epochs is 0"):
        settings_from(path, {"epochs": 3})
