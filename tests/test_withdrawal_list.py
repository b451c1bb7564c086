"""Lists of people who withdrew: every usual way of writing one is read whole, and what is unclear is refused."""

from __future__ import annotations

import pytest

from ingest.errors import TableError
from ingest.withdrawal_list import read_withdrawals

PEOPLE = {"9000001", "9000002", "9000003"}


@pytest.mark.parametrize(
    "text",
    [
        "9000001\n9000002\n9000003\n",  # UK Biobank's own
        "\ufeff9000001\r\n9000002\r\n\r\n9000003",
        "9000001\r9000002\r9000003\r",
        "9000001.0\n9000002.0\n9000003.0\n",
        "eid;date\n9000001;2024-01-01\n9000002;\n9000003\n;\n",
        "eid\tdate\n9000001\t2024-01-01\n9000002\t2024-01-01\n9000003\ta remark; with, commas\n",
        "date,Participant ID\n2024-01-01,9000001\n2024-01-01,9000002\n2024-01-01,9000003\n",
        '"","eid"\n"1","9000001"\n"2","9000002"\n"3","9000003"\n',  # R
        '"eid" "remark"\n9000001 "two  words"\n9000002 "" \n9000003 x\n',
        "Participant ID\n 9000001\n9000002 \n9000003\n",
        "9000001 9000002  9000003\n",
        "9000001,9000002,9000003\n",
        "9000001;9000002;\n9000003\n",
        "# withdrawn\n9000001   # asked by mail\n9000002# and\n9000003 #a, b; \"c\n",
        "eid # of this project\n9000001\n9000002\neid\n9000003\n",  # two lists that were joined
    ],
)  # fmt: skip
def test_lists_that_are_read_whole(tmp_path, text):
    (tmp_path / "w.csv").write_bytes(text.encode())
    assert read_withdrawals(tmp_path / "w.csv") == PEOPLE


def test_ids_of_bids_and_of_files(tmp_path):
    path = tmp_path / "w.csv"
    for text, people in (
        ("participant_id,why\nsub-01,remark\n 02 \n", {"01", "02"}),
        ("sub-CON01\nsub-DEP2\n7\n", {"CON01", "DEP2", "7"}),
        ('"my scan 1"\n"my scan 2"\n', {"my scan 1", "my scan 2"}),
    ):
        path.write_text(text)
        assert read_withdrawals(path) == people


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("9000001,2024-01-01\n", "line 1: '2024-01-01' does not look like the id '9000001'"),
        ("number;date\n9000001;2024-01-01\n", "line 1: 'date' does not look"),
        ("9000001\n9000002 asked by mail\n", "line 2: 'asked' does not look"),
        ('"1" 9000001\n', "line 1"),
        ("2001,1950\n2002,1950\n", "line 2: '1950' occurs twice"),
        ("eid\n9000001,9000002\n", "line 2: 2 cells below a header of 1"),
        ('"eid" "date"\n"1" 9000001 "x"\n', "line 2: 3 cells below a header of 2"),  # R numbers rows without a header
        ("date,eid\n2024-01-01,9000001\n2024-01-02,\n", "line 3: nothing below 'eid'"),
        ('eid,why\n9000001,"two\nlines"\n', "line 2: a quote that does not end"),
        ("eid,date\n", "names nobody"),
        ("\n# 9000001\n", "names nobody"),
    ],
)
def test_what_is_unclear_is_refused(tmp_path, text, problem):
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(TableError, match=problem) as caught:
        read_withdrawals(tmp_path / "w.csv")
    assert "expected one participant id a line" in str(caught.value) or "below" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_other_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "w.csv").write_bytes("9000001\n9000002\n".encode(encoding))
    with pytest.raises(TableError, match="UTF-8"):
        read_withdrawals(tmp_path / "w.csv")
