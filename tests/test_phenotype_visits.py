"""Plain tables with a row per visit: a scan gets the answers of its own, and who has none is told."""

from __future__ import annotations

import numpy as np
import pytest
from joined_table import join, told

from ingest.phenotypes import join_phenotypes

NAN = np.nan


@pytest.mark.parametrize("column", ["session_id", "session", "ses", "Visit"])
def test_a_scan_gets_the_answers_of_its_own_visit(tmp_path, column):
    text = f"participant_id,age,{column}\nsub-9000001,60,ses-2\nsub-9000001,62,ses-3\n9000002,50,2.0\n9000003,40, 2\n"
    found = join(tmp_path, text)
    assert list(found.table) == ["age"]
    np.testing.assert_array_equal(found.table["age"], [60, 62, 50, 40])
    assert (found.bad_values, found.warnings) == (0, [])


def test_a_row_without_a_session_is_of_all_visits(tmp_path):
    text = "participant,visit,sex,age\n9000001,,F,\n9000001,2,n/a,60\n9000001,3,,62\n9000002,n/a,M,50\n9000003,2,M,\n"
    found = join(tmp_path, text)
    np.testing.assert_array_equal(found.table["sex"], [0, 0, 1, 1])
    np.testing.assert_array_equal(found.table["age"], [60, 62, 50, NAN])
    assert (found.bad_values, found.warnings) == (0, [])


def test_rows_are_duplicates_only_of_the_same_visit(tmp_path):
    text = "id,session,x\n9000001,2,1\n9000001,ses-2,1\n9000001,3,5\n9000001,3.0,6\n9000002,2,1\n9000003,2,1\n"
    found = join(tmp_path, text)
    np.testing.assert_array_equal(found.table["x"], [1, 5, 1, 1])
    assert found.bad_values == 1
    assert told(found, "1 duplicate rows of participants and visits say what")
    assert told(found, "1 duplicate rows of participants and visits have other values")


def test_scans_without_a_session_get_the_only_visit_and_never_one_of_several(tmp_path):
    (tmp_path / "p.csv").write_text("id,session,x,y\n01,1,5,1\n02,1,6,1\n02,2,7,1\n02,,,2\n03,,8,1\n")
    found = join_phenotypes(tmp_path / "p.csv", ["01", "02", "03", ""], [""] * 4)
    np.testing.assert_array_equal(found.table["x"], [5, NAN, 8, NAN])
    np.testing.assert_array_equal(found.table["y"], [1, 2, 1, NAN])
    assert found.bad_values == 1
    assert told(found, "1 scans have no session", "one visit of their person")
    assert told(found, "1 scans have no session", "'session' has several")


def test_visits_that_no_row_is_of_are_told(tmp_path):
    found = join(tmp_path, "id,session,x\n9000001,2,1\n9000002,2,2\n9000003,2,3\n")
    np.testing.assert_array_equal(found.table["x"], [1, NAN, 2, 3])
    assert found.bad_values == 0
    assert told(found, "1 scans are of a session that has no row")
    other = join(tmp_path, "id,visit,x\n9000001,baseline,1\n9000002,baseline,2\n9000003,baseline,3\n")
    assert other.table["x"].isna().all()
    assert other.bad_values == 4
    assert told(other, "none of the 4 scans", "'2'", "'visit' has such as 'baseline'")
