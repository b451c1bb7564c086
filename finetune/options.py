"""Flags of the command from the settings: each setting has one name, one default and one help text, in one place."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from extract.probing.settings import THIRD_DEGREE
from finetune.settings import FinetuneSettings, make_settings, read_settings

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings; flags come before what it says.")
]


def with_settings(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """Give a command a flag for each setting but some, of which it gets those that were given as ``**flags``."""
    signature = inspect.signature(command, eval_str=True)
    own = [part for part in signature.parameters.values() if part.kind is not part.VAR_KEYWORD]
    flags = [_flag(name) for name in FinetuneSettings.model_fields if name not in without]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        command(**given)

    wrapper.__annotations__ = {part.name: part.annotation for part in [*own, *flags]}
    wrapper.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    return wrapper


def settings_from(config: Path | None, flags: Mapping[str, Any]) -> FinetuneSettings:
    """Return the settings of a YAML file, if any, and of flags, which come first.

    Raises
    ------
    ValueError
        See `finetune.settings.make_settings`.
    """
    given = {} if config is None else read_settings(config)
    make_settings(given, str(config))  # says what is wrong with the file as such
    named = {name: _read(name, value) for name, value in flags.items() if value is not None and value != []}
    return make_settings(given | named, "the command", named=option_of)


def option_of(name: str) -> str:
    """Return what the option of a setting is called."""
    return f"--{name.replace('_', '-')}"


def _flag(name: str) -> inspect.Parameter:
    field = FinetuneSettings.model_fields[name]
    text = field.description or ""
    kind = _without_none(field.annotation)
    default = "" if field.default is None or field.default == () else str(field.default)
    default = {"kinship": str(THIRD_DEGREE)}.get(name, default)  # one that others know
    option = option_of(name)
    given: dict[str, Any] = {"help": text, "show_default": default or False, "rich_help_panel": _panel(name)}
    if kind is bool:
        return _parameter(name, bool | None, typer.Option(f"{option}/--no-{option[2:]}", **given))
    if get_origin(kind) is dict or name == "augmentation":
        given["show_default"] = False
        return _parameter(name, list[str] | None, typer.Option(option, metavar="NAME=VALUE", **given))
    if get_origin(kind) is Literal:
        return _parameter(name, str | None, typer.Option(option, metavar="|".join(get_args(kind)), **given))
    if get_origin(kind) is tuple:
        metavar = {"target": "A,B", "crop": "Z,Y,X", "size": "N|H,W|Z,Y,X"}[name]
        return _parameter(name, str | None, typer.Option(option, metavar=metavar, **given))
    plain = kind if kind in (int, float, str) else str
    return _parameter(name, plain | None, typer.Option(option, **given))


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _without_none(kind: Any) -> Any:
    """Return what an option takes beside nothing."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


_PANELS: dict[str, Sequence[str]] = {
    "Network": (
        "model", "weights", "weights_dir", "view", "slices", "crop", "size", "scale", "pool", "dropout",
        "freeze_until", "batch_norm",
    ),
    "People": ("target", "task", "where", "validation", "test", "split", "groups", "kinship", "train_people"),
    "Machine": (
        "precision", "checkpointing", "device", "backend", "threads", "on_error", "micro_batch", "checkpoint_every",
        "tensorboard",
    ),
}  # fmt: skip


def _panel(name: str) -> str:
    return next((panel for panel, names in _PANELS.items() if name in names), "Training")


def _read(name: str, value: Any) -> Any:
    """Turn the text of a flag into what a YAML file would say."""
    if name not in ("task", "augmentation"):
        return value
    if name == "augmentation" and value == ["none"]:
        return "none"
    pairs = {}
    for text in value:
        key, _, given = text.partition("=")
        if not key.strip() or not given.strip():
            example = "income=ordinal" if name == "task" else "rotation_deg=5, or none"
            raise ValueError(f"{option_of(name)} is {text!r}, expected NAME=VALUE, such as {example}")
        pairs[key.strip()] = given.strip()
    return pairs
