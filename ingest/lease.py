"""One writer at a time on a store in an object store: a lock object that its holder keeps alive.

The object is made only if there is none (``If-None-Match``), and its holder writes it anew every few seconds, only if
nobody else has in between (``If-Match``). No clocks are compared: whoever finds a lock watches it, and takes it over
when it has not changed for a while, for then its holder is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from ingest.errors import ObjectStoreError, StoreBusyError, StoreError
from ingest.places import ObjectPath, clear_errors, client

#: Seconds between two signs of life, and without any until a lock counts as abandoned.
HEARTBEAT_S = 4.0
ABANDONED_S = 24.0


@contextlib.contextmanager
def store_lease(store: ObjectPath) -> Iterator[Callable[[], None]]:
    """Hold the only right to write to a store while the block runs; gives a function that raises once it is lost.

    Raises
    ------
    StoreBusyError
        If another process holds it; names that process.
    """
    path = store.with_name(store.name + ".lock")
    lease = _Lease(path)
    lease.acquire(store)
    stop = threading.Event()
    heart = threading.Thread(target=lease.keep_alive, args=(stop,), daemon=True, name="store-lease")
    heart.start()
    try:
        yield lambda: lease.check(store)
    finally:
        stop.set()
        heart.join()
        lease.release()


class _Lease:
    """The lock object as this process knows it."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self.beats = 0
        self.etag = ""
        self.alive_at = time.monotonic()
        self.lost = False

    def acquire(self, store: ObjectPath) -> None:
        try:
            self._write("create")
            return
        except (AlreadyExistsError, PreconditionError):
            pass
        seen, holder = self._look()
        watched_since = time.monotonic()
        while seen is not None and not _is_dead(holder) and time.monotonic() < watched_since + ABANDONED_S:
            time.sleep(min(1.0, HEARTBEAT_S / 4))
            now, holder = self._look()
            if now is not None and now != seen:
                raise StoreBusyError(
                    f"{store} is being written by {holder.get('who', 'another process')}; "
                    "wait until that has ended, or stop it first"
                )
            seen = now
        try:
            self._write("create" if seen is None else {"e_tag": seen})
        except (AlreadyExistsError, PreconditionError):
            raise StoreBusyError(
                f"{store} is being written by another process, which has just begun; wait for it"
            ) from None

    def keep_alive(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                self._write({"e_tag": self.etag})
            except (AlreadyExistsError, PreconditionError):
                self.lost = True
                return
            except ObjectStoreError:  # it may answer again
                pass

    def check(self, store: ObjectPath) -> None:
        if self.lost or time.monotonic() > self.alive_at + ABANDONED_S:
            raise StoreError(
                f"the right to write to {store} is lost: this process was stopped, or cut off from the object store, "
                f"for more than {ABANDONED_S:g} s; nothing that is done is lost: run the same command again"
            )

    def release(self) -> None:
        with contextlib.suppress(ObjectStoreError):
            if self._look()[1].get("token") == self.token:
                self.path.unlink()

    def _write(self, mode: Any) -> None:
        self.beats += 1
        body = {"token": self.token, "beats": self.beats, **_myself()}
        started = time.monotonic()
        try:
            with clear_errors(self.path):
                result = obstore.put(client(self.path), self.path.key, json.dumps(body).encode(), mode=mode)
            self.etag = str(result["e_tag"])
        except (AlreadyExistsError, PreconditionError):
            # The answer to a first try may have got lost: then the object is this process's own.
            etag, holder = self._look()
            if etag is None or (holder.get("token"), holder.get("beats")) != (self.token, self.beats):
                raise
            self.etag = etag
        self.alive_at = started

    def _look(self) -> tuple[str | None, dict[str, Any]]:
        """Return the etag of the lock object, None if there is none, and what it says."""
        try:
            with clear_errors(self.path):
                result = obstore.get(client(self.path), self.path.key)
                content = bytes(result.bytes())
        except FileNotFoundError:
            return None, {}
        try:
            holder = json.loads(content)
        except ValueError:
            holder = {}
        return str(result.meta["e_tag"]), holder if isinstance(holder, dict) else {}


def _myself() -> dict[str, Any]:
    who = f"process {os.getpid()} on {socket.gethostname()}, last seen {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return {"who": who, "pid": os.getpid(), "machine": _machine()}


def _machine() -> str:
    """Return what tells this machine, since it was started, and its table of processes from others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.stat("/proc/self/ns/pid").st_ino)
        ]  # fmt: skip
    return " ".join(parts)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Tell whether the holder was a process of this machine that is no more: then there is nothing to wait for."""
    if holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
