"""Datasets of an HDF5 file from elsewhere: only what lies in the file itself is read, and only if it is there.

HDF5 lets a dataset have its values in any other file (external storage, external links, virtual datasets), and gives
those that were never written as zeros, of any size.
"""

from __future__ import annotations

import math

import h5py


def group_inside(file: h5py.File, name: str) -> h5py.Group:
    """Return a group of the file; ValueError if it is something else or a link, KeyError if it is not there."""
    found = _inside(file, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{name} is a dataset, expected a group")
    return found


def dataset_inside(parent: h5py.Group, name: str) -> h5py.Dataset:
    """Return a dataset all of whose values lie in the file.

    Raises
    ------
    ValueError
        If it is something else, if values lie in other files, or if some were never written.
    KeyError
        If it is not there.
    """
    found = _inside(parent, name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name} is a group, expected a dataset")
    if found.external or found.is_virtual:
        raise ValueError(f"{name} has its values in other files, which are not read")
    if found.chunks is None:
        written = found.id.get_storage_size() >= found.size * found.id.get_type().get_size()
    else:
        chunks = math.prod(-(-length // step) for length, step in zip(found.shape, found.chunks, strict=True))
        written = found.id.get_num_chunks() == chunks
    if not written:
        raise ValueError(f"{name} has shape {found.shape}, but not all of its values were written")
    return found


def _inside(parent: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    if isinstance(parent.get(name, getlink=True), h5py.ExternalLink | h5py.SoftLink):
        raise ValueError(f"{name} is a link, expected what lies in this file")
    return parent[name]
