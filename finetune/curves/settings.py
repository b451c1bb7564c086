"""What a curve is made of: sizes, methods, seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.settings import FinetuneSettings, build_settings

Method = Literal["transfer", "scratch", "probe"]

#: How a target is predicted: a network fine-tuned from pretrained weights, the same one from random weights, and linear
#: probes of the pretrained one, left as it is.
METHODS: tuple[Method, ...] = ("transfer", "scratch", "probe")

#: Sizes that are taken unless others are asked for: this one, twice as many, and so on, and everyone.
FIRST_SIZE = 25

#: Settings of a training that has nothing to keep.
_ALL_TRAINED = {"freeze_until": None, "batch_norm": "train", "layer_decay": 1.0}

#: A size this close to everyone says nothing more.
_NEARLY_ALL = 0.9


class CurveSettings(BaseModel):
    """Settings of a curve; those of each training are a `finetune.FinetuneSettings`.

    Raises
    ------
    pydantic.ValidationError
        For a value that cannot be, or an unknown setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    sizes: tuple[int, ...] | Literal["auto"] = Field(
        default="auto", description="People to train on, with commas between; auto: 25, 50, 100, ... and all there are."
    )
    methods: tuple[Method, ...] = Field(default=METHODS, description="Of transfer, scratch and probe, those to run.")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2, 3, 4),
        description="A number of repeats, or their seeds with commas between: people and weights anew.",
    )
    scratch_lr: float | None = Field(
        default=None, gt=0, description="Learning rate from random weights; by default the same."
    )
    draws: int = Field(default=2000, ge=100, description="Draws of the people tested, for intervals.")
    wait: bool = Field(
        default=False, description="Wait for what other processes have begun, rather than leave it to them."
    )
    retry_failed: bool = Field(default=False, description="Try again what failed before.")
    keep_weights: bool = Field(default=False, description="Keep the networks; without, predictions and logs alone.")

    @model_validator(mode="before")
    @classmethod
    def _read_lists(cls, given: Any) -> Any:
        """Take text with commas, and single numbers, where there may be several; one number of seeds is how many."""
        if not isinstance(given, Mapping):
            return given
        given = dict(given)
        seeds = given.get("seeds")
        if isinstance(seeds, int) or (isinstance(seeds, str) and seeds.strip().isdecimal()):
            given["seeds"] = tuple(range(int(seeds)))
        for name in ("sizes", "methods", "seeds"):
            value = given.get(name)
            if isinstance(value, str) and value != "auto":
                given[name] = tuple(part.strip() for part in value.split(",") if part.strip())
            elif isinstance(value, int):
                given[name] = (value,)
        return given

    @model_validator(mode="after")
    def _check(self) -> CurveSettings:
        for name, least in (("sizes", 2), ("methods", None), ("seeds", 0)):
            values = getattr(self, name)
            if values == "auto":
                continue
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {','.join(map(str, values)) or 'none'}, expected one or more, each once")
            if least is not None and min(values) < least:
                raise ValueError(f"{name} are {','.join(map(str, values))}, expected {least} or more each")
        return self


def make_curve_settings(
    given: Mapping[str, Any], source: str = "the settings of the curve", *, named: Callable[[str], str] = str
) -> CurveSettings:
    """Return settings of which some are given; arguments and errors are those of `finetune.settings.make_settings`."""
    return build_settings(CurveSettings, given, source, named)


def choose_sizes(sizes: tuple[int, ...] | Literal["auto"], people: int) -> tuple[int, ...]:
    """Return the sizes of a curve, ascending.

    Parameters
    ----------
    sizes
        Those asked for; ``auto`` doubles from `FIRST_SIZE` up to all.
    people
        Who can be trained on.

    Raises
    ------
    ValueError
        If one is larger than there are people.
    """
    if sizes == "auto":
        found, size = [], FIRST_SIZE
        while size < _NEARLY_ALL * people:
            found.append(size)
            size *= 2
        return (*found, people)
    if max(sizes) > people:
        raise ValueError(
            f"size {max(sizes)} of the curve is more than the {people} people of the training part; leave it out, or "
            "give the validation and test parts a smaller share"
        )
    return tuple(sorted(sizes))


def from_scratch(settings: FinetuneSettings, lr: float | None = None) -> FinetuneSettings:
    """Return settings of the same training from random weights.

    What only makes sense with weights that know something is given up: frozen stages, statistics of batch norms that
    stay as they are, and smaller rates of earlier stages.

    Parameters
    ----------
    lr
        Another learning rate; with None the same.
    """
    own = {} if lr is None else {"lr": lr}
    return settings.model_copy(update={"weights": "scratch", "weights_dir": None, **_ALL_TRAINED, **own})


def choose_methods(
    methods: tuple[str, ...], settings: FinetuneSettings, scratch_lr: float | None = None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the methods that make sense with some settings, and in words what is left out or changed, and why.

    Raises
    ------
    ValueError
        If none is left, or there is a learning rate from scratch and nothing is trained from scratch.
    """
    if scratch_lr is not None and "scratch" not in methods:
        raise ValueError(
            f"scratch_lr is {scratch_lr:g}, but of the methods {','.join(methods)} none trains from scratch; leave it "
            "out, or add scratch"
        )
    notes = []
    given_up = [
        f"{name} {getattr(settings, name)}" for name, value in _ALL_TRAINED.items() if getattr(settings, name) != value
    ]
    if "scratch" in methods and given_up:
        notes.append(f"scratch goes without {' and '.join(given_up)}, which make no sense with random weights")
    if "probe" in methods and settings.pool == "attention":
        notes.append("the probe sees the mean over slices: attention would have to be trained")
    if settings.weights != "scratch":
        return methods, notes
    kept = tuple(method for method in methods if method != "transfer")
    if not kept:
        raise ValueError(
            "weights are scratch, so there is nothing to transfer; give weights (imagenet, kinetics, FILE, RUN_DIR), "
            "or methods scratch,probe"
        )
    if "transfer" in methods:
        notes.append("transfer is left out: the weights are scratch, so it would be the same as scratch")
    if "probe" in methods:
        notes.append("the frozen network of the probe has random weights, as asked for by weights scratch")
    return kept, notes
