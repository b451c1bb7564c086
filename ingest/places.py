"""Where sources and stores lie: a folder, or below a prefix of an S3 bucket, which `ObjectPath` makes look like one.

Credentials, region and endpoint come from the environment, by the names that AWS's own tools read:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP`` ...; on
Amazon's machines the role of the machine will do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store
from zarr.storage import ObjectStore

from ingest.errors import ObjectStoreError

_SCHEME = "s3://"
_ATTEMPTS = 5  # of what obstore itself does not try again
_PIECE = 16 << 20  # bytes of one request: a slow link gets a deadline per piece, not per archive
#: A server that restarts is back by then; one that is not is an error.
_RETRY = {"max_retries": 100, "retry_timeout": timedelta(seconds=45), "backoff": {"max_backoff": timedelta(seconds=4)}}
_TIMEOUTS = {"timeout": "120s", "connect_timeout": "10s", "read_timeout": "20s"}
_process: int | None = None  # that has made clients


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A place in an object store, with what `pathlib.Path` offers and an object store can do.

    Writing is atomic: an object is there whole or not at all. There are no folders; what lies below a place is what
    begins with its name.

    Attributes
    ----------
    bucket
    key
        Without slashes at its ends.
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """Last part of the key."""
        return PurePosixPath(self.key).name or self.bucket

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        """The place above."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Return the place of that name beside this one."""
        return self.parent / name

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        """Return the way from another place to this one."""
        return PurePosixPath(self.key).relative_to(other.key)

    def absolute(self) -> ObjectPath:
        """Return the place itself: it always is."""
        return self

    def is_file(self) -> bool:
        """Tell whether there is an object."""
        return self.size() is not None

    def is_dir(self) -> bool:
        """Tell whether there are objects below."""
        return next(self.below(), None) is not None

    def exists(self) -> bool:
        """Tell whether there is an object, or one below."""
        return self.is_file() or self.is_dir()

    def size(self) -> int | None:
        """Return the bytes of the object, None if there is none."""
        try:
            with clear_errors(self):
                return int(obstore.head(client(self), self.key)["size"]) if self.key else None
        except FileNotFoundError:
            return None

    def read_bytes(self) -> bytes:
        """Return the object's content.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ObjectStoreError
            If the store does not answer, or refuses.
        """
        with clear_errors(self):
            return bytes(obstore.get(client(self), self.key).bytes())

    def read_pieces(self, size: int) -> bytes:
        """Return the first `size` bytes of the object, requested by pieces so that a slow link gets them all."""
        content = bytearray()
        with clear_errors(self):
            while len(content) < size:
                end = min(size, len(content) + _PIECE)
                content += obstore.get_range(client(self), self.key, start=len(content), end=end)
        return bytes(content)

    def read_tail(self, nbytes: int) -> tuple[bytes, int]:
        """Return the last bytes of the object, all if it has fewer, and how many it has."""
        try:
            with clear_errors(self):
                found = obstore.get(client(self), self.key, options={"range": {"suffix": nbytes}})
                return bytes(found.bytes()), int(found.meta["size"])
        except ObjectStoreError as error:
            if "416 Range Not Satisfiable" not in str(error):
                raise
            return b"", 0  # only of an empty object there is no tail

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Return the bytes from each start to each end, all requested at once, and none between them."""
        if not ranges:
            return []
        starts, ends = zip(*ranges, strict=True)
        with clear_errors(self):
            found = obstore.get_ranges(client(self), self.key, starts=starts, ends=ends, coalesce=0)
            return [bytes(piece) for piece in found]

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the object's content as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write the object, at once or not at all."""
        with clear_errors(self):
            obstore.put(client(self), self.key, content, use_multipart=False)

    def write_text(self, text: str) -> None:
        """Write the object, at once or not at all."""
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = True) -> None:  # noqa: ARG002 - an object store does not say
        """Remove the object; it is no error if there is none."""
        self.remove([self])

    @staticmethod
    def remove(places: list[ObjectPath]) -> None:
        """Remove objects of one bucket, a thousand in a request."""
        if places:
            with clear_errors(places[0]):
                obstore.delete(client(places[0]), [place.key for place in places])

    def below(self) -> Iterator[tuple[ObjectPath, int, float]]:
        """Yield (place, bytes, seconds since 1970) of every object below, page by page.

        A page that is cut off is asked for again; nothing is yielded twice.
        """
        prefix = f"{self.key}/" if self.key else ""
        last, attempt = None, 0
        while True:
            try:
                with clear_errors(self):
                    for page in obstore.list(client(self), prefix or None, offset=last):
                        for entry in page:
                            last, attempt = entry["path"], 0
                            place = ObjectPath(self.bucket, entry["path"])
                            yield place, int(entry["size"]), entry["last_modified"].timestamp()
                return
            except ObjectStoreError:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise


#: A file or folder, local or in an object store.
Place: TypeAlias = Path | ObjectPath


def as_place(text: str | Place) -> Place:
    """Return the place that a path or an ``s3://bucket/key`` address names.

    Raises
    ------
    ValueError
        For addresses of another kind, or without a bucket.
    """
    if not isinstance(text, str):
        return text
    if text.startswith(_SCHEME):
        bucket, _, key = text.removeprefix(_SCHEME).partition("/")
        if not bucket:
            raise ValueError(f"{text} names no bucket, expected s3://bucket/folder")
        return ObjectPath(bucket, key.strip("/"))
    if "://" in text:
        raise ValueError(f"{text} is no place that can be used, expected a path or s3://bucket/folder")
    return Path(text)


def files_below(place: Place) -> Iterator[str]:
    """Yield the names, relative to a place and with slashes, of all files or objects below it."""
    if isinstance(place, Path):
        for parent, _, names in os.walk(place):
            for name in names:
                yield os.path.relpath(os.path.join(parent, name), place)
    else:
        for found, _, _ in place.below():
            yield str(found.relative_to(place))


@contextlib.contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """Give a file of this machine with the content, and the name, of a place."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place.name
        with contextlib.suppress(FileNotFoundError):  # whoever reads it says what is missing
            path.write_bytes(place.read_bytes())
        yield path


def zarr_store(place: Place) -> Path | ObjectStore:
    """Return what zarr opens to read what lies at a place: the folder, or a store of its own for objects."""
    if isinstance(place, Path):
        return place
    return ObjectStore(client(place, place.key), read_only=True)


def client(place: ObjectPath, prefix: str | None = None) -> S3Store:
    """Return obstore's client for the bucket of a place, or for what lies there below a prefix.

    Raises
    ------
    ObjectStoreError
        In a process that was forked from one that has used a client: obstore's threads are not there, and a new client
        would wait for them for ever like an old one.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise ObjectStoreError(
            f"{place} cannot be used in process {os.getpid()}, which was forked from one that has used {_SCHEME}; "
            'start processes by spawn or forkserver: DataLoader(..., multiprocessing_context="spawn")'
        )
    return _client(place.bucket, prefix)


@functools.lru_cache(maxsize=8)
def _client(bucket: str, prefix: str | None = None) -> S3Store:
    # Options that are given replace those of the environment, so this one is read here.
    plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    options = {**_TIMEOUTS, "allow_http": plain}
    return S3Store(bucket, prefix=prefix, client_options=options, retry_config=_RETRY)  # type: ignore[arg-type]


def error_line(error: BaseException) -> str:
    """Return what obstore says about an error, in one line and without its debugging text."""
    return " ".join(str(error).partition("\n\nDebug source:")[0].split())


@contextlib.contextmanager
def clear_errors(place: ObjectPath) -> Iterator[None]:
    """Turn obstore's errors into ObjectStoreError and FileNotFoundError, which say what to do; conflicts pass."""
    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(place) from None
        raise FileNotFoundError(f"there is no {place}") from None
    except BaseError as error:
        text = error_line(error)
        if "NoSuchBucket" in text:
            raise _no_bucket(place) from None
        if "403 Forbidden" in text or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            raise ObjectStoreError(
                f"{place} may not be used: access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what "
                "the bucket allows"
            ) from error
        if "/latest/api/token" in text:
            raise ObjectStoreError(
                f"no credentials for {place}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_SKIP_SIGNATURE=true for a public bucket"
            ) from error
        if "builder error" in text:
            text += " (an endpoint without TLS needs AWS_ALLOW_HTTP=true)"
        raise ObjectStoreError(f"{place} cannot be reached: {text}; check AWS_ENDPOINT_URL and the network") from error


def _no_bucket(place: ObjectPath) -> ObjectStoreError:
    return ObjectStoreError(f"there is no bucket {place.bucket}; make it first, or mend the address")
