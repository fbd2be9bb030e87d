"""Block-wise fusion of two images by discrete coefficients, which a network has to tell apart.

Source: Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale Unannotated Dataset
(Volume Fusion), 2023, published as Volume Fusion-based Self-supervised Pretraining for 3D Medical Image Segmentation, TIP 2025.
Numbers are those of the implementation of Wald et al., CVPR 2025: 10 to 39 boxes with sides from 8 voxels to 5/8 of a patch of
about 128 voxels, of which later ones overwrite earlier ones.

Deviation: the smallest side is a share of the patch, 1/16, because patches can be much smaller than 128 voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FusionRange:
    """Ranges from which maps of coefficients are drawn."""

    coefficients: int = 4
    """Number of steps from 0 to 1; there is one class more."""
    boxes: tuple[int, int] = (10, 39)
    """Smallest and largest number of boxes."""
    side: tuple[float, float] = (1 / 16, 5 / 8)
    """Smallest and largest side of a box as a share of the patch along each axis; at least one voxel."""


def draw_classes(
    generators: Sequence[torch.Generator], ranges: FusionRange, shape: Sequence[int]
) -> Int[Tensor, " batch *shape"]:
    """Draw the class of every voxel: class k stands for the coefficient k / ``coefficients`` of the foreground.

    A patch has class 0 except in boxes, whose classes, 0 included, are equally probable.

    Args:
        generators: One generator per sample. How many random numbers each gives depends only on the largest number of boxes.
        ranges: Ranges from which the boxes are drawn.
        shape: Number of voxels along each axis.

    Returns:
        Classes on the CPU.

    Raises:
        ValueError: If a range cannot be used.
    """
    _check(ranges)
    least, most = ranges.boxes
    dimensions = len(shape)
    classes = torch.zeros(len(generators), *shape, dtype=torch.int64)
    lengths = torch.tensor(tuple(shape), dtype=torch.float64)
    for own, generator in zip(classes, generators, strict=True):
        uniform = torch.rand(1 + most * (1 + 2 * dimensions), generator=generator, dtype=torch.float64)
        count = least + int(uniform[0] * (most - least + 1))
        each, side, place = uniform[1:].view(most, -1).split([1, dimensions, dimensions], dim=1)
        shortest = (ranges.side[0] * lengths).ceil()
        longest = (ranges.side[1] * lengths).floor().clamp_min(1)
        shortest = torch.minimum(shortest, longest)
        size = (shortest + side * (longest - shortest + 1)).floor()
        lower = (place * (lengths - size + 1)).floor()
        kinds = (each[:, 0] * (ranges.coefficients + 1)).long()
        for kind, start, extent in zip(
            kinds[:count].tolist(), lower.long().tolist(), size.long().tolist(), strict=False
        ):
            own[tuple(slice(first, first + n) for first, n in zip(start, extent, strict=True))] = kind
    return classes


def fuse(
    foreground: Float[Tensor, "batch channel *shape"],
    background: Float[Tensor, "batch channel *shape"],
    classes: Int[Tensor, " batch *shape"],
    coefficients: int,
) -> Float[Tensor, "batch channel *shape"]:
    """Return ``a * foreground + (1 - a) * background`` with the coefficients ``a`` that the classes stand for.

    Args:
        foreground: Images whose share is predicted.
        background: Images that fill the rest.
        classes: Class of every voxel, 0 to ``coefficients``.
        coefficients: Number of steps from 0 to 1.
    """
    share = (classes.to(foreground.dtype) / coefficients)[:, None]
    return torch.lerp(background, foreground, share)


def _check(ranges: FusionRange) -> None:
    if ranges.coefficients < 1:
        raise ValueError(f"coefficients must be at least 1, got {ranges.coefficients}")
    least, most = ranges.boxes
    if not 1 <= least <= most:
        raise ValueError(f"boxes must be two ascending numbers of at least 1, got {ranges.boxes}")
    low, high = ranges.side
    if not 0 < low <= high <= 1:
        raise ValueError(f"side must be two ascending numbers within (0, 1], got {ranges.side}")
