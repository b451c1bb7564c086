"""The variables of the reference study and the confounds beside them: UK Biobank fields, codings, kinds of target."""

from __future__ import annotations

from dataclasses import dataclass, field

#: How a probe treats a variable.
TASKS = ("binary", "multiclass", "ordinal", "count", "continuous")


@dataclass(frozen=True)
class Variable:
    """One phenotype.

    Attributes
    ----------
    name
        Column in the store.
    ukb_field
        Field number of UK Biobank's showcase.
    labels
        Code -> label, for codings. Codes below 0 always mean missing.
    task
        One of `TASKS`.
    aliases
        Names that other tables (BIDS ``participants.tsv``) use.
    confound
        A nuisance rather than a target: kept in the store, probed only when named.
    """

    name: str
    ukb_field: int
    task: str
    units: str | None = None
    labels: dict[int, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    confound: bool = False


VARIABLES = (
    Variable("sex", 31, "binary", labels={0: "female", 1: "male"}, aliases=("gender",)),
    Variable("age", 21003, "continuous", units="years"),
    Variable("household_size", 709, "count", units="people"),
    Variable(
        "income",
        738,
        "ordinal",
        units="GBP a year before tax",
        labels={
            1: "less than 18,000",
            2: "18,000 to 30,999",
            3: "31,000 to 51,999",
            4: "52,000 to 100,000",
            5: "greater than 100,000",
        },
    ),
    Variable("fluid_intelligence", 20016, "continuous", units="right answers"),
    Variable("smoking", 20116, "multiclass", labels={0: "never", 1: "previous", 2: "current"}),
    Variable(
        "site",
        54,
        "multiclass",
        labels={11025: "Cheadle", 11026: "Reading", 11027: "Newcastle", 11028: "Bristol"},
        confound=True,
    ),
    Variable("head_size", 25000, "continuous", units="volumetric scaling from head to MNI152", confound=True),
)

BY_FIELD = {variable.ukb_field: variable for variable in VARIABLES}
BY_NAME = {name: variable for variable in VARIABLES for name in (variable.name, *variable.aliases)}
