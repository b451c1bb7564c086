"""Phenotypes of a table, looked up for scans that are embedded: a probe takes them beside those of the store."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from extract.embeddings import Embeddings
from ingest.dictionary import BY_NAME
from ingest.errors import TableError
from ingest.phenotypes import join_phenotypes
from ingest.places import Place, local_copy
from ingest.sidecar import read_sidecar


@dataclass(frozen=True)
class Joined:
    """Embeddings whose scans were looked up in a table.

    Attributes
    ----------
    embeddings
        With the table's variables.
    table
        Name of the file.
    variables
        That are of the table.
    warnings
        What a user should know of the table. They may name participants, so no report shows them.
    bad_values
        See `ingest.phenotypes.Phenotypes`.
    """

    embeddings: Embeddings
    table: str
    variables: list[str]
    warnings: list[str]
    bad_values: int

    def to_json(self) -> dict[str, Any]:
        """Return where phenotypes came from, for reports and programs."""
        return {"table": self.table, "variables": self.variables, "bad_values": self.bad_values}


def join_table(embeddings: Embeddings, table: Place) -> Joined:
    """Look up each scan's participant in a table, as ``ingest --phenotypes`` does.

    The table's variables replace those of the same name, or of another name of the same UK Biobank variable; the others
    stay as they are.

    Raises
    ------
    TableError
        If the table cannot be read, none of the scans has a row in it, or it has nothing to take.
    """
    scans = embeddings.scans
    sessions = scans["session"].astype(str) if "session" in scans else [""] * len(scans)
    with local_copy(table) as copy:
        found = join_phenotypes(copy, scans["participant"].astype(str), sessions, read_sidecar(table))
    if not len(found.table.columns):
        raise TableError(f"{table} has no column beside those of who and when; expected phenotypes, a column each")
    kept = without_variables(embeddings, found.table.columns)
    joined = replace(
        kept,
        phenotypes=pd.concat([kept.phenotypes.reset_index(drop=True), found.table], axis="columns"),
        variables=kept.variables | found.variables,
    )
    return Joined(joined, table.name, list(map(str, found.table.columns)), found.warnings, found.bad_values)


def without_variables(embeddings: Embeddings, names: Collection[str]) -> Embeddings:
    """Return embeddings without the phenotypes of some names, or of other names of the same variables."""
    gone = {_meaning(name) for name in names}
    kept = [name for name in embeddings.phenotypes.columns if _meaning(name) not in gone]
    variables = {name: about for name, about in embeddings.variables.items() if _meaning(name) not in gone}
    return replace(embeddings, phenotypes=embeddings.phenotypes[kept], variables=variables)


def _meaning(name: object) -> str:
    """Return UK Biobank's variable that a name or alias stands for, else the name itself."""
    variable = BY_NAME.get(str(name).lower())
    return str(name) if variable is None else variable.name
