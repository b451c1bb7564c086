"""The dictionary of variables: all of the study's, every label and code understood, and the command that prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joined_table import join

from ingest.dictionary import TASKS, VARIABLES
from ingest.phenotypes import join_phenotypes


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
