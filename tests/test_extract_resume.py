"""Killed, repeated, grown, changed, damaged: the embeddings are always what an undisturbed run would have made.

BRAIN_VOLUMES_KILLS sets how many random kills are tried (8 unless told).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from extracting import DIED, SETTINGS, Server
from small_store import SLAB, make_store

from extract import build_encoder, extract, open_embeddings
from extract.assemble import _kept_provenance, assemble
from extract.blocks import (
    parts_path,
    read_finished,
    read_settings,
    remove_parts,
    same_scans,
    scans_per_block,
    start_parts,
    write_block,
)
from extract.resume import extract_to
from extract.run import scans_table
from ingest.encode import encode_shard
from ingest.errors import StoreError
from ingest.lock import store_lock
from ingest.shard import shard_path, write_shard
from ingest.store import open_store, resize_store, rows_of, write_phenotypes, write_scans
from ingest.withdraw import withdraw
from loaders.errors import ShardError

KILLS = int(os.environ.get("BRAIN_VOLUMES_KILLS", "6"))
SCANS = 20
KINDS = (".zarr", ".h5", ".parquet", ".npz")


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(**SETTINGS)


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path / "s.zarr", SCANS, bad=[2])
    table = pd.DataFrame({"age": np.arange(SCANS) + 40.0})
    write_phenotypes(tmp_path / "s.zarr", table, {"age": {"task": "continuous"}})
    return tmp_path / "s.zarr"


@pytest.fixture(scope="module")
def killing(tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    """Give a server and a store."""
    path = tmp_path_factory.mktemp("killing") / "s.zarr"
    make_store(path, SCANS, bad=[2])
    server = Server(path)
    yield server, path
    server.close()


def content(out: Path) -> tuple[np.ndarray, pd.DataFrame, dict]:
    """Return what embeddings hold; nothing may be left beside them."""
    beside = [f.name for f in out.parent.iterdir() if f.name.lstrip(".").startswith(out.stem) and f != out]
    assert beside == []
    found = open_embeddings(out)
    return found.features, pd.concat([found.scans, found.phenotypes], axis="columns"), found.attrs


def assert_same(found: Path, expected: tuple[np.ndarray, pd.DataFrame, dict]) -> None:
    features, table, attrs = content(found)
    np.testing.assert_array_equal(features, expected[0])
    pd.testing.assert_frame_equal(table, expected[1])
    assert attrs == expected[2]


def test_killed_at_random_moments(killing, tmp_path):
    server, store = killing
    assert server.run(store, tmp_path / "reference.h5") == 0
    expected = content(tmp_path / "reference.h5")
    assert len(expected[0]) == SCANS - 1
    started = time.perf_counter()
    assert server.run(store, tmp_path / "again.h5") == 0
    whole = time.perf_counter() - started
    rng = random.Random(0)
    kills = finished = went_on = 0
    while kills < KILLS:
        out = tmp_path / f"e{finished}{KINDS[finished % 4]}"
        while (code := server.run(store, out, kill_after=rng.uniform(0, whole))) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            went_on += len(list(parts_path(out).glob("0*.npz"))) > 0
            if kills >= KILLS:
                assert server.run(store, out) == 0
                break
        assert_same(out, expected)
        finished += 1
    assert went_on, "no kill left finished blocks behind"


def without_size(out: Path) -> None:
    """Make embeddings in a Zarr store what an older version wrote."""
    scans = zarr.open_group(out)["scans"]
    del scans["source_size"], scans.attrs["columns"]


def test_killed_before_every_twentieth_step(killing, tmp_path):
    server, store = killing
    assert server.run(store, tmp_path / "reference.zarr") == 0
    expected = content(tmp_path / "reference.zarr")
    died = 0
    for step in range(1, 400, 20):
        folder = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "reference.zarr", folder / "e.zarr")
        without_size(folder / "e.zarr")  # all is embedded anew
        code = server.run(store, folder / "e.zarr", die_at=step)
        assert code in (0, DIED)
        died += code == DIED
        assert server.run(store, folder / "e.zarr") == 0
        assert_same(folder / "e.zarr", expected)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert died > 2


def test_a_run_that_goes_on_embeds_only_what_is_missing(store, encoder, tmp_path):
    done = []

    def stop(timing) -> None:
        done.append(timing.scans)
        if timing.scans >= 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path / "e.h5", store, encoder, batch_size=1, on_batch=stop)
    assert not (tmp_path / "e.h5").exists()
    plans = []
    summary = extract_to(tmp_path / "e.h5", store, encoder, on_plan=plans.append)
    assert plans == [SCANS - 1 - 2 * scans_per_block(1)]
    assert (summary.scans, summary.embedded) == (SCANS - 1, plans[0])
    extract_to(tmp_path / "f.h5", store, encoder, batch_size=1)
    assert_same(tmp_path / "e.h5", content(tmp_path / "f.h5"))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_store_that_has_grown_and_changed_only_what_is_new_is_embedded(store, encoder, tmp_path, kind):
    out = tmp_path / f"e{kind}"
    assert extract_to(out, store, encoder).embedded == SCANS - 1
    before = content(out)
    modified = [f.stat().st_mtime_ns for f in [out, *out.rglob("*")]]
    assert extract_to(out, store, encoder).embedded == 0
    assert modified == [f.stat().st_mtime_ns for f in [out, *out.rglob("*")]], "nothing is new"

    voxels = np.random.default_rng(5).integers(0, 256, (2, 16, 12, 8), dtype=np.uint8)
    rows = rows_of(open_store(store).scans)
    resize_store(store, SCANS + 1)
    rows.append(replace(rows[0], participant="new", source="new.nii.gz"))
    rows[7] = replace(rows[7], source_mtime=1.0)  # read again
    rows[9] = replace(rows[9], status="withdrawn", participant="")
    for row, picture in zip((7, SCANS), voxels, strict=True):
        shard_path(store, row).unlink(missing_ok=True)
        write_shard(shard_path(store, row), encode_shard(picture, SLAB))
    ages = pd.DataFrame({"age": np.arange(SCANS + 1) + 50.0})
    write_scans(store, rows)
    write_phenotypes(store, ages, {"age": {"task": "continuous"}})
    assert extract_to(out, store, encoder).embedded == 2
    features, table, attrs = content(out)
    anew = extract(store, encoder)
    np.testing.assert_allclose(features, anew.features, rtol=1e-4, atol=1e-5)
    assert table["row"].tolist() == [row for row in range(SCANS + 1) if row not in (2, 9)]
    assert table["age"].tolist() == [row + 50 for row in table["row"]]
    assert attrs == {"format": "brain-embeddings", "format_version": 1, **json.loads(json.dumps(anew.attrs))}
    kept = [row for row in before[1]["row"] if row not in (7, 9)]
    where = [np.flatnonzero(t["row"].isin(kept)) for t in (table, before[1])]
    np.testing.assert_array_equal(features[where[0]], before[0][where[1]])


@pytest.mark.parametrize("again", [False, True])
def test_who_withdraws_meanwhile_is_in_no_file(store, encoder, tmp_path, again):
    people = tmp_path / "w.csv"
    people.write_text("\n".join(open_store(store).scans["participant"][[3, 12]]))
    (tmp_path / "e.h5").symlink_to(tmp_path / "real.h5")
    if again:
        extract_to(tmp_path / "e.h5", store, encoder)
        rows = rows_of(open_store(store).scans)
        rows[18] = replace(rows[18], source_mtime=1.0)
        write_scans(store, rows)
    shard_path(store, 12).write_bytes(b"damaged")  # its file is named in the reason why it is left out

    def leave(timing) -> None:
        if timing.scans == 1:
            withdraw(people, [store])

    summary = extract_to(tmp_path / "e.h5", store, encoder, batch_size=1, on_batch=leave)
    assert summary.skipped == {}
    features, table, attrs = content(tmp_path / "real.h5")
    assert (tmp_path / "e.h5").is_symlink()
    assert table["row"].tolist() == [row for row in range(SCANS) if row not in (2, 3, 12)]
    assert attrs["skipped"] == []
    np.testing.assert_allclose(features, extract(store, encoder).features, rtol=1e-4, atol=1e-5)
    everyone = tmp_path / "all.csv"
    everyone.write_text("\n".join(name for name in open_store(store).scans["participant"] if name))
    with pytest.raises(StoreError, match="all scans have left"):
        extract_to(tmp_path / "f.h5", store, encoder, on_batch=lambda _: withdraw(everyone, [store]))


def test_new_phenotypes_alone(store, encoder, tmp_path):
    extract_to(tmp_path / "e.npz", store, encoder)
    features, table, _ = content(tmp_path / "e.npz")
    write_phenotypes(store, pd.DataFrame({"sex": np.arange(SCANS) % 2.0}), {"sex": {"task": "binary"}})
    assert extract_to(tmp_path / "e.npz", store, encoder).embedded == 0
    now = content(tmp_path / "e.npz")
    np.testing.assert_array_equal(now[0], features)
    assert now[1]["sex"].tolist() == [row % 2 for row in table["row"]]
    assert "age" not in now[1]


def test_what_is_of_another_run_is_refused_and_replaced_when_told(store, encoder, tmp_path):
    other = build_encoder(**SETTINGS | {"slices": 2})
    out = tmp_path / "e.h5"
    extract_to(out, store, encoder)
    with pytest.raises(StoreError, match=r"e.h5 exists and was made with slices 1, not 2; add --overwrite"):
        extract_to(out, store, other)
    make_store(tmp_path / "t.zarr", 3)
    with pytest.raises(StoreError, match=r"made with store_id \"\w+\", not \"\w+\"; add --overwrite"):
        extract_to(out, tmp_path / "t.zarr", encoder)
    assert extract_to(out, store, other, overwrite=True).embedded == SCANS - 1
    assert content(out)[2]["slices"] == 2

    parts = parts_path(out)
    start_parts(parts, {**read_tables_settings(out), "slices": 5})
    stray = r"e.h5.parts is of an unfinished run with slices 5, not 2; "
    with pytest.raises(StoreError, match=stray + r"remove .*e\.h5\.parts to go on with .*e\.h5, which is of this one"):
        extract_to(out, store, other)
    out.unlink()
    with pytest.raises(StoreError, match=stray + "add --overwrite to give that up"):
        extract_to(out, store, other)
    assert extract_to(out, store, other, overwrite=True).embedded == SCANS - 1
    content(out)
    with store_lock(out), pytest.raises(StoreError, match="is being written by process"):
        extract_to(out, store, other)


def test_nothing_but_embeddings_is_overwritten(store, encoder, tmp_path, monkeypatch):
    make_store(tmp_path / "other.zarr", 3)
    (tmp_path / "notes.h5").write_text("precious")
    (tmp_path / "link.zarr").symlink_to(store)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.chdir(tmp_path)
    for out in ("other.zarr", "notes.h5"):
        with pytest.raises(
            StoreError, match=f"{out} exists and is not known to be an embedding file.*remove it yourself"
        ):
            extract_to(Path(out), store, encoder, overwrite=True)
    for out in (store, Path("s.zarr"), Path("link.zarr"), store / "e.h5"):
        for overwrite in (False, True):
            with pytest.raises(StoreError, match=r"is the store .*s\.zarr, or in it, and not replaced"):
                extract_to(out, store, encoder, overwrite=overwrite)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_of_another_version_of_the_encoding_nothing_is_kept(store, encoder, tmp_path, monkeypatch):
    extract_to(tmp_path / "e.h5", store, encoder)
    monkeypatch.setattr("extract.encoder.ENCODING_VERSION", 2)
    with pytest.raises(StoreError, match="made with encoding_version 1, not 2"):
        extract_to(tmp_path / "e.h5", store, encoder)


def test_a_file_names_who_began_it_and_who_added_to_it_last():
    old, new, newest = ({"brain-volumes": version} for version in "123")
    had = {"created_by": old, "backend": "dali"}
    now = {"created_by": new, "backend": "torch"}
    assert _kept_provenance(had, now, grown=False) == had
    grown = _kept_provenance(had, now, grown=True)
    assert grown == {"created_by": old, "updated_by": new}
    assert _kept_provenance(grown, {"created_by": newest}, grown=True) == {"created_by": old, "updated_by": newest}
    assert _kept_provenance(had, {"created_by": old}, grown=True) == {"created_by": old}


def read_tables_settings(out: Path) -> dict:
    attrs = open_embeddings(out).attrs
    return {"store_id": attrs["store"]["id"], **attrs}


def test_damaged_scans_are_left_out_and_tried_again(store, encoder, tmp_path):
    expected = extract(store, encoder)
    shard = shard_path(store, 4)
    good = shard.read_bytes()
    shard.write_bytes(b"damaged")
    with pytest.raises(ShardError, match="row 4"):
        extract(store, encoder)
    summary = extract_to(tmp_path / "e.parquet", store, encoder, batch_size=8)
    assert list(summary.skipped) == [4]
    assert summary.embedded == SCANS - 2
    found = open_embeddings(tmp_path / "e.parquet")
    assert 4 not in found.scans["row"].tolist()
    assert found.attrs["skipped"][0]["row"] == 4
    assert "row 4" in found.attrs["skipped"][0]["reason"]
    assert extract_to(tmp_path / "e.parquet", store, encoder).skipped.keys() == {4}
    shard.write_bytes(good)
    summary = extract_to(tmp_path / "e.parquet", store, encoder)
    assert (summary.embedded, summary.skipped) == (1, {})
    found = open_embeddings(tmp_path / "e.parquet")
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)
    assert found.attrs["skipped"] == []


def test_no_scan_can_be_read(store, encoder, tmp_path):
    for row in open_store(store).ok_rows:
        shard_path(store, int(row)).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"none of the 19 scans of .* can be read; the first: .*row 0"):
        extract_to(tmp_path / "e.h5", store, encoder)
    assert [f.name for f in tmp_path.iterdir()] == ["s.zarr"]


def test_blocks_that_are_damaged_or_of_other_images_do_not_count(store, tmp_path):
    parts = tmp_path / "e.h5.parts"
    volumes = open_store(store)
    wanted = scans_table(volumes, volumes.ok_rows)
    start_parts(parts, {"batch_size": 1})
    write_block(parts, 0, wanted[:3], np.zeros((3, 2), np.float32), {19: "why"})
    write_block(parts, 1, wanted[3:5], np.ones((2, 2), np.float32), {})
    found = read_finished(parts)
    assert found.skipped == {19: "why"}
    assert same_scans(wanted, found.scans).tolist() == [0, 1, 2, 3, 4, *[-1] * (SCANS - 6)]
    changed = wanted.assign(source_size=np.where(wanted.index == 1, 5, wanted["source_size"]))
    assert same_scans(changed, found.scans)[:3].tolist() == [0, -1, 2]
    assert same_scans(wanted.drop(columns="source_size"), found.scans).max() == -1
    (parts / "00000001.npz").write_bytes((parts / "00000001.npz").read_bytes()[:300])
    found = read_finished(parts)
    assert (len(found.scans), found.next_number) == (3, 2)
    (parts / "settings.json").unlink()
    assert read_settings(parts) is None
    start_parts(parts, {"batch_size": 1})
    assert not len(read_finished(parts).scans), "blocks without settings were about to be removed"
    assert remove_parts(parts) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_scans(store, tmp_path, kind):
    volumes = open_store(store)
    block, blocks, width = 1024, 24, 512
    some = scans_table(volumes, volumes.ok_rows).iloc[np.zeros(block * blocks, int)]
    wanted = some.assign(row=np.arange(block * blocks)).reset_index(drop=True)
    many = replace(volumes, phenotypes=pd.DataFrame({"age": np.arange(block * blocks, dtype=float)}))
    parts = tmp_path / "e.parts"
    start_parts(parts, {"batch_size": 8})
    for number in range(blocks):
        features = np.full((block, width), number, np.float32)
        write_block(parts, number, wanted[number * block :][:block], features, {})
    out = tmp_path / f"e{kind}"
    assemble(tmp_path / f"warm{kind}", many, wanted, None, parts, {})
    tracemalloc.start()
    assemble(out, many, wanted, None, parts, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    all_of_them = 4 * width * block * blocks
    assert peak < 0.6 * all_of_them
    found = open_embeddings(out)
    np.testing.assert_array_equal(found.features[:, 0], np.repeat(np.arange(blocks), block))
    assert (found.features == found.features[:, :1]).all()
