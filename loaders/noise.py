"""Gaussian noise that is a function of the voxel's number: the same on every device and in every batch.

`torch.randn` is another generator on a GPU than on a CPU, and what it gives to a scan depends on who came before. Here
each voxel hashes its own number instead (a counter-based generator, as Salmon et al. 2011,
doi:10.1145/2063384.2063405, advocate), and Box and Muller's transform (1958, doi:10.1214/aoms/1177706645) makes two
normal numbers of two uniform ones.
"""

from __future__ import annotations

import math

import torch

# Pairs of voxels at a time. On a CPU the dozen passes over a block then stay in its cache; a GPU would only wait for
# more launches. The numbers do not depend on it.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**24


def add_noise(image: torch.Tensor, sd: float, keys: torch.Tensor) -> None:
    """Add white Gaussian noise to an image, in place.

    Parameters
    ----------
    image
        float32, contiguous, of fewer than 2^32 voxels.
    sd
        Standard deviation.
    keys
        int32 (2, 2), random bits, on the image's device: one row for the radius, one for the angle.
    """
    flat = image.view(-1)
    half = (len(flat) + 1) // 2  # voxel i makes a pair with voxel half + i
    block = _BLOCK.get(image.device.type, _BLOCK_ELSEWHERE)
    for start in range(0, half, block):
        stop = min(start + block, half)
        bits = hash_counters(torch.arange(start, stop, dtype=torch.int32, device=image.device), keys)
        # 24 bits, as many as float32 holds exactly; never 0, of which there is no logarithm
        uniform = (bits[0] >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).add_(1).mul_(2**-24)
        radius = uniform.log_().mul_(-2).sqrt_()
        angle = bits[1].to(torch.float32).mul_(math.pi / 2**31)
        flat[start:stop].addcmul_(radius, angle.cos(), value=sd)
        partners = min(stop, len(flat) - half) - start  # one less than voxels at the end of an odd image
        flat[half + start : half + start + partners].addcmul_(radius[:partners], angle.sin_()[:partners], value=sd)


def hash_counters(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return 32 random-looking bits for each counter and row of keys.

    MurmurHash3's finaliser (Appleby) with the constants that Wellons found by searching for the least bias
    ("lowbias32", https://nullprogram.com/blog/2018/07/31/). A second key in its middle keeps two scans from getting the
    same numbers at shifted places.

    Parameters
    ----------
    counters
        int32 (n,).
    keys
        int32 (rows, 2).

    Returns
    -------
    torch.Tensor
        int32 (rows, n); all 32 bits are random, the sign among them.
    """
    # torch multiplies int32 modulo 2^32, as C does uint32; its shifts copy the sign, hence the masks.
    bits = counters ^ keys[:, :1]
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= keys[:, 1:]
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - 2**32  # as a signed number
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits
