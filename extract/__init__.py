"""Frozen-encoder embeddings of brain volumes, and linear probes on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extract.embeddings import Embeddings, open_embeddings, write_embeddings

if TYPE_CHECKING:
    from extract.encoder import Encoder, build_encoder
    from extract.run import extract

__all__ = ["Embeddings", "Encoder", "build_encoder", "extract", "open_embeddings", "write_embeddings"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: `probe` does without, and torch takes seconds to import."""
    if name in ("Encoder", "build_encoder"):
        from extract import encoder

        return getattr(encoder, name)
    if name == "extract":
        from extract.run import extract

        return extract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
