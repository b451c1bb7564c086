"""What may go wrong with a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

#: What helps against a folder that no run can go on in.
ANEW = "--overwrite begins the run anew"


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a prediction is not finite: what it was of, and what helps."""

    def __init__(
        self,
        *,
        step: int,
        loss: float,
        norm: float,
        by_target: Mapping[str, float],
        rows: Sequence[int],
        rate: float,
        precision: str,
        clip: float | None,
    ) -> None:
        bad = [name for name, value in by_target.items() if not math.isfinite(value)]
        what = (
            f"the loss of {', '.join(bad)} is {loss}" if bad else f"the gradient's norm is {norm} (the loss {loss:.3g})"
        )
        shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        helps = ["a lower --lr"]
        if precision == "float16":
            helps.insert(0, "--precision bfloat16 or float32, whose numbers reach further")
        if clip is None:
            helps.append("--clip 1")
        super().__init__(
            f"step {step}: {what}; learning rate {rate:.3g}, {precision}, rows {shown} of the store. Begin anew "
            f"(--overwrite) with {', or '.join(helps)}; ingest verify STORE tells whether the volumes are sound"
        )
