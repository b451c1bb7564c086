"""Linear probes of embeddings: scores, reports, and models for new people."""
