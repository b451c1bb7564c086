"""What the ``probe`` command prints for programs: one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.embeddings import Embeddings
from extract.probing.compare import Difference, Probed
from extract.probing.phenotypes import Joined
from extract.probing.settings import ProbeSettings


def to_document(
    sources: Sequence[tuple[Path, str | None]],
    probed: Sequence[Probed],
    compared: Sequence[Difference],
    settings: ProbeSettings,
    *,
    phenotypes: Joined | None,
    report: Path | None,
    save: Path | None,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Return what ``--json`` prints; the top level is about the first embedding.

    Parameters
    ----------
    sources
        File and layer of each embedding.
    phenotypes
        What was joined to the embeddings, if anything was.
    report, save
        Where they are written, if they are.
    """
    first = probed[0]
    document: dict[str, Any] = {
        "embeddings": sources[0][0].name,
        **_identity(first.embeddings, sources[0][1]),
        **settings_to_json(settings),
        "targets": first.to_json(),
        "phenotypes": None if phenotypes is None else phenotypes.to_json(),
        "report": None if report is None else str(report),
        "save": None if save is None else str(save),
    }
    if len(probed) > 1:
        document["embeddings"] = [
            {"name": one.name, "file": path.name, **_identity(one.embeddings, layer), "targets": one.to_json()}
            for (path, layer), one in zip(sources, probed, strict=True)
        ]
        document["differences"] = [difference.to_json() for difference in compared]
    return document | {"warnings": list(warnings)}


def _identity(embeddings: Embeddings, layer: str | None) -> dict[str, Any]:
    return {
        "scans": len(embeddings.features),
        "features": embeddings.features.shape[1],
        "simulated": bool(embeddings.attrs.get("simulated")),
        "model": embeddings.attrs.get("model"),
        "weights": embeddings.attrs.get("weights"),
        "layer": layer,
    }


def settings_to_json(settings: ProbeSettings) -> dict[str, Any]:
    """Return the settings for people and programs; of a file only its name."""
    return {
        "folds": settings.folds,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "confounds": list(settings.confounds),
        "groups": settings.groups.name if isinstance(settings.groups, Path) else settings.groups,
        "kinship": settings.kinship,
        "bins": {name: of if isinstance(of, int) else list(of) for name, of in settings.bins.items()},
        "permutations": settings.permutations,
        "bootstrap": settings.bootstrap,
    }
