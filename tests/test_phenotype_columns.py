"""Columns of phenotype tables: spellings of UK Biobank's fields, labels, codes, and values that are not understood."""

from __future__ import annotations

import json

import numpy as np
import pytest
from joined_table import PARTICIPANTS, SESSIONS, join, told

from ingest.dictionary import BY_FIELD
from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes, parse_ukb_column


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
        ("ts_53_2_0", (53, 2, 0)),
        ("x31.0.0", (31, 0, 0)),
        ("X21003.2.0", (21003, 2, 0)),
        ("p20016_i2_a1", (20016, 2, 1)),
        ("P31_I0", (31, 0, 0)),
        ("20016-2.1", (20016, 2, 1)),
        ("Age when attended assessment centre | Instance 2", (21003, 2, 0)),
        ("fluid intelligence score | Instance 3 | Array 1", (20016, 3, 1)),
        ("Body mass index (BMI) | Instance 2", None),
        ("Sex", None),
        ("eid", None),
        ("p31x", None),
        ("31", None),
        ("31-0", None),
        ("p", None),
        ("31-0.0 ", None),
        ("p٣١", None),
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
        "Participant ID,Sex,Age when attended assessment centre | Instance 2,"
        "Age when attended assessment centre | Instance 3,Average total household income before tax | Instance 2",
        '"eid","X31.0.0","X21003.2.0","X21003.3.0","X738.2.0"',
        "EID, 31-0.0,f.21003.2.0,p21003_i3 ,participant.p738_i2",
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
    assert found.bad_values == 4  # 'yes' in two scans of a person, 9 in the scan of that visit, and a duplicate row
    assert any("1 duplicate rows of participants have other values" in line for line in found.warnings)
    assert any("column '31-0.0'" in line and "'yes'" in line for line in found.warnings)


def test_household_size_keeps_its_tail_and_loses_its_codes(tmp_path):
    found = join(tmp_path, "eid,709-2.0\n9000001,100\n9000002,-1\n9000003,-3\n")
    np.testing.assert_array_equal(found.table["household_size"], [100, np.nan, np.nan, np.nan])


def test_labels_may_differ_in_case_and_blanks_and_stand_beside_codes(tmp_path):
    text = (
        "eid\tp31\tp738_i2\tp20116_i2\tp54_i2\tp709_i2\n"
        "9000001\tMALE\tless  than 18,000 \tprevious\tCheadle (imaging)\tDo not know\n"
        "9000002\t0\t 5\tCurrent\t11027.0\tPrefer not to answer\n"
        "9000003\tfemale\t-3\t-3.0\t11099\t-1.0\n"
    )
    found = join(tmp_path, text, "p.tsv")
    assert found.bad_values == 0
    expected = {"sex": [1, 0, 0], "income": [1, 5, np.nan], "smoking": [1, 2, np.nan]}
    expected |= {"site": [11025, 11027, 11099], "household_size": [np.nan] * 3}  # another centre is a category too
    for name, values in expected.items():
        np.testing.assert_array_equal(found.table[name][[0, 2, 3]], values)
    assert told(found, "household_size is missing in every scan", "[2]")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("31-0.0", "2", None),
        ("31-0.0", "0.5", None),
        ("20116-2.0", "3", None),
        ("738-2.0", "6", None),
        ("709-2.0", "inf", None),
        ("709-2.0", "many", None),
        ("21003-2.0", "1e9999", None),
        ("709-2.0", "1.0", 1),
        ("709-2.0", "1e2", 100),
        ("709-2.0", "-7", np.nan),
        ("25000-2.0", "1.25", 1.25),
        ("20016-2.0", "NA", np.nan),
        ("20016-2.0", ".", np.nan),
    ],
)
def test_values(tmp_path, field, value, expected):
    """None: not understood, so missing and counted."""
    found = join(tmp_path, f"eid,{field}\n9000001,{value}\n9000002,\n")
    name = BY_FIELD[int(field.split("-")[0])].name
    np.testing.assert_array_equal(found.table[name][0], np.nan if expected is None else expected)
    assert (found.bad_values > 0) == (expected is None)
    assert told(found, "not understood", field) == (expected is None)


def test_other_arrays_are_not_mistaken_for_the_first(tmp_path):
    found = join(tmp_path, "eid,p20016_i2_a1,p20016_i2_a0,p20016_i2_a2\n9000001,1,7,2\n9000002,3,,4\n")
    np.testing.assert_array_equal(found.table["fluid_intelligence"][[0, 2]], [7, np.nan])
    with pytest.raises(TableError, match="none of the known UK Biobank fields"):
        join(tmp_path, "eid,p20016_i2_a1\n9000001,1\n")


def test_codes_of_other_tables_are_taken_for_uk_biobanks_and_that_is_told(tmp_path):
    found = join(tmp_path, "participant,sex\n9000001,0\n9000002,1\n9000003,1\n")
    assert found.table["sex"].tolist() == [0, 0, 1, 1]
    assert told(found, "the codes of 'sex' are taken for UK Biobank's: 0 female, 1 male", "rename the column")
    found = join(tmp_path, "participant,sex\n9000001,female\n9000002,male\n9000003,male\n")
    assert found.table["sex"].tolist() == [0, 0, 1, 1]
    assert found.warnings == []
    found = join(tmp_path, "participant,sex\n9000001,1\n9000002,2\n9000003,2\n")
    assert told(found, "not understood", "rename the column if it tells something else")


def levels(tmp_path, text: str, sidecar: object):
    (tmp_path / "p.csv").write_text(text)
    written = sidecar if isinstance(sidecar, str) else json.dumps(sidecar)
    return join_phenotypes(tmp_path / "p.csv", PARTICIPANTS, SESSIONS, written)


def test_levels_tell_what_codes_mean(tmp_path):
    found = levels(
        tmp_path,
        "participant,sex,smoking,hand,stage,age\n9000001,0,1,R,3,61\n9000002,1,2,L,1.0,62\n9000003,1,-3,R,9,63\n",
        {
            "sex": {"Levels": {"0": "male", "1": "female"}},
            "smoking": {"Levels": {"1": {"Description": "Never"}, "2": {"Description": "Current"}, "-3": "not known"}},
            "hand": {"Levels": {"L": "left", "R": "right"}},
            "stage": {"Levels": {"1": "none", "2": "mild", "3": "severe", "9": "n/a"}},
            "age": {"Levels": {"61": "sixty-one", "62": "sixty-two", "63": "sixty-three"}},
        },
    )
    assert found.table["sex"].tolist() == [1, 1, 0, 0], "UK Biobank's code of male is 1"
    np.testing.assert_array_equal(found.table["smoking"], [0, 0, 2, np.nan])
    assert found.table["hand"].tolist() == [1, 1, 0, 1]
    assert found.variables["hand"]["labels"] == {"0": "left", "1": "right"}
    np.testing.assert_array_equal(found.table["stage"], [3, 3, 1, np.nan])
    assert found.variables["stage"]["labels"] == {"1": "none", "3": "severe"}
    assert found.variables["stage"]["task"] == "binary"
    assert found.table["age"].tolist() == [61, 61, 62, 63], "which is a number, whatever is said of it"
    assert found.warnings == []


def test_levels_that_lack_a_code_or_cannot_be_read_tell_nothing(tmp_path):
    text = "participant,stage\n9000001,3\n9000002,1\n9000003,2\n"
    found = levels(tmp_path, text, {"stage": {"Levels": {"1": "none", "2": "mild"}}, "x": 3})
    assert (found.table["stage"].tolist(), found.variables["stage"]["labels"]) == ([3, 3, 1, 2], None)
    assert told(levels(tmp_path, text, "{"), "the JSON file beside it is damaged")


def test_numbers_that_float64_cannot_tell_apart_are_left_out(tmp_path):
    found = join(tmp_path, "participant,code,x\n9000001,4611686018427387904,1e20\n9000002,4611686018427387905,2\n")
    assert list(found.table.columns) == ["x"]
    assert told(found, "column 'code' left out", "as ids have")
