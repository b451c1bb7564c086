"""Weights are what they say, wherever they come from; what is something else is refused by name, and never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from networks import assert_close, trained
from torchvision.models import ResNet18_Weights, resnet18, resnet34
from torchvision.models.video import R3D_18_Weights, r3d_18

from extract import build_encoder, weights
from extract.checkpoints import FORMAT, read_checkpoint
from extract.cli import main
from extract.encoder import describe
from extract.errors import WeightsUnavailableError
from extract.weights import load_weights


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return trained(resnet18).state_dict()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12, 20, 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(path: Path, content: object, **options: object) -> str:
    torch.save(content, path, **options)
    return str(path)


def features(images: torch.Tensor, weights: str, model: str = "resnet18", **settings: object) -> torch.Tensor:
    return build_encoder(model, weights=weights, device="cpu", slices=1, **settings)(images)


@pytest.fixture(scope="module")
def plainly(state, tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("plain") / "w.pth", state)


@pytest.fixture(scope="module")
def expected(plainly) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return features(torch.randint(0, 256, (2, 12, 20, 18), dtype=torch.uint8, generator=generator), plainly)


def without_counts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what torch of 2017 saved, and torchvision's files still are."""
    return {key: value for key, value in state.items() if "num_batches" not in key}


WRAPPED = {
    "nested": lambda state: {"epoch": 3, "state_dict": state},
    "DataParallel, compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {
            **{f"model.encoder.{key}": value for key, value in state.items()},
            "model.head.weight": torch.ones(2, 512),
        }
    },
    "backbone": lambda state: {f"module.backbone.{key}": value for key, value in state.items() if "fc." not in key},
    "no counts": without_counts,
    "other classes": lambda state: {**state, "fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)},
    "no classifier": lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
    "ours": lambda state: {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": state, "target": "sex"},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_files_in_every_form(state, expected, images, tmp_path, form):
    path = tmp_path / "file.pt"
    encoder = build_encoder(weights=saved(path, WRAPPED[form](state)), device="cpu", slices=1)
    assert_close(encoder(images), expected)
    assert describe(encoder)["weights"] == {"name": "file.pt", "sha256": sha256(path), "torchvision": None}


def test_half_precision_and_old_files(state, expected, images, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    assert_close(features(images, saved(tmp_path / "half.pth", half)), expected, 0.02)
    everything = {key: value.half() for key, value in state.items()}  # counts of batches, too
    widened = {key: value.float() for key, value in half.items()}
    found = features(images, saved(tmp_path / "all.pth", everything))
    assert torch.equal(found, features(images, saved(tmp_path / "wide.pth", widened)))
    old = saved(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False)
    assert_close(features(images, old), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_of_ours_brings_its_normalisation(state, images, tmp_path, plain):
    content = {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": state}
    path = saved(tmp_path / "ft.pth", {**content, "mean": [0.2, 0.3, 0.1], "std": (0.5, 0.25, 1)})
    encoder = build_encoder(weights=path, device="cpu", slices=1, plain=plain)
    assert describe(encoder)["input"]["mean"] == (0.2, 0.3, 0.1)
    assert describe(encoder)["input"]["std"] == (0.5, 0.25, 1.0)
    network = trained(resnet18)
    network.fc = torch.nn.Identity()
    mean, std = torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1), torch.tensor([0.5, 0.25, 1]).view(3, 1, 1)
    slices = [images[:, 6].flip(1), images[:, :, 10].flip(1), images[:, :, :, 8].flip(1)]
    with torch.no_grad():
        expected = torch.stack([network((picture[:, None] / 255 - mean) / std) for picture in slices]).mean(0)
    assert_close(encoder(images), expected)
    assert read_checkpoint(path).model == "resnet18"
    usual = build_encoder(weights=saved(tmp_path / "b.pth", content), device="cpu")
    assert usual.weights.mean == load_weights("resnet18", "random").mean


class Hostile:
    """Leaves a file behind when it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def test_code_is_never_run(state, tmp_path, monkeypatch):
    mark = tmp_path / "was-here"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    files = [
        saved(tmp_path / "a.pth", Hostile()),
        saved(tmp_path / "b.pth", {**state, "x": Hostile()}),
        saved(tmp_path / "c.pth", {"state_dict": state, "x": Hostile()}, _use_new_zipfile_serialization=False),
        saved(tmp_path / "d.pth", {"format": FORMAT, "model": Hostile(), "state_dict": state}),
    ]
    for file in files:
        with pytest.raises(WeightsUnavailableError, match=r"[abcd]\.pth .*it asks for \w+\.system, which may run any"):
            read_checkpoint(file)
    (tmp_path / "e.pth").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(WeightsUnavailableError, match=r"e\.pth is no state dict that is safe to load"):
        read_checkpoint(tmp_path / "e.pth")
    assert not mark.exists()
    torch.load(files[0], weights_only=False)
    assert mark.exists(), "it would have been run"


def truncated(path: Path, state: dict) -> None:
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


NO_WEIGHTS = {
    "is a web page": lambda path, _: path.write_text("\n<!DOCTYPE html><html><body>404</body></html>"),
    "is a pointer of Git LFS": lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"),
    "is empty": lambda path, _: path.write_bytes(b""),
    "is a folder without best.pt, .*--weights-dir": lambda path, _: path.mkdir(),
    "is no file": lambda path, _: os.mkfifo(path),
    "damaged, incomplete": truncated,
    "or was not written by torch.save": lambda path, _: path.write_text("not weights"),
    "it asks for torch.nn.*Linear, which": lambda path, _: torch.save(torch.nn.Linear(2, 2), path),
    "holds list, expected a state dict": lambda path, _: torch.save([torch.zeros(1)], path),
    "holds Tensor, expected": lambda path, _: torch.save(torch.zeros(1), path),
    "holds an empty dict": lambda path, _: torch.save({}, path),
    "holds str as 'note'": lambda path, state: torch.save({**state, "note": "x"}, path),
    "holds Tensor as '3'": lambda path, state: torch.save({**state, 3: torch.zeros(1)}, path),
    "has conv1.weight more than once": lambda path, state: torch.save(
        {**state, "module.conv1.weight": torch.zeros(1)}, path
    ),
    "has numbers in layer2.0.conv1.weight that are not finite": lambda path, state: torch.save(
        {**state, "layer2.0.conv1.weight": torch.full((128, 64, 3, 3), torch.nan)}, path
    ),
    "its layer1.0.conv1.weight is 64 x 64 x 1 x 1, expected 64 x 64 x 3 x 3$": lambda path, state: torch.save(
        {**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, path
    ),
    "it has no conv1.weight and 1 more": lambda path, state: torch.save(
        {key.replace("conv1.weight", "stem") if key == "conv1.weight" else key: v for key, v in state.items()}, path
    ),
    "its bn1.weight is torch.int64": lambda path, state: torch.save(
        {**state, "bn1.weight": torch.ones(64, dtype=torch.int64)}, path
    ),
    "its bn1.weight is .* on meta": lambda path, state: torch.save(
        {**state, "bn1.weight": torch.ones(64, device="meta")}, path
    ),
    "its bn1.weight is .*sparse_coo": lambda path, state: torch.save(
        {**state, "bn1.weight": torch.ones(64).to_sparse()}, path
    ),
    "does not fit resnet18: it is r3d_18; use --model r3d_18": lambda path, _: torch.save(r3d_18().state_dict(), path),
    "it is resnet34; use": lambda path, _: torch.save(without_counts(resnet34().state_dict()), path),
    "it is a checkpoint of resnet34; use --model resnet34": lambda path, state: torch.save(
        {"format": FORMAT, "model": {"name": "resnet34"}, "state_dict": state}, path
    ),
    "checkpoint of the model 'vgg11', which is unknown": lambda path, state: torch.save(
        {"format": FORMAT, "model": {"name": "vgg11"}, "state_dict": state}, path
    ),
    "checkpoint of the model None": lambda path, state: torch.save({"format": FORMAT, "state_dict": state}, path),
    "holds NoneType, expected": lambda path, _: torch.save({"format": FORMAT, "model": {"name": "resnet18"}}, path),
    "as std of its input, expected numbers above 0": lambda path, state: torch.save(
        {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": state, "mean": [0.5] * 3, "std": [1, 1, 0]},
        path,
    ),
    "has None as std of its input, expected three": lambda path, state: torch.save(
        {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": state, "mean": [0.5] * 3}, path
    ),
    "as mean of its input, expected three": lambda path, state: torch.save(
        {"format": FORMAT, "model": {"name": "resnet18"}, "state_dict": state, "mean": [0.5], "std": [1.0]}, path
    ),
}


@pytest.mark.parametrize("words", NO_WEIGHTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_holds_no_weights_of_the_model_is_refused_by_name(state, tmp_path, words):
    path = tmp_path / "w.pth"
    NO_WEIGHTS[words](path, state)
    with pytest.raises(WeightsUnavailableError, match=rf"w\.pth .*{words}") as caught:
        load_weights("resnet18", str(path))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "torch's advice is to load it all the same"


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """A small file: what of it is cut off or flipped, no other error comes of it."""
    content = Path(saved(tmp_path / "w.pth", {"a": torch.arange(4.0)})).read_bytes()
    damaged = tmp_path / "damaged.pth"
    rng = torch.Generator().manual_seed(6)
    refused = 0
    for _ in range(60):
        at = int(torch.randint(len(content), (1,), generator=rng))
        flipped = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
        for changed in (content[:at], flipped):
            damaged.write_bytes(changed)
            try:
                read_checkpoint(damaged)
            except WeightsUnavailableError:
                refused += 1
    assert refused > 60


def test_numbers_that_were_damaged_are_noticed(tmp_path):
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3)}
    path = Path(saved(tmp_path / "w.pth", weights))
    content = bytearray(path.read_bytes())
    start = content.index(weights["a"].numpy().tobytes())
    for at in range(start, start + 600, 4):
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        WeightsUnavailableError, match=r"w\.pth is damaged: the bytes of \S+/0 in it .* download it again"
    ):
        read_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        saved(path, weights)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(path).state_dict["a"], weights["a"]), "without checksums, there is none to fail"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_the_cache_of_torchvision(cache, state, expected, images):
    path = cache / "resnet18-f37072fd.pth"
    torch.save(state, path)
    encoder = build_encoder(device="cpu", slices=1)
    assert describe(encoder)["weights"] == {
        "name": "imagenet", "sha256": sha256(path), "torchvision": "ResNet18_Weights.IMAGENET1K_V1",
    }  # fmt: skip
    assert_close(encoder(images), expected)
    path.write_text("<html>")
    with pytest.raises(WeightsUnavailableError, match=r"imagenet weights of resnet18 .*web page.*; delete .*f37072fd"):
        load_weights("resnet18", "imagenet")
    torch.save(r3d_18().state_dict(), path)
    with pytest.raises(WeightsUnavailableError, match="it is r3d_18"):
        load_weights("resnet18")


def test_what_is_not_in_the_cache_is_downloaded_and_checked(cache, state, monkeypatch, tmp_path):
    made = tmp_path / "made.pth"
    torch.save(state, made)
    name = f"resnet18-{sha256(made)[:8]}.pth"
    entry = type("Entry", (), {"url": f"file://{tmp_path}/{name}", "transforms": ResNet18_Weights.DEFAULT.transforms})()
    monkeypatch.setattr(weights, "default_weights", lambda _: entry)
    with pytest.raises(WeightsUnavailableError, match=rf"cannot be downloaded \(.*; put {name} into .*--weights-dir"):
        load_weights("resnet18")
    (tmp_path / name).write_bytes(made.read_bytes()[:-1])
    with pytest.raises(WeightsUnavailableError, match=r"cannot be downloaded \(invalid hash value"):
        load_weights("resnet18")
    assert not list(cache.iterdir())
    (tmp_path / name).write_bytes(made.read_bytes())
    assert load_weights("resnet18").sha256 == sha256(made)
    assert [file.name for file in cache.iterdir()] == [name]


def test_an_offline_folder(cache, state, images, plainly, expected, monkeypatch, tmp_path):
    folder = tmp_path / "offline"
    with pytest.raises(WeightsUnavailableError, match="offline, which is no folder"):
        load_weights("resnet18", None, folder)
    folder.mkdir()
    monkeypatch.setattr(weights, "_why_unreachable", lambda _: pytest.fail("asked a network"))
    with pytest.raises(WeightsUnavailableError, match=r"offline has no r3d_18-b3b3357e\.pth, .* download it from http"):
        load_weights("r3d_18", None, folder)
    torch.save(state, folder / "resnet18-f37072fd.pth")
    torch.save(state, cache / "resnet18-f37072fd.pth")
    with pytest.raises(WeightsUnavailableError, match=r"sha256 begins with .{8}, expected f37072fd; copy it again"):
        load_weights("resnet18", "imagenet", folder)
    path = Path(saved(tmp_path / "made.pth", state))
    path = path.rename(folder / f"resnet18-{sha256(path)[:8]}.pth")
    entry = ResNet18_Weights.DEFAULT
    renamed = type("Entry", (), {"url": f"https://h/{path.name}", "transforms": entry.transforms})()
    monkeypatch.setattr(weights, "default_weights", lambda _: renamed)
    encoder = build_encoder(weights_dir=folder, device="cpu", slices=1)
    assert encoder.weights.sha256 == sha256(path)
    assert_close(encoder(images), expected)
    for other in ("random", plainly):
        with pytest.raises(ValueError, match="weights_dir holds imagenet weights, but weights is"):
            load_weights("resnet18", other, folder)


def test_every_file_of_torchvision_has_digits_in_its_name():
    for entry in (ResNet18_Weights.IMAGENET1K_V1, R3D_18_Weights.KINETICS400_V1):
        assert weights._digits(weights._file_name(entry)) in ("f37072fd", "b3b3357e")
    assert weights._digits("weights.pth") is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--weights", "none.pth"], 3, "no weights 'none.pth' for resnet18: expected imagenet, random, or the path"),
        (["--weights", "kinetics"], 3, "no weights 'kinetics' for resnet18"),
        (["--weights", "page.pth"], 3, "page.pth is a web page"),
        (["--weights-dir", "nowhere"], 3, "weights_dir is nowhere, which is no folder"),
        (["--weights", "random", "--weights-dir", "nowhere"], 1, "leave one of them out"),
        (["--weights", "random", "--model", "resnet19"], 1, "did you mean resnet18?"),
        (["--weights", "random", "--layers", "layer3, pool"], 1, "layer 'pool' is not in resnet18"),
        (["--weights", "random", "--crop", "1,2,x"], 1, "crop is '1,2,x', expected whole numbers"),
        (["--weights", "random", "--crop", "17,4,4"], 1, "crop is 17 x 4 x 4"),
        (["--weights", "random", "--size", "64", "--scale", "0.5"], 1, "expected one of them"),
        (["--weights", "random", "--pooling", "sum"], 1, "expected one of mean, max, both"),
        (
            ["--weights", "random", "--model", "r3d_18", "--slices", "7"],
            1,
            "slices is 7, but r3d_18 sees whole volumes",
        ),
        (["--weights", "random", "--seed", "9" * 23], 1, "seed is 99999999999999999999999, expected 0 or more"),
        (["--weights", "page.pth", "--seed", "5"], 1, "seed is 5, but only random weights depend on it"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, code, words):
    from small_store import make_store

    make_store(tmp_path / "s.zarr", 1)
    (tmp_path / "page.pth").write_text("<html>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["extract", "s.zarr", "e.h5", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "e.h5").exists()


def test_the_command_line_gives_its_options_to_the_encoder(tmp_path, monkeypatch, capsys, plainly):
    from small_store import make_store

    from extract import extract, open_embeddings

    voxels = make_store(tmp_path / "s.zarr", 2)
    monkeypatch.chdir(tmp_path)
    options = ["--layers", "layer1, avgpool", "--pooling", "both", "--view", "sagittal", "--slices", "2"]
    options += ["--crop", "14,9,7", "--size", "20,24", "--weights", plainly, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["extract", "s.zarr", "e.h5", *options, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert "warning: resnet18 sees pictures of 20 x 24 voxels; below 32" in printed.err
    found = open_embeddings(tmp_path / "e.h5")
    encoder = build_encoder(
        weights=plainly, layers=["layer1", "avgpool"], pooling="both", view="sagittal", slices=2, crop=(14, 9, 7),
        size=(20, 24), device="cpu",
    )  # fmt: skip
    assert_close(torch.from_numpy(found.features), encoder(torch.from_numpy(voxels)))
    assert found.features.shape == extract(tmp_path / "s.zarr", encoder).features.shape == (2, 128 + 1024)
    assert found.attrs["layers"] == [
        {"name": "layer1", "features": 128, "start": 0},
        {"name": "avgpool", "features": 1024, "start": 128},
    ]
    assert found.attrs["size"] == [20, 24]
