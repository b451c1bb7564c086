"""Frozen-encoder embeddings of brain volumes, and linear probes on them."""

from extract.embeddings import Embeddings, open_embeddings, write_embeddings
from extract.encoder import Encoder, build_encoder
from extract.run import extract

__all__ = ["Embeddings", "Encoder", "build_encoder", "extract", "open_embeddings", "write_embeddings"]
