"""The embedding file: one row per scan, with who it is, what is known of them, and how it was made."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr

from ingest.store import quiet_zarr, write_column

FORMAT = "brain-embeddings"
FORMAT_VERSION = 1
SUFFIXES = (".zarr", ".h5")


@dataclass(frozen=True)
class Embeddings:
    """Frozen-encoder features of scans.

    Attributes
    ----------
    features : numpy.ndarray
        float32, (scan, feature).
    scans : pandas.DataFrame
        One row per scan in the same order: ``row`` (row of the scan in the volume store), ``participant``,
        ``session``, ``modality`` and the numeric columns that can serve as confounds (``brain_voxels``, ``head_scale``).
    phenotypes : pandas.DataFrame
        float64, one column per variable, NaN where missing.
    variables : dict
        For each phenotype its attributes in the store: ``field``, ``instance``, ``coding``, ``units``, ``task``,
        ``labels`` (any of them may be None).
    attrs : dict
        Provenance: model, weights (name, sha256), layer, views, precision, store (path, id), ``simulated``, versions.
    """

    features: np.ndarray
    scans: pd.DataFrame
    phenotypes: pd.DataFrame
    variables: dict[str, dict[str, Any]] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
