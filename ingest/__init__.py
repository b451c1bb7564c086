"""NIfTI scans to a chunked Zarr store."""

from ingest.run import ingest
from ingest.settings import IngestSettings, IngestSummary
from ingest.store import VolumeStore, open_store

__all__ = ["IngestSettings", "IngestSummary", "VolumeStore", "ingest", "open_store"]
