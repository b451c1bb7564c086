"""Fitted probes in a file, and what they predict for new people. Reading one runs no code: it is JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.embeddings import Embeddings
from extract.probing.model import ProbeModel
from extract.probing.targets import CLASSIFICATIONS
from ingest.dictionary import TASKS
from ingest.errors import StoreError
from ingest.store import check_format, package_versions
from ingest.writing import write_text_whole, write_whole

FORMAT = "brain-probe"
FORMAT_VERSION = 2  # 1 took a category that it did not know as none
SUFFIX = ".json"
TABLE_SUFFIXES = (".csv", ".parquet")

#: Attributes of embeddings that decide what a feature means. Not the precision: digits, no other features.
_ENCODER = (
    "encoding_version", "model", "weights", "layers", "pooling", "view", "slices", "crop", "size", "scale", "input",
)  # fmt: skip
#: Of files from before it was written.
_FIRST_ENCODING = {"encoding_version": 1}

_MOST_BYTES = 1 << 28  # of a file; a million coefficients take 20 MB
_IDENTITY = ("row", "participant", "session", "modality")


@dataclass(frozen=True)
class SavedProbe:
    """Models that were fitted to everyone, and the features that they take. No participant is in it.

    Attributes
    ----------
    encoder
        What the embeddings said of how they were made, of `encoder_of`.
    layer
        The one layer of a file of several that was probed; None for all.
    features
        Number of features.
    simulated
        Whether they were fitted to simulated data.
    """

    models: list[ProbeModel]
    encoder: dict[str, Any]
    layer: str | None
    features: int
    simulated: bool


def encoder_of(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the attributes of embeddings say of the features: encoder, layers, input, grid of the scans."""
    found = _FIRST_ENCODING | {key: attrs[key] for key in _ENCODER if attrs.get(key) is not None}
    if "layers" not in found and attrs.get("layer") is not None:  # as earlier versions wrote it
        found["layers"] = attrs["layer"]
    grid = (attrs.get("store") or {}).get("grid") or {}
    found["grid"] = {key: grid[key] for key in ("shape_zyx", "voxel_mm", "space") if key in grid}
    if "weights" in found:  # a name may be that of a file; what is in them counts
        found["weights"] = {"sha256": found["weights"].get("sha256")}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def save_probe(
    path: Path,
    embeddings: Embeddings,
    models: Sequence[ProbeModel],
    *,
    layer: str | None = None,
    phenotypes: Mapping[str, Any] | None = None,
) -> None:
    """Write fitted probes; the file appears whole or not at all, replacing another.

    Parameters
    ----------
    path
        A .json file; its folder is made.
    embeddings
        What the models were fitted to.
    layer
        The layer that was asked for, if one was.
    phenotypes
        Of which table they are, if not of the embeddings: for people who read the file.

    Raises
    ------
    ValueError
        If there is no model, one would be refused by `load_probe`, or two columns of its predictions would have one
        name.
    StoreError
        If the file cannot be written, or its name has another ending.
    """
    check_model_suffix(path)
    features, simulated = int(embeddings.features.shape[1]), bool(embeddings.attrs.get("simulated"))
    saved = SavedProbe(list(models), encoder_of(embeddings.attrs), layer, features, simulated)
    _check_models(saved)
    _check_headings(models)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "simulated": saved.simulated,
        "features": saved.features,
        "layer": saved.layer,
        "encoder": saved.encoder,
        "phenotypes": phenotypes,
        "models": [model.to_json() for model in models],
        "created_by": package_versions("numpy", "scipy"),
    }
    text = json.dumps(document, allow_nan=False, indent=1)
    write_text_whole(path, text)


def load_probe(path: Path) -> SavedProbe:
    """Read what `save_probe` wrote.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    StoreError
        If it is something else, of an unknown version, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no saved probe at {path}; make one with: probe EMB --save {path.with_suffix(SUFFIX)}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StoreError(f"{path} has more than {_MOST_BYTES:,} bytes; a saved probe has fewer")
        document = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is no saved probe: {_first_line(error)}; make one with: probe EMB --save") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path} is no saved probe: it holds a {type(document).__name__}, expected an object")
    check_format(document, path, name=FORMAT, known=FORMAT_VERSION)
    try:
        saved = SavedProbe(
            [ProbeModel.from_json(model) for model in document["models"]],
            dict(document["encoder"]),
            document["layer"],
            int(document["features"]),
            bool(document["simulated"]),
        )
        _check_models(saved)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else _first_line(error)
        raise StoreError(f"{path} is damaged: {what}; save the probe again") from error
    return saved


def apply_probe(saved: SavedProbe, embeddings: Embeddings) -> pd.DataFrame:
    """Predict for each scan.

    Returns
    -------
    pandas.DataFrame
        One row per scan: who it is, and for each target a column of its name, with the value in the target's units or
        the most probable class; of classes their probabilities, too, as ``sex=male``.

    Raises
    ------
    ValueError
        If the features are others than the models were fitted to (the message says what differs) or no numbers, or a
        confound that a model takes is not there.
    """
    check_encoder(saved, embeddings)
    strange = np.flatnonzero(~np.isfinite(embeddings.features).all(axis=1))
    if len(strange):
        raise ValueError(
            f"row {strange[0]} of the embeddings has NaN or infinite features, as have {len(strange) - 1} more"
        )
    names = [name for name in _IDENTITY if name in embeddings.scans]
    columns: list[tuple[str, np.ndarray]] = [(name, embeddings.scans[name].to_numpy()) for name in names]
    for model in saved.models:
        columns += prediction_columns(model.name, model.labels, model.predict_embeddings(embeddings))
    return as_predictions(columns)


def prediction_columns(name: str, labels: Sequence[str], predicted: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the columns of a target by their names.

    Parameters
    ----------
    predicted
        (scan, class) probabilities, or (scan,) values if there are no labels.
    """
    if not labels:
        return [(name, predicted)]
    likeliest = np.array(labels, dtype=object)[predicted.argmax(axis=1)]
    return [(name, likeliest), *((f"{name}={label}", predicted[:, k]) for k, label in enumerate(labels))]


def as_predictions(columns: Sequence[tuple[str, np.ndarray]]) -> pd.DataFrame:
    """Return a table of predictions; ValueError if two columns have one name."""
    _check_once([name for name, _ in columns])
    return pd.DataFrame(dict(columns))


def _check_headings(models: Sequence[ProbeModel]) -> None:
    """Raise ValueError if predictions of models could not be columns of one table."""
    headings = [*_IDENTITY]
    for model in models:
        nothing = np.zeros((0, len(model.labels))) if model.labels else np.zeros(0)
        headings += [name for name, _ in prediction_columns(model.name, model.labels, nothing)]
    _check_once(headings)


def _check_once(headings: Sequence[str]) -> None:
    twice = [name for name in headings if headings.count(name) > 1]
    if twice:
        raise ValueError(
            f"two columns of the predictions would be called {twice[0]!r}; rename the target and fit it again"
        )


def confound_warnings(saved: SavedProbe, embeddings: Embeddings) -> list[str]:
    """Return what is unknown of the confounds that the models take, each once: scans without, strange categories."""
    return list(dict.fromkeys(warning for model in saved.models for warning in model.warnings(embeddings)))


def check_encoder(saved: SavedProbe, embeddings: Embeddings) -> None:
    """Raise ValueError if embeddings were made in another way than those that the models were fitted to."""
    ours, theirs = _flat(_FIRST_ENCODING | saved.encoder), _flat(encoder_of(embeddings.attrs))
    unlike = [
        f"{key} {_brief(theirs.get(key))} instead of {_brief(ours.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if unlike:
        raise ValueError(
            f"the embeddings are not of the encoder that the probe was fitted to: {'; '.join(unlike)}; extract them in "
            "the same way"
        )
    if embeddings.features.shape[1] != saved.features:
        raise ValueError(
            f"the embeddings have {embeddings.features.shape[1]} features, the probe was fitted to {saved.features}; "
            "extract them in the same way"
        )


def write_predictions(path: Path, predictions: pd.DataFrame) -> None:
    """Write predictions as .csv or .parquet; the file appears whole or not at all, replacing another.

    Raises
    ------
    StoreError
        If the file cannot be written, or its name has another ending.
    """
    check_table_suffix(path)

    def write(temporary: Path) -> None:
        if path.suffix == ".csv":
            predictions.to_csv(temporary, index=False)
        else:
            predictions.to_parquet(temporary, index=False)

    write_whole(path, write)


def check_model_suffix(path: Path) -> None:
    """Raise StoreError if the name's ending is not that of a saved probe."""
    if path.suffix != SUFFIX:
        raise StoreError(f"{path} ends in {path.suffix!r}; a probe is saved as {SUFFIX}")


def check_table_suffix(path: Path) -> None:
    """Raise StoreError if the name's ending is no kind of table."""
    if path.suffix not in TABLE_SUFFIXES:
        raise StoreError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(TABLE_SUFFIXES)}")


def _check_models(saved: SavedProbe) -> None:
    """Raise ValueError if models do not fit together or hold what is no number."""
    names = [model.name for model in saved.models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"it holds models of {', '.join(map(repr, names)) or 'nothing'}, expected one per target")
    if not isinstance(saved.layer, str | None):
        raise ValueError(f"its layer is {saved.layer!r}, expected a name")
    for model in saved.models:
        if model.task not in TASKS or bool(model.labels) != (model.task in CLASSIFICATIONS):
            raise ValueError(
                f"{model.name} has the task {model.task!r} and {len(model.labels)} classes, expected one of "
                f"{', '.join(TASKS)}, and classes of {' and '.join(CLASSIFICATIONS)} alone"
            )
        outputs = len(model.labels) if len(model.labels) > 2 else 1
        if model.coefficients.shape != (saved.features, outputs) or model.intercept.shape != (outputs,):
            raise ValueError(
                f"{model.name} has coefficients of shape {model.coefficients.shape} and {model.intercept.size} "
                f"intercepts, expected ({saved.features}, {outputs}) and {outputs}"
            )
        columns = 0
        if model.confounds is not None:
            columns = sum(map(len, model.confounds.means))
            if [len(means) for means in model.confounds.means] != [len(of) or 1 for of in model.confounds.categories]:
                raise ValueError(f"{model.name} has {columns} means of its confounds, expected one of each column")
            if not np.isfinite([mean for means in model.confounds.means for mean in means]).all():
                raise ValueError(f"a mean of the confounds of {model.name} is no finite number")
            for name, codes, labels in zip(
                model.confounds.names, model.confounds.categories, model.confounds.labels, strict=True
            ):
                if len(set(labels)) < len(codes) or len(labels) != len(codes):
                    raise ValueError(f"{model.name}: {len(codes)} categories of {name} have {len(set(labels))} labels")
        if model.confound_coefficients.shape != (columns, outputs):
            raise ValueError(
                f"{model.name} has coefficients of confounds of shape {model.confound_coefficients.shape}, expected "
                f"({columns}, {outputs})"
            )
        if len(model.labels) == 1 or len(set(model.labels)) < len(model.labels):
            raise ValueError(f"{model.name} has the classes {', '.join(model.labels)}, expected two or more, each once")
        for numbers in (model.coefficients, model.intercept, model.confound_coefficients, model.penalty):
            if not np.isfinite(numbers).all():
                raise ValueError(f"a coefficient or the penalty of {model.name} is no finite number")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number")


def _flat(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Return it without dictionaries in it: ``weights sha256``, ``grid space``."""
    found: dict[str, Any] = {}
    for key, value in encoder.items():
        found |= {f"{key} {name}": of for name, of in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _brief(value: object) -> str:
    text = "unknown" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…" if " " not in text else f"{text[:57]}…"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
