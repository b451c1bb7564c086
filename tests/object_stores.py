"""A bucket, a bad network before it, a source to put there, and what a store must hold wherever it lies."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ellipsoid, write_nifti
from faulty_proxy import FaultyProxy
from s3_server import S3Server, s3_server, use

from ingest import ingest, places

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
AFFINE[:3, 3] = [-60, -80, -60]
BUCKETS = (f"bucket-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator[str]:
    """Make a bucket, and let this process use the server."""
    name = next(BUCKETS)
    server.make_bucket(name)
    use(server.environment, monkeypatch)
    yield name
    places._client.cache_clear()


@contextlib.contextmanager
def bad_network(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Let this process use a server through a proxy, and try again at once."""
    with FaultyProxy(server.endpoint) as between:
        use(between.environment, monkeypatch)
        monkeypatch.setitem(places._RETRY, "backoff", {"init_backoff": places.timedelta(milliseconds=20)})
        yield between


@pytest.fixture
def proxy(server, monkeypatch) -> Iterator[FaultyProxy]:
    """Put a bad network between this process and the server."""
    with bad_network(server, monkeypatch) as between:
        yield between


def scan_bytes(folder: Path, seed: int) -> bytes:
    data = ellipsoid(AFFINE, (32, 42, 32), seed=seed).astype(np.int16)
    return write_nifti(folder / "scratch" / "x.nii.gz", data, AFFINE).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a BIDS tree with six scans, a broken one, a table, and what is to be passed over."""
    top = tmp_path_factory.mktemp("s3") / "bids"
    for number in range(6):
        path = top / f"sub-900000{number}" / "anat" / f"sub-900000{number}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(scan_bytes(top.parent, number))
    (top / "sub-9000006" / "anat").mkdir(parents=True)
    (top / "sub-9000006" / "anat" / "sub-9000006_T1w.nii.gz").write_bytes(b"broken")
    (top / "derivatives").mkdir()
    (top / "derivatives" / "sub-9000000_T1w.nii.gz").write_bytes(b"not looked at")
    (top / "dataset_description.json").write_text("{}")
    lines = [f"sub-900000{number}\t{50 + number}" for number in range(7)]
    (top / "participants.tsv").write_text("\n".join(["participant_id\tage", *lines]))
    return top


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "s.zarr"
    ingest(folder, out)
    return out


def local_content(store: Path) -> dict[str, bytes]:
    return comparable({str(f.relative_to(store)): f.read_bytes() for f in store.rglob("*") if f.is_file()})


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out what two places cannot have in common: identity, the source's address, the files' times."""
    meta = json.loads(files["zarr.json"])
    meta["attributes"].pop("store_id")
    meta["attributes"]["settings"].pop("source")
    kept = {name: content for name, content in files.items() if not name.startswith("scans/source_mtime")}
    return kept | {"zarr.json": json.dumps(meta, sort_keys=True).encode()}


def stored(server: S3Server, bucket: str, name: str = "out.zarr") -> dict[str, bytes]:
    objects = server.objects(bucket)
    beside = [key for key in objects if key.startswith(name) and not key.startswith(name + "/")]
    assert beside == [], "nothing is left beside the store"
    return comparable({k.removeprefix(name + "/"): v for k, v in objects.items() if k.startswith(name + "/")})
