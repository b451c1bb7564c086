"""Commands of which one is meant where none is named."""

from __future__ import annotations

import difflib
import os
from typing import Any

from typer.core import TyperGroup

_CLOSE = 0.75  # from which on one name is taken for another misspelt: inspct, but not a folder called export2


class RunByDefault(TyperGroup):
    """``ingest SRC OUT`` is ``ingest run SRC OUT``, and so with every program that has a command ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` before what names no command, and is not one misspelt."""
        if args and args[0] not in self.commands and args[0] != "--help":
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=_CLOSE)
            if meant and not os.path.exists(args[0]):
                ctx.fail(f"there is no {args[0]}, and no such command; did you mean: {ctx.info_name} {meant[0]}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)
