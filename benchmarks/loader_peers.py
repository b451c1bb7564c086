"""Other ways to the same batches: what people load volumes with, each as its own documentation has it.

Every peer gives float32 volumes in [0, 1] of the same scans. Those that work from the .nii.gz files crop and scale each
scan as `ingest` does; the others store our uint8 voxels in a format of their own and divide by 255 in their dataset, as
users do. Workers are processes of torch's DataLoader, started anew for every epoch.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from benchmarks.made import FILE_SHAPE_XYZ, START_XYZ, STOP_XYZ
from ingest.store import VolumeStore
from loaders import VolumeReader

#: Scans that CacheDataset holds in memory at most: 19.7 MB each as float32, 1.3 GB together.
CACHED_SCANS = 64

#: Scans in a shard of WebDataset, and compressed scans in its shuffle buffer: 20 MB and 40 MB.
SHARD_SCANS, BUFFER_SCANS = 8, 16

_Read = Callable[[int], Any]  # voxels of the volume at a position


@dataclass(frozen=True)
class Source:
    """What all peers load.

    Attributes
    ----------
    store
        Has the voxels.
    files
        Row -> .nii.gz file.
    rows
        Rows to be loaded, in any order; a peer's files hold these and no others.
    """

    store: VolumeStore
    files: dict[int, Path]
    rows: np.ndarray


@dataclass(frozen=True)
class Peer:
    """One way to load volumes.

    Attributes
    ----------
    stores
        What lies on disk, and in memory where that is the point.
    package
        Distribution that is measured.
    dataset
        ``dataset(source, folder, rows)`` gives float32 volumes of those rows to torch's DataLoader. What is to be done
        once, before the first epoch, it does.
    write
        ``write(source, folder)`` writes what it reads; None if that is the .nii.gz files.
    max_scans
        Scans that it can hold; None without a limit.
    in_order
        Whether batches come in the order of `rows`; otherwise the peer has a random order of its own.
    try_without_workers
        Whether none may be faster than some: it has little more to do than a worker has to hand volumes over.
    """

    name: str
    stores: str
    package: str
    dataset: Callable[[Source, Path, np.ndarray], Any]
    write: Callable[[Source, Path], None] | None = None
    max_scans: int | None = None
    in_order: bool = True
    try_without_workers: bool = True


def prepare_peer(peer: Peer, source: Source, directory: Path) -> Path:
    """Write a peer's files, unless those of the same scans are there.

    Returns
    -------
    Path
        Its folder in `directory`, absent for peers that write nothing.
    """
    folder = directory / peer.name.lower().replace(" ", "-")
    if peer.write is None:
        return folder
    wanted = {"store_id": source.store.attrs["store_id"], "rows": sorted(source.rows.tolist())}
    done = folder / "done.json"
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return folder
    staged = folder.with_name(f".{folder.name}.staged")
    for unfinished in (staged, folder):
        shutil.rmtree(unfinished, ignore_errors=True)
    staged.mkdir(parents=True)
    peer.write(source, staged)
    (staged / "done.json").write_text(json.dumps(wanted))
    staged.rename(folder)
    return folder


def open_peer(
    peer: Peer, source: Source, folder: Path, rows: np.ndarray, *, batch_size: int, workers: int
) -> Iterable[torch.Tensor]:
    """Return batches of some of the rows in a peer's folder; each pass over them is an epoch.

    Returns
    -------
    iterable of torch.Tensor
        float32 in [0, 1]: (scan, 1, x, y, z) from tools for medical images, (scan, z, y, x) from the others.
    """
    return DataLoader(peer.dataset(source, folder, rows), batch_size=batch_size, num_workers=workers)


def stored_bytes(peer: Peer, source: Source, folder: Path) -> float:
    """Return the bytes on disk per scan of what a peer reads."""
    if peer.write is None:
        files = [source.files[int(row)] for row in source.rows]
    else:
        files = [file for file in folder.rglob("*") if file.is_file() and file != folder / "done.json"]
    return sum(file.stat().st_size for file in files) / len(source.rows)


def check_pictures(peer: Peer, source: Source, folder: Path, rows: np.ndarray, *, workers: int = 0) -> int:
    """Return the largest difference, in grey levels, between a peer's pictures of some rows and the stored ones.

    Raises
    ------
    ValueError
        If it gives other than one volume for every row, or volumes of another shape or type.
    """
    found = torch.cat(list(open_peer(peer, source, folder, rows, batch_size=4, workers=workers)))
    if found.ndim == 5:
        found = found[:, 0].permute(0, 3, 2, 1)
    with VolumeReader(source.store) as reader:
        ours = torch.from_numpy(reader.read(rows)).to(torch.int16)
    if found.dtype != torch.float32 or found.shape != ours.shape:
        raise ValueError(f"{peer.name} gave {found.dtype} {[*found.shape]}, expected torch.float32 {[*ours.shape]}")
    levels = torch.round(found * 255).to(torch.int16)
    if not peer.in_order:
        nearest = [int(torch.stack([(one - picture).abs().max() for one in ours]).argmin()) for picture in levels]
        if len(set(nearest)) < len(rows):
            raise ValueError(f"{peer.name} did not give each of the rows {rows.tolist()} once")
        ours = ours[nearest]
    return int((levels - ours).abs().max())


# From .nii.gz files


def monai_transform() -> Any:
    """Return the pipeline that gives the store's pictures as float32 (1, x, y, z) in [0, 1]."""
    from monai.transforms import Compose, EnsureType, Lambda, LoadImage, Orientation, SpatialCrop

    return Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation("RAS", labels=None),
            SpatialCrop(roi_start=START_XYZ, roi_end=STOP_XYZ),
            Lambda(scale_to_percentile),  # a bare function would not be cached, for MONAI takes it for a random one
            EnsureType(track_meta=False),  # plain tensors are cheaper to batch
        ]
    )


def scale_to_percentile(image: Any) -> Any:
    """Map the 99.9th percentile of the positive voxels to 1, as the store's default intensity rule does."""
    values = image.numpy()
    return (image / float(np.percentile(values[values > 0], 99.9))).clamp(0, 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _paths(source: Source, rows: np.ndarray) -> list[str]:
    return [str(source.files[int(row)]) for row in rows]


def _monai(source: Source, _: Path, rows: np.ndarray) -> Any:
    from monai.data import Dataset

    return Dataset(_paths(source, rows), monai_transform())


def _file_name(path: str) -> bytes:
    """Return the name of a scan in MONAI's cache, which by default has the whole path and is lost if that changes."""
    return Path(path).name.removesuffix(".nii.gz").encode()


def _monai_persistent(source: Source, folder: Path, rows: np.ndarray) -> Any:
    from monai.data import PersistentDataset

    return PersistentDataset(_paths(source, rows), monai_transform(), folder, hash_func=_file_name)


def _write_monai_persistent(source: Source, folder: Path) -> None:
    dataset = _monai_persistent(source, folder, source.rows)
    for _ in DataLoader(dataset, batch_size=None, num_workers=_cores()):
        pass
    if len(list(folder.glob("*.pt"))) != len(source.rows):  # then MONAI would silently start from the source files
        raise ValueError(f"MONAI did not cache each of {len(source.rows)} scans in {folder}")


def _monai_cached(source: Source, _: Path, rows: np.ndarray) -> Any:
    from monai.data import CacheDataset

    if len(rows) > CACHED_SCANS:
        raise ValueError(f"{len(rows)} scans are too many to hold in memory, expected at most {CACHED_SCANS}")
    return CacheDataset(_paths(source, rows), monai_transform(), num_workers=_cores(), progress=False)


def _torchio(source: Source, _: Path, rows: np.ndarray) -> Any:
    import torchio as tio

    (x, y, z), (to_x, to_y, to_z) = START_XYZ, (n - stop for n, stop in zip(FILE_SHAPE_XYZ, STOP_XYZ, strict=True))
    transform = tio.Compose(
        [
            tio.ToCanonical(copy=False),  # a copy would be one of all voxels, of a subject that nobody else has
            tio.Crop((x, to_x, y, to_y, z, to_z)),
            tio.RescaleIntensity((0, 1), percentiles=(0, 99.9), masking_method=lambda image: image > 0, copy=False),
        ],
        copy=False,
    )

    def voxels(subject: Any) -> Any:  # alone: TorchIO's own loader would hand over a subject's history as well
        return transform(subject).get_first_image().data

    return tio.SubjectsDataset([tio.Subject(t1=tio.ScalarImage(path)) for path in _paths(source, rows)], voxels)


# From uint8 files


def _stored_volumes(source: Source) -> Iterator[tuple[int, np.ndarray]]:
    """Yield row and voxels (z, y, x), in the order of the rows."""
    with VolumeReader(source.store) as reader:
        for row in sorted(source.rows.tolist()):
            yield row, reader.read([row])[0]


def _scaled(voxels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(voxels).float().div_(255)


class _Volumes(Dataset[torch.Tensor]):
    """Volumes of some rows, in a file that is opened by whoever reads, for it would not survive a fork."""

    def __init__(self, open_file: Callable[[Path], _Read], _: Source, folder: Path, rows: np.ndarray) -> None:
        stored = json.loads((folder / "done.json").read_text())["rows"]
        position = {row: number for number, row in enumerate(stored)}
        self._positions = [position[row] for row in rows.tolist()]
        self._open = partial(open_file, folder)
        self._read: _Read | None = None

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: int) -> torch.Tensor:
        self._read = self._read or self._open()
        return _scaled(self._read(self._positions[number]))


def _write_webdataset(source: Source, folder: Path) -> None:
    import webdataset as wds

    pattern = str(folder / "%05d.tar")
    with wds.ShardWriter(pattern, maxcount=SHARD_SCANS, encoder=False, verbose=0) as writer:
        for row, voxels in _stored_volumes(source):
            npy = io.BytesIO()
            np.save(npy, voxels)
            writer.write({"__key__": f"{row:06d}", "npy.gz": gzip.compress(npy.getvalue(), 6)})  # 6: as gzip itself


def _webdataset(_: Source, folder: Path, rows: np.ndarray) -> Any:
    """Return shards of few scans in random order, each worker having its own, with a shuffle buffer in each worker."""
    import webdataset as wds

    keys = {f"{row:06d}" for row in rows}
    shards = sorted(str(shard) for shard in folder.glob("*.tar"))
    return (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)  # a worker may have no shard
        .select(lambda sample: sample["__key__"] in keys)
        .shuffle(BUFFER_SCANS, initial=BUFFER_SCANS, seed=0)  # while they are still compressed
        .decode()
        .map(lambda sample: _scaled(sample["npy.gz"]))
    )


def _write_hdf5(source: Source, folder: Path) -> None:
    shape = source.store.grid.shape_zyx
    with h5py.File(folder / "volumes.h5", "w") as file:
        options = {"chunks": (1, *shape), "compression": "gzip", "compression_opts": 4}  # 4 is h5py's own choice
        volumes = file.create_dataset("volumes", (len(source.rows), *shape), np.uint8, **options)
        for position, (_, voxels) in enumerate(_stored_volumes(source)):
            volumes[position] = voxels


def _open_hdf5(folder: Path) -> _Read:
    return h5py.File(folder / "volumes.h5", "r")["volumes"].__getitem__


def _write_zarr(source: Source, folder: Path) -> None:
    one = source.store.grid.shape_zyx
    path, scans = folder / "volumes.zarr", len(source.rows)
    volumes = zarr.create_array(path, shape=(scans, *one), chunks=(1, *one), dtype="uint8")
    for position, (_, voxels) in enumerate(_stored_volumes(source)):
        volumes[position] = voxels


def _open_zarr(folder: Path) -> _Read:
    return zarr.open_array(folder / "volumes.zarr", mode="r").__getitem__


def _write_npy(source: Source, folder: Path) -> None:
    for position, (_, voxels) in enumerate(_stored_volumes(source)):
        np.save(folder / f"{position}.npy", voxels)


def _open_npy(folder: Path) -> _Read:
    return lambda position: np.load(folder / f"{position}.npy")


PEERS: tuple[Peer, ...] = (
    Peer("MONAI", ".nii.gz", "monai", _monai, try_without_workers=False),
    Peer("MONAI PersistentDataset", "float32 .pt", "monai", _monai_persistent, _write_monai_persistent),
    Peer("MONAI CacheDataset", ".nii.gz, float32 in memory", "monai", _monai_cached, max_scans=CACHED_SCANS),
    Peer("TorchIO", ".nii.gz", "torchio", _torchio, try_without_workers=False),
    Peer("WebDataset", "uint8 .npy.gz in .tar", "webdataset", _webdataset, _write_webdataset, in_order=False),
    Peer("HDF5", "uint8, gzip", "h5py", partial(_Volumes, _open_hdf5), _write_hdf5),
    Peer("zarr-python", "uint8, zstd", "zarr", partial(_Volumes, _open_zarr), _write_zarr),
    Peer("npy", "uint8 .npy", "torch", partial(_Volumes, _open_npy), _write_npy),
)

MONAI = PEERS[0]  # as streaming from files is what most people do
