"""NIfTI scans to a chunked Zarr store."""

import lazy_loader

# The names are in __init__.pyi; each is imported when it is first asked for: torch and others take seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
