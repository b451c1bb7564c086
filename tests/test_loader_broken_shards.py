"""Shards with a wrong index and files that are no shards: loaders and readers name the scan, and read no more of it."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_cases import ABSENT, picture_of, with_crc, with_index
from small_store import SHAPE, SLAB, make_store

from ingest.shard import shard_path
from loaders import CorruptShardError, VolumeReader, open_loader
from loaders.views import plan_picture


def test_a_swap_in_the_index_is_found_by_its_checksum(tmp_path):
    make_store(tmp_path / "s.zarr", 1)
    path = shard_path(tmp_path / "s.zarr", 0)
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)[[0, 2, 1, 3]]
    path.write_bytes(content[:-68] + index.tobytes() + content[-4:])
    with VolumeReader(tmp_path / "s.zarr") as reader, pytest.raises(CorruptShardError, match="checksum of the index"):
        reader.read([0])


@pytest.mark.parametrize("view", ["volume", "axial", "sagittal"])
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ((0, 0), "slab 2 has no bytes"),
        ((ABSENT, 0), "slab 2 has no bytes"),
        ((100, ABSENT), "slab 2 lies outside the shard"),
        ((ABSENT, 100), "slab 2 lies outside the shard"),
        ((2**63, 100), "slab 2 lies outside the shard"),
        ((2**63, 2**63), "slab 2 lies outside the shard"),
        ((0, 8), "slab 2 lies outside the shard"),
        ((0, 10**6), "slab 2 lies outside the shard"),
        ((0, 40), "slab 2 has a wrong checksum"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(tmp_path, view, entry, reason):
    make_store(tmp_path / "s.zarr", 2)
    path = shard_path(tmp_path / "s.zarr", 1)
    content = path.read_bytes()
    entries = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).tolist()
    entries[2] = list(entry)
    path.write_bytes(with_index(content[:-68], entries))
    for settings_ in ({"backend": "torch"}, {"backend": "dali", "dtype": "float16"}):
        with (
            open_loader(tmp_path / "s.zarr", view=view, slices=[0, 1, 7], **settings_) as loader,  # type: ignore[arg-type]
            pytest.raises(CorruptShardError, match=rf"row 1 \(1.nii.gz\) of .*: {reason}")
            if view != "axial"
            else pytest.MonkeyPatch.context(),  # slab 2 is not looked at
        ):
            list(loader)
    with VolumeReader(tmp_path / "s.zarr", view="axial", slices=[9, 0]) as reader:
        np.testing.assert_array_equal(reader.read([0]), VolumeReader(tmp_path / "s.zarr").read([0])[:, [9, 0], ::-1])
        with pytest.raises(CorruptShardError, match=reason):
            reader.read([1])


def faulty(path: Path, fault: str) -> Callable[[], None]:
    """Put something else in a file's place; return what removes it."""
    path.unlink()
    if fault == "a folder":
        path.mkdir()
    elif fault == "an empty file":
        path.touch()
    elif fault == "a device":
        path.symlink_to("/dev/zero")
    elif fault == "a socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    elif fault == "10 GB of nothing":
        path.touch()
        os.truncate(path, 10 << 30)
    elif fault == "10 GB and a good index":
        index = with_crc(np.array([(number * 100, 100) for number in range(4)], "<u8").tobytes())
        path.touch()
        os.truncate(path, (10 << 30) - len(index))
        with open(path, "ab") as file:
            file.write(index)
    return lambda: path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("view", ["volume", "axial"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nothing", "No such file"),
        ("a folder", "no regular file"),
        ("an empty file", "the shard has 0 bytes, expected 68 to"),
        ("a device", "no regular file"),
        ("a socket", "No such device"),
        ("10 GB of nothing", "the shard has 10737418240 bytes, expected 68 to"),
        ("10 GB and a good index", "the shard has 10737418240 bytes, expected 68 to"),
    ],
)
def test_what_is_no_shard_is_not_read_and_named(tmp_path, view, fault, reason):
    voxels = make_store(tmp_path / "s.zarr", 3)
    remove = faulty(shard_path(tmp_path / "s.zarr", 1), fault)
    try:
        with open_loader(tmp_path / "s.zarr", view=view, on_error="skip", batch_size=3) as loader:
            list(loader)  # loads what is compiled
            started = time.perf_counter()
            before = bytes_by_the_system()
            (batch,) = loader
            assert bytes_by_the_system() - before < 200_000
            assert time.perf_counter() - started < 10
        assert list(loader.skipped) == [1]
        assert re.search(rf"row 1 \(1.nii.gz\) of .*s.zarr cannot be read: .*{reason}", loader.skipped[1])
        picture = plan_picture(SHAPE, SLAB, view)
        np.testing.assert_array_equal(batch.images[2], picture_of(voxels[2], picture))
        with (
            VolumeReader(tmp_path / "s.zarr", view=view) as reader,
            pytest.raises(CorruptShardError, match=rf"row 1 \(1.nii.gz\) of .*: .*{reason}"),
        ):
            reader.read([1])
    finally:
        remove()


def bytes_by_the_system() -> int:
    return int(Path("/proc/self/io").read_text().split("\n")[0].removeprefix("rchar: "))
