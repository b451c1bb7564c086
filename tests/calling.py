"""Commands called within this process: what they print and their exit codes, without seconds of imports."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock


def call(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call a command's `main`; one test of each command runs it as a process."""
    command = ["command", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
