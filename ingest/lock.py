"""One writer at a time: a lock beside the store that the kernel gives up when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from ingest.errors import StoreBusyError, StoreError
from ingest.places import Place

_PATIENCE_S, _LOOK_AGAIN_S = 0.5, 0.01

#: What a file system answers that has no locks at all (some network mounts).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def store_lock(store: Place, *, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the only right to write to a store while the block runs; gives a function that raises once it is lost.

    Of a link it is that to what the link leads to.

    In an object store it is a lease, see `ingest.lease`. In a folder it is ``flock`` on ``STORE.lock``, so a killed run
    leaves none behind. It works between machines where the file system supports it (local disks, NFS 4, Lustre mounted
    with ``flock``).

    Parameters
    ----------
    shared
        Others may hold it at the same time who say this too. Not in object stores.

    Raises
    ------
    StoreBusyError
        If another process holds it; names that process.
    StoreError
        If the lock cannot be made there, or the file system has none.
    """
    if not isinstance(store, Path):
        from ingest.lease import store_lease

        with store_lease(store) as check:
            yield check
        return
    store = store.resolve()
    path = store.with_name(store.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(store, error) from error
    descriptor = _acquire(path, store, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        os.ftruncate(descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        os.write(descriptor, holder.encode())
        yield lambda: None  # the kernel takes it from nobody who lives
    finally:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if shared:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last one, or the others keep the file
            path.unlink()  # before the lock is given up: whoever waits for it finds that the file is another one
        os.close(descriptor)


def _acquire(path: Path, store: Path, kind: int) -> int:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _not_writable(store, error) from error
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if kind == fcntl.LOCK_SH and time.monotonic() < end:  # it may be one of them that looks if it is the last
                os.close(descriptor)
                time.sleep(_LOOK_AGAIN_S)
                continue
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise StoreBusyError(
                f"{store} is being written by {holder}; wait until that has ended, or stop it first"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise StoreError(
                    f"{path.parent} cannot lock files ({error.strerror}), so a second writer could not be kept out; "
                    "put the store on a local disk, NFS 4 or Lustre mounted with flock"
                ) from None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its last holder removed it in between: try the new one


def _not_writable(store: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{store} cannot be written: no lock can be made beside it ({error.strerror}: {error.filename}); choose a "
        "folder where there is leave and room to write"
    )
