"""Spellings, codes and joins of phenotype tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes, parse_ukb_column

PARTICIPANTS = ["9000001", "9000001", "9000002", "9000003"]
SESSIONS = ["2", "3", "2", "2"]


def join(path: Path, text: str, name: str = "p.csv"):
    (path / name).write_text(text, encoding="utf-8")
    return join_phenotypes(path / name, PARTICIPANTS, SESSIONS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("31-0.0", (31, 0, 0)),
        ("f.21003.2.0", (21003, 2, 0)),
        ("p31", (31, 0, 0)),
        ("p21003_i2", (21003, 2, 0)),
        ("p399_i2_a1", (399, 2, 1)),
        ("participant.p20016_i2", (20016, 2, 0)),
        ("n_31_0_0", (31, 0, 0)),
        ("eid", None),
        ("p31x", None),
        ("31", None),
    ],
)
def test_column_spellings(name, expected):
    parsed = parse_ukb_column(name)
    assert (parsed and (parsed.field, parsed.instance, parsed.array)) == expected


@pytest.mark.parametrize(
    "header",
    [
        "eid,31-0.0,21003-2.0,21003-3.0,738-2.0",
        "f.eid,f.31.0.0,f.21003.2.0,f.21003.3.0,f.738.2.0",
        "participant.eid,participant.p31,participant.p21003_i2,participant.p21003_i3,participant.p738_i2",
        "n_eid,n_31_0_0,n_21003_2_0,n_21003_3_0,n_738_2_0",
        "Participant ID,p31,p21003_i2,p21003_i3,p738_i2",
    ],
)
def test_all_spellings_and_the_instance_of_the_scan(tmp_path, header):
    found = join(tmp_path, header + "\n9000001,1,60,63,-3\n9000002,0,50,,5\n9000009,0,1,1,1\n")
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(found.table["age"], [60, 63, 50, np.nan])
    np.testing.assert_array_equal(found.table["income"], [np.nan, np.nan, 5, np.nan])  # -3 is missing; no instance 3
    assert found.variables["sex"]["field"] == 31
    assert found.variables["income"]["task"] == "ordinal"
    assert found.bad_values == 0
    assert any("1 of 4 scans have no row" in line for line in found.warnings)


def test_decoded_labels_and_commas_in_a_tsv(tmp_path):
    text = (
        "eid\tp31\tp738_i2\tp20116_i2\n"
        "9000001\tMale\tGreater than 100,000\tNever\n"
        '9000002\tFemale\t"18,000 to 30,999"\tPrefer not to answer\n'
    )
    found = join(tmp_path, text, "p.tsv")
    np.testing.assert_array_equal(found.table["sex"][[0, 2]], [1, 0])
    np.testing.assert_array_equal(found.table["income"][[0, 2]], [5, 2])
    np.testing.assert_array_equal(found.table["smoking"][[0, 2]], [0, np.nan])
    assert found.bad_values == 0


def test_what_is_not_understood_is_counted(tmp_path):
    found = join(tmp_path, "eid,31-0.0,738-2.0\n9000001,yes,9\n9000002,0,2\n9000002,1,3\n9000003,,\n")
    np.testing.assert_array_equal(found.table["sex"], [np.nan, np.nan, 0, np.nan])
    np.testing.assert_array_equal(found.table["income"], [np.nan, np.nan, 2, np.nan])
    assert found.bad_values == 5  # 'yes' and 9 of a person with two scans, and a duplicate row
    assert any("duplicate" in line for line in found.warnings)


def test_household_size_keeps_its_tail_and_loses_its_codes(tmp_path):
    found = join(tmp_path, "eid,709-2.0\n9000001,100\n9000002,-1\n9000003,-3\n")
    np.testing.assert_array_equal(found.table["household_size"], [100, np.nan, np.nan, np.nan])


def test_parquet_reads_only_the_columns_it_needs(tmp_path):
    frame = pd.DataFrame({"eid": [9000001, 9000002], "p31": [1, 0], "p4080_i2_a0": [120.0, np.nan]})
    frame.to_parquet(tmp_path / "p.parquet")
    found = join_phenotypes(tmp_path / "p.parquet", PARTICIPANTS, SESSIONS)
    assert list(found.table) == ["sex"]
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, np.nan])


def test_plain_tables_take_every_column(tmp_path):
    rows = "\n".join(f"900000{i},{i * 1.5},{'yes' if i % 2 else 'no'},remark {i}" for i in range(1, 4))
    found = join(tmp_path, f"participant,bmi,patient,note\n{rows}\n")
    np.testing.assert_array_equal(found.table["bmi"], [1.5, 1.5, 3.0, 4.5])
    np.testing.assert_array_equal(found.table["patient"], [1, 1, 0, 1])
    assert found.variables["patient"]["labels"] == {"0": "no", "1": "yes"}
    assert found.variables["patient"]["task"] == "binary"


@pytest.mark.parametrize("text", ["", "name,age\nx,1\n", "eid,4080-0.0\n9000001,120\n"])
def test_unusable_tables_are_refused(tmp_path, text):
    with pytest.raises(TableError):
        join(tmp_path, text)


def test_an_absent_table_is_refused(tmp_path):
    with pytest.raises(TableError, match="no phenotype table"):
        join_phenotypes(tmp_path / "none.csv", PARTICIPANTS, SESSIONS)


def test_scans_without_a_session_get_the_first_imaging_visit(tmp_path):
    (tmp_path / "p.csv").write_text("eid,31-0.0,21003-2.0,21003-3.0\n9000001,1,55,58\n")
    found = join_phenotypes(tmp_path / "p.csv", ["9000001"] * 4, ["", "2", "3", "5"])
    np.testing.assert_array_equal(found.table["age"], [55, 55, 58, np.nan])
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 1, 1])
    assert any("1 scans have no session" in line for line in found.warnings)
    assert any("1 scans are of a session that no column" in line for line in found.warnings)
