"""Spellings, codes and joins of phenotype tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.dictionary import BY_FIELD, TASKS, VARIABLES
from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes, parse_ukb_column, participant_key

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


def told(found, *words: str) -> bool:
    """Tell whether one warning holds all the words."""
    return any(all(word in line for word in words) for line in found.warnings)


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


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "separator"), [("p.csv", ","), ("p.csv", ";"), ("p.csv", "\t"), ("p.txt", "\t"),
                                                  ("p.tab", "\t"), ("p.txt", ","), ("p.dat", ";")])  # fmt: skip
def test_separators_line_ends_and_byte_order_marks(tmp_path, name, separator, bom, ending):
    lines = [["eid", "31-0.0", "738-2.0"], ["9000001", "Male", '"31,000 to 51,999"'], [" 9000002.0 ", "0", "4.0"]]
    text = bom + ending.join(separator.join(line) for line in lines)
    (tmp_path / name).write_bytes(text.encode())  # without an end of the last line
    found = join_phenotypes(tmp_path / name, PARTICIPANTS, SESSIONS)
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(found.table["income"], [3, np.nan, 4, np.nan])
    assert found.bad_values == 0


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
    assert found.warnings == ["p.csv: 2 of 5 people in the table have no scan"]


def test_a_table_of_other_people_is_an_error(tmp_path):
    found = join(tmp_path, "eid,31-0.0\n9111111,1\n")
    assert found.table["sex"].isna().all()
    assert found.bad_values == 4
    assert told(found, "none of the 4 scans", "another project")


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


@pytest.mark.parametrize(
    ("rows", "odd"),
    [
        ("9000001,1,60\n9000002,0\n9000003,0,50\n", 3),  # cut short
        ("9000001,1,60\n9000002,Female,18,000\n9000003,0,50\n", 3),  # a comma that nobody quoted
        ("9000001,1,60\n9000003,0,50\n9000002,0,", None),  # complete
        ("9000001,1,60\n9000003,0,50\n9000002", 4),  # the end is missing
    ],
)
def test_rows_of_another_length_are_left_out_and_counted(tmp_path, rows, odd):
    found = join(tmp_path, f"eid,31-0.0,21003-2.0\n{rows}")
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0 if odd is None else np.nan, 0])
    assert found.bad_values == (odd is not None)
    assert told(found, "fields", f"row {odd}") == (odd is not None)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n\n\n", "is empty"),
        (b"eid,31-0.0\n", "a header and no rows"),
        (b"eid,31-0.0", "a header and no rows"),
        (b"eid,31-0.0\n\n", "a header and no rows"),
        ("eid,31-0.0,größe\n9000001,1,2\n".encode("latin-1"), "UTF-8"),
        ("eid,31-0.0\n9000001,männlich\n".encode("latin-1"), "UTF-8"),
        ("eid,31-0.0\n9000001,1\n".encode("utf-16"), "UTF-8"),
        (b"name,age\nx,1\n", "no participant column"),
        (b"participant_id,31-0.0\n", "no rows"),
    ],
)
def test_unusable_texts_say_why(tmp_path, content, problem):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(TableError, match=problem):
        join_phenotypes(tmp_path / "p.csv", PARTICIPANTS, SESSIONS)


def test_letters_in_columns_that_nobody_wants_do_no_harm(tmp_path):
    (tmp_path / "p.csv").write_bytes("\n\neid,20002-0.0,31-0.0\n9000001,größer,1\n".encode("latin-1"))
    found = join_phenotypes(tmp_path / "p.csv", PARTICIPANTS, SESSIONS)
    np.testing.assert_array_equal(found.table["sex"][:2], [1, 1])


def test_texts_with_quotes_and_line_ends(tmp_path):
    text = 'participant,note,group\n9000001,"two\nlines, ""quoted""",a\n9000002,5" of it,b\n9000003,,a\n'
    found = join(tmp_path, text)
    np.testing.assert_array_equal(found.table["group"], [0, 0, 1, 0])
    assert sorted(found.variables["note"]["labels"].values()) == ['5" of it', 'two lines, "quoted"']


def test_parquet_of_every_kind(tmp_path):
    table = pa.table(
        {
            "31-0.0": pa.array(["Male", "Female", None]).dictionary_encode(),
            "21003-2.0": pa.array([60.0, None, float("nan")]),
            "709-2.0": pa.array([3, None, -1], pa.int8()),
            "participant.eid": pa.array([9000001.0, 9000002.0, None]),
            "41270-0.0": pa.array([["a"], [], None]),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = join_phenotypes(tmp_path / "p.parquet", PARTICIPANTS, SESSIONS)
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(found.table["age"], [60, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found.table["household_size"], [3, np.nan, np.nan, np.nan])
    assert found.bad_values == 1  # a row without an id
    indexed = pd.DataFrame({"eid": ["9000001"], "p31": [True]}).set_index("eid")  # the id as pandas' index
    indexed.to_parquet(tmp_path / "i.parquet")
    found = join_phenotypes(tmp_path / "i.parquet", PARTICIPANTS, SESSIONS)
    assert told(found, "'true'")
    twice = pa.Table.from_arrays([pa.array(["9000001"]), pa.array([1]), pa.array([0])], names=["eid", "p31", "p31"])
    pq.write_table(twice, tmp_path / "t.parquet")
    found = join_phenotypes(tmp_path / "t.parquet", PARTICIPANTS, SESSIONS)
    assert told(found, "'p31' and 'p31'", "differ")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(TableError, match="cannot be read as parquet"):
        join_phenotypes(tmp_path / "b.parquet", PARTICIPANTS, SESSIONS)


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


WIDE_ROWS = 1000


def write_wide_table(path: Path) -> None:
    """Write 1,000 rows of 30,000 columns, four of them of fields that are wanted."""
    columns = [f"p{40000 + number}_i2" for number in range(29_996)]
    people = np.arange(WIDE_ROWS)
    known = {"p738_i2": people * 0 - 3, "eid": 9_000_000 + people, "p21003_i2": 50 + people, "p31": people % 2}
    for place, name in zip((0, 9_000, 20_000, 29_998), known, strict=True):
        columns.insert(place, name)
    filler = np.random.default_rng(0).integers(0, 10**7, len(columns))
    if path.suffix == ".parquet":
        arrays = {
            name: pa.array(known.get(name, number + people))
            for name, number in zip(columns, filler.tolist(), strict=True)
        }
        pq.write_table(pa.table(arrays), path, use_dictionary=False, write_statistics=False, compression="none")
        return
    separator = "," if path.suffix == ".csv" else "\t"
    pieces = [separator.join(map(str, filler[start + 1 : stop])) for start, stop in
              ((0, 9_000), (9_000, 20_000), (20_000, 29_998), (29_998, 30_000))]  # fmt: skip
    with open(path, "w") as file:
        file.write(separator.join(columns) + "\n")
        for row in zip(*known.values(), strict=True):
            cells = [text for pair in zip(map(str, row), pieces, strict=True) for text in pair]
            file.write(separator.join(cells) + "\n")


@pytest.mark.parametrize(("name", "megabytes"), [("p.csv", 90), ("p.tsv", 90), ("p.parquet", 180)])
def test_of_30_000_columns_only_those_wanted_are_loaded(tmp_path, name, megabytes):
    """Of parquet the list of all columns is read, which takes 3 KB for each of them."""
    write_wide_table(tmp_path / name)
    script = (
        "import json, re, sys; from pathlib import Path\n"
        "from ingest.phenotypes import join_phenotypes\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "people = [str(9000000 + number) for number in range(int(sys.argv[2]))]\n"
        "before = peak()  # of resource.getrusage the peak is that of whoever started this process\n"
        "found = join_phenotypes(Path(sys.argv[1]), people, ['2'] * len(people))\n"
        "taken = peak() - before\n"
        "values = {name: found.table[name].fillna(-1).tolist() for name in found.table}\n"
        "print(json.dumps({'kilobytes': taken, 'values': values, 'warnings': found.warnings}))\n"
    )
    command = [sys.executable, "-c", script, tmp_path / name, str(WIDE_ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["values"] == {
        "sex": [number % 2 for number in range(WIDE_ROWS)],
        "age": [50 + number for number in range(WIDE_ROWS)],
        "income": [-1] * WIDE_ROWS,
    }
    assert found["warnings"] == [f"{name}: income is missing in every scan; its columns are of instances [2]"]
    assert (tmp_path / name).stat().st_size > 230e6
    assert found["kilobytes"] * 1024 < megabytes * 1e6


def test_the_dictionary_knows_every_variable_of_the_study():
    study = ["sex", "age", "household_size", "income", "fluid_intelligence", "smoking"]
    assert [variable.name for variable in VARIABLES if not variable.confound] == study
    codings = {variable.name: variable.coding for variable in VARIABLES}
    assert codings == {
        "sex": 9,
        "age": None,
        "household_size": 100291,
        "income": 100294,
        "fluid_intelligence": None,
        "smoking": 90,
        "site": 10,
        "head_size": None,
    }
    for variable in VARIABLES:
        assert variable.task in TASKS
        assert variable.title
        assert variable.source
        assert set(variable.instances) <= {0, 1, 2, 3}
        assert all(code < 0 for code in variable.missing)
        assert all(code >= 0 for code in variable.labels)
        assert variable.coding or not (variable.labels or variable.missing)
        assert str(variable.ukb_field) in variable.url


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_every_label_and_special_code_of_the_dictionary_is_understood(tmp_path, variable):
    written = [*variable.labels.values(), *variable.missing, *map(str.title, variable.missing.values())]
    expected = [*variable.labels, *[np.nan] * 2 * len(variable.missing)]
    column = f"{variable.title} | Instance 2"
    pd.DataFrame({"Participant ID": range(len(written)), column: written}).to_csv(tmp_path / "p.csv", index=False)
    if not written:
        return
    people = [str(number) for number in range(len(written))]
    found = join_phenotypes(tmp_path / "p.csv", people, ["2"] * len(people))
    np.testing.assert_array_equal(found.table[variable.name], expected)
    assert found.bad_values == 0


def test_attributes_of_a_variable_keep_their_keys_and_tell_its_source(tmp_path):
    found = join(tmp_path, "eid,31-0.0,738-2.0\n9000001,1,2\n9000002,0,2\n")
    keys = {"field", "instance", "coding", "units", "task", "labels", "confound", "source"}
    assert all(set(attributes) == keys for attributes in found.variables.values())
    assert found.variables["income"] == {
        "field": 738,
        "instance": "that of the scan's session",
        "coding": "UK Biobank data-coding 100294; negative codes are missing",
        "units": "GBP a year before tax",
        "task": "ordinal",
        "labels": {"1": "less than 18,000", "2": "18,000 to 30,999", "3": "31,000 to 51,999", "4": "52,000 to 100,000",
                   "5": "greater than 100,000"},
        "confound": False,
        "source": "UK Biobank field 738, Average total household income before tax: touchscreen question; "
        "sociodemographics, household",
    }  # fmt: skip
    assert found.variables["sex"]["instance"] == "0"
    plain = join(tmp_path, "id,sex,group,x\n9000001,m,a,1\n9000002,f,b,2\n")
    assert all(set(attributes) == keys for attributes in plain.variables.values())


def test_command_dictionary(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command = [Path(sys.executable).with_name("ingest"), "dictionary"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    words = " ".join(text.split())
    for variable in VARIABLES:
        assert variable.name in text
        assert f" {variable.ukb_field} {variable.title.split()[0]}" in words
        for label in variable.labels.values():
            assert label in words
    assert "-3 prefer not to answer" in words
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"variables": [variable.to_json() for variable in VARIABLES]}
    income = json.loads(done.stdout)["variables"][3]
    assert income["missing"] == {"-1": "do not know", "-3": "prefer not to answer"}
    assert income["labels"]["5"] == "greater than 100,000"
