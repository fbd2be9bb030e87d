"""Smooth random fields and deformed coordinates, from which phantoms are made."""

from collections.abc import Sequence

import numpy as np

WARP = 0.05
"""Typical displacement of the deformation, as a fraction of half the field of view."""


def check_size(shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Check the size of a phantom.

    Raises:
        ValueError: If the shape is not three numbers of at least 8, or the spacing not three numbers above 0.
    """
    if len(shape) != 3 or len(spacing_mm) != 3 or min(shape) < 8 or min(spacing_mm) <= 0:
        raise ValueError(
            "shape must be three numbers of at least 8 and spacing_mm three numbers above 0, "
            f"got {tuple(shape)} and {tuple(spacing_mm)}"
        )


def warped_grid(
    rng: np.random.Generator, shape: tuple[int, ...], extent_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the anatomical coordinates (-1 to 1) of every voxel after tilt, scaling and a smooth deformation.

    Args:
        rng: Source of the deformation; it is advanced.
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

    The field is a sum of cosines.

    Args:
        rng: Source of the weights; it is advanced.
        waves: Largest number of half periods along z, y and x.
        shape: Shape (z, y, x) in voxels.
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
    """Return an MR magnitude image: the volume under a smooth shading, with Rician noise.

    Args:
        rng: Source of shading and noise; it is advanced.
        volume: Intensities (z, y, x).
        bias: Largest deviation of the shading from 1.
        noise: Standard deviation of the noise in both channels, in units of intensity.

    Returns:
        Intensities (z, y, x), at least 0.
    """
    real = rng.standard_normal(volume.shape, np.float32) * np.float32(noise)
    field = smooth_field(rng, (2, 2, 2), volume.shape)
    shaded = volume * (1 + np.float32(bias) * field / np.abs(field).max())
    imaginary = rng.standard_normal(volume.shape, np.float32) * np.float32(noise)
    return np.hypot(shaded + real, imaginary)
