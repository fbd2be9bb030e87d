"""Axis-aligned boxes, for the position of a crop in its patch and for the overlap of two crops.

A box is continuous: voxel i reaches from i - 0.5 to i + 0.5, in the same coordinates as points. In mm, the origin is the
centre of voxel 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """One box per sample, zyx, in voxels or in mm."""

    lower: Float[Tensor, "batch d"]
    size: Float[Tensor, "batch d"]

    @property
    def upper(self) -> Tensor:
        """Upper corners of the boxes (batch, d)."""
        return self.lower + self.size


def boxes_of_voxels(lower_vox: Int[Tensor, "batch d"], size_vox: Int[Tensor, "batch d"]) -> Boxes:
    """Return the boxes that cover whole voxels, given their first voxels and their sizes."""
    return Boxes(lower_vox.double() - 0.5, size_vox.double())


def to_mm(boxes: Boxes, spacing_mm: Sequence[float]) -> Boxes:
    """Convert boxes from voxels to mm, measured from the centre of voxel 0."""
    spacing = torch.as_tensor(spacing_mm, dtype=boxes.lower.dtype, device=boxes.lower.device)
    return Boxes(boxes.lower * spacing, boxes.size * spacing)


def intersect(first: Boxes, second: Boxes) -> Boxes:
    """Return the intersection of each pair of boxes; its size is 0 along axes on which they do not overlap."""
    lower = torch.maximum(first.lower, second.lower)
    return Boxes(lower, (torch.minimum(first.upper, second.upper) - lower).clamp_min(0))


def volume(boxes: Boxes) -> Float[Tensor, " batch"]:
    """Return the volume of the boxes (area in 2D), in voxels or in mm to the power of the number of axes."""
    return boxes.size.prod(dim=1)


def overlap_share(first: Boxes, second: Boxes) -> Float[Tensor, " batch"]:
    """Return the share of the smaller box that both boxes of a pair have in common, 0 to 1."""
    return volume(intersect(first, second)) / torch.minimum(volume(first), volume(second))


def intersection_over_union(first: Boxes, second: Boxes) -> Float[Tensor, " batch"]:
    """Return the intersection over union of each pair of boxes by volume, 0 to 1."""
    common = volume(intersect(first, second))
    return common / (volume(first) + volume(second) - common)


def contains(boxes: Boxes, points: Float[Tensor, "batch points d"]) -> Bool[Tensor, "batch points"]:
    """Return which points lie in their sample's box; the box includes its lower border but not its upper one."""
    inside = (points >= boxes.lower[:, None]) & (points < boxes.upper[:, None])
    return inside.all(dim=2)
