"""Batches of brain volumes from a store, at the speed of the hardware."""

from loaders.augmentation import Augmentation
from loaders.dataset import Sample, VolumeDataset
from loaders.errors import CorruptShardError, ShardError, SlowReadError
from loaders.loader import Batch, Loader
from loaders.opening import open_loader
from loaders.reader import VolumeReader
from loaders.timing import Timing
from loaders.views import View, slices_of

__all__ = [
    "Augmentation",
    "Batch",
    "CorruptShardError",
    "Loader",
    "Sample",
    "ShardError",
    "SlowReadError",
    "Timing",
    "View",
    "VolumeDataset",
    "VolumeReader",
    "open_loader",
    "slices_of",
]
