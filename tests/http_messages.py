"""Requests and answers of HTTP as they are on the wire, and which operation of S3 a request is."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from urllib.parse import parse_qsl, unquote, urlsplit


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


LAST_CHUNK = b"0\r\n\r\n"


def read_head(reader: BufferedReader) -> bytes:
    """Return a head with the empty line that ends it."""
    lines = []
    while True:
        line = reader.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise EOFError
        lines.append(line)
        if line in (b"\r\n", b"\n"):
            return b"".join(lines)


def headers_of(head: bytes) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in head.decode("latin-1").splitlines()[1:] if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def read_request(reader: BufferedReader) -> Request | None:
    """Return the next request of a connection, None where it ends."""
    if not reader.peek(1):
        return None
    head = read_head(reader)
    method, target, _ = head.decode("latin-1").split("\r\n", 1)[0].split(" ")
    url = urlsplit(target)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    key = unquote(url.path).strip("/")
    headers = headers_of(head)
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


def framing_of(headers: dict[str, str], *, until_close: bool) -> int | str:
    """Return how long a body is: a number of bytes, "chunked", or "close" where it ends with the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return "chunked"
    if "content-length" in headers:
        return int(headers["content-length"])
    return "close" if until_close else 0


def blocks_of(reader: BufferedReader, framing: int | str) -> Iterator[bytes]:
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


def closes(headers: dict[str, str]) -> bool:
    return headers.get("connection", "").lower() == "close"


def error_answer(status: int, *, bare: bool) -> bytes:
    """Return an answer as S3 gives it; to HEAD without its body."""
    code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}.get(status, "Fault")
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'.encode()
    reason = http.client.responses.get(status, "Fault")
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if bare else body)
