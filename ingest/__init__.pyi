from .run import ingest as ingest
from .settings import IngestSettings as IngestSettings
from .settings import IngestSummary as IngestSummary
from .store import VolumeStore as VolumeStore
from .store import open_store as open_store
