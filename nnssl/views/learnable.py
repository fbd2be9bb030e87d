"""The mask of the voxels that a method may learn from, in the views of a batch.

The mask comes with the patches (``nnssl.data.learnable``). It passes through the same geometry as a view, by the nearest voxel.

Source: Wald et al., Revisiting MAE Pre-training for 3D Medical Image Segmentation, CVPR 2025 (anonymised regions are left out of
the loss).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.views.points import place_of
from nnssl.views.spatial import AffineParams, apply_affine

TOKEN_SHARE = 0.5
"""Smallest share of a token's voxels that a method may learn from, for the token to count where it cannot be divided."""


def mask_of_patches(
    learnable: Bool[Tensor, " batch *shape"] | None, volumes: Float[Tensor, "batch channel *shape"]
) -> Bool[Tensor, " batch *shape"]:
    """Return the mask of the patches; without one, true everywhere."""
    if learnable is None:
        return torch.ones(len(volumes), *volumes.shape[2:], dtype=torch.bool, device=volumes.device)
    return learnable


def mask_of_view(learnable: Bool[Tensor, " batch *shape"], params: AffineParams) -> Bool[Tensor, " batch *shape"]:
    """Return the mask in a view of the patches, false where the view shows what lies outside the patch.

    Args:
        learnable: Mask of the patches.
        params: Position of the view in the patches, one record per sample.
    """
    return apply_affine(learnable[:, None].float(), params, mode="nearest")[:, 0] > 0.5


def mask_at_points(
    learnable: Bool[Tensor, " batch *shape"], points_vox: Float[Tensor, "batch points d"]
) -> Bool[Tensor, "batch points"]:
    """Return the mask at the voxels nearest to points of the patches; points outside are moved to the border."""
    shape = learnable.shape[1:]
    last = torch.tensor([length - 1 for length in shape], device=points_vox.device)
    nearest = points_vox.round().long().clamp_min(0).minimum(last)
    return learnable.flatten(1).gather(1, place_of(nearest, shape))


def mask_where_any(
    valid: Bool[Tensor, " batch *shape"], learnable: Bool[Tensor, " batch *shape"]
) -> Bool[Tensor, " batch *shape"]:
    """Return the valid voxels that a method may learn from; all valid voxels for a sample that has none of them.

    Args:
        valid: Voxels that may be drawn.
        learnable: Mask of the same view.
    """
    within = valid & learnable
    return torch.where(within.flatten(1).any(dim=1).view(-1, *(1,) * (valid.ndim - 1)), within, valid)


def mask_of_tokens(learnable: Bool[Tensor, " batch *shape"], grid: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
    """Return which tokens count: those of whose voxels at least half may be learned from, in C order of their grid.

    Args:
        learnable: Mask of a view.
        grid: Number of tokens along each axis.
    """
    values = learnable[:, None].float()
    pool: Any = F.adaptive_avg_pool3d if len(grid) == 3 else F.adaptive_avg_pool2d
    return pool(values, tuple(grid)).flatten(1) >= TOKEN_SHARE
