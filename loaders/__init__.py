"""Batches of brain volumes from a store, at the speed of the hardware."""

from loaders.loader import Batch, Loader, open_loader
from loaders.reader import CorruptShardError, VolumeReader

__all__ = ["Batch", "CorruptShardError", "Loader", "VolumeReader", "open_loader"]
