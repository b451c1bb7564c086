"""Settings of a fine-tuning run: one class, of which a YAML file or flags give some, and every run saves all."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ingest.dictionary import TASKS

#: Before every value that is a rate or a share.
Share = Annotated[float, Field(ge=0, lt=1)]

_Kind = TypeVar("_Kind", bound=BaseModel)


class FinetuneSettings(BaseModel):
    """Settings of a run. Descriptions are the help of the command's flags.

    Raises
    ------
    pydantic.ValidationError
        For a value that cannot be; `read_settings` and `make_settings` turn it into one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    target: tuple[str, ...] = Field((), description="Phenotype, or several with commas between them.")
    task: dict[str, str] = Field(
        default_factory=dict, description="NAME=KIND: binary, multiclass, ordinal, count or continuous."
    )
    where: str | None = Field(None, description='Only scans of which this is true, such as "age >= 60".')

    model: str = Field("resnet18", description="A ResNet of torchvision: 2D resnet18, ..., or 3D r3d_18, mc3_18, ...")
    weights: str | None = Field(
        None, description="imagenet, kinetics, scratch, FILE or RUN_DIR; by default the pretrained ones of the model."
    )
    weights_dir: str | None = Field(None, description="Folder with torchvision's files.")
    view: Literal["axial", "coronal", "sagittal", "triplanar"] | None = Field(
        None, description="Slices of a 2D model; by default triplanar."
    )
    slices: int = Field(3, ge=1, description="Slices per plane, of a 2D model.")
    crop: tuple[int, int, int] | None = Field(None, description="Z,Y,X: the central part of each volume.")
    size: tuple[int, ...] | None = Field(None, description="Resize each picture to N, H,W or Z,Y,X.")
    scale: float = Field(1.0, gt=0, le=1, description="Or by a factor, e.g. 0.5 for half resolution.")
    pool: Literal["mean", "attention"] = Field(
        "mean", description="How the slices of a scan become one: their mean, or by gated attention."
    )
    dropout: Share = Field(0.2, description="Of the features before the heads.")

    validation: Share = Field(0.15, description="Share of the people to choose the best epoch by.")
    test: Share = Field(0.2, description="Share of the people to score in the end.")
    split: str | None = Field(None, description="A split.csv of another run (participant,part), to use again.")
    groups: str | None = Field(
        None, description="Never split these: a phenotype (site), or a table of families or kin."
    )
    kinship: float | None = Field(None, gt=0, le=0.5, description="Related from this coefficient on, of such a table.")
    train_people: int | None = Field(None, ge=1, description="Train on so many of the people to train on.")

    epochs: int = Field(30, ge=1, description="Passes over the scans to train on.")
    min_steps: int = Field(0, ge=0, description="More epochs, if these have fewer optimiser steps.")
    validate_every: int = Field(1, ge=1, description="Validate after epochs, at least so many steps apart.")
    patience: int | None = Field(None, ge=1, description="Stop after so many validations without a better one.")
    monitor: Literal["loss", "score"] = Field("loss", description="What of the validation tells the best epoch.")
    batch_size: int = Field(32, ge=1, description="Scans of an optimiser step, of all processes together.")
    micro_batch: int | None = Field(
        None, ge=1, description="At most so many scans at a time on a device; by default by its memory."
    )
    lr: float = Field(3e-4, gt=0, description="Greatest learning rate, of the last stage of the network.")
    head_lr: float | None = Field(None, gt=0, description="... and of the heads; by default the same.")
    layer_decay: float = Field(1.0, gt=0, le=1, description="Learning rate of each stage over that of the next one.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW; not of biases and norms.")
    warmup: Share = Field(0.1, description="Share of the steps in which the learning rate grows; then it is a cosine.")
    clip: float | None = Field(1.0, gt=0, description="Greatest norm of the gradient.")
    freeze_until: str | None = Field(None, description="Leave this stage and those before it: stem, layer1, ...")
    batch_norm: Literal["train", "frozen"] = Field(
        "train", description="Trained with the statistics of each batch, or with those that the weights come with."
    )
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: all classes count the same.")
    augmentation: dict[str, float] | Literal["none"] = Field(
        default_factory=dict,
        description="NAME=RANGE of loaders.Augmentation, beside the defaults for the scans' space; or none.",
    )

    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of what is computed.")
    checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    backend: Literal["auto", "dali", "torch"] = Field("auto", description="Of the loader.")
    threads: int | None = Field(
        None, ge=1, description="Of the loader; by default one per core, at most 8; 16 for a GPU, or s3://."
    )
    on_error: Literal["raise", "skip"] = Field("skip", description="What to do about scans that cannot be read.")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Of the split, the new weights, the order, augmentation and dropout."
    )
    checkpoint_every: int = Field(200, ge=1, description="Steps from one checkpoint to the next.")
    bootstrap: int = Field(2000, ge=0, description="Draws of the people (or families) tested, for intervals.")
    tensorboard: bool = Field(True, description="Log for TensorBoard, too.")

    @model_validator(mode="before")
    @classmethod
    def _read_lists(cls, given: Any) -> Any:
        """Take text with commas, and single numbers, where there may be several; no true or false for a number."""
        if not isinstance(given, Mapping):
            return given
        given = dict(given)
        for name, value in given.items():
            field = cls.model_fields.get(name)
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
            if field and field.annotation is not bool and any(isinstance(part, bool) for part in parts):
                raise ValueError(
                    f"{name} is {value!r}, expected no true or false (nor yes, no, on, off without quotes)"
                )
        if given.get("weights") == "random":  # as `extract` calls them
            given["weights"] = "scratch"
        for name in ("target", "crop", "size"):
            value = given.get(name)
            if isinstance(value, str):
                given[name] = tuple(part.strip() for part in value.split(",") if part.strip())
            elif isinstance(value, int):
                given[name] = (value,)
        return given

    @field_validator("groups")
    @classmethod
    def _absolute(cls, groups: str | None) -> str | None:
        """Return where a file is, whatever folder a run goes on from; a phenotype stays as it is."""
        return os.path.abspath(groups) if groups is not None and os.path.isfile(groups) else groups

    @model_validator(mode="after")
    def _check(self) -> FinetuneSettings:
        if len(set(self.target)) < len(self.target):
            raise ValueError(f"target is {','.join(self.target)}, expected each once")
        for name, task in self.task.items():
            if task not in TASKS:
                raise ValueError(f"task of {name} is {task!r}, expected one of {', '.join(TASKS)}")
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation is {self.validation} and test {self.test}, which leaves nobody to train on; expected less "
                "than 1 together"
            )
        if self.size is not None and self.scale != 1:
            raise ValueError(f"size is {self.size} and scale {self.scale}, expected one of them")
        if self.patience is not None and not self.validation and self.split is None:
            raise ValueError(f"patience is {self.patience}, but validation is 0: nothing tells when to stop")
        if self.kinship is not None and self.groups is None:
            raise ValueError(f"kinship is {self.kinship}, which needs groups: a table with a column Kinship")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected no more than batch_size, {self.batch_size}")
        return self

    def to_yaml(self) -> str:
        """Return all settings as YAML, which `read_settings` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def make_settings(
    given: Mapping[str, Any], source: str = "the settings", *, named: Callable[[str], str] = str
) -> FinetuneSettings:
    """Return settings of which some are given.

    Parameters
    ----------
    source
        Where they are from, for messages.
    named
        What a setting is called there: an option of a command has another name.

    Raises
    ------
    ValueError
        Naming an unknown setting and the nearest known one, or a value and what was expected.
    """
    return build_settings(FinetuneSettings, given, source, named)


def build_settings(
    kind: type[_Kind], given: Mapping[str, Any], source: str, named: Callable[[str], str] = str
) -> _Kind:
    """Return settings of any class of which some are given; errors are those of `make_settings`."""
    known = list(kind.model_fields)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(str(name).lower().replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"
            raise ValueError(f"{source}: {name!r} is no setting{hint}")
    try:
        return kind(**given)
    except ValidationError as error:
        raise ValueError(f"{source}: {_in_words(error, named, known)}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a YAML file sets, by name, for `make_settings`.

    Raises
    ------
    ValueError
        If it cannot be read, is no YAML, or no table of settings.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected settings, one in a line: epochs: 30")
    return {str(name): value for name, value in content.items()}


def _in_words(error: ValidationError, named: Callable[[str], str], known: Sequence[str]) -> str:
    """Return in one line what is wrong with the first bad setting."""
    first = error.errors()[0]
    where = [part for part in first["loc"] if not str(part).startswith(("literal[", "dict[", "tuple["))]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not where:  # a sentence of our own, which begins with the setting
        word, _, rest = message.partition(" ")
        return f"{named(word)} {rest}" if word in known else message
    name = named(str(where[0]))
    if first["type"] == "missing":  # of several values the last ones
        length = int(error.errors()[-1]["loc"][-1]) + 1
        return f"{name} is {','.join(map(str, first['input']))}, expected {length} values"
    name = ".".join([name, *(part for part in where[1:] if isinstance(part, str))])
    verb = "has" if isinstance(where[-1], int) else "is"  # one of several values
    return f"{name} {verb} {first['input']!r}: {message[0].lower()}{message[1:]}"
