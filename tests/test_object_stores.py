"""Sources and stores in S3: the same store as on a disk, whatever the network does and whenever the run dies."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from calling import call
from conftest import ellipsoid
from faulty_proxy import Fault, FaultyProxy
from nifti_cases import nifti_pair
from object_stores import AFFINE, comparable, local_content, scan_bytes, stored
from object_stores import bucket as bucket  # a fixture
from object_stores import folder as folder  # a fixture
from object_stores import local as local  # a fixture
from object_stores import proxy as proxy  # a fixture
from object_stores import server as server  # a fixture

from ingest import IngestSettings, ingest, lease, open_store, places, remote_tables
from ingest.cli import main
from ingest.errors import StoreError
from ingest.inspection import summarise_store
from ingest.lock import store_lock
from ingest.places import ObjectPath, as_place
from ingest.verify import verify
from ingest.withdraw import withdraw
from loaders import open_loader

KILLS = int(os.environ.get("BRAIN_VOLUMES_KILLS", "2"))


def test_the_store_is_the_same_as_on_a_disk(server, bucket, folder, local, tmp_path):
    server.put_tree(bucket, "in", folder)
    summary = ingest(f"s3://{bucket}/in", f"s3://{bucket}/out.zarr")
    assert summary.status == {"bad_nifti": 1, "ok": 6}
    assert stored(server, bucket) == local_content(local)
    ingest(folder, f"s3://{bucket}/mixed.zarr")
    assert stored(server, bucket, "mixed.zarr") == local_content(local)
    ingest(f"s3://{bucket}/in", tmp_path / "s.zarr")
    assert local_content(tmp_path / "s.zarr") == local_content(local)

    store = open_store(f"s3://{bucket}/out.zarr")
    assert list(store.phenotypes["age"]) == [50.0 + number for number in range(7)]
    expected = open_store(local).scans.drop(columns="source_mtime")
    assert store.scans.drop(columns="source_mtime").equals(expected)
    assert (store.scans["source_mtime"] > 1e9).all()
    inside = summarise_store(f"s3://{bucket}/out.zarr")
    assert (inside.scans, inside.stored_bytes) == (7, summarise_store(local).stored_bytes)
    plain = zarr.open_group(places.zarr_store(as_place(f"s3://{bucket}/out.zarr")), mode="r")
    with open_loader(local, rows=[2]) as there, open_loader(f"s3://{bucket}/out.zarr", rows=[2]) as here:
        images = next(iter(here)).images.numpy()
        np.testing.assert_array_equal(images, next(iter(there)).images.numpy())
        np.testing.assert_array_equal(images[0], plain["volumes"][2])


def test_only_what_is_new_or_changed_is_read(server, bucket, folder, tmp_path):
    source, out = f"s3://{bucket}/in", f"s3://{bucket}/out.zarr"
    server.put_tree(bucket, "in", folder)
    ingest(source, out)
    before = server.objects(bucket, "out.zarr")
    read: list[str] = []
    ingest(source, out, on_scan=lambda row: read.append(row.participant))
    assert read == []
    as_place(f"{source}/sub-9000008/anat/sub-9000008_T1w.nii.gz").write_bytes(scan_bytes(tmp_path, 8))
    as_place(f"{source}/sub-9000002/anat/sub-9000002_T1w.nii.gz").write_bytes(scan_bytes(tmp_path, 99)[:-7])
    summary = ingest(source, out, retry_failed=True, on_scan=lambda row: read.append(row.participant))
    assert sorted(read) == ["sub-9000002", "sub-9000006", "sub-9000008"]
    assert (summary.new, summary.changed, summary.retried) == (1, 1, 1)
    after = server.objects(bucket, "out.zarr")
    for row in range(6):  # the third is damaged now, or half sent, and stays as it was
        assert after[f"volumes/c/{row}/0/0/0"] == before[f"volumes/c/{row}/0/0/0"]
    assert sorted((name.split("/")[0], reason) for name, reason, _ in summary.failures) == [
        ("sub-9000002", "bad_nifti"), ("sub-9000006", "bad_nifti"),
    ]  # fmt: skip
    assert "volumes/c/7/0/0/0" in after
    ingest(source, out, IngestSettings(slab=8), overwrite=True)
    assert open_store(out).slab == 8


def test_pairs_archives_and_manifests(server, bucket, tmp_path):
    import zipfile

    header, image = nifti_pair(ellipsoid(AFFINE, (32, 42, 32)).astype(np.int16), affine=AFFINE, kind=nib.Nifti1Pair)
    top = tmp_path / "tree"
    (top / "Brain MRI" / "90").mkdir(parents=True)
    (top / "9000001.hdr").write_bytes(header)
    (top / "9000001.img").write_bytes(image)
    (top / "9000002.nii.gz").write_bytes(scan_bytes(tmp_path, 2))
    with zipfile.ZipFile(top / "Brain MRI" / "90" / "9000003_20252_2_0.zip", "w") as archive:
        archive.writestr("T1/T1_brain.nii.gz", scan_bytes(tmp_path, 3))
    table = "path,participant\n9000001.img,a\nBrain MRI/90/9000003_20252_2_0.zip/T1/T1_brain.nii.gz,b\n"
    table += f"s3://{bucket}/in/9000002.nii.gz,c\ngone.nii,d\n"
    (top / "list.csv").write_text(table)
    server.put_tree(bucket, "in", top)
    flat = ingest(f"s3://{bucket}/in", tmp_path / "flat.zarr", IngestSettings(layout="flat"))
    assert flat.status == {"ok": 2}
    summary = ingest(f"s3://{bucket}/in/list.csv", tmp_path / "list.zarr")
    assert summary.status == {"ok": 3, "read_error": 1}
    assert "there is no s3://" in summary.failures[0][2]
    ukb = ingest(f"s3://{bucket}/in", tmp_path / "ukb.zarr", IngestSettings(image="T1_brain"))
    assert ukb.status == {"ok": 1}
    assert open_store(tmp_path / "ukb.zarr").scans["participant"][0] == "9000003"


def test_a_bad_network_changes_nothing(server, bucket, folder, local, proxy):
    server.put_tree(bucket, "in", folder)
    proxy.reset(
        Fault("status", share=0.15, status=500),
        Fault("drop", share=0.1),
        Fault("drop", on="PutObject", share=0.15, forwarded=True),
        Fault("cut", on="GetObject", share=0.3, after=3000),
        Fault("slow", on="GetObject", key=r"sub-9000001", rate=200_000),
        Fault("cut", on="ListObjectsV2", first=2, after=100),
    )
    ingest(f"s3://{bucket}/in", f"s3://{bucket}/out.zarr")
    kinds = {kind for (kind, *_), count in _injected(proxy) if count}
    assert {"status", "drop", "cut", "slow"} <= kinds
    proxy.reset()
    assert stored(server, bucket) == local_content(local)


def _injected(proxy: FaultyProxy) -> list[tuple[tuple[str, ...], int]]:
    return [((key,) if isinstance(key, str) else tuple(key), count) for key, count in proxy.injected.items()]


def test_a_scan_that_cannot_be_fetched_is_a_row(server, bucket, folder, proxy, monkeypatch):
    monkeypatch.setitem(places._RETRY, "max_retries", 2)
    server.put_tree(bucket, "in", folder)
    proxy.reset(Fault("status", key="sub-9000003.*T1w", on="GetObject", status=500))
    source, out = f"s3://{bucket}/in", f"s3://{bucket}/out.zarr"
    summary = ingest(source, out)
    assert summary.status == {"bad_nifti": 1, "ok": 5, "read_error": 1}
    failed, _, reason = next(failure for failure in summary.failures if failure[1] == "read_error")
    assert "sub-9000003" in failed
    assert "cannot be reached" in reason
    proxy.reset()
    assert ingest(source, out, retry_failed=True).status == {"bad_nifti": 1, "ok": 6}


def test_sources_that_are_gone_end_the_run_and_not_every_scan(bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setitem(places._RETRY, "max_retries", 1)
    for number in range(20):
        as_place(f"s3://{bucket}/in/{number}.nii").write_bytes(b"x")
    for number in range(5):
        as_place(f"s3://{bucket}/in/00{number}.nii.gz").write_bytes(scan_bytes(tmp_path, number))
    proxy.reset(Fault("status", on="GetObject", skip=5))
    with pytest.raises(StoreError, match=r"is gone: 8 scans .* run the same command again"):
        ingest(f"s3://{bucket}/in", tmp_path / "s.zarr")
    proxy.reset()
    summary = ingest(f"s3://{bucket}/in", tmp_path / "s.zarr", retry_failed=True)
    assert summary.status == {"bad_nifti": 20, "ok": 5}


def test_a_store_that_cannot_be_reached_ends_clearly_and_goes_on(server, bucket, folder, local, proxy, monkeypatch):
    monkeypatch.setitem(places._RETRY, "max_retries", 2)
    proxy.reset(Fault("status", on="PutObject", key="volumes/c/", skip=3, status=503))
    with pytest.raises(StoreError, match=r"volumes/c/.* cannot be reached: .*run the same command again"):
        ingest(folder, f"s3://{bucket}/out.zarr")
    proxy.reset()
    ingest(folder, f"s3://{bucket}/out.zarr")
    assert stored(server, bucket) == local_content(local)


class Died(BaseException):
    """Stands for the end of the process: nothing catches it, nothing is cleaned up."""


def test_died_before_every_change(server, bucket, folder, local, monkeypatch):
    """The run dies before its first, second, third ... write or removal, its lock stays, and the next goes on."""
    out = ObjectPath(bucket, "out.zarr")
    monkeypatch.setattr(remote_tables, "_PUTS_AT_ONCE", 1)
    monkeypatch.setattr(lease, "_is_dead", lambda _: True)
    monkeypatch.setattr(lease._Lease, "release", lambda _: None)
    write, remove = ObjectPath.write_bytes, ObjectPath.remove
    changes = itertools.count()
    dies_at = -1

    def dying(call):
        def changed(*arguments):
            if next(changes) == dies_at:
                raise Died
            return call(*arguments)

        return changed

    monkeypatch.setattr(ObjectPath, "write_bytes", dying(write))
    monkeypatch.setattr(ObjectPath, "remove", staticmethod(dying(remove)))
    finished = False
    while not finished:
        dies_at += 31 if dies_at > 4 else 2
        changes = itertools.count()
        try:
            ingest(folder, str(out))
            finished = True
        except Died:
            pass
        dying_was, dies_at = dies_at, -1
        ingest(folder, str(out))
        dies_at = dying_was
        left = server.objects(bucket)
        assert not [key for key in left if key.startswith(("out.zarr.staged", "out.zarr.journal"))]
        assert (
            comparable({k.removeprefix("out.zarr/"): v for k, v in left.items() if k.startswith("out.zarr/")})
            == local_content(local)
        )  # fmt: skip
        if not finished:
            remote_tables.remove_store(out)
    assert dies_at > 60


def ingest_process(source: Path | str, out: str) -> subprocess.Popen[str]:
    code = "import sys; from ingest.cli import main; main()"
    command = [sys.executable, "-c", code, str(source), out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_moments(server, bucket, folder, local):
    rng = random.Random(0)
    started = time.perf_counter()
    process = ingest_process(folder, f"s3://{bucket}/warm.zarr")
    assert process.communicate(timeout=120)[1].count("bad_nifti") == 1
    whole = time.perf_counter() - started
    kills = 0
    while kills < KILLS:
        process = ingest_process(folder, f"s3://{bucket}/out.zarr")
        time.sleep(rng.uniform(whole / 3, whole))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    process = ingest_process(folder, f"s3://{bucket}/out.zarr")
    output = process.communicate(timeout=120)
    assert process.returncode == 1, output  # one scan is broken
    assert stored(server, bucket) == local_content(local)


def test_a_second_writer_is_refused(bucket, folder, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    out = f"s3://{bucket}/out.zarr"
    with store_lock(as_place(out)) as check:
        with pytest.raises(StoreError, match=rf"{out} is being written by process {os.getpid()} on "):
            ingest(folder, out)
        check()
    assert not as_place(out).exists()
    assert not as_place(out + ".lock").exists()


def test_a_lock_whose_holder_is_silent_is_taken_over_and_the_holder_notices(bucket, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease, "ABANDONED_S", 1.0)
    out = as_place(f"s3://{bucket}/out.zarr")
    silent = lease._Lease(out.with_name("out.zarr.lock"))
    silent.acquire(out)  # and gives no sign of life
    with store_lock(out) as check:
        check()
        time.sleep(1.1)
        with pytest.raises(StoreError, match=r"right to write to .* is lost"):
            silent.check(out)
        with pytest.raises(lease.PreconditionError):
            silent._write({"e_tag": silent.etag})
        silent.release()  # is not its own any more
        assert as_place(f"s3://{bucket}/out.zarr.lock").exists()
        check()


def test_an_answer_that_is_lost_does_not_lock_out_oneself(bucket, proxy):
    proxy.reset(Fault("drop", on="PutObject", key=r"\.lock", first=1, forwarded=True))
    with store_lock(as_place(f"s3://{bucket}/out.zarr")) as check:
        check()
    assert proxy.injected.total() == 1


def test_verify_finds_damage_and_repairs_it(server, bucket, folder, local):
    out = f"s3://{bucket}/out.zarr"
    server.put_tree(bucket, "in", folder)
    ingest(f"s3://{bucket}/in", out)
    assert verify(out, against=f"s3://{bucket}/in", sample=0).clean
    shard = as_place(f"{out}/volumes/c/1/0/0/0")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(bytes(content))
    as_place(f"{out}/volumes/c/3/0/0/0").unlink()
    as_place(f"{out}/volumes/c/77/0/0/0").write_bytes(b"x")
    found = {(finding.kind, finding.row) for finding in verify(out).findings}
    assert found == {("shard_damaged", 1), ("shard_missing", 3), ("shard_orphan", None)}
    report = verify(out, against=f"s3://{bucket}/in", repair=True)
    assert report.repaired == 3
    assert verify(out).clean
    assert stored(server, bucket) == local_content(local)


def test_withdrawal_leaves_nothing(server, bucket, folder, tmp_path):
    server.put_tree(bucket, "in", folder)
    out = f"s3://{bucket}/out.zarr"
    ingest(f"s3://{bucket}/in", out)
    (tmp_path / "w.csv").write_text("9000002\n")
    record = withdraw(tmp_path / "w.csv", [out])
    assert (record.removals[0].people, record.removals[0].scans) == (1, 1)
    assert record.removals[0].bytes_deleted > 0
    left = server.objects(bucket, "out.zarr")
    assert "volumes/c/2/0/0/0" not in left
    assert not [key for key, content in left.items() if b"9000002" in content]
    store = open_store(out)
    assert store.scans["status"][2] == "withdrawn"
    assert np.isnan(store.phenotypes["age"][2])
    assert not store.scans.map(str).map(lambda cell: "9000002" in cell).to_numpy().any()
    with pytest.raises(StoreError, match="--withdrawn"):
        ingest(f"s3://{bucket}/in", out)
    assert ingest(f"s3://{bucket}/in", out, withdrawn=tmp_path / "w.csv").status["withdrawn"] == 1


def test_workers_in_other_processes(server, bucket, folder, local):
    server.put_tree(bucket, "in", folder)
    ingest(f"s3://{bucket}/in", f"s3://{bucket}/out.zarr", workers=1)
    assert stored(server, bucket) == local_content(local)


def test_what_cannot_be_used_is_said_in_one_line(bucket, folder, monkeypatch):
    def error_of(source: str | Path, out: str) -> str:
        places._client.cache_clear()
        done = call(main, source, out)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "there is no bucket nobody-made-this" in error_of(folder, "s3://nobody-made-this/out.zarr")
    assert "no folder s3://" in error_of(f"s3://{bucket}/empty", f"s3://{bucket}/out.zarr")
    assert "names no bucket" in error_of(folder, "s3:///out.zarr")
    assert "no place that can be used" in error_of("https://example.org/x", f"s3://{bucket}/out.zarr")
    as_place(f"s3://{bucket}/thing/file").write_bytes(b"x")
    assert "is not a Zarr store" in error_of(folder, f"s3://{bucket}/thing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "access denied" in error_of(folder, f"s3://{bucket}/out.zarr")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    assert "AWS_ALLOW_HTTP=true" in error_of(folder, f"s3://{bucket}/out.zarr")


def test_a_dead_endpoint_is_given_up(bucket, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(places._RETRY, "max_retries", 2)
    places._client.cache_clear()
    with pytest.raises(StoreError, match="cannot be reached"):
        ingest(folder, f"s3://{bucket}/out.zarr")
    with pytest.raises(StoreError, match="cannot be reached"):
        ingest(f"s3://{bucket}/in", folder.parent / "never.zarr")
    assert not (folder.parent / "never.zarr").exists()


def test_object_paths_are_like_paths(bucket):
    place = as_place(f"s3://{bucket}/a b/c.zarr/")
    assert str(place) == f"s3://{bucket}/a b/c.zarr"
    assert (place.name, place.suffix, place.parent.key) == ("c.zarr", ".zarr", "a b")
    assert place.with_name("d").key == "a b/d"
    assert not place.exists()
    (place / "x" / "é%20#?.txt").write_text("ü")
    assert place.exists()
    assert place.is_dir()
    assert not place.is_file()
    assert (place / "x" / "é%20#?.txt").read_text() == "ü"
    assert list(places.files_below(place)) == ["x/é%20#?.txt"]
    content = bytes(range(256)) * 200_000  # several pieces
    (place / "large").write_bytes(content)
    assert (place / "large").read_pieces(len(content)) == content
    with pytest.raises(FileNotFoundError, match="there is no s3://"):
        (place / "none").read_bytes()
