"""Assignment of the points of two views of a patch to the regions that both views show.

A region is a supervoxel. Points of the reference view decide which regions of a patch are used, and points of the query view are
assigned to them. All shapes are fixed, so that the CPU never has to wait for a result of the GPU.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

KEYS = 2**31
"""Number of keys, above every number of supervoxels; the next one stands for the outside of the image."""
FACTOR = 2_654_435_761
"""Odd factor that spreads neighbouring numbers over all keys (Knuth's multiplicative hash)."""


class RegionPoints(NamedTuple):
    """Regions of points. A region is counted within its patch, from 0.

    Attributes:
        reference: Region of each reference point (batch, points); -1 for none.
        query: Region of each query point (batch, points); -1 for none.
        used: Whether the region exists (batch, regions).
    """

    reference: Int[Tensor, "batch reference"]
    query: Int[Tensor, "batch query"]
    used: Bool[Tensor, "batch regions"]


def assign_regions(
    reference: Int[Tensor, "batch reference"],
    query: Int[Tensor, "batch query"],
    salt: Int[Tensor, " batch"],
    most: int,
    least_points: int,
) -> RegionPoints:
    """Choose regions of each patch in a random order and assign the points of both views to them.

    Args:
        reference: Supervoxel of each reference point, below 2^31; 0 outside the image.
        query: Supervoxel of each query point.
        salt: Random number of each sample, below 2^30, from which the order follows.
        most: Largest number of regions of a patch.
        least_points: Smallest number of reference points of a region.
    """
    keys, wanted = _keys(reference, salt), _keys(query, salt)
    ordered, order = keys.sort(dim=1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = starts.cumsum(dim=1) - 1
    size = torch.zeros_like(ordered).scatter_add(1, group, torch.ones_like(ordered))
    key = torch.full_like(ordered, KEYS).scatter(1, group, ordered)
    valid = (size >= least_points) & (key < KEYS)
    number = valid.cumsum(dim=1) - 1
    region = torch.where(valid & (number < most), number, -1)
    of_ordered = region.gather(1, group)
    place = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[1] - 1)
    same = ordered.gather(1, place) == wanted
    used = torch.arange(most, device=keys.device) < valid.sum(dim=1, keepdim=True)
    return RegionPoints(
        reference=torch.empty_like(of_ordered).scatter(1, order, of_ordered),
        query=torch.where(same, of_ordered.gather(1, place), -1),
        used=used,
    )


def _keys(supervoxels: Tensor, salt: Tensor) -> Tensor:
    odd = ((2 * salt + 1) * FACTOR) % KEYS  # odd factors map different numbers to different keys
    mixed = (supervoxels.long() * odd[:, None]) % KEYS
    return torch.where(supervoxels > 0, mixed, KEYS)
