"""Points of a view: drawing them with a preference for the body, and reading features of a map at them.

A point is given as zyx in voxels of its patch or view; voxel centres are integers. A feature map of another resolution covers
the same patch and is read with ``align_corners=False``: voxel i of the patch reaches from i - 0.5 to i + 0.5 on both.

Source: Seince et al., Pix2Rep, MIDL 2024 (sampled pixels).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

FEW_CELLS = 512
"""Largest number of cells of a map that is interpolated by a product of matrices on a GPU."""


def brighter_part(volumes: Float[Tensor, "batch channel *shape"]) -> Bool[Tensor, " batch *shape"]:
    """Return which voxels are brighter than the mean of their patch, averaged over channels.

    This finds the body without labels, because air is darker than the mean of every patch that contains some. In a patch without
    air, it is the brighter part.
    """
    brightness = volumes.float().mean(dim=1)
    return brightness > brightness.mean(dim=tuple(range(1, brightness.ndim)), keepdim=True)


def draw_points(
    generators: Sequence[torch.Generator],
    valid: Bool[Tensor, " batch *shape"],
    count: int,
    preferred: Bool[Tensor, " batch *shape"] | None = None,
    preferred_share: float = 0.0,
) -> Int[Tensor, "batch {count} d"]:
    """Draw voxels of each sample without replacement: a share of them from the preferred voxels, the others from all.

    Only valid voxels are drawn. If a sample has fewer valid voxels than ``count``, they are repeated in turn. A sample without
    any valid voxel gets invalid points, which the caller must exclude.

    Args:
        generators: One generator per sample; each gives one random number, a seed for the mask's device.
        valid: Voxels that may be drawn.
        count: Number of points per sample.
        preferred: Preferred voxels, for instance the body; None if there are none.
        preferred_share: Share of the points drawn from the preferred voxels, 0 to 1; a sample with too few takes others.

    Returns:
        Points, zyx in voxels, on the device of ``valid``.
    """
    shape = valid.shape[1:]
    seeds = [int(torch.randint(2**62, (1,), generator=generator)) for generator in generators]
    scores = torch.stack(
        [torch.rand(math.prod(shape), generator=torch.Generator(valid.device).manual_seed(seed), device=valid.device)
         for seed in seeds]
    )  # fmt: skip
    allowed = valid.flatten(1)
    count_preferred = min(round(count * preferred_share), scores.shape[1])
    # Random numbers lie below 1, so all valid preferred voxels come before the other valid ones, and these before the rest.
    wanted = allowed if preferred is None else allowed & preferred.flatten(1)
    first = (scores + allowed + wanted).topk(count_preferred, dim=1).indices
    taken = torch.zeros_like(allowed).scatter(1, first, True)
    others = min(count, scores.shape[1]) - count_preferred
    second = (scores + 1 + allowed).masked_fill(taken, 0).topk(others, dim=1).indices
    chosen = torch.cat([first, second], dim=1)
    usable = allowed.gather(1, chosen)
    chosen = chosen.gather(1, usable.int().argsort(dim=1, descending=True, stable=True))
    turn = torch.arange(count, device=valid.device) % usable.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.stack(torch.unravel_index(chosen.gather(1, turn), shape), dim=-1)


def place_of(
    points_vox: Int[Tensor, "batch points d"] | Float[Tensor, "batch points d"], shape: Sequence[int]
) -> Int[Tensor, "batch points"]:
    """Return the flat index of each point among all voxels of a patch or cells of a map, in C order.

    Args:
        points_vox: Points, zyx in whole numbers.
        shape: Number of voxels of the patch, or of cells of the map, along each axis.
    """
    place = torch.zeros_like(points_vox[..., 0], dtype=torch.long)
    for axis, length in enumerate(shape):
        place = place * length + points_vox[..., axis].long()
    return place


def cell_centres_vox(
    grid: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "cell d"]:
    """Return the centres of a map's cells in voxels of the patch that it covers, in C order."""
    axes = [
        (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (voxels / cells) - 0.5
        for cells, voxels in zip(grid, shape, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def are_inside(points_vox: Float[Tensor, "batch points d"], shape: Sequence[int]) -> Bool[Tensor, "batch points"]:
    """Return which points lie between the centres of a patch's first and last voxels."""
    last = torch.tensor(tuple(shape), device=points_vox.device) - 1
    return ((points_vox >= 0) & (points_vox <= last)).all(dim=-1)


def interpolate_at(
    feature_map: Float[Tensor, "batch channel *grid"], points_vox: Float[Tensor, "batch points d"], shape: Sequence[int]
) -> Float[Tensor, "batch points channel"]:
    """Return the features at points, linearly interpolated between the centres of the map's cells.

    Beyond the outer centres, features are constant. Memory that is kept for the backward pass grows with the number of points,
    not with the number of voxels.

    Args:
        feature_map: Map of any resolution that covers the patch.
        points_vox: Points, zyx in voxels of the patch.
        shape: Number of voxels of the patch along each axis.

    Returns:
        Features in float32, also for a map in half precision. At the centre of a cell, they equal the cell's bit for bit.
    """
    index, weight = _surrounding_cells(points_vox, feature_map.shape[2:], shape)
    cells = math.prod(feature_map.shape[2:])
    if feature_map.device.type == "cpu":
        first = cells * torch.arange(len(index)).view(-1, 1, 1)
        rows = feature_map.movedim(1, -1).flatten(0, -2)  # no copy in channels-last
        sums = _WeightedRows.apply(rows, (first + index).transpose(1, 2).flatten(0, 1), weight.mT.flatten(0, 1))
        return sums.unflatten(0, points_vox.shape[:2])
    if cells <= FEW_CELLS:
        # A product of matrices: a gather of all corners would copy every cell many times.
        parts = torch.zeros(*points_vox.shape[:2], cells, device=points_vox.device)
        parts = parts.scatter_add(2, index.transpose(1, 2), weight.transpose(1, 2))
        with torch.autocast(feature_map.device.type, enabled=False):
            return parts @ feature_map.flatten(2).float().transpose(1, 2)
    # The backward pass of one gather for all corners makes one gradient of the map's size instead of one for each corner.
    chosen = index.flatten(1)[:, None].expand(-1, feature_map.shape[1], -1)
    values = feature_map.flatten(2).gather(2, chosen).float().unflatten(2, index.shape[1:])
    return (values * weight[:, None]).sum(dim=2).transpose(1, 2)


class _WeightedRows(torch.autograd.Function):
    """Weighted sums of a table's rows, in float32: (sum, feature) from rows (row, feature), indices and weights (sum, term).

    On the CPU, both passes are several times faster than a gather and its scatter: the backward pass is the same sum, of the
    gradients that belong to each row. There is no gradient with respect to the weights, and thus to the points.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.count, ctx.dtype = len(rows), rows.dtype
        return embedding_bag(index, rows.float(), per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        owned = index.flatten()
        _, order = torch.sort(owned.int())
        terms = owned.new_zeros(ctx.count).scatter_add_(0, owned, torch.ones_like(owned))
        starts = terms.cumsum(0) - terms
        owner = order.div(index.shape[1], rounding_mode="floor")
        sums = embedding_bag(
            owner, gradient.float().contiguous(), starts, per_sample_weights=weight.flatten()[order], mode="sum"
        )
        return sums.to(ctx.dtype), None, None


def _surrounding_cells(
    points_vox: Float[Tensor, "batch points d"], grid: Sequence[int], shape: Sequence[int]
) -> tuple[Int[Tensor, "batch corners points"], Float[Tensor, "batch corners points"]]:
    """Return the flat indices of the cells around each point, and their weights in linear interpolation, in float32."""
    points_vox = points_vox if points_vox.dtype is torch.float64 else points_vox.float()
    scale, same, last, last_lower = _lengths(tuple(grid), tuple(shape), points_vox.device, points_vox.dtype)
    place = torch.where(same, points_vox, (points_vox + 0.5) * scale - 0.5).clamp_min(0).minimum(last)
    below = place.floor().minimum(last_lower)
    share = place - below
    cells = torch.stack([below, (below + 1).minimum(last)]).long()
    weights = torch.stack([1 - share, share])
    # all corners together, axis by axis, since a GPU takes as long for a small operation as for a large one
    index, weight = cells[..., 0], weights[..., 0]
    for axis in range(1, len(grid)):
        index = (index[:, None] * grid[axis] + cells[..., axis]).flatten(0, 1)
        weight = (weight[:, None] * weights[..., axis]).flatten(0, 1)
    return index.transpose(0, 1), weight.transpose(0, 1).float()


@functools.lru_cache(maxsize=128)
def _lengths(
    grid: tuple[int, ...], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for each axis: cells per voxel, whether cells are voxels, the last cell, and the last one with a cell above."""
    with torch.inference_mode(False):  # kept tensors must serve training too
        cells = torch.tensor(grid, device=device, dtype=dtype)
        scale = torch.tensor([a / b for a, b in zip(grid, shape, strict=True)], device=device, dtype=dtype)
        same = torch.tensor([a == b for a, b in zip(grid, shape, strict=True)], device=device)
        return scale, same, cells - 1, (cells - 2).clamp_min(0)


def corner_points(
    points_vox: Float[Tensor, "batch points d"], shape: Sequence[int]
) -> tuple[Float[Tensor, "batch points corners d"], Float[Tensor, "batch points corners"]]:
    """Return the voxels around each point and their weights in linear interpolation.

    They serve to interpolate values that are computed at voxels, such as probabilities.

    Args:
        points_vox: Points, zyx in voxels.
        shape: Number of voxels of the patch along each axis; points outside are moved to the nearest border.

    Returns:
        The 2^d corners, zyx in voxels, and their weights, which sum to 1.
    """
    corners, weights = [], []
    last = torch.tensor([length - 1 for length in shape], device=points_vox.device, dtype=points_vox.dtype)
    place = points_vox.clamp_min(0).minimum(last)
    below = place.floor().minimum((last - 1).clamp_min(0))
    share = place - below
    for corner in itertools.product((0, 1), repeat=len(shape)):
        step = torch.tensor(corner, device=points_vox.device, dtype=points_vox.dtype)
        corners.append((below + step).minimum(last))
        weights.append(torch.where(step > 0, share, 1 - share).prod(dim=-1))
    return torch.stack(corners, dim=2), torch.stack(weights, dim=2)
