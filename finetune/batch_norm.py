"""Statistics of batch norms for the weights as they are: what a network is validated, kept and tested with.

While it is trained, a batch norm uses the mean and variance of each batch, and an average of those of the last dozen of
batches is kept for later. After few or large steps that average is of weights that are gone, and what the network
predicts is far off though it has learnt. So the averages are taken anew, over one set of scans with one set of weights
(Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from finetune.network import NORMS, ScanNetwork
from loaders import Batch, Loader
from loaders.views import as_images, each

#: Scans that give the statistics: of their slices or voxels there are plenty.
SCANS = 128


def choose_scans(rows: np.ndarray, seed: int) -> np.ndarray:
    """Choose which of the rows to train on give the statistics, the same ones each time; int64, in ascending order."""
    return np.sort(np.random.default_rng([seed, SCANS]).permutation(rows)[:SCANS])


def read_scans(batch: Batch, least: int = 1) -> Batch | None:
    """Return a batch without the scans that could not be read, whose pictures are black; None for too few.

    Parameters
    ----------
    least
        Fewer are too few.
    """
    if batch.valid.all():
        return batch
    kept = np.flatnonzero(batch.valid)
    if len(kept) < least:
        return None
    pictures = each(batch.images)
    places = torch.from_numpy(kept).to(pictures[0].device)  # not a mask, which would make a GPU be waited for
    images = as_images(tuple(one[places] for one in pictures))
    return Batch(images, batch.rows[kept], [batch.participant[place] for place in kept], batch.valid[kept])


def update_statistics(network: ScanNetwork, loader: Loader, dtype: torch.dtype = torch.float32) -> None:
    """Take the averages of all batch norms anew, but of those that are frozen.

    Parameters
    ----------
    network
        On its device.
    loader
        Of the scans, as stored; on all processes the same ones, for they wait for each other (SyncBatchNorm).
    dtype
        Of what is computed.
    """
    was_training = network.training
    network.train()
    norms = [module for module in network.modules() if isinstance(module, NORMS) and module.training]
    together = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    device = next(network.parameters()).device
    with _averaging(norms), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        for number, batch in enumerate(loader if norms else ()):
            if number and len(batch.rows) == 1:  # what is left over: of one small slice there may be no variance
                continue
            read = read_scans(batch, least=2 if len(batch.rows) > 1 else 1)
            if read is None and together:  # processes that wait for each other leave out none
                read = batch
            if read is not None:
                network.features(read.images, network.seen.cut)
    network.train(was_training)


@contextlib.contextmanager
def _averaging(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Have batch norms average over all batches alike, from now on."""
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
