"""The phenotypes that a run writes: of the table it is given, of one that BIDS has, or those that the store had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from ingest.errors import TableError
from ingest.layouts import Layout
from ingest.phenotypes import Phenotypes, join_phenotypes
from ingest.places import Place, local_copy
from ingest.scan import ScanRow
from ingest.sidecar import read_sidecar
from ingest.store import VolumeStore

_BIDS_TABLE = "participants.tsv"


def choose_table(source: Place, layout: Layout, given: Place | None, store: VolumeStore | None) -> Place | None:
    """Return the table that a run joins.

    A BIDS tree's own is taken unless another one is given, or was in an earlier run.
    """
    before = None if store is None else store.attrs["settings"]["phenotypes"]
    if given is None and layout is Layout.bids and before in (None, _BIDS_TABLE):
        own = source / _BIDS_TABLE
        return own if own.is_file() else None
    return given


def join(table: Place, rows: list[ScanRow], store: VolumeStore | None, *, given: bool) -> Phenotypes | None:
    """Join a table to the scans of a run.

    Parameters
    ----------
    rows
        Of the store after the run.
    store
        As it is before it.
    given
        The user has named the table. One that was only found is left alone if it cannot be used.

    Raises
    ------
    TableError
        If the table that is given cannot be used.
    """
    try:
        with local_copy(table) as copy:
            people, sessions = [row.participant for row in rows], [row.session for row in rows]
            joined = join_phenotypes(copy, people, sessions, read_sidecar(table))
    except TableError as error:
        if given:
            raise
        return kept(rows, store, warning=f"{table.name} is left out: {error}")
    dropped = sorted(set(store.phenotypes.columns) - set(joined.table.columns)) if store else []
    if dropped:
        warning = f"{table.name} lacks {', '.join(dropped)}, which the store had from an older table, and loses now"
        joined = replace(joined, warnings=[*joined.warnings, warning])
    return joined


def kept(rows: list[ScanRow], store: VolumeStore | None, warning: str = "") -> Phenotypes | None:
    """Return the phenotypes that a store has, for all rows of it by now: new scans, and those of others, have none.

    Returns
    -------
    Phenotypes or None
        None if there is nothing to write and nothing to say.
    """
    warnings = [warning] if warning else []
    table = pd.DataFrame(index=range(len(rows))) if store is None else store.phenotypes.reindex(range(len(rows)))
    if store is None or not len(table.columns):
        return Phenotypes(table, {}, warnings) if warnings else None
    before = zip(store.scans["participant"], store.scans["session"], strict=True)
    others = [number for number, who in enumerate(before) if who != (rows[number].participant, rows[number].session)]
    added = len(rows) - len(store.scans) + len(others)
    if added:
        table.iloc[others] = np.nan
        warnings.append(f"{added} new scans have no phenotypes; give the table again with --phenotypes")
    return Phenotypes(table, store.variables, warnings) if warnings else None
