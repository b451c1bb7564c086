"""Variables of plain tables: numbers with stray texts, decimal commas, special codes, names that no store can have."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from joined_table import join, told
from small_store import make_store

from ingest.phenotypes import join_phenotypes
from ingest.store import open_store, write_phenotypes

NAN = np.nan


def column(folder, header: str, answers: list[str], separator: str = ",", name: str = "p.csv"):
    rows = "".join(f"{number}{separator}{answer}\n" for number, answer in enumerate(answers))
    (folder / name).write_text(f"id{separator}{header}\n{rows}")
    return join_phenotypes(folder / name, map(str, range(len(answers))), [""] * len(answers))


@pytest.mark.parametrize("name", ["age", "years"])
def test_a_stray_text_is_a_bad_value_amid_numbers(tmp_path, name):
    found = column(tmp_path, name, ["60", "72", "9", "100", "89+", "45", "n/a"])
    np.testing.assert_array_equal(found.table[name], [60, 72, 9, 100, NAN, 45, NAN])
    assert found.variables[name]["labels"] is None
    assert found.bad_values == 1
    assert told(found, "1 values of", "'89+'")
    bmi = column(tmp_path, "bmi", ["25.5", "unknown", "unknown", "110", "30", "inf"])
    np.testing.assert_array_equal(bmi.table["bmi"], [25.5, NAN, NAN, 110, 30, NAN])
    assert bmi.bad_values == 3


def test_dates_are_told(tmp_path):
    found = column(tmp_path, "when", ["2001-02-03", "2001-02-04 10:00", ""])
    (line,) = found.warnings
    assert "column 'when' has dates, which are taken as categories" in line
    assert list(found.table["when"][:2]) == [0, 1]
    assert column(tmp_path, "who", ["2001-02-03", "later"]).warnings == []


def test_texts_that_are_as_many_as_numbers_are_categories(tmp_path):
    found = column(tmp_path, "group", ["a", "1", "b", "2"])
    np.testing.assert_array_equal(found.table["group"], [2, 0, 3, 1])
    assert found.bad_values == 0
    age = column(tmp_path, "age", ["young", "old", "60"])  # but age is a number, whatever stands in it
    np.testing.assert_array_equal(age.table["age"], [NAN, NAN, 60])
    assert age.bad_values == 2
    sex = column(tmp_path, "sex", ["m", "f", "unknown"])
    assert list(sex.variables["sex"]["labels"].values()) == ["f", "m", "unknown"]


@pytest.mark.parametrize("name", ["age", "years"])
def test_decimal_commas_are_read_where_semicolons_separate(tmp_path, name):
    found = column(tmp_path, name, ["60,5", "-1,25", "44", "1.5"], ";")
    np.testing.assert_array_equal(found.table[name], [60.5, -1.25, 44, 1.5])
    assert (found.bad_values, found.warnings) == (0, [])
    tabs = column(tmp_path, name, ["60,5", "55,2", "44,1"], "\t", "p.tsv")
    assert tabs.table[name].isna().all()
    assert tabs.bad_values == 3
    assert told(tabs, "'60,5'")
    ukb = join(tmp_path, "eid;25000-2.0\n9000001;1,25\n9000002;1,5\n9000003;1\n")
    np.testing.assert_array_equal(ukb.table["head_size"], [1.25, NAN, 1.5, 1])


def test_negative_numbers_are_numbers_and_only_special_codes_are_missing(tmp_path):
    found = join(
        tmp_path,
        "participant,age,fluid_intelligence,head_size,household_size,smoking\n"
        "9000001,-1.2,0.3,-0.1,-1,-3\n9000002,0.7,-0.3,0.1,-7,1\n9000003,0.1,0.1,0.2,2,-1\n",
    )
    np.testing.assert_array_equal(found.table["age"], [-1.2, -1.2, 0.7, 0.1])
    np.testing.assert_array_equal(found.table["fluid_intelligence"], [0.3, 0.3, -0.3, 0.1])
    np.testing.assert_array_equal(found.table["head_size"], [-0.1, -0.1, 0.1, 0.2])
    np.testing.assert_array_equal(found.table["household_size"], [NAN, NAN, -7, 2])
    np.testing.assert_array_equal(found.table["smoking"], [NAN, NAN, 1, NAN])
    assert found.bad_values == 1  # -1 is no code of smoking
    assert told(found, "2 values of 'household_size'", "-1 (do not know), -3 (prefer not to answer)")
    assert told(found, "2 values of 'smoking'", "-3 (prefer not to answer)")
    assert found.variables["age"]["coding"] == "UK Biobank"
    assert found.variables["smoking"]["coding"] == "UK Biobank data-coding 90; its codes -3 are missing"


GOOD = ["a b", "é" * 127, "...x", ".zarray", "_a", "two\nlines", "100%", "a:b?*", "ZARR.JSON"]
BAD = ["a" * 256, "é" * 128, "/" * 256, ".", "..", "...", "zarr.json", "__index__", "nul\0"]


def test_names_that_no_store_can_have_are_left_out_before_the_work(tmp_path):
    columns = {"id": ["p0", "p1"], **{name: [1, 2] for name in [*GOOD, *BAD]}}
    pd.DataFrame(columns).to_parquet(tmp_path / "p.parquet")
    found = join_phenotypes(tmp_path / "p.parquet", ["p0", "p1"], ["", ""])
    assert list(found.table) == GOOD
    assert len(found.warnings) == len(BAD)
    assert told(found, "'zarr.json' left out", "rename it")
    assert told(found, "'" + "a" * 60 + "...'", "256 bytes, at most 255")
    make_store(tmp_path / "s.zarr", 2)
    write_phenotypes(tmp_path / "s.zarr", found.table, found.variables)  # those that are taken can be stored
    stored = open_store(tmp_path / "s.zarr").phenotypes
    assert sorted(stored) == sorted(GOOD)
    assert stored.to_numpy().tolist() == [[1.0] * len(GOOD), [2.0] * len(GOOD)]
