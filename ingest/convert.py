"""One scan, from its file to its shard. This is the unit of work of every worker: one task, one whole shard."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ingest.archive import ScanContent, read_scan
from ingest.conform import conform
from ingest.errors import ScanError
from ingest.grid import Grid, space_of
from ingest.intensity import IntensityRule, to_grey_levels
from ingest.nifti import NiftiVolume, read_nifti
from ingest.scan import ScanRow, ScanSource
from ingest.shard import encode_shard, shard_path, write_shard

SIMULATED_PREFIX = "simulated brain"


@dataclass(frozen=True)
class ConvertedScan:
    """The outcome of one scan: its row, and whether its header says that it is simulated."""

    row: ScanRow
    simulated: bool = False


def pending_row(source: ScanSource) -> ScanRow:
    """Return the row of a scan that was found but not read yet."""
    try:
        stat = os.stat(source.path)
        size, mtime = stat.st_size, stat.st_mtime
    except OSError:  # the read reports it
        size, mtime = 0, float("nan")
    return ScanRow(
        participant=source.participant,
        session=source.session,
        modality=source.modality,
        source=source.name,
        source_size=size,
        source_mtime=mtime,
    )


def load_volume(source: ScanSource) -> tuple[NiftiVolume, ScanContent]:
    """Read and decode a scan's file.

    Raises
    ------
    ScanError
        With the status that the row gets.
    """
    content = read_scan(source)
    return read_nifti(content.nifti, content.image), content


def volume_space(source: ScanSource, volume: NiftiVolume) -> str:
    """Return the space of a decoded scan, see `ingest.grid.space_of`."""
    name = os.path.basename(source.member or source.path)
    return space_of(name, volume.affine, volume.data.shape[::-1], volume.form_code)


def convert_scan(
    source: ScanSource, row: int, store: Path, grid: Grid, rule: IntensityRule, slab: int
) -> ConvertedScan:
    """Read, conform, quantise and store one scan.

    Parameters
    ----------
    row
        Row of the scan in the store, that is the number of its shard.
    store
        Folder of the store.

    Returns
    -------
    ConvertedScan
        Status ``ok`` if the shard was written; otherwise the status and reason, and no shard.
    """
    pending = pending_row(source)
    simulated = False
    try:
        volume, content = load_volume(source)
        simulated = volume.description.startswith(SIMULATED_PREFIX)
        space = volume_space(source, volume)
        if space != grid.space:
            raise ScanError(
                "wrong_shape", f"the scan is in {space} space, this store holds {grid.space}; ingest it apart"
            )
        conformed = conform(volume, grid)
        stored = to_grey_levels(conformed.data, rule)
    except ScanError as error:
        return ConvertedScan(replace(pending, status=error.status, error=error.reason), simulated)
    except Exception as error:  # one strange file must not end a run of 100,000; its row names the error
        reason = f"unexpected {type(error).__name__}: {error}"
        return ConvertedScan(replace(pending, status="read_error", error=reason), simulated)
    write_shard(shard_path(store, row), encode_shard(stored.data, slab))
    brain_voxels = int(np.count_nonzero(stored.data))
    done = replace(
        pending,
        status="ok",
        scale=stored.scale,
        offset=0.0,
        brain_voxels=brain_voxels,
        head_scale=content.head_scale,
        cut_off_voxels=conformed.cut_off_voxels,
        mean=float(stored.data.sum(dtype=np.int64) / max(brain_voxels, 1)),
    )
    return ConvertedScan(done, simulated)
