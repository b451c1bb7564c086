"""What a command says when Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from rich.console import Console

#: Exit code of whoever was ended by Ctrl-C: 128 and the number of SIGINT.
INTERRUPTED = 130

#: Of commands whose work is kept.
GOES_ON = "the same command{} goes on where it was"


@contextlib.contextmanager
def told_interruption(errors: Console, advice: Mapping[str, str]) -> Iterator[None]:
    """Say in one line that Ctrl-C has ended the command that runs meanwhile, and what there is to do then.

    Of the processes that torchrun starts, which Ctrl-C ends together, the first says it.

    Parameters
    ----------
    errors
        Where to say it.
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
        errors.print("interrupted" + (f"; {text}" if text else ""), soft_wrap=True, highlight=False, markup=False)
    sys.exit(INTERRUPTED)
