"""How to probe: folds, confounds, groups, and what is computed beside the scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Pairs with a kinship coefficient of this or more are related, in the third degree or closer (Manichaikul et al. 2010,
#: Bioinformatics 26:2867; UK Biobank's table of pairs begins there).
THIRD_DEGREE = 0.0442

_FEWEST_TRAIN_PEOPLE = 10


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe, the same for all of its targets.

    Attributes
    ----------
    folds, repeats
        Of the outer cross-validation. Targets with few people get fewer folds; ``method`` of the result says how many.
    seed
        Of folds, draws and permutations, 0 or more.
    confounds
        Phenotypes, by name or alias, and ``brain_volume`` and ``head_scale`` of the scans (`probing.confounds`).
    groups
        A phenotype (``site``), or a table of families or of related pairs, whose people are never split
        (`probing.groups`); None splits between any two people.
    kinship
        Pairs with a coefficient of this or more are related, of a table with coefficients; None takes `THIRD_DEGREE`.
    bins
        Target -> number of quantile classes, or their inner edges in ascending order: the target becomes classes.
    permutations
        Of the permutation test (`probing.permutation`); 0 for none.
    bootstrap
        Draws of the people tested (`probing.bootstrap`); 0 for none.
    train_people
        People to train on in each fold, for learning curves; None for all. The test folds are the same for any number,
        and who is trained on with fewer is among those of more.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    folds: int = 5
    repeats: int = 5
    seed: int = 0
    confounds: tuple[str, ...] = ()
    groups: str | Path | None = None
    kinship: float | None = None
    bins: Mapping[str, int | tuple[float, ...]] = field(default_factory=dict)
    permutations: int = 0
    bootstrap: int = 0
    train_people: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.folds < 2 or self.repeats < 1 or self.seed < 0:
            raise ValueError(
                f"folds={self.folds}, repeats={self.repeats}, seed={self.seed}: expected 2 or more folds, 1 or more "
                "repeats and a seed of 0 or more"
            )
        if self.permutations < 0 or self.bootstrap < 0:
            raise ValueError(
                f"permutations={self.permutations}, bootstrap={self.bootstrap}: expected 0 for none, or a number above"
            )
        if self.kinship is not None and not 0 < self.kinship <= 0.5:
            raise ValueError(f"kinship={self.kinship}: expected a coefficient above 0 and up to 0.5 (twins)")
        if self.kinship is not None and self.groups is None:
            raise ValueError(f"kinship={self.kinship} needs groups: a table of relatives with a column Kinship")
        if self.train_people is not None and self.train_people < _FEWEST_TRAIN_PEOPLE:
            raise ValueError(f"train_people={self.train_people}: expected {_FEWEST_TRAIN_PEOPLE} or more")
        if len(set(self.confounds)) < len(self.confounds):
            raise ValueError(f"confounds {', '.join(self.confounds)}: expected each once")
        for name, bins in self.bins.items():
            if isinstance(bins, int):
                if bins < 2:
                    raise ValueError(f"{bins} bins of {name!r}: expected 2 or more")
            elif not bins or not all(map(math.isfinite, bins)) or any(b <= a for a, b in itertools.pairwise(bins)):
                raise ValueError(f"bins {bins} of {name!r}: expected inner edges in ascending order")
