"""The variables of the reference study and the confounds beside them: UK Biobank fields, sources, codings, tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: How a probe treats a variable.
TASKS = ("binary", "multiclass", "ordinal", "count", "continuous")

#: Visits: 0 first assessment (2006-10), 1 its repeat, 2 first imaging visit (from 2014), 3 repeat of the imaging.
_EVERY_VISIT = (0, 1, 2, 3)
_IMAGING_VISITS = (2, 3)

_DO_NOT_KNOW = {-1: "do not know"}
_NO_ANSWER = {-3: "prefer not to answer"}


@dataclass(frozen=True)
class Variable:
    """One phenotype.

    Attributes
    ----------
    name
        Column in the store.
    ukb_field, title
        Number and title of the field in UK Biobank's showcase.
    task
        One of `TASKS`.
    source
        How UK Biobank came by it, and where in the showcase it is.
    units
        Of the values; None for categories.
    coding
        Number of UK Biobank's data-coding, None for a field that has none.
    labels
        Code -> label, for codings, in UK Biobank's words. In its tables codes below 0 always mean missing.
    missing
        Code -> meaning of the special codes.
    instances
        Visits of which there are values.
    aliases
        Names that other tables (BIDS ``participants.tsv``) use.
    confound
        A nuisance rather than a target: kept in the store, probed only when named.
    more_codes
        Whether codes beyond `labels` are categories too, rather than mistakes.
    """

    name: str
    ukb_field: int
    title: str
    task: str
    source: str
    units: str | None = None
    coding: int | None = None
    labels: dict[int, str] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    instances: tuple[int, ...] = _EVERY_VISIT
    aliases: tuple[str, ...] = ()
    confound: bool = False
    more_codes: bool = False

    @property
    def url(self) -> str:
        """Address of the field in UK Biobank's showcase."""
        return f"https://biobank.ndph.ox.ac.uk/showcase/field.cgi?id={self.ukb_field}"

    def to_json(self) -> dict[str, Any]:
        """Return everything about the variable, as printed by ``ingest dictionary --json``."""
        return {
            "name": self.name,
            "field": self.ukb_field,
            "title": self.title,
            "task": self.task,
            "units": self.units,
            "coding": self.coding,
            "labels": {str(code): label for code, label in self.labels.items()} or None,
            "missing": {str(code): meaning for code, meaning in self.missing.items()} or None,
            "more_codes": self.more_codes,
            "instances": list(self.instances),
            "aliases": list(self.aliases),
            "confound": self.confound,
            "source": self.source,
            "url": self.url,
        }

    def attributes(self, instance: str | None, source: str, missing: str | None) -> dict[str, Any]:
        """Return what a store says of the variable.

        Parameters
        ----------
        instance
            Which visit its values are of.
        source
            How they were come by.
        missing
            Which codes were taken as missing, in words.
        """
        coding = "UK Biobank" if self.coding is None else f"UK Biobank data-coding {self.coding}"
        return {
            "field": self.ukb_field,
            "instance": instance,
            "coding": f"{coding}; {missing}" if missing else coding,
            "units": self.units,
            "task": self.task,
            "labels": {str(code): label for code, label in self.labels.items()} or None,
            "confound": self.confound,
            "source": source,
        }


VARIABLES = (
    Variable(
        "sex",
        31,
        "Sex",
        "binary",
        source="central registry at recruitment, in some cases updated by the participant; baseline characteristics",
        coding=9,
        labels={0: "female", 1: "male"},
        instances=(0,),
        aliases=("gender",),
    ),
    Variable(
        "age",
        21003,
        "Age when attended assessment centre",
        "continuous",
        source="derived from the dates of birth and of the visit; assessment centre, reception",
        units="years",
    ),
    Variable(
        "household_size",
        709,
        "Number in household",
        "count",
        source="touchscreen question; sociodemographics, household",
        units="people",
        coding=100291,
        missing=_DO_NOT_KNOW | _NO_ANSWER,
    ),
    Variable(
        "income",
        738,
        "Average total household income before tax",
        "ordinal",
        source="touchscreen question; sociodemographics, household",
        units="GBP a year before tax",
        coding=100294,
        labels={
            1: "less than 18,000",
            2: "18,000 to 30,999",
            3: "31,000 to 51,999",
            4: "52,000 to 100,000",
            5: "greater than 100,000",
        },
        missing=_DO_NOT_KNOW | _NO_ANSWER,
    ),
    Variable(
        "fluid_intelligence",
        20016,
        "Fluid intelligence score",
        "continuous",
        source="right answers to 13 touchscreen questions in two minutes; cognitive function, fluid intelligence",
        units="right answers",
    ),
    Variable(
        "smoking",
        20116,
        "Smoking status",
        "multiclass",
        source="summary of touchscreen questions; lifestyle and environment, smoking",
        coding=90,
        labels={0: "never", 1: "previous", 2: "current"},
        missing=_NO_ANSWER,
    ),
    Variable(
        "site",
        54,
        "UK Biobank assessment centre",
        "multiclass",
        source="where the visit took place; assessment centre, reception",
        coding=10,
        labels={
            11025: "Cheadle (imaging)",
            11026: "Reading (imaging)",
            11027: "Newcastle (imaging)",
            11028: "Bristol (imaging)",
        },
        confound=True,
        more_codes=True,  # centres without a scanner have codes too
    ),
    Variable(
        "head_size",
        25000,
        "Volumetric scaling from T1 head image to standard space",
        "continuous",
        source="computed from the T1 scan; imaging, T1 structural brain MRI",
        units="volumetric scaling from head to MNI152",
        instances=_IMAGING_VISITS,
        confound=True,
    ),
)

BY_FIELD = {variable.ukb_field: variable for variable in VARIABLES}
BY_NAME = {name: variable for variable in VARIABLES for name in (variable.name, *variable.aliases)}
BY_TITLE = {variable.title.lower(): variable for variable in VARIABLES}
