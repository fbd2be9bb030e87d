"""Flips of whole patches, which permute voxels without interpolation."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from nnssl.errors import UserError


def draw_flips(
    generators: Sequence[torch.Generator], dimensions: int, axes: Sequence[int], probability: float
) -> Bool[Tensor, "batch d"]:
    """Draw which axes of each sample are flipped.

    Args:
        generators: One generator per sample; each always gives the same number of random numbers.
        dimensions: Number of axes of the patch.
        axes: Axes that may be flipped, each independently; 0 is z, or y in 2D.
        probability: Probability of each.

    Returns:
        Flips on the CPU.
    """
    uniform = torch.stack([torch.rand(dimensions, generator=each, dtype=torch.float64) for each in generators])
    may_flip = torch.zeros(dimensions, dtype=torch.bool)
    may_flip[list(axes)] = True
    return (uniform < probability) & may_flip


def apply_flips(
    volumes: Shaped[Tensor, "batch channel *shape"], flips: Bool[Tensor, "batch d"]
) -> Shaped[Tensor, "batch channel *shape"]:
    """Return the volumes, each flipped along its own axes.

    Args:
        volumes: Volumes or masks on any device.
        flips: Drawn flips, on the CPU.
    """
    flipped = [
        volume.flip([axis + 1 for axis, flip in enumerate(own) if flip])
        for volume, own in zip(volumes, flips, strict=True)
    ]
    return torch.stack(flipped)


def check_flips(dimensions: int, axes: Sequence[int]) -> None:
    """Check the setting ``flip_axes``, before anything is drawn.

    Raises:
        UserError: If an axis does not belong to the patch.
    """
    if any(not -dimensions <= axis < dimensions for axis in axes):
        raise UserError(f"flip_axes must be axes of a patch of {dimensions} axes, got {','.join(map(str, axes))}")
