"""One scan, from its file to its shard. This is the unit of work of every worker: one task, one whole shard."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from math import isnan, nan

from ingest.archive import read_scan
from ingest.conform import conform
from ingest.encode import encode_shard
from ingest.errors import ScanError
from ingest.grid import Grid, space_of
from ingest.intensity import IntensityRule, to_grey_levels
from ingest.memory import GRID_BYTES
from ingest.nifti import NiftiVolume, read_nifti
from ingest.places import Place
from ingest.scan import ScanRow, ScanSource
from ingest.shard import shard_path, write_shard

logger = logging.getLogger("ingest")

SIMULATED_PREFIX = "simulated brain"


@dataclass(frozen=True)
class ConvertedScan:
    """The outcome of one scan: its row, and whether its header says that it is simulated."""

    row: ScanRow
    simulated: bool = False


def pending_row(source: ScanSource) -> ScanRow:
    """Return the row of a scan that was found but not read yet."""
    size, mtime = source.size, nan if source.mtime is None else source.mtime
    if size is None:
        try:
            stat = os.stat(source.path)
            size, mtime = stat.st_size, stat.st_mtime
        except (OSError, ValueError):  # the read reports it
            size = 0
    return ScanRow(
        participant=source.participant,
        session=source.session,
        modality=source.modality,
        source=source.name,
        source_size=size,
        source_mtime=mtime,
    )


def is_out_of_reach(row: ScanRow) -> bool:
    """Whether a row of `pending_row` is of a file that could not even be looked at."""
    return row.source_size == 0 and isnan(row.source_mtime)


def load_volume(source: ScanSource, memory: int | None = None) -> tuple[NiftiVolume, float]:
    """Read and decode a scan's file; return its volume, and the head's scale that its archive tells (else NaN).

    Parameters
    ----------
    memory
        Bytes that this may take; None for no other limit than those of `ingest.archive` and `ingest.nifti`.

    Raises
    ------
    ScanError
        With the status that the row gets.
    """
    if memory is None:
        content = read_scan(source)
        return read_nifti(content.nifti, content.image), content.head_scale
    content = read_scan(source, max_bytes=(memory - GRID_BYTES) // 2)  # an archive and its member
    held = 2 * pending_row(source).source_size + GRID_BYTES
    twice = (memory - held) // 2  # axes in another order are put right in a copy
    return read_nifti(content.nifti, content.image, max_bytes=twice), content.head_scale


def volume_space(source: ScanSource, volume: NiftiVolume) -> str:
    """Return the space of a decoded scan, see `ingest.grid.space_of`."""
    name = os.path.basename(source.member or source.path)
    return space_of(name, volume.affine, volume.data.shape[::-1], volume.form_code)


def convert_scan(
    source: ScanSource, row: int, store: Place, grid: Grid, rule: IntensityRule, slab: int, memory: int | None = None
) -> ConvertedScan:
    """Read, conform, quantise and store one scan.

    Parameters
    ----------
    row
        Row of the scan in the store, that is the number of its shard.
    store
        Where the store is.
    memory
        Bytes that it may take, see `load_volume`.

    Returns
    -------
    ConvertedScan
        Status ``ok`` if the shard was written; otherwise the status and reason, and no shard.
    """
    pending = pending_row(source)
    simulated = False
    try:
        volume, head_scale = load_volume(source, memory)
        simulated = volume.description.startswith(SIMULATED_PREFIX)
        space = volume_space(source, volume)
        if space != grid.space:
            raise ScanError(
                "wrong_shape", f"the scan is in {space} space, this store holds {grid.space}; ingest it apart"
            )
        conformed = conform(volume, grid)
        stored = to_grey_levels(conformed.box, rule)
    except ScanError as error:
        return ConvertedScan(replace(pending, status=error.status, error=error.reason), simulated)
    except Exception as error:  # one strange file must not end a run of 100,000; its row names the error
        logger.exception("unexpected error in %s", source.name)
        reason = f"unexpected {type(error).__name__}: {error}"
        return ConvertedScan(replace(pending, status="read_error", error=reason), simulated)
    write_shard(shard_path(store, row), encode_shard(stored.data, slab))
    done = replace(
        pending,
        status="ok",
        scale=stored.scale,
        offset=0.0,
        brain_voxels=stored.brain_voxels,
        head_scale=head_scale,
        cut_off_voxels=conformed.cut_off_voxels + stored.left_out,
        mean=stored.mean,
    )
    return ConvertedScan(done, simulated)
