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


def add_noise(images: torch.Tensor, sd: torch.Tensor, keys: torch.Tensor) -> None:
    """Add white Gaussian noise to images, in place.

    Parameters
    ----------
    images
        float32 (scan, ...), contiguous, each of fewer than 2^32 voxels.
    sd
        float32 (scan,), standard deviations.
    keys
        int32 (scan, 2, 2), random bits, on the images' device: of each scan one row for the radius, one for the angle.
    """
    flat = images.view(len(images), -1)
    voxels = flat.shape[1]
    half = _half(voxels)  # voxel i makes a pair with voxel half + i
    block = max(1, _BLOCK.get(images.device.type, _BLOCK_ELSEWHERE) // len(images))
    for start in range(0, half, block):
        stop = min(start + block, half)
        counters = torch.arange(start, stop, dtype=torch.int32, device=images.device)
        radius, angle = _polar(counters, sd, keys)
        flat[:, start:stop].addcmul_(radius, angle.cos())
        partners = min(stop, voxels - half) - start  # one less than voxels at the end of an odd image
        flat[:, half + start : half + start + partners].addcmul_(radius[:, :partners], angle.sin_()[:, :partners])


def add_noise_at(
    images: torch.Tensor, numbers: torch.Tensor, voxels: int, sd: torch.Tensor, keys: torch.Tensor
) -> None:
    """Add to some voxels of images what `add_noise` adds to them, in place.

    Parameters
    ----------
    images
        float32 (scan, ...), contiguous: a part of each.
    numbers
        int64, of the shape of a part: which voxels of the whole these are.
    voxels
        Of the whole.
    sd, keys
        See `add_noise`.
    """
    numbers, half = numbers.flatten(), _half(voxels)
    first = numbers < half
    radius, angle = _polar(torch.where(first, numbers, numbers - half).to(torch.int32), sd, keys)
    images.view(len(images), -1).addcmul_(radius, torch.where(first, angle.cos(), angle.sin()))


def _half(voxels: int) -> int:
    return (voxels + 1) // 2


def _polar(counters: torch.Tensor, sd: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return radius and angle, float32 (scan, n), of points in the plane whose coordinates are normal numbers."""
    bits = hash_counters(counters, keys)
    # 24 bits, as many as float32 holds exactly; never 0, of which there is no logarithm
    uniform = (bits[:, 0] >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).add_(1).mul_(2**-24)
    radius = uniform.log_().mul_((-2 * sd**2)[:, None]).sqrt_()
    return radius, bits[:, 1].to(torch.float32).mul_(math.pi / 2**31)


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
        int32 (..., 2).

    Returns
    -------
    torch.Tensor
        int32 (..., n); all 32 bits are random, the sign among them.
    """
    # torch multiplies int32 modulo 2^32, as C does uint32; its shifts copy the sign, hence the masks.
    bits = counters ^ keys[..., :1]
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= keys[..., 1:]
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - 2**32  # as a signed number
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits
