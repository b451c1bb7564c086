"""Files of phenotype tables: separators, line ends, quotes, parquet, rows cut short, and 30,000 columns."""

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
from joined_table import PARTICIPANTS, SESSIONS, join, told

from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes


def test_parquet_reads_only_the_columns_it_needs(tmp_path):
    frame = pd.DataFrame({"eid": [9000001, 9000002], "p31": [1, 0], "p4080_i2_a0": [120.0, np.nan]})
    frame.to_parquet(tmp_path / "p.parquet")
    found = join_phenotypes(tmp_path / "p.parquet", PARTICIPANTS, SESSIONS)
    assert list(found.table) == ["sex"]
    np.testing.assert_array_equal(found.table["sex"], [1, 1, 0, np.nan])


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
