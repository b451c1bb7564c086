"""Which scans a loader takes and how often: rows, phenotypes, strata, weights, and settings that cannot be."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch
from sampled_store import OK, SCANS, visited
from sampled_store import path as path  # a fixture
from sampled_store import store as store  # a fixture
from sampled_store import voxels as voxels  # a fixture
from small_store import make_store

from ingest.store import open_store, write_phenotypes
from loaders import Augmentation, VolumeReader, open_loader
from loaders.opening import choose_backend
from loaders.select import balancing_weights, select_rows, strata_of


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, OK),
        ({"rows": [9, 2, 2, 0]}, [9, 2, 2, 0]),
        ({"rows": range(3)}, [0, 1, 2]),
        ({"rows": []}, []),
        ({"rows": np.empty(0)}, []),
        ({"rows": np.array([7, 3], dtype=np.uint16)}, [7, 3]),
        ({"rows": pd.Series([5, 1])}, [5, 1]),
        ({"rows": np.arange(SCANS) < 6}, [0, 1, 2, 3, 5]),  # a mask leaves out what holds no volume
        ({"rows": [False] * SCANS}, []),
        ({"known": ["age"]}, [row for row in OK if row not in (2, 9, 11)]),
        ({"known": ["sex", "age"], "rows": [9, 8, 2, 1]}, [8, 1]),
        ({"where": "age >= 70"}, [row for row in OK if row >= 20]),
        ({"where": "age >= 70 and sex == 1 and session == '3'"}, [21, 23, 25]),
        ({"where": "participant in ['p3', 'p4', 'p5']"}, [3, 5]),
        ({"where": "site == 3 or age < 52"}, [0, 1, 22, 23, 24, 25]),
        ({"where": "`1st` == 7"}, [7]),
        ({"where": "age > 1000"}, []),
        ({"where": "sex == 1", "rows": [9, 8, 3, 2]}, [9, 3]),
        ({"where": "sex == 1", "rows": np.arange(SCANS) < 4, "known": ["age"]}, [1, 3]),
    ],
)
def test_rows_are_selected(store, arguments, expected):
    selected = select_rows(store, **arguments)
    assert selected.tolist() == expected
    assert selected.dtype == np.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [0, 17]}, IndexError, "row 17 holds no volume: its status is bad_nifti; use rows with status ok"),
        ({"rows": [SCANS]}, IndexError, "row 26 is not in the store, which has rows 0 to 25"),
        ({"rows": [0, -1]}, IndexError, "row -1 is not in the store"),
        ({"rows": np.ones(5, bool)}, ValueError, r"the mask of rows has shape \(5,\), expected \(26,\)"),
        ({"rows": [1.0, 2.5]}, ValueError, "rows are float64, expected whole numbers, or a mask of bool"),
        ({"rows": pd.Series([True] * SCANS, dtype=object)}, ValueError, "rows are object, expected whole numbers"),
        ({"rows": ["p1"]}, ValueError, "rows are <U2, expected whole numbers"),
        ({"known": ["iq"]}, ValueError, "the store has no phenotype 'iq'; it has 1st, age, sex, site"),
        (
            {"where": "iq > 1"},
            ValueError,
            "'iq > 1' cannot be evaluated: name 'iq' is not defined; columns are brain_voxels, .*, sex, site",
        ),
        ({"where": "age >"}, ValueError, "'age >' cannot be evaluated: invalid syntax"),
        ({"where": "participant > 3"}, ValueError, "'participant > 3' cannot be evaluated: .*; columns are"),
        ({"where": ""}, ValueError, "'' cannot be evaluated"),
        ({"where": "age + 1"}, ValueError, "'age \\+ 1' is not true or false for each scan; for example: age >= 60"),
        ({"where": "1 < 2"}, ValueError, "'1 < 2' is not true or false for each scan"),
        ({"where": "old = age > 60"}, ValueError, "'old = age > 60' is not true or false for each scan"),
    ],
)
def test_selections_that_cannot_be_are_refused(store, arguments, error, message):
    with pytest.raises(error, match=message):
        select_rows(store, **arguments)


def test_a_name_of_two_columns_must_say_which_is_meant(tmp_path):
    make_store(tmp_path / "s.zarr", 4)
    write_phenotypes(tmp_path / "s.zarr", pd.DataFrame({"scale": [5.0, 6, 7, 8], "age": [50.0, 60, 70, 80]}), {})
    store = open_store(tmp_path / "s.zarr")
    for where in ("scale < 7", "age > 50 and `scale` < 7"):
        with pytest.raises(
            ValueError, match=r"has scale, which is a column of the scans and a phenotype; write `scans\.scale` or `ph"
        ):
            select_rows(store, where=where)
    assert select_rows(store, where="`phenotypes.scale` < 7").tolist() == [0, 1]
    assert select_rows(store, where="`scans.scale` == 1 and age > 60").tolist() == [2, 3]
    assert select_rows(store, where="age > 70").tolist() == [3], "one that is not asked for does no harm"
    assert select_rows(store, known=["scale"]).tolist() == [0, 1, 2, 3]


def test_a_reader_takes_rows_as_a_loader_does(store, voxels):
    with VolumeReader(store) as reader:
        np.testing.assert_array_equal(reader.read(np.arange(SCANS) < 6), voxels[[0, 1, 2, 3, 5]])
        np.testing.assert_array_equal(reader.read([9, 2, 2]), voxels[[9, 2, 2]])
        assert reader.read([]).shape == (0, *reader.shape)
        for rows, message in (([2.7], "rows are float64, expected whole"), ([True], r"mask of rows has shape \(1,\)")):
            with pytest.raises(ValueError, match=message):
                reader.read(rows)


def test_a_loader_of_selected_scans_has_those(store, voxels):
    with open_loader(store, where="sex == 1", known=["age"], batch_size=100, backend="torch") as loader:
        (batch,) = loader
    assert batch.rows.tolist() == [row for row in OK if row % 2 and row not in (9, 11)]
    np.testing.assert_array_equal(batch.images.numpy(), voxels[batch.rows])
    shape = " x ".join(map(str, batch.images.shape))
    assert repr(batch) == f"Batch({len(batch.rows)} scans that count, images {shape} uint8 on cpu)"
    with open_loader(store, where="sex == 1", known="age", batch_size=100, backend="torch") as loader:
        assert next(iter(loader)).rows.tolist() == batch.rows.tolist()
    with open_loader(store, where="age > 1000", shuffle=True, stratify="sex", backend="torch") as loader:
        assert len(loader) == len(list(loader)) == 0
        assert loader.state_dict()["position"] == 0


# ------------------------------------------------------------------------------------ strata, weights, what is refused


def test_strata_are_the_values_or_quantiles_and_missing_values_are_one():
    nan = np.nan
    assert strata_of(np.array([7.0, nan, 3, 7, nan])).tolist() == [1, -1, 0, 1, -1]
    assert strata_of(np.array([nan, nan])).tolist() == [-1, -1]
    assert strata_of(np.empty(0)).tolist() == []
    assert strata_of(np.arange(10.0)).tolist() == list(range(10))
    values = np.random.default_rng(0).permutation(1000.0 + np.arange(200))
    values[:20] = nan
    labels = strata_of(values)
    assert np.bincount(labels + 1).tolist() == [20] + [18] * 10
    assert all(values[labels == a].max() < values[labels == a + 1].min() for a in range(9))
    assert np.unique(strata_of(np.arange(30.0), bins=3)).tolist() == [0, 1, 2]
    many_zeros = strata_of(np.concatenate([np.zeros(100), np.arange(1.0, 21)]))
    assert len(np.unique(many_zeros[:100])) == 1
    assert np.unique(many_zeros[100:]).size > 1


def test_balancing_weights_make_every_stratum_as_likely():
    values = np.array([1.0, 1, 1, 1, 2, np.nan, np.nan, 3])
    weights = balancing_weights(values)
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25, 1, 0.5, 0.5, 1]
    values = np.random.default_rng(0).exponential(size=1000)
    weights, labels = balancing_weights(values), strata_of(values)
    np.testing.assert_allclose([weights[labels == label].sum() for label in range(10)], 1)


def test_a_balanced_loader_draws_each_site_as_often(store):
    site = store.phenotypes["site"].to_numpy()
    with open_loader(store, balance="site", batch_size=100, view="axial", slices=1, backend="torch") as loader:
        drawn = np.concatenate([batch.rows for _ in range(60) for batch in loader])
    counts = np.bincount(site[drawn].astype(int))[1:]
    expected = len(drawn) / 3
    assert ((counts - expected) ** 2 / expected).sum() < 2 + 5 * 2  # 2 degrees of freedom
    assert set(drawn) == set(OK)


def test_a_loader_with_weights_draws_in_proportion_and_those_of_weight_zero_never(store):
    weights = np.arange(len(OK)) % 4
    with open_loader(store, weights=weights, batch_size=100, view="axial", slices=1, backend="torch") as loader:
        drawn = np.concatenate([batch.rows for _ in range(60) for batch in loader])
    per_weight = np.bincount(weights[np.searchsorted(OK, drawn)], minlength=4)
    assert per_weight[0] == 0
    expected = len(drawn) * np.arange(1, 4) / 6
    assert ((per_weight[1:] - expected) ** 2 / expected).sum() < 2 + 5 * 2  # 2 degrees of freedom


def test_stratified_batches_have_each_sex_in_proportion(store):
    sex = store.phenotypes["sex"].to_numpy()
    share = sex[OK].mean()
    with open_loader(store, shuffle=True, stratify="sex", batch_size=5, backend="torch") as loader:
        for _ in range(3):
            batches = list(loader)
            assert sorted(visited(batches)) == OK
            assert all(abs(sex[batch.rows].sum() - share * len(batch.rows)) <= 1 for batch in batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 weights were given for 24 rows, expected one for each"),
        ({"weights": np.ones(SCANS)}, "26 weights were given for 24 rows"),
        ({"weights": [-1.0] + [1.0] * 23}, "weights must be finite, not negative, and not all zero"),
        ({"weights": [np.nan] + [1.0] * 23}, "weights must be finite"),
        ({"weights": [np.inf] + [1.0] * 23}, "weights must be finite"),
        ({"weights": np.zeros(24)}, "not all zero"),
        ({"weights": np.ones(24), "balance": "sex"}, "weights, balance and stratify exclude one another"),
        ({"balance": "sex", "stratify": "sex", "shuffle": True}, "exclude one another; give one of them"),
        ({"stratify": "sex"}, "stratify orders a shuffled epoch; it needs shuffle=True"),
        ({"stratify": "iq", "shuffle": True}, "the store has no phenotype 'iq'; it has 1st, age, sex, site"),
        ({"balance": "iq"}, "the store has no phenotype 'iq'"),
        ({"where": "iq > 1"}, "'iq > 1' cannot be evaluated"),
        ({"known": ["iq"]}, "the store has no phenotype 'iq'"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"rank": 1}, "rank is 1 and world_size None, expected both or neither"),
        ({"world_size": 2}, "rank is None and world_size 2, expected both or neither"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        (
            {"seed": 2**63, "augmentation": Augmentation(), "dtype": "float32"},
            r"seed is 9223372036854775808, expected 0 to 2\*\*63 - 1 with an augmentation",
        ),
        ({"on_error": "ignore"}, "on_error is 'ignore', expected raise or skip"),
        ({"deadline": 0}, "deadline is 0, expected a number of seconds above 0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"threads": 0}, "threads is 0, expected 1 to 1024"),
        ({"threads": 2000}, "threads is 2000, expected 1 to 1024"),
        ({"threads": 2.0}, "threads is 2.0, expected a whole number, 1 to 1024"),
        ({"batch_size": 4.0}, "batch_size is 4.0, expected a whole number, 1 or more"),
        ({"batch_size": "4"}, "batch_size is '4', expected a whole number"),
        ({"batch_size": True}, "batch_size is True, expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number, 0 or more"),
        ({"seed": None, "shuffle": True}, "seed is None, expected a whole number"),
        ({"mean": [0.4] * 3, "dtype": "float32"}, r"mean is \[0.4, 0.4, 0.4\], expected one number"),
        ({"std": "0.2", "dtype": "float32"}, "std is '0.2', expected one number"),
        ({"cache_bytes": "4GB", "cache_dir": "somewhere"}, "cache_bytes is '4GB', expected a whole number, 1 or more"),
        (
            {"planes": [[1.5], [2], [3]], "augmentation": Augmentation(), "dtype": "float32"},
            r"planes are \[\[1.5\], \[2\], \[3\]\], expected whole numbers",
        ),
        (
            {"planes": [[True] * 16, [2], [3]], "augmentation": Augmentation(), "dtype": "float32"},
            r"planes are \[\[True, .*, \[3\]\], expected whole numbers",
        ),
        ({"cache_bytes": 1000}, "a cache needs both cache_dir and cache_bytes"),
        ({"cache_dir": "somewhere"}, "a cache needs both"),
        ({"backend": "numpy"}, "backend 'numpy' is unknown, expected one of auto, dali, torch"),
        ({"device": "meta"}, "device is 'meta', expected auto, cpu, cuda, or cuda:N"),
        ({"device": "gpu"}, "device is 'gpu', expected auto, cpu, cuda, or cuda:N"),
        ({"view": "all"}, "view is 'all', expected one of axial, coronal, sagittal, triplanar, volume"),
        ({"dtype": "float64"}, "dtype is float64, expected one of uint8, float32"),
        ({"augmentation": Augmentation()}, "uint8 pictures are not augmented"),
        ({"mean": 0.5}, "uint8 pictures are not normalised"),
        ({"channels": 2}, "channels is 2, expected None, 1 or 3"),
    ],
)
def test_settings_that_cannot_be_are_refused(store, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_loader(store, **arguments)


def test_a_gpu_that_is_not_there_is_refused_at_once(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is cuda:7, but of 2 GPUs there is none with this number"):
        open_loader(store, device="cuda:7")


@pytest.mark.parametrize(
    ("view", "cores", "backend"),
    [
        ("volume", 64, "dali"), ("axial", 2, "torch"), ("coronal", 64, "dali"), ("triplanar", 8, "dali"),
        ("triplanar", 16, "torch"),
    ],
)  # fmt: skip
def test_who_decodes_for_a_gpu_depends_on_the_view_and_the_cores(monkeypatch, view, cores, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert choose_backend("auto", None, view) == (backend, torch.device("cuda", 0))
    assert choose_backend("auto", "cpu", view) == ("torch", torch.device("cpu"))
    assert choose_backend("dali", None, view)[0] == "dali"
    assert choose_backend("torch", None, view) == ("torch", torch.device("cuda", 0)), "a GPU, whatever the backend"


def test_without_dali_batches_are_on_the_gpu_as_well(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choose_backend("auto") == ("torch", torch.device("cuda", 0))


@pytest.mark.parametrize(("processes", "threads"), [(None, 8), ("4", 3), ("50", 1), ("many", 8), ("0", 8)])
def test_processes_that_torchrun_starts_share_the_cores(store, monkeypatch, processes, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    with open_loader(store, backend="torch", device="cpu") as loader:
        assert loader.timing.threads == threads


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"where": "participant == '1'"}, ["participant == '1'", "of none of 24 scans", "['labels']", "ids as text"]),
        ({"where": "age > 70", "rows": [0, 1]}, ["age > 70", "none of 2 scans"]),
        ({"known": "age", "rows": [2, 9]}, ["known='age' leaves no scan", "missing of all 2"]),
        ({"where": "age > 70"}, []),
        ({"where": "age > 70", "rows": []}, []),
    ],
)
def test_a_condition_that_leaves_no_scan_is_warned_of(store, caplog, arguments, said):
    select_rows(store, **arguments)
    assert len(caplog.messages) == bool(said)
    for words in said:
        assert words in caplog.text


def test_a_store_without_phenotypes_says_so(tmp_path):
    make_store(tmp_path / "s.zarr", 3)
    with pytest.raises(ValueError, match="the store has no phenotype 'age'; it has none"):
        open_loader(tmp_path / "s.zarr", balance="age")
    assert select_rows(open_store(tmp_path / "s.zarr"), where="source == '1.nii.gz'").tolist() == [1]
