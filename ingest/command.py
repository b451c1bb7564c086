"""Running a command: what users can mend, and Ctrl-C, is told in one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from ingest.consoles import errors, print_line

#: Exit code of whoever was ended by Ctrl-C: 128 and the number of SIGINT.
INTERRUPTED = 130

#: Of commands whose work is kept.
GOES_ON = "the same command{} goes on where it was"


def run_app(
    app: Callable[[], object], advice: Mapping[str, str], *, codes: Mapping[type[Exception], int] | None = None
) -> None:
    """Run the commands of a program; what users can mend is one line on stderr.

    Parameters
    ----------
    app
        Of typer.
    advice
        By command, what to do after Ctrl-C, see `told_interruption`.
    codes
        Of errors of other kinds, which are told, too, the exit code. That of ValueError and OSError is 1.
    """
    codes = {ValueError: 1, OSError: 1, **(codes or {})}
    try:
        with told_interruption(advice):
            app()
    except tuple(codes) as error:
        print_line(f"error: {error}", errors)
        sys.exit(next(code for kind, code in codes.items() if isinstance(error, kind)))


@contextlib.contextmanager
def told_interruption(advice: Mapping[str, str]) -> Iterator[None]:
    """Say in one line that Ctrl-C has ended the command that runs meanwhile, and what there is to do then.

    Of the processes that torchrun starts, which Ctrl-C ends together, the first says it.

    Parameters
    ----------
    advice
        By command, what to do; that of ``run`` is for where none is named. Of others nothing is said.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        pass
    except SystemExit as ended:
        if ended.code != INTERRUPTED:  # as which typer passes it on
            raise
    given = sys.argv[1:]
    command = given[0] if given and given[0] in advice else "run"
    text = advice.get(command, "").format(" without --overwrite" if "--overwrite" in given else "")
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print_line("interrupted" + (f"; {text}" if text else ""), errors)
    sys.exit(INTERRUPTED)
