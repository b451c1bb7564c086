"""Shards on a disk: past the system's cache where the file system can do that, and the same bytes where it cannot."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest

from ingest import shard
from ingest.shard import write_shard

LENGTHS = (1, 4095, 4096, 4097, 3 * 4096, 100_000)


@pytest.fixture(params=["past the cache", "no such flag", "refused when opened", "refused when written"])
def disk(request, monkeypatch):
    """Make the system one that can write past its cache, or one of those that cannot."""
    opened = os.open

    def open_refused(path, flags, *args, **kwargs):
        if flags & direct:
            raise OSError(errno.EINVAL, "no direct writes here")
        return opened(path, flags, *args, **kwargs)

    def write_refused(*_):
        raise OSError(errno.EINVAL, "no direct writes of this size")

    direct = getattr(os, "O_DIRECT", 0)
    if request.param == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT")
    elif request.param == "refused when opened":
        monkeypatch.setattr(shard.os, "open", open_refused)
    elif request.param == "refused when written":
        monkeypatch.setattr(shard.os, "write", write_refused)


@pytest.mark.usefixtures("disk")
def test_what_is_written_is_there_and_nothing_else(tmp_path):
    """Whole blocks or not, after a longer one or a shorter one: no byte of the block, or of the shard before, stays."""
    for number, length in enumerate([*LENGTHS, *LENGTHS[::-1]]):
        content = np.random.default_rng(number).bytes(length)
        path = tmp_path / "c" / str(number) / "0" / "0" / "0"
        write_shard(path, content)
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == ["0"]


def test_the_fast_way_is_the_one_taken_here(tmp_path, monkeypatch):
    """Else the test above proves nothing of it."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except (AttributeError, OSError):
        pytest.skip("this file system cannot be written past the cache")
    monkeypatch.setattr(shard, "open", None, raising=False)  # what the other way opens with
    write_shard(tmp_path / "c" / "0", b"x" * 5000)
    assert (tmp_path / "c" / "0").read_bytes() == b"x" * 5000


def test_threads_do_not_share_what_they_write_from(tmp_path):
    contents = {number: np.random.default_rng(number).bytes(50_000 + number) for number in range(8)}

    def write(number: int) -> None:
        for repeat in range(5):
            write_shard(tmp_path / str(number) / str(repeat), contents[number])

    threads = [threading.Thread(target=write, args=(number,)) for number in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, content in contents.items():
        assert all(file.read_bytes() == content for file in (tmp_path / str(number)).iterdir())


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_or_broken_is_an_error_that_leaves_nothing(tmp_path, monkeypatch, fault):
    def fail(*_):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(shard.os, "write", fail)
    with pytest.raises(OSError, match=os.strerror(fault)):
        write_shard(tmp_path / "c" / "0", b"x" * 5000)
    monkeypatch.undo()
    assert list((tmp_path / "c").iterdir()) == []


def test_a_write_that_stops_halfway_is_done_again_in_full(tmp_path, monkeypatch):
    """Systems may write less than they are asked to."""
    written = os.write
    monkeypatch.setattr(shard.os, "write", lambda file, content: written(file, content[:4096]))
    write_shard(tmp_path / "0", bytes(range(256)) * 40)
    monkeypatch.undo()
    assert (tmp_path / "0").read_bytes() == bytes(range(256)) * 40
