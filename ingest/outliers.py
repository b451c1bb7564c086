"""Which scans of a cohort stand out: every quality number against its median, in robust standard deviations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ingest.quality import CENTRE, Measure

#: Robust SDs from the median beyond which a scan is called an outlier (Iglewicz & Hoaglin 1993, How to Detect and
#: Handle Outliers, section 3.3).
OUTLIER_SCORE = 3.5

_MAD_TO_SD = 1.4826  # of a normal distribution
_DIRECTIONS = {"x": ("right", "left"), "y": ("forward", "back"), "z": ("up", "down")}
_SHOWN_SHIFT_MM = 1.0


@dataclass(frozen=True)
class Cohort:
    """Every scan against all others.

    Attributes
    ----------
    measures
        What was compared.
    numbers
        float64, one row per scan: the columns of `ingest.quality.ScanQuality`, and ``centre``, the distance (mm) of the
        centre of mass from the cohort's median. NaN without a volume.
    deviations
        float64, one row per scan and one column per measure: robust SDs from the median, signed. Of ``centre`` only
        what is above the median counts: nearer than usual is no fault.
    score
        float64 (scan,), the largest deviation of each scan without its sign; NaN without a volume.
    median, spread
        Per measure, in its unit.
    """

    measures: tuple[Measure, ...]
    numbers: pd.DataFrame
    deviations: pd.DataFrame
    score: np.ndarray
    median: dict[str, float]
    spread: dict[str, float]

    @property
    def outliers(self) -> np.ndarray:
        """Rows (int64) with a score above `OUTLIER_SCORE`, the highest first."""
        rows = np.flatnonzero(self.score > OUTLIER_SCORE)
        return rows[np.argsort(-self.score[rows], kind="stable")]

    def standing_out(self, row: int) -> list[Measure]:
        """Return the measures by which a scan is an outlier, the largest deviation first."""
        size = self.deviations.iloc[row].abs()
        found = [measure for measure in self.measures if size[measure.name] > OUTLIER_SCORE]
        return sorted(found, key=lambda measure: -size[measure.name])

    def explain(self, row: int) -> str:
        """Say in words why a scan is an outlier; empty if it is none."""
        return "; ".join(self._explain(row, measure) for measure in self.standing_out(row))

    def _explain(self, row: int, measure: Measure) -> str:
        deviation = self.deviations[measure.name].iloc[row]
        side = "above" if deviation > 0 else "below"
        value, median = (
            f"{number:,.{measure.decimals}f}"
            for number in (self.numbers[measure.name].iloc[row], self.median[measure.name])
        )
        detail = f"{value} against {median} {measure.unit}"
        if measure is CENTRE:
            detail = f"{value} mm off, usual {median}{self._shift(row)}"
        return f"{measure.title.lower()} {abs(deviation):,.1f} robust SDs {side} the median ({detail})"

    def _shift(self, row: int) -> str:
        """Name the directions in which the centre of mass is off, the largest first."""
        shifts = {axis: self.numbers[axis].iloc[row] - self.median[axis] for axis in _DIRECTIONS}
        named = [
            f"{abs(shift):.1f} {_DIRECTIONS[axis][0 if shift > 0 else 1]}"
            for axis, shift in sorted(shifts.items(), key=lambda item: -abs(item[1]))
            if abs(shift) >= _SHOWN_SHIFT_MM
        ]
        return f": {', '.join(named)}" if named else ""


def compare_scans(numbers: pd.DataFrame, measures: tuple[Measure, ...]) -> Cohort:
    """Score every scan by its distance from the cohort's medians.

    A deviation is (value - median) / spread, where the spread is 1.4826 times the median absolute deviation (MAD), so
    the SD of a normal distribution, but not less than `Measure.least_spread`: if half a cohort has one value, the MAD
    is 0.

    Parameters
    ----------
    numbers
        float64, one row per scan, the columns of `ingest.quality.ScanQuality`; NaN without a volume.
    """
    numbers = numbers.copy()
    centres = numbers[list(_DIRECTIONS)]
    median = {str(axis): float(value) for axis, value in centres.median().items()}
    numbers[CENTRE.name] = np.sqrt(((centres - centres.median()) ** 2).sum(axis=1, skipna=False))
    spread = {}
    deviations = pd.DataFrame(index=numbers.index)
    for measure in measures:
        values = numbers[measure.name]
        median[measure.name] = float(values.median())
        mad = float((values - median[measure.name]).abs().median())
        spread[measure.name] = max(measure.least_spread, _MAD_TO_SD * mad)  # in this order: without scans it is NaN
        deviations[measure.name] = (values - median[measure.name]) / spread[measure.name]
    deviations[CENTRE.name] = deviations[CENTRE.name].clip(lower=0)
    score = deviations.abs().max(axis=1).to_numpy(np.float64)
    return Cohort(measures, numbers, deviations, score, median, spread)
