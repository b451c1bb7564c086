"""A proxy before an S3 server that makes the network as bad as a test likes, and counts."""

from __future__ import annotations

import contextlib
import hashlib
import re
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Literal, Self
from urllib.parse import urlsplit

from http_messages import (
    LAST_CHUNK,
    Request,
    blocks_of,
    closes,
    error_answer,
    framing_of,
    headers_of,
    read_head,
    read_request,
)
from s3_server import environment


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
                while (request := read_request(reader)) and self._answer(request, client, reader, upstream):
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
        body = blocks_of(reader, framing_of(request.headers, until_close=False))
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
                return client_stays and not closes(request.headers) and not closes(headers)
            for _ in answer:
                pass
        if fault.kind == "drop":
            return False
        client.sendall(error_answer(fault.status, bare=request.method == "HEAD"))
        return not closes(request.headers)

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
                head = read_head(answers)
                status = int(head.split(None, 2)[1])
                if status >= 200:
                    break
        except (OSError, EOFError):
            with self._lock:
                self.unreachable += not self._stopping.is_set()
            raise
        headers = headers_of(head)
        framing: int | str = 0
        if request.method != "HEAD" and status not in (204, 304):
            framing = framing_of(headers, until_close=True)
        length = framing if isinstance(framing, int) else None
        return head, headers, blocks_of(answers, framing), length

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
            with self._lock:  # before it goes: a client that has all of it may ask at once
                self.downloaded[request.operation] += len(block)
            self._pace(client, block, fault.rate if fault and fault.kind == "slow" else 0.0)
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


def _applies(on: str, key: str, method: str, operation: str, where: str) -> bool:
    return on in ("", method, operation) and re.search(key, where) is not None
