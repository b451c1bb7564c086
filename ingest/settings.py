"""What a run is asked for, and what it says afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from ingest.grid import MNI152_GRID
from ingest.intensity import IntensityRule
from ingest.layouts import Layout
from ingest.places import Place


class Space(StrEnum):
    """Space of a store: ``auto`` is that of the first readable scan."""

    auto = "auto"
    mni = "mni"
    native = "native"


@dataclass(frozen=True)
class IngestSettings:
    """Everything that decides what a store holds.

    Attributes
    ----------
    layout
        How scans are named.
    image
        Member, suffix or part of the name to take, see `ingest.layouts.find_scans`.
    space
        One space per store; scans in another become rows with status ``wrong_shape``.
    phenotypes
        Table to join; None takes a BIDS ``participants.tsv`` if there is one.
    slab
        Planes per LZ4 slab, a divisor of the grid's 160 planes; None for `DEFAULT_SLAB`, or what the store has.
    intensity
        How intensities become grey levels.

    Raises
    ------
    ValueError
        For a layout, a space or a slab that cannot be.
    """

    layout: Layout = Layout.auto
    image: str | None = None
    space: Space = Space.auto
    phenotypes: str | Place | None = None
    slab: int | None = None
    intensity: IntensityRule = field(default_factory=IntensityRule)

    def __post_init__(self) -> None:
        """Take names for layout and space, and check the slab."""
        for name, kind in (("layout", Layout), ("space", Space)):
            value = getattr(self, name)
            if value not in list(kind):
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(kind)}")
            object.__setattr__(self, name, kind(value))  # as frozen dataclasses have to
        depth = MNI152_GRID.shape_zyx[0]  # of all grids
        if self.slab is not None and not (0 < self.slab <= depth and depth % self.slab == 0):
            raise ValueError(f"slab is {self.slab}, expected a divisor of the grid's {depth} planes, such as 2, 4 or 8")


@dataclass(frozen=True)
class IngestSummary:
    """What a run did.

    Attributes
    ----------
    status
        Rows by status.
    bytes
        Of the files that were read.
    new, changed, retried, left
        See `ingest.plan.Plan`.
    failures
        (source, status, reason) of every scan of this run that is neither ok nor an expected absence.
    warnings
        Sentences about phenotypes and voxels cut off.
    bad_values
        Phenotype values that were not understood, and duplicate rows.
    """

    scans: int
    status: dict[str, int]
    seconds: float
    volumes_per_second: float
    bytes: int
    simulated: bool
    new: int
    changed: int
    retried: int
    left: int
    failures: list[tuple[str, str, str]]
    warnings: list[str]
    bad_values: int = 0

    @property
    def clean(self) -> bool:
        """Whether everything asked for was done; a store without a single volume is not what anybody asks for."""
        volumes = self.status.get("ok", 0) or not self.scans - self.status.get("withdrawn", 0)
        return bool(volumes) and not self.failures and not self.bad_values

    def to_json(self) -> dict[str, Any]:
        """Return the summary as printed by ``--json``."""
        return asdict(self)
