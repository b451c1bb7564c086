"""A server that forks processes which extract, so that they start at once: torch takes seconds to import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIED = 77
SETTINGS = {"weights": "random", "view": "axial", "slices": 1, "device": "cpu"}


class Server:
    """Runs `extract_to` in processes of their own, one batch of one scan after the other."""

    def __init__(self, warm_store: Path) -> None:
        command = [sys.executable, __file__, str(warm_store)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._answer()

    def run(self, store: Path, out: Path, *, kill_after: float | None = None, die_at: int = 0) -> int:
        """Extract; return the exit code, negative if it was killed.

        Parameters
        ----------
        kill_after
            Seconds until SIGKILL.
        die_at
            It dies before so many changes of names in the file system.
        """
        print(store, out, die_at, sep="\t", file=self._process.stdin)
        pid = int(self._answer())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # not reaped yet, for that is what we ask for next: so it is still its own
        print("wait", file=self._process.stdin)
        return os.waitstatus_to_exitcode(int(self._answer()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return line.strip()


def _serve(warm_store: Path) -> None:
    import torch

    from extract import build_encoder
    from extract.resume import extract_to

    torch.set_num_threads(1)  # threads do not outlive a fork
    encoder = build_encoder(**SETTINGS)
    extract_to(warm_store.with_name("warm.h5"), warm_store, encoder, batch_size=1)
    serve(lambda store, out: extract_to(Path(out), store, encoder, batch_size=1))


def serve(work: Callable[[str, str], object]) -> None:
    """Do some work for each line of stdin, in a process of its own."""
    print("ready", flush=True)
    for line in sys.stdin:
        store, out, step = line.rstrip("\n").split("\t")
        pid = os.fork()
        if not pid:
            if int(step):
                _die_at(int(step))
            try:
                work(store, out)
            except BaseException:
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitpid(pid, 0)[1], flush=True)


def _die_at(step: int) -> None:
    count = 0
    mkdir = os.mkdir

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += function is not mkdir or not os.path.exists(args[0])
            if count == step:
                os._exit(DIED)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
