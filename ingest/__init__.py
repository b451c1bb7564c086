"""NIfTI scans to a chunked Zarr store."""

from ingest.run import IngestSettings, IngestSummary, ingest
from ingest.store import VolumeStore, open_store

__all__ = ["IngestSettings", "IngestSummary", "VolumeStore", "ingest", "open_store"]
