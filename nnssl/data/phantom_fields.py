"""Smooth random fields and deformed coordinates, from which phantoms are made."""

from collections.abc import Sequence

import numpy as np

WARP = 0.05
"""Typical displacement of the deformation, as a fraction of half the field of view."""


def warped_grid(
    rng: np.random.Generator, shape: tuple[int, ...], extent_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the anatomical coordinates (-1 to 1) of every voxel after tilt, scaling and a smooth deformation.

    Args:
        rng: Source of the deformation.
        shape: Shape (z, y, x) in voxels.
        extent_mm: Size (z, y, x) of the field of view in mm.

    Returns:
        The coordinates along z, y and x, each of that shape.
    """
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    waves = np.clip(np.round(4 * extent_mm / extent_mm.max()), 2, None).astype(int)
    for axis in range(3):
        grid[axis] += smooth_field(rng, waves, shape) * np.float32(WARP)
    tilt = rng.normal(0, 0.06, (3, 3)).astype(np.float32)
    np.fill_diagonal(tilt, 1 + rng.uniform(-0.08, 0.08, 3))
    warped = np.tensordot(tilt, grid, axes=1) + rng.normal(0, 0.03, (3, 1, 1, 1)).astype(np.float32)
    return warped[0], warped[1], warped[2]


def smooth_field(rng: np.random.Generator, waves: Sequence[int] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return a smooth random field (z, y, x) of unit standard deviation.

    The field is a sum of cosines with up to ``waves`` half periods per axis.
    """
    bases = []
    for count, size in zip(waves, shape, strict=True):
        order, place = np.arange(count + 1)[:, None], (np.arange(size) + 0.5) / size
        bases.append((np.cos(np.pi * order * place) / (1 + order)).astype(np.float32))
    weights = rng.standard_normal([len(basis) for basis in bases], np.float32)
    field = np.einsum("abc,az,by,cx->zyx", weights, *bases, optimize=True)
    field -= field.mean()
    return field / max(float(field.std()), 1e-6)


def rician(rng: np.random.Generator, volume: np.ndarray, bias: float, noise: float) -> np.ndarray:
    """Return an MR magnitude image of a volume: a smooth shading that departs from 1 by up to ``bias``, then Rician noise."""
    real = rng.standard_normal(volume.shape, np.float32) * np.float32(noise)
    field = smooth_field(rng, (2, 2, 2), volume.shape)
    shaded = volume * (1 + np.float32(bias) * field / np.abs(field).max())
    imaginary = rng.standard_normal(volume.shape, np.float32) * np.float32(noise)
    return np.hypot(shaded + real, imaginary)
