"""Phenotype tables joined to scans: whose rows are whose, of which visit, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pytest
from joined_table import PARTICIPANTS, SESSIONS, join, told

from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes, participant_key


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


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("9000001", "9000001"),
        (" 9000001\t", "9000001"),
        ("9000001.0", "9000001"),
        (9000001.0, "9000001"),
        (9000001, "9000001"),
        ("sub-01", "01"),
        ("sub-01.5", "01.5"),
        ("1.0a", "1.0a"),
    ],
)
def test_ids_that_are_one_person(written, key):
    assert participant_key(written) == key


def test_one_field_spelt_twice_is_told_and_never_chosen(tmp_path):
    header = "eid,31-0.0,p31,participant.p31_i0,21003-2.0,21003-2.0\n"
    same = join(tmp_path, header + "9000001,1,Male,,60,60.0\n9000002,,0,0,50,\n")
    np.testing.assert_array_equal(same.table["sex"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(same.table["age"], [60, np.nan, 50, np.nan])
    assert same.bad_values == 0
    assert told(same, "'31-0.0' and 'p31' and 'participant.p31_i0'", "agree")
    differ = join(tmp_path, header + "9000001,1,1,0,60,61\n9000002,0,0,,50,50\n")
    np.testing.assert_array_equal(differ.table["sex"], [np.nan, np.nan, 0, np.nan])
    np.testing.assert_array_equal(differ.table["age"], [np.nan, np.nan, 50, np.nan])
    assert differ.bad_values == 3  # sex in two scans, age in the one of that visit
    assert told(differ, "'21003-2.0' and '21003-2.0'", "differ in 1 scans")
    plain = join(tmp_path, "id,a,a,b\n9000001,x,y,1\n9000002,x,,2\n9000003,,z,3\n")
    np.testing.assert_array_equal(plain.table["a"], [np.nan, np.nan, 0, 1])
    assert plain.variables["a"]["labels"] == {"0": "x", "1": "z"}
    assert plain.bad_values == 2


def test_duplicate_rows_that_agree_are_told_apart_from_those_that_do_not(tmp_path):
    rows = "9000001,1,60\n9000001 ,1,60\n9000001.0,1, 60\n9000002,0,50\n9000002,0,51\n"
    found = join(tmp_path, f"eid,31-0.0,21003-2.0\n{rows}")
    np.testing.assert_array_equal(found.table["age"], [60, np.nan, 50, np.nan])
    assert found.bad_values == 1
    assert told(found, "2 duplicate rows", "say what an earlier row says")
    assert told(found, "1 duplicate rows", "other values", "first")


def test_people_without_a_scan_are_counted_and_no_error(tmp_path):
    found = join(tmp_path, "eid,31-0.0\n9000001,1\n9000002,0\n9000003,0\n9000007,0\n9000008,0\n")
    assert found.bad_values == 0
    assert found.warnings == ["p.csv: 2 of 5 people in the table have no scan, 9000007, 9000008"]


def test_a_table_of_other_people_is_an_error(tmp_path):
    with pytest.raises(
        TableError, match=r"p\.csv: none of the 4 scans .* of people 9000001.*, the rows 9111111; .*another project"
    ):
        join(tmp_path, "eid,31-0.0\n9111111,1\n")


def test_rows_without_an_id(tmp_path):
    found = join(tmp_path, "eid,31-0.0\n9000001,1\n,\n ,\n,1\nNA,0\n9000002,0\n9000003,0\n")
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, 0])
    assert found.bad_values == 2
    assert told(found, "2 rows have no participant id")


def test_scans_of_withdrawn_people_get_nothing_and_count_for_nothing(tmp_path):
    (tmp_path / "p.csv").write_text("eid,31-0.0,21003-2.0\n9000001,1,60\n,0,50\n")
    found = join_phenotypes(tmp_path / "p.csv", ["9000001", "", ""], ["2", "", ""])
    np.testing.assert_array_equal(found.table["sex"], [1, np.nan, np.nan])
    assert found.warnings == ["p.csv: 1 rows have no participant id and are left out"]


def test_plain_tables_are_not_taken_for_uk_biobanks(tmp_path):
    text = ",participant_id,Sex,p300,bmi kg/m2,income,z\n"
    text += "0,sub-9000001,M,4.5,20,Less than 18,000,inf\n".replace("Less than 18,000", '"Less than 18,000"')
    text += '1,sub-9000002,F,5,21,"18,000 to 30,999",-1\n'
    found = join(tmp_path, text)
    assert list(found.table) == ["Sex", "p300", "bmi kg_m2", "income", "z"]
    np.testing.assert_array_equal(found.table["p300"], [4.5, 4.5, 5, np.nan])
    np.testing.assert_array_equal(found.table["income"], [1, 1, 2, np.nan])  # labels of ours keep their order
    np.testing.assert_array_equal(found.table["z"], [np.nan, np.nan, -1, np.nan])  # negative numbers are numbers here
    assert found.variables["Sex"]["field"] == 31
    assert found.variables["p300"]["source"] == "column 'p300' of p.csv"
    assert found.bad_values == 2


def test_names_beside_numbered_fields_are_told(tmp_path):
    found = join(tmp_path, "eid,Sex,age,p21003_i2\n9000001,1,5,60\n9000002,1,5,50\n9000003,0,5,40\n")
    np.testing.assert_array_equal(found.table["age"], [60, np.nan, 50, 40])
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 1, 0])  # a title of the Platform
    assert told(found, "columns left out: 'age'")


def test_answers_of_the_first_assessment_are_told(tmp_path):
    found = join(tmp_path, "eid,21003-0.0,31-0.0\n9000001,50,0\n9000002,51,1\n9000003,52,1\n")
    assert found.table["age"].tolist() == [50, 50, 51, 52]
    assert told(found, "age is there of instance 0 only")
    assert not told(found, "sex is there"), "which is asked once"


def test_sessions_may_be_of_any_length(tmp_path):
    (tmp_path / "p.csv").write_text("eid,21003-2.0\n9000001,60\n")
    found = join_phenotypes(tmp_path / "p.csv", ["9000001"] * 2, ["20190304123456789012", "2"])
    np.testing.assert_array_equal(found.table["age"], [np.nan, 60])


def test_rows_that_all_have_a_field_more_are_named(tmp_path):
    with pytest.raises(TableError, match=r"no rows that fit it: 3 rows have more or fewer fields than the 2"):
        join(tmp_path, "eid,31-0.0\n" + "".join(f"{k},900000{k},1\n" for k in (1, 2, 3)))
