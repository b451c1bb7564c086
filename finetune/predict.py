"""What a finished run predicts for the scans of any store, as a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extract.checkpoints import BEST, LAST
from extract.fast import choose_precision, exact_float32, memory_for, scans_at_a_time
from extract.fold import fold_batch_norms, pool_before_relu
from extract.grey import collapse_to_grey
from extract.inputs import resize, target_size
from extract.probing.apply import check_table_suffix, write_predictions
from extract.trained import other_store, same_store
from finetune.build import check_volumes
from finetune.checkpoints import LoadedRun, load_run
from finetune.cohort import some_rows
from finetune.evaluate import Outputs, predict_rows, what_to_load
from finetune.network import ScanNetwork
from finetune.predictions import prediction_table
from finetune.results import RESULTS, SETTINGS, SPLIT
from finetune.split import PARTS, UNUSED, read_split
from ingest.errors import StoreError
from ingest.places import Place
from ingest.store import VolumeStore, open_store, unchanged
from ingest.writing import check_writable
from loaders.device import choose_device
from loaders.opening import room_to_inflate
from loaders.views import Images, View, plan_picture


@dataclass(frozen=True)
class Predicted:
    """Predictions that were written.

    Attributes
    ----------
    path
        Of the table.
    scans
        That it has a row for.
    targets
        That are predicted.
    skipped
        By row of the store, why others have none.
    parts
        Scans of people of each part of the run's split; none if it is not known.
    warnings
        What is to be told.
    simulated, trained_on_simulated
        The scans are; those are that the network was trained on.
    seconds, scans_per_second
        From the first scan to the last.
    precision, batch_size
        That were chosen.
    """

    path: Path
    scans: int
    targets: list[str]
    skipped: dict[int, str]
    parts: dict[str, int]
    warnings: list[str]
    simulated: bool
    trained_on_simulated: bool
    seconds: float
    scans_per_second: float
    precision: str
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        """Return it as printed by ``--json``."""
        skipped = [{"row": row, "reason": reason} for row, reason in self.skipped.items()]
        return {**vars(self), "path": str(self.path), "skipped": skipped}


def predict_to(
    out: str | Path,
    store: str | Place,
    run: str | Path,
    *,
    where: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Predicted:
    """Predict for the scans of a store, and write a row for each.

    Parameters
    ----------
    out
        A .parquet or .csv file, see `finetune.predictions.prediction_table`; it appears whole. If ``split.csv`` lies
        beside the weights, and can be about people of this store, a column ``part`` says which part each scan is of.
        The attributes of a parquet file (``pandas.read_parquet(out).attrs``) say what predicted, and for what.
    store
        Path or ``s3://`` address of a store.
    run
        Folder of a run, of which the best weights are taken, or a checkpoint.
    where
        Only scans of which this is true, see `loaders.select.select_rows`.
    device, backend, threads
        See `loaders.device.choose_device` and `loaders.open_loader`.
    precision
        See `extract.fast.choose_precision`; by default that of the run.
    batch_size
        Scans at a time; by default by device and memory.
    overwrite
        Replace `out`.
    on_plan
        Called with the number of scans.
    on_batch
        Called after each batch with its number of scans.

    Raises
    ------
    WeightsUnavailableError
        If the weights cannot be read.
    StoreError
        If the store cannot be read, or `out` not be written.
    ValueError
        If the network does not take such volumes, no scan is left, or nothing can be predicted for any.
    """
    out, run = Path(out), Path(run)
    check_table_suffix(out)
    check_writable(out)
    if out.exists() and not overwrite:
        raise StoreError(f"{out} exists; add --overwrite to replace it, or choose another name")
    loaded = load_run(run)
    volumes = open_store(store)
    rows = some_rows(volumes, where)
    check_volumes(loaded.network, volumes.grid.shape_zyx)
    chosen = choose_device(device)
    dtype = _precision(precision, loaded.settings.precision, chosen)
    network = without_idle_work(loaded.network).to(chosen)
    batch_size = batch_size or min(_fitting(network, volumes, chosen, dtype, backend), len(rows))
    if on_plan:
        on_plan(len(rows))
    begun = time.perf_counter()
    exact = chosen.type == "cuda" and dtype is torch.float32
    with memory_for(chosen), exact_float32() if exact else nullcontext():
        outputs = predict_rows(
            network, volumes, rows, batch_size=batch_size, backend=backend, threads=threads, dtype=dtype,
            on_error="skip", on_batch=on_batch,
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    outputs = _finite(_still_there(outputs, volumes), str(dtype).removeprefix("torch."))
    table = prediction_table(volumes, outputs, loaded.heads, network.head_slices)
    part = _parts(run, loaded, volumes, outputs.rows)
    if part is not None:
        table.insert(1, "part", part)
    table.attrs.update(_provenance(run, loaded, volumes))
    write_predictions(out, table)
    warnings = [*unfinished(run, loaded), *other_store(loaded.attrs, volumes)]
    known = (
        {} if part is None else {name: int((part == name).sum()) for name in (*PARTS, UNUSED) if (part == name).any()}
    )
    if "train" in known:
        warnings.append(
            f"{known['train']} scans are of people whom the network was trained on, and look better than others; "
            "the column part tells who they are"
        )
    return Predicted(
        path=out,
        scans=len(table),
        targets=[head.name for head in loaded.heads],
        skipped=outputs.skipped,
        parts=known,
        warnings=warnings,
        simulated=bool(volumes.attrs["simulated"]),
        trained_on_simulated=bool(loaded.attrs.get("simulated")),
        seconds=round(seconds, 3),
        scans_per_second=round(len(table) / seconds, 3),
        precision=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def unfinished(run: Path, loaded: LoadedRun) -> list[str]:
    """Return a warning if weights are of a run that is still under way, or was killed."""
    folder = _folder_of(run)
    if not (folder / SETTINGS).is_file() or (folder / RESULTS).is_file():
        return []
    epoch, epochs = loaded.attrs.get("epoch"), loaded.settings.epochs
    return [f"this run is not finished: the weights are of epoch {epoch} of {epochs}; finetune STORE {folder} goes on"]


def _folder_of(run: Path) -> Path:
    """Return the folder of a run, of it or a checkpoint in it."""
    return run.parent if run.name in (BEST, LAST) else run


def _precision(wanted: str | None, of_run: str, device: torch.device) -> torch.dtype:
    if wanted is None:
        wanted = "auto" if of_run == "float16" and device.type == "cpu" else of_run
    return choose_precision(wanted, device)


class _GreyNetwork(ScanNetwork):
    """A network that takes stored grey levels as they are, see `without_idle_work`."""

    def encode(self, grey: torch.Tensor) -> torch.Tensor:
        """uint8 (item, 1, [z,] y, x) -> (item, feature)."""
        x = resize(grey, target_size(grey.shape[2:], self.seen.scale, self.seen.size)).to(torch.float32)
        features: torch.Tensor = self.encoder(x.contiguous(memory_format=_layout(self)))
        return features


def without_idle_work(network: ScanNetwork) -> _GreyNetwork:
    """Return a network that gives the same but for rounding, with less work, as `extract.encoder` does it."""
    pool = "mean" if network.attention is None else "attention"
    lean = _GreyNetwork(network.model, network.seen, network.heads_info, pool=pool)
    lean.load_state_dict(network.state_dict())
    lean.requires_grad_(False).eval()
    fold_batch_norms(lean.encoder)
    pool_before_relu(lean.encoder)
    collapse_to_grey(lean.encoder, network.seen.mean, network.seen.std)
    return lean.to(memory_format=_layout(lean))


def _layout(network: ScanNetwork) -> torch.memory_format:
    return torch.channels_last_3d if network.seen.view is View.volume else torch.channels_last


def _fitting(network: ScanNetwork, volumes: VolumeStore, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Return how many scans to predict for at a time."""
    view, slices = what_to_load(network.seen, volumes.grid.shape_zyx)
    picture = plan_picture(volumes.grid.shape_zyx, volumes.slab, view, slices)

    def run(scan: Images) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            outputs: torch.Tensor = network(scan, cut=network.seen.cut)
            return outputs

    most, held = room_to_inflate(volumes, picture, backend, device)
    return min(most, scans_at_a_time(run, device, picture, held))


def _still_there(outputs: Outputs, volumes: VolumeStore) -> Outputs:
    """Return what was predicted without scans that have left the store meanwhile: their people may have withdrawn."""
    now = open_store(volumes.path)
    there = unchanged(volumes, now, outputs.rows)
    left_out = np.array(list(outputs.skipped), np.int64)
    kept = set(left_out[unchanged(volumes, now, left_out)].tolist())
    skipped = {row: reason for row, reason in outputs.skipped.items() if row in kept}
    return replace(outputs, rows=outputs.rows[there], values=outputs.values[there], skipped=skipped)


def _finite(outputs: Outputs, precision: str) -> Outputs:
    """Return what can be predicted from; scans of which the network makes no numbers are skipped.

    Raises
    ------
    ValueError
        If nothing is left.
    """
    there = np.isfinite(outputs.values).all(axis=1)
    reason = f"predictions are no finite numbers: the weights do not work in {precision}"
    skipped = dict(sorted((outputs.skipped | dict.fromkeys(outputs.rows[~there].tolist(), reason)).items()))
    if not there.any() and not skipped:
        raise ValueError("all scans have left the store while they were predicted for")
    if not there.any():
        row, why = next(iter(skipped.items()))
        raise ValueError(f"nothing can be predicted for any of {len(skipped)} scans; row {row}: {why}")
    return replace(outputs, rows=outputs.rows[there], values=outputs.values[there], skipped=skipped)


def _parts(run: Path, loaded: LoadedRun, volumes: VolumeStore, rows: np.ndarray) -> np.ndarray | None:
    """Return which part of the run's split each scan is of, text (scan,); None if that cannot be told.

    People are known by their names. Simulated people of different stores have the same ones.
    """
    folder = _folder_of(run)
    simulated = loaded.attrs.get("simulated") or volumes.attrs["simulated"]
    if not (folder / SPLIT).is_file() or (simulated and not same_store(loaded.attrs, volumes)):
        return None
    return read_split(folder / SPLIT).parts(volumes.scans["participant"].iloc[rows])


def _provenance(run: Path, loaded: LoadedRun, volumes: VolumeStore) -> dict[str, Any]:
    """Return what goes with the table where its format has a place for it."""
    return {
        "run": run.absolute().name,
        "epoch": loaded.attrs.get("epoch"),
        "sha256": loaded.sha256,
        "store_id": volumes.attrs["store_id"],
        "simulated": {"run": bool(loaded.attrs.get("simulated")), "store": bool(volumes.attrs["simulated"])},
    }
