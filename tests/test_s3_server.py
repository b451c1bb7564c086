"""The S3 server of the tests is one, the faults of its proxy happen, and obstore takes them as ingest relies on."""

from __future__ import annotations

import http.client
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest
from faulty_proxy import Fault, FaultyProxy
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store
from s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server, s3_server

NAMES = (f"bucket-{number}" for number in count())


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server) -> str:
    name = next(NAMES)
    server.make_bucket(name)
    return name


@pytest.fixture
def proxy(server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.endpoint) as between:
        yield between


def open_bucket(endpoint: str, bucket: str, *, retries: int = 5, secret: str = SECRET_KEY, **client: str) -> S3Store:
    return S3Store(
        bucket,
        endpoint=endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=secret,
        region=REGION,
        client_options={"allow_http": True, **client},
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=60),
            "backoff": {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(milliseconds=10)},
        },
    )


def get(store: S3Store, key: str) -> bytes:
    return bytes(obstore.get(store, key).bytes())


def keys(store: S3Store, prefix: str | None = None) -> list[str]:
    return [entry["path"] for page in obstore.list(store, prefix) for entry in page]


def test_objects(server, bucket):
    store = server.store(bucket)
    before = datetime.now(UTC) - timedelta(seconds=2)
    obstore.put(store, "a/b é+ü.bin", b"0123456789")
    assert get(store, "a/b é+ü.bin") == b"0123456789"
    assert bytes(obstore.get_range(store, "a/b é+ü.bin", start=2, end=5)) == b"234"
    head = obstore.head(store, "a/b é+ü.bin")
    assert head["size"] == 10
    assert head["e_tag"]
    assert head["last_modified"] >= before
    obstore.delete(store, "a/b é+ü.bin")
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "a/b é+ü.bin")


def test_conditions(server, bucket):
    store = server.store(bucket)
    first = obstore.put(store, "lock", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "lock", b"2", mode="create")
    obstore.put(store, "lock", b"3", mode={"e_tag": first["e_tag"]})
    with pytest.raises(PreconditionError):
        obstore.put(store, "lock", b"4", mode={"e_tag": first["e_tag"]})
    assert get(store, "lock") == b"3"


def test_one_of_many_creates(server, bucket):
    store = server.store(bucket)

    def create(number: int) -> bool:
        try:
            obstore.put(store, "lock", f"{number}".encode(), mode="create")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(create, range(8))) == 1


def test_lists_by_pages(server, bucket, proxy):
    store = server.store(bucket)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: obstore.put(store, f"p/{number:04d}", b""), range(1100)))
    obstore.put(store, "p.txt", b"")
    store = open_bucket(proxy.endpoint, bucket)
    assert sorted(keys(store, "p")) == [f"p/{number:04d}" for number in range(1100)]
    assert proxy.count("ListObjectsV2", f"^{bucket}/p/$") == 2


def test_multipart(server, bucket, proxy):
    data = os.urandom((11 << 20) + 3)
    obstore.put(open_bucket(proxy.endpoint, bucket), "big", data)
    assert server.objects(bucket) == {"big": data}
    operations = {operation: n for (operation, _), n in proxy.requests.items()}
    assert operations == {"CreateMultipartUpload": 1, "UploadPart": 3, "CompleteMultipartUpload": 1}


def test_folders(server, bucket, tmp_path):
    files = {"x": b"1", "d/y": b"", "d/e/z": b"\x00" * 100}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    server.put_tree(bucket, "some/where", tmp_path)
    assert server.objects(bucket, "some/where") == files
    assert sorted(server.objects(bucket)) == sorted(f"some/where/{name}" for name in files)


def test_signatures_are_checked(server, bucket, proxy):
    with pytest.raises(PermissionDeniedError, match="SignatureDoesNotMatch"):
        obstore.put(open_bucket(server.endpoint, bucket, secret="wrong"), "a", b"")
    obstore.put(open_bucket(proxy.endpoint, bucket), "a", b"")
    with pytest.raises(PermissionDeniedError):
        obstore.get(open_bucket(proxy.endpoint, bucket, secret="wrong"), "a")


def test_the_environment_is_enough(bucket, proxy, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    store = S3Store.from_url(f"s3://{bucket}/some/where")
    obstore.put(pickle.loads(pickle.dumps(store)), "a", b"1")
    assert get(store, "a") == b"1"
    assert proxy.count("PutObject", f"^{bucket}/some/where/a$") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_server_dies_with_its_process():
    code = "from s3_server import *; s = S3Server(); s.start(); print(s.endpoint, s.folder, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    with child:
        endpoint, folder = child.stdout.readline().split()
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=5)
    with pytest.raises(ConnectionRefusedError):
        connection.request("GET", "/")


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("s3_server._weed", lambda: sys.executable)
    server = S3Server()
    with pytest.raises(RuntimeError, match=r"(?s)the S3 server ended.*nknown option"):
        server.start()
    server.stop()


@pytest.mark.parametrize("status", [500, 503])
def test_retries_hide_errors_of_the_server(server, bucket, proxy, status):
    obstore.put(server.store(bucket), "a", b"1")
    proxy.faults = (Fault("status", status=status, first=2, each=True),)
    store = open_bucket(proxy.endpoint, bucket)
    assert get(store, "a") == b"1"
    obstore.put(store, "b", b"2")
    assert sorted(keys(store)) == ["a", "b"]
    assert obstore.head(store, "b")["size"] == 1
    assert proxy.injected == {"status": 8}
    assert proxy.count("GetObject", "/a$") == 3


def test_errors_that_stay_surface(server, bucket, proxy):
    obstore.put(server.store(bucket), "a", b"1")
    proxy.faults = (Fault("status", on="GET"),)
    with pytest.raises(GenericError, match="503"):
        obstore.get(open_bucket(proxy.endpoint, bucket, retries=2), "a")
    assert proxy.injected == {"status": 3}
    proxy.reset(Fault("status", status=403))
    with pytest.raises(PermissionDeniedError):
        obstore.get(open_bucket(proxy.endpoint, bucket), "a")
    assert proxy.injected == {"status": 1}, "a refusal is not tried again"


def test_a_share_is_the_same_every_time(server, bucket):
    for number in range(40):
        obstore.put(server.store(bucket), f"{number}", b"")

    def failures(seed: int) -> list[int]:
        with FaultyProxy(server.endpoint, (Fault("status", share=0.3),), seed=seed) as proxy:
            store = open_bucket(proxy.endpoint, bucket, retries=10)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda number: obstore.get(store, f"{number}"), range(40)))
            assert proxy.injected["status"] + 40 == proxy.count("GET")
            return [proxy.count("GetObject", f"/{number}$") for number in range(40)]

    assert failures(1) == failures(1)
    assert failures(1) != failures(2)
    assert sum(failures(1)) > 40


def test_a_body_that_breaks_off(server, bucket, proxy):
    data = os.urandom(1_700_000)
    obstore.put(server.store(bucket), "a", data)
    store = open_bucket(proxy.endpoint, bucket)
    proxy.faults = (Fault("cut", on="GetObject", after=700_000, first=2),)
    assert get(store, "a") == data, "obstore goes on where a body broke off"
    assert proxy.injected == {"cut": 2}
    proxy.reset(Fault("cut", on="GetObject", after=1 << 40))
    with pytest.raises(GenericError):
        get(open_bucket(proxy.endpoint, bucket, retries=1), "a")
    assert proxy.downloaded["GetObject"] >= len(data) - 1


def test_no_answer_at_all(bucket, proxy):
    store = open_bucket(proxy.endpoint, bucket)
    proxy.faults = (Fault("drop", first=1, each=True),)
    obstore.put(store, "a", b"1")
    assert get(store, "a") == b"1"
    assert proxy.injected == {"drop": 2}


def test_an_answer_that_is_lost(bucket, proxy):
    """Then a condition fails on what the same call has written: whoever creates must look whose the object is."""
    store = open_bucket(proxy.endpoint, bucket)
    proxy.faults = (Fault("drop", on="PutObject", first=1, forwarded=True),)
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "lock", b"mine", mode="create")
    assert get(store, "lock") == b"mine"
    assert proxy.injected == {"drop": 1}
    proxy.reset(Fault("status", on="PutObject", first=1, forwarded=True))
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "other", b"mine", mode="create")


def test_slow_answers(server, bucket, proxy):
    obstore.put(server.store(bucket), "a", bytes(20_000))
    proxy.faults = (Fault("slow", delay=0.05, rate=200_000),)
    assert get(open_bucket(proxy.endpoint, bucket), "a") == bytes(20_000)
    proxy.reset(Fault("slow", rate=1000))
    with pytest.raises(GenericError, match=r"(?i)time"):
        get(open_bucket(proxy.endpoint, bucket, retries=1, timeout="300ms"), "a")
    assert proxy.injected["slow"] >= 1


def test_no_answer_ever(server, bucket, proxy):
    obstore.put(server.store(bucket), "a", b"1")
    proxy.faults = (Fault("hang", first=1),)
    assert get(open_bucket(proxy.endpoint, bucket, timeout="300ms"), "a") == b"1"
    assert proxy.injected == {"hang": 1}
    proxy.reset(Fault("hang"))
    with pytest.raises(GenericError, match=r"(?i)time"):
        obstore.get(open_bucket(proxy.endpoint, bucket, retries=1, timeout="300ms"), "a")
    assert proxy.injected == {"hang": 2}


def test_stopping_lets_go(server, bucket):
    with FaultyProxy(server.endpoint, (Fault("hang"),)) as proxy, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(obstore.head, open_bucket(proxy.endpoint, bucket, retries=0), "a")
        while not proxy.injected:
            time.sleep(0.01)
        proxy.stop()
        with pytest.raises(GenericError):
            waiting.result(30)


def test_many_connections(bucket, proxy):
    store = open_bucket(proxy.endpoint, bucket)
    data = [os.urandom(50_000) for _ in range(64)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda number: obstore.put(store, f"{number}", data[number]), range(64)))
        assert list(pool.map(lambda number: get(store, f"{number}"), range(64))) == data
    assert proxy.uploaded["PutObject"] == proxy.downloaded["GetObject"] == 64 * 50_000
    assert proxy.unreachable == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_what_other_clients_send(server, bucket, proxy, chunked):
    """Heads that wait for 100, and bodies in chunks."""
    address = urlsplit(obstore.sign(open_bucket(proxy.endpoint, bucket), "PUT", "a", timedelta(minutes=1)))
    connection = http.client.HTTPConnection(address.netloc, timeout=30)
    body = iter([b"abc", b"defg"]) if chunked else b"abcdefg"
    connection.request(
        "PUT",
        f"{address.path}?{address.query}",
        body,
        {"Expect": "100-continue"} | ({"Transfer-Encoding": "chunked"} if chunked else {}),
        encode_chunked=chunked,
    )
    assert connection.getresponse().status == 200
    connection.close()
    assert server.objects(bucket) == {"a": b"abcdefg"}
