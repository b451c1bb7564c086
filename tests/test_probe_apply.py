"""Saved probes: what was fitted is what is applied, to the same features only, and reading one runs no code."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embedded import make_embeddings

from extract.embeddings import Embeddings
from extract.probing.apply import (
    SavedProbe,
    apply_probe,
    confound_warnings,
    encoder_of,
    load_probe,
    save_probe,
    write_predictions,
)
from extract.probing.model import ProbeModel, refit
from extract.probing.settings import ProbeSettings
from ingest.errors import StoreError

TARGETS = ("sex", "age", "smoking", "siblings")
GRID = {"shape_zyx": (160, 192, 160), "voxel_mm": 1.0, "space": "MNI152", "affine_ras": []}
LAYERS = [{"name": "avgpool", "features": 25, "start": 0}]


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    """Return 90 scans whose features know everything a little, with a site as confound."""
    rng = np.random.default_rng(0)
    values = {
        "sex": np.arange(90) % 2,
        "age": rng.uniform(45, 80, 90),
        "smoking": np.arange(90) % 3,
        "siblings": rng.poisson(2, 90),
        "site": rng.integers(1, 4, 90),
    }
    known = np.array([*values.values()]).T
    features = rng.normal(size=(90, 25)) + 0.5 * (known % 7) @ rng.normal(size=(5, 25))
    made = make_embeddings(
        features,
        values,
        variables={
            "sex": {"task": "binary", "labels": {"0": "female", "1": "male"}},
            "smoking": {"task": "multiclass"},
            "siblings": {"task": "count"},
            "site": {"task": "multiclass", "confound": True},
        },
    )
    attrs = {
        "weights": {"name": "imagenet", "sha256": "a" * 64},
        "layers": LAYERS,
        "view": "triplanar",
        "slices": 3,
        "precision": "float32",
        "store": {"path": "/home/jane/t1.zarr", "grid": GRID},
    }
    return replace(made, attrs={**made.attrs, **attrs})


@pytest.fixture(scope="module")
def models(embeddings) -> list[ProbeModel]:
    settings = ProbeSettings(confounds=("site",))
    return [refit(embeddings, name, settings=settings) for name in TARGETS]


@pytest.fixture(scope="module")
def path(embeddings, models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "new" / "model.json"
    save_probe(path, embeddings, models, layer="avgpool")
    return path


def changed(embeddings: Embeddings, **attrs: object) -> Embeddings:
    return replace(embeddings, attrs={**embeddings.attrs, **attrs})


def test_applied_to_whom_it_was_fitted_to_it_predicts_the_same(path, embeddings, models):
    predictions = apply_probe(load_probe(path), embeddings)
    sex, age, smoking, siblings = (model.predict_embeddings(embeddings) for model in models)
    np.testing.assert_array_equal(predictions["age"], age)
    np.testing.assert_array_equal(predictions["siblings"], siblings)
    np.testing.assert_array_equal(predictions[["sex=female", "sex=male"]], sex)
    np.testing.assert_array_equal(predictions[["smoking=0", "smoking=1", "smoking=2"]], smoking)
    assert list(predictions["sex"]) == [("female", "male")[k] for k in sex.argmax(axis=1)]
    assert list(predictions["participant"]) == list(embeddings.scans["participant"])
    assert np.mean(predictions["sex"] == np.where(embeddings.phenotypes["sex"] == 1, "male", "female")) > 0.6


def test_what_is_saved_is_what_is_loaded(path, embeddings, models):
    saved = load_probe(path)
    assert [model.to_json() for model in saved.models] == [model.to_json() for model in models]
    assert (saved.layer, saved.features, saved.simulated) == ("avgpool", 25, True)
    assert saved.encoder == encoder_of(embeddings.attrs)
    assert [file.name for file in path.parent.iterdir()] == ["model.json"]


def test_a_saved_probe_names_no_participant_and_no_folder(path, embeddings):
    text = path.read_text()
    assert not any(person in text for person in embeddings.scans["participant"])
    assert "jane" not in text


def test_people_without_phenotypes_are_predicted(path, embeddings):
    new = replace(embeddings, phenotypes=embeddings.phenotypes[["site"]], variables={})
    np.testing.assert_array_equal(
        apply_probe(load_probe(path), new)["age"], apply_probe(load_probe(path), embeddings)["age"]
    )


def test_confounds_of_new_people_are_matched_by_label_and_named_where_they_are_unknown(embeddings, tmp_path):
    def at(codes: np.ndarray, labels: dict[str, str]) -> Embeddings:
        variables = {**embeddings.variables, "site": {"task": "multiclass", "labels": labels, "confound": True}}
        return replace(embeddings, phenotypes=embeddings.phenotypes.assign(site=codes), variables=variables)

    sites = embeddings.phenotypes["site"].to_numpy()
    fitted = at(sites, {"1": "Leeds", "2": "Oxford", "3": "York"})
    save_probe(tmp_path / "m.json", fitted, [refit(fitted, "age", settings=ProbeSettings(confounds=("site", "sex")))])
    saved = load_probe(tmp_path / "m.json")
    expected = apply_probe(saved, fitted)["age"]
    assert confound_warnings(saved, fitted) == []
    renumbered = at(sites - 1, {"0": "Leeds", "1": "Oxford", "2": "York", "3": "Bath"})
    np.testing.assert_array_equal(apply_probe(saved, renumbered)["age"], expected)
    assert confound_warnings(saved, renumbered) == []

    moved = np.where(np.arange(90) < 4, 3, sites - 1)
    moved[4:6] = np.nan
    strangers = replace(renumbered, phenotypes=renumbered.phenotypes.assign(site=moved))
    missing, unseen = confound_warnings(saved, strangers)
    assert missing.startswith("2 of 90 scans lack the confound site")
    assert unseen.startswith("4 of 90 scans have a site that the probe was not fitted to ('Bath')")
    found = apply_probe(saved, strangers)["age"]
    np.testing.assert_array_equal(found[6:], expected[6:])
    assert found.between(20, 110).all()  # years: no coefficient has run away
    nowhere = replace(strangers, phenotypes=strangers.phenotypes.assign(site=np.nan))
    with pytest.raises(ValueError, match=r"of 'age' needs site, .*'site' is missing in every scan; .*, or fit without"):
        apply_probe(saved, nowhere)


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"model": "r3d_18"}, ["model r3d_18 instead of resnet18"]),
        ({"weights": {"name": "imagenet", "sha256": "b" * 64}}, ["weights sha256 bbbb", "instead of aaaa"]),
        ({"view": "axial", "slices": 5}, ["view axial instead of triplanar", "slices 5 instead of 3"]),
        ({"layers": None}, ["layers unknown instead of"]),
        ({"encoding_version": 2}, ["encoding_version 2 instead of 1"]),
        ({"crop": [10, 10, 10]}, ["crop [10, 10, 10] instead of unknown"]),
        ({"store": {"grid": {**GRID, "space": "native"}}}, ["grid", "native", "MNI152"]),
    ],
)
def test_another_encoder_is_refused_by_what_differs(path, embeddings, attrs, words):
    with pytest.raises(ValueError, match="not of the encoder that the probe was fitted to") as caught:
        apply_probe(load_probe(path), changed(embeddings, **attrs))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "attrs",
    [
        {"precision": "bfloat16", "compiled": True},
        {"encoding_version": 1},
        {"weights": {"name": "mine.pth", "sha256": "a" * 64}},
        {"store": {"path": "elsewhere", "id": "b", "grid": {**GRID, "shape_zyx": [160, 192, 160]}}},
    ],
)
def test_what_makes_no_other_features_does_not_matter(path, embeddings, attrs):
    assert len(apply_probe(load_probe(path), changed(embeddings, **attrs))) == 90


def test_other_features_and_missing_confounds_are_refused(path, embeddings):
    saved = load_probe(path)
    with pytest.raises(ValueError, match="24 features, the probe was fitted to 25"):
        apply_probe(saved, replace(embeddings, features=embeddings.features[:, :24]))
    for refused in (apply_probe, confound_warnings):
        with pytest.raises(ValueError, match=r"model of 'sex' needs site .*--phenotypes.*: no phenotype 'site'"):
            refused(saved, replace(embeddings, phenotypes=embeddings.phenotypes[["age"]]))
    features = embeddings.features.copy()
    features[7, 3] = np.inf
    with pytest.raises(ValueError, match=r"row 7 .* as have 0 more"):
        apply_probe(saved, replace(embeddings, features=features))
    twice = SavedProbe([replace(saved.models[0], name="session")], saved.encoder, None, 25, False)
    with pytest.raises(ValueError, match="would be called 'session'"):
        apply_probe(twice, embeddings)


def test_predictions_are_tables(path, embeddings, tmp_path):
    predictions = apply_probe(load_probe(path), embeddings)
    write_predictions(tmp_path / "new" / "p.csv", predictions)
    write_predictions(tmp_path / "new" / "p.parquet", predictions)
    read = pd.read_csv(tmp_path / "new" / "p.csv", dtype={"participant": str, "session": str, "smoking": str})
    pd.testing.assert_frame_equal(read, predictions, check_dtype=False, rtol=1e-12)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "new" / "p.parquet"), predictions, check_dtype=False)
    with pytest.raises(StoreError, match=r"'\.txt', expected one of \.csv, \.parquet"):
        write_predictions(tmp_path / "p.txt", predictions)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(StoreError, match="choose another name"):
        write_predictions(tmp_path / "folder.csv", predictions)
    with pytest.raises(StoreError, match=r"'\.pkl'; a probe is saved as \.json"):
        save_probe(tmp_path / "p.pkl", embeddings, [])
    with pytest.raises(ValueError, match="models of nothing"):
        save_probe(tmp_path / "p.json", embeddings, [])
    models = load_probe(path).models
    for name, heading in (("row", "row"), ("participant", "participant"), ("sex=male", "sex=male")):
        with pytest.raises(ValueError, match=f"would be called '{heading}'; rename"):
            save_probe(tmp_path / "p.json", embeddings, [models[0], replace(models[1], name=name)])


class Explosive:
    """Unpickling this would show."""

    def __reduce__(self):
        return (Path("exploded").touch, ())


def edited(path: Path, **changes: object) -> str:
    return json.dumps({**json.loads(path.read_text()), **changes})


def model(path: Path, **changes: object) -> dict:
    return {**json.loads(path.read_text())["models"][1], **changes}


def hostile_files(path: Path) -> dict[str, tuple[str | bytes, str]]:
    """Return by name a file and what is said of it."""
    without = {key: value for key, value in json.loads(path.read_text()).items() if key != "features"}
    ragged = model(path, coefficients=[[1.0], [1.0, 2.0]])
    confounds = {**model(path)["confounds"], "coefficients": [[1.0]]}
    labels = {**model(path)["confounds"], "labels": [["1", "2"]]}
    means = {**model(path)["confounds"], "means": [[0.5, 0.5]]}
    classes = json.loads(path.read_text())["models"][0]
    return {
        "pickle": (pickle.dumps(Explosive()), "is no saved probe"),
        "npz": (b"PK\x03\x04" + b"\x93NUMPY" * 9, "is no saved probe"),
        "empty": (b"", "is no saved probe"),
        "not utf-8": (b"\xff\xfe{}", "is no saved probe"),
        "cut": (path.read_text()[:-100], "is no saved probe"),
        "deep": ("[" * 100_000, "is no saved probe"),
        "a list": ("[]", "holds a list"),
        "a number": ("1" * 5000, "is no saved probe"),
        "another format": (edited(path, format="brain-volumes"), "is not a brain-probe"),
        "an earlier version": (edited(path, format_version=1), "format version 1"),
        "a later version": (edited(path, format_version=3), "format version 3"),
        "no task": (edited(path, models=[model(path, task="guess")]), "'guess' and 0 classes, expected one of"),
        "a class as a number": (edited(path, models=[{**classes, "task": "continuous"}]), "'continuous' and 2 classes"),
        "a class without names": (edited(path, models=[{**classes, "labels": []}]), "'binary' and 0 classes"),
        "means": (edited(path, models=[model(path, confounds=means)]), "2 means of its confounds"),
        "NaN": (edited(path, features=float("nan")), "NaN, which is no number"),
        "too large a number": (path.read_text().replace('"penalty": ', '"penalty": 1e999, "x": '), "is damaged"),
        "no models": (edited(path, models=[]), "models of nothing"),
        "null models": (edited(path, models=None), "is damaged"),
        "no features": (json.dumps(without), "missing"),
        "twice": (edited(path, models=[model(path)] * 2), "one per target"),
        "a list for a model": (edited(path, models=[[]]), "is damaged"),
        "other features": (edited(path, features=24), r"expected \(24, 1\)"),
        "ragged": (edited(path, models=[ragged]), "is damaged"),
        "a word": (edited(path, models=[model(path, coefficients=[["x"]] * 25)]), "is damaged"),
        "a class": (edited(path, models=[{**classes, "labels": ["a"]}]), "two or more"),
        "confounds": (edited(path, models=[model(path, confounds=confounds)]), "coefficients of confounds"),
        "labels": (edited(path, models=[model(path, confounds=labels)]), "3 categories of site have 2 labels"),
        "a layer": (edited(path, layer=["x"]), "expected a name"),
        "an encoder": (edited(path, encoder=3), "is damaged"),
    }  # fmt: skip


def test_damaged_and_hostile_files_are_refused_by_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (content, words) in hostile_files(path).items():
        file = tmp_path / "m.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(StoreError, match=words) as caught:
            load_probe(file)
        assert str(file) in str(caught.value), name
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError, match="no saved probe at"):
        load_probe(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(StoreError, match="no saved probe"):
        load_probe(tmp_path / "folder.json")
