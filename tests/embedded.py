"""Embeddings with known effects, for tests of probes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from extract.embeddings import Embeddings


def make_embeddings(
    features: np.ndarray,
    phenotypes: dict[str, np.ndarray],
    *,
    people: np.ndarray | None = None,
    variables: dict[str, dict[str, object]] | None = None,
    scans: dict[str, np.ndarray] | None = None,
    space: str = "native",
    simulated: bool = True,
) -> Embeddings:
    """Return embeddings as extract would write them; `scans` are more columns of the scans."""
    n = len(features)
    people = np.arange(n) if people is None else people
    table = pd.DataFrame(
        {
            "row": np.arange(n),
            "participant": [f"9{person:06d}" for person in people],
            "session": ["2"] * n,
            "modality": ["T1w"] * n,
            **(scans or {}),
        }
    )
    attrs = {
        "model": "resnet18",
        "weights": {"name": "random", "sha256": "0" * 64},
        "simulated": simulated,
        "store": {"grid": {"space": space, "voxel_mm": 1.0}},
    }
    values = pd.DataFrame({name: np.asarray(column, dtype=np.float64) for name, column in phenotypes.items()})
    return Embeddings(features.astype(np.float32), table, values.reindex(range(n)), variables or {}, attrs)


def make_cohort() -> Embeddings:
    """Return 120 scans of 100 people: sex, age and smoking shape the features, fluid intelligence does not."""
    rng = np.random.default_rng(0)
    people = np.concatenate([np.arange(100), np.arange(20)])
    sex = rng.permutation(np.arange(100) % 2)[people].astype(float)
    age = rng.uniform(45, 80, 100)[people]
    smoking = rng.permutation(np.arange(100) % 3)[people].astype(float)
    features = rng.normal(size=(120, 40))
    features[:, 0] += 2 * sex
    features[:, 1:4] += (age[:, None] - 62) / 8
    features[:, 5:8] += 2 * np.eye(3)[smoking.astype(int)]
    age[:10] = np.nan
    return make_embeddings(
        features,
        {
            "site": rng.integers(1, 3, 120),
            "something": rng.normal(size=120),
            "smoking": smoking,
            "fluid_intelligence": rng.integers(0, 14, 120),
            "age": age,
            "gender": sex,
        },
        people=people,
        variables={
            "site": {"task": "multiclass", "confound": True},
            "gender": {"task": "binary", "labels": {"0": "female", "1": "male"}},
            "smoking": {"task": "multiclass", "labels": {"0": "never", "1": "previous", "2": "current"}},
            "age": {"task": "continuous", "units": "years"},
        },
    )
