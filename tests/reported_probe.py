"""Embeddings of a store of three brains, and results of probes of every kind, for reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import mni_brain, write_nifti

from extract.embeddings import Embeddings
from extract.probing.results import Interval, OutOfFold, TargetResult
from ingest import ingest
from ingest.grid import FSL_MNI152_AFFINE
from ingest.store import open_store

SHA = "5c106cde386e87d4033832f2996f5493238eda96ccf559d1d62760c4de0613f8"
HOSTILE = "<script>alert(1)</script>"

#: Patient left, front, top: mm in MNI space, within the ellipsoid.
MARKERS = {"left": (-45.0, -17.0, 19.0), "front": (0.0, 45.0, 19.0), "top": (0.0, -17.0, 50.0)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store of three brains, each with one marker, in the order of their names."""
    folder = tmp_path_factory.mktemp("jane.doe")
    for name, place in MARKERS.items():
        write_nifti(folder / "src" / f"person-{name}.nii.gz", mni_brain(marker_mm=place), FSL_MNI152_AFFINE, code=4)
    (folder / "src" / "person-broken.nii.gz").write_bytes(b"no image")
    ingest(folder / "src", folder / "study.zarr")
    return folder / "study.zarr"


@pytest.fixture(scope="module")
def embeddings(store) -> Embeddings:
    """Return embeddings of the store, repeated to 60 scans of 57 people; only names and attributes matter here."""
    opened = open_store(store)
    n = 60
    return Embeddings(
        features=np.zeros((n, 8), np.float32),
        scans=pd.DataFrame(
            {"row": np.resize(opened.ok_rows, n), "participant": [f"person-{i % 57:03d}" for i in range(n)]}
        ),
        phenotypes=pd.DataFrame(),
        variables={"income": {"labels": {"1": "less than 18,000", "2": "more & more"}, "units": "GBP a year"}},
        attrs={
            "model": "resnet18",
            "weights": {"name": "imagenet", "sha256": SHA},
            "layer": "avgpool",
            "view": "triplanar",
            "slices": 3,
            "scale": 1.0,
            "pooling": "mean over slices",
            "precision": "float32",
            "input": {"rule": "stored / 255, minus mean, over std", "mean": [0.4], "std": [0.2]},
            "store": {"path": str(store), "id": opened.attrs["store_id"], "grid": opened.attrs["grid"]},
            "simulated": False,
            "created_by": {"numpy": "2.9.9"},
        },
    )


def changed(embeddings: Embeddings, **attrs: object) -> Embeddings:
    """Return embeddings with other attributes."""
    return replace(embeddings, attrs={**embeddings.attrs, **attrs})


@pytest.fixture(scope="module")
def results() -> list[TargetResult]:
    """Return one target of each kind, one with a hostile name, one skipped."""
    n = 60
    rng = np.random.default_rng(0)
    fold = np.arange(n) % 5
    sex = rng.integers(0, 2, n)
    male = np.clip(sex + rng.normal(scale=0.4, size=n), 0, 1)
    binary = {"auc": Interval(0.967, 0.941, 0.993, 0.5), "balanced_accuracy": Interval(0.91, 0.86, 0.95, 0.5)}
    none = {
        "r": Interval(0.04, -0.1, 0.17, 0.0),
        "r2": Interval(-0.01, -0.1, 0.05, 0.0),
        "mae": Interval(1.11, 1.0, 1.2, 1.12),
    }
    age = rng.normal(60, 8, n)
    income = rng.integers(1, 6, n).astype(float)
    smoking = OutOfFold(rng.integers(0, 3, n), rng.dirichlet([6, 4, 2], n), fold)
    labels = ["never", "previous", "current"]
    return [
        TargetResult(
            "sex", "binary", "ok", n, 57, metric="auc", metrics=binary, labels=["female", "male"],
            method="logistic regression", out_of_fold=OutOfFold(sex, np.c_[1 - male, male], fold),
        ),
        TargetResult(
            "age", "continuous", "ok", n, 57, metric="r", metrics={"r": Interval(-0.4, -0.6, -0.2, 0.0)},
            units="years", out_of_fold=OutOfFold(age, age + rng.normal(size=n), fold),
        ),
        TargetResult(
            "income", "ordinal", "ok", n, 57, metric="r", metrics=none, units="GBP a year",
            out_of_fold=OutOfFold(income, np.full(n, 3.0), fold),
        ),
        TargetResult(
            "smoking", "multiclass", "ok", n, 57, metric="auc", metrics={"auc": Interval(0.5, 0.4, 0.6, 0.5)},
            labels=labels, out_of_fold=smoking,
        ),
        TargetResult(
            HOSTILE, "multiclass", "ok", n, 57, metric="auc", metrics={"auc": Interval(0.5, 0.4, 0.6, 0.5)},
            labels=[HOSTILE, "$x^{$", "\x00 脳 "], out_of_fold=smoking, units=HOSTILE,
        ),
        TargetResult("head_size", "continuous", "skipped", 12, 11, reason=f"12 scans, at least 20 needed {HOSTILE}"),
    ]  # fmt: skip


def confounded(result: TargetResult) -> TargetResult:
    """Return a result with all that can be asked for."""
    alone, gain = Interval(0.871, 0.81, 0.93, 0.5), Interval(0.096, -0.01, 0.2, 0.0)
    headline = replace(result.headline, boot_low=0.9501, boot_high=0.9802)
    return replace(
        result, metrics={**result.metrics, "auc": headline}, confounds=["site", "head_size"],
        confound_metrics={"auc": alone}, gains={"auc": gain}, p_value=0.0099, permutations=100,
        null="labels exchanged between people",
    )  # fmt: skip
