"""Simulated brains: the MNI152 template, deformed smoothly, with the known effects of age, sex and intelligence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ingest.grid import FSL_MNI152_AFFINE, FSL_MNI152_SHAPE
from ingest.template import SPACING, load_template
from ingest.warp import draw_warped

_GREY_LEVEL = 1000.0  # white matter in the written files, about
_KNOT_MM = 24.0  # distance of the knots of the individual deformation
_NOISE = 22.0
_BIAS = 0.05  # standard deviation of the log of the bias field: about +-15 % over a brain


@dataclass(frozen=True)
class Effects:
    """Sizes of the known effects, in the units of the fields they scale.

    Attributes
    ----------
    ventricles_per_decade
        Displacement (mm) of the wall of the lateral ventricles per ten years.
    contrast_per_decade
        Share of the grey/white contrast that is lost per ten years.
    sex_mm
        Largest displacement between women and men.
    intelligence_mm
        Largest displacement per standard deviation of intelligence.
    individual_mm
        Standard deviation of each component of the individual deformation.
    """

    ventricles_per_decade: float = 0.6
    contrast_per_decade: float = 0.09
    sex_mm: float = 3.8
    intelligence_mm: float = 0.5
    individual_mm: float = 1.0


@dataclass(frozen=True)
class Anatomy:
    """What a person's brain looks like.

    Attributes
    ----------
    age
        Years.
    male
        Whether the local shape is that of men.
    intelligence
        In standard deviations.
    head_scale
        Volumetric scaling from the head to the template, as UK Biobank's field 25000: larger for smaller heads.
    seed
        Of the individual deformation: the same for every scan of a person.
    """

    age: float
    male: bool
    intelligence: float
    head_scale: float
    seed: tuple[int, ...]


def mni_volume(anatomy: Anatomy, effects: Effects, rng: np.random.Generator) -> np.ndarray:
    """Draw a brain as UK Biobank's ``T1_brain_to_MNI``: on FSL's grid, within the template's mask.

    Parameters
    ----------
    rng
        Of what differs between two scans of a person: noise, bias field, gain.

    Returns
    -------
    numpy.ndarray
        float32 (z, y, x) on FSL's MNI152 grid, x fastest and running from right to left (LAS); whole numbers.
    """
    template = load_template()
    matrix = np.linalg.inv(template.affine) @ FSL_MNI152_AFFINE
    out = np.empty(FSL_MNI152_SHAPE[::-1], np.float32)
    draw_warped(_tissues(anatomy, effects), template.near, _fields(anatomy, effects, rng), SPACING, matrix, out)
    return _with_noise(out, template.fsl_mask, rng, floor=-40.0)


def native_volume(anatomy: Anatomy, effects: Effects, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a skull-stripped brain in the scanner's space: true size, oblique, off centre.

    Returns
    -------
    volume : numpy.ndarray
        float32 (z, y, x), 1 mm, LAS; whole numbers from 0.
    affine : numpy.ndarray
        float64 (4, 4), voxel (x, y, z) -> mm of the scanner.
    """
    template = load_template()
    pose = np.eye(4)
    pose[:3, :3] = _rotation(rng.normal(0, np.deg2rad([5, 2, 2])))
    pose[:3, 3] = rng.normal([0, 10, 0], [2, 6, 6])
    head_from_mni = pose @ np.diag([*[anatomy.head_scale ** (-1 / 3)] * 3, 1.0])
    tilt = np.eye(4)  # the slices are tilted against the scanner
    tilt[:3, :3] = _rotation(rng.normal(0, np.deg2rad([4, 1, 1])))
    shape = (256, 256, 192)
    affine = tilt @ np.array([[-1.0, 0, 0, 95.5], [0, 1, 0, -117.5], [0, 0, 1, -128], [0, 0, 0, 1]])
    matrix = np.linalg.inv(head_from_mni @ template.affine) @ affine
    out = np.empty(shape, np.float32)
    draw_warped(_tissues(anatomy, effects), template.near, _fields(anatomy, effects, rng), SPACING, matrix, out)
    return _with_noise(out, out > 0, rng, floor=1.0), affine


def flirt_matrix(anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """Return a linear transform from a head to MNI152 (4, 4) whose determinant is the person's head scale."""
    matrix = np.eye(4)
    stretch = np.exp(rng.normal(0, 0.02, 3))
    stretch *= (anatomy.head_scale / stretch.prod()) ** (1 / 3)
    matrix[:3, :3] = _rotation(rng.normal(0, np.deg2rad([5, 2, 2]))) @ np.diag(stretch)
    matrix[:3, 3] = rng.normal([-8, -25, -60], [3, 8, 12])
    return matrix


def _tissues(anatomy: Anatomy, effects: Effects) -> np.ndarray:
    """Return the template with the grey/white contrast of an age."""
    template = load_template()
    share = effects.contrast_per_decade * (anatomy.age - 64) / 10
    return (template.t1 + np.float32(share) * template.contrast) * np.float32(_GREY_LEVEL)


def _fields(anatomy: Anatomy, effects: Effects, rng: np.random.Generator) -> np.ndarray:
    """Return displacement (voxels) and gain on the coarse grid, float32 (4, Z, Y, X).

    A point of the picture shows what lies at the point plus the displacement, so the fields, which point to where
    tissue goes, enter with a minus.
    """
    template = load_template()
    own = np.random.default_rng(anatomy.seed)
    shape = template.sex.shape[1:]
    fields = np.empty((4, *shape), np.float32)
    for part in range(3):
        fields[part] = _smooth_noise(shape, effects.individual_mm, own)
    fields[:3] -= template.ventricles * (effects.ventricles_per_decade * (anatomy.age - 64) / 10 + own.normal(0, 0.35))
    fields[:3] -= template.sex * (effects.sex_mm * (0.5 if anatomy.male else -0.5))
    fields[:3] -= template.intelligence * (effects.intelligence_mm * anatomy.intelligence)
    fields[3] = rng.uniform(0.8, 1.25) * np.exp(_smooth_noise(shape, _BIAS, rng, knot_mm=60.0))
    return fields


def _smooth_noise(
    shape: tuple[int, ...], deviation: float, rng: np.random.Generator, *, knot_mm: float = _KNOT_MM
) -> np.ndarray:
    """Return normal random numbers at knots `knot_mm` apart, smoothed by a Gaussian, on the coarse grid."""
    smooth = rng.standard_normal([int(np.ceil(n * SPACING / knot_mm)) + 3 for n in shape])
    for points in shape:  # each turn smooths the first axis and moves it to the end
        at = np.arange(points)[:, None] * (SPACING / knot_mm) + 1
        weights = np.exp(-((at - np.arange(smooth.shape[0])) ** 2) / (2 * 0.7**2))
        smooth = np.tensordot(smooth, weights, axes=(0, 1))
    return (smooth * (deviation / smooth.std())).astype(np.float32)


def _with_noise(volume: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, floor: float) -> np.ndarray:
    """Add noise within the mask and round to whole numbers; what is rounded to 0 becomes 1, as brain is never 0."""
    inside = np.flatnonzero(mask)
    values = volume.ravel()[inside]
    values += rng.standard_normal(len(inside), dtype=np.float32) * np.float32(_NOISE)
    np.rint(values, out=values)
    np.maximum(values, floor, out=values)
    values[values == 0] = 1
    noisy = np.zeros(volume.size, np.float32)
    noisy[inside] = values
    return noisy.reshape(volume.shape)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) by angles (radians) about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
