"""Batches of brain volumes from a store, at the speed of the hardware."""

import lazy_loader

# The names are in __init__.pyi; each is imported when it is first asked for: torch and others take seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
