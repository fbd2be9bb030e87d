"""Two overlapping crops of one patch: drawing them, measuring their overlap, and mapping points from one to the other.

Source: none; the overlap by intersection over union is that of PCRL's code (Zhou et al., ICCV 2021).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.views.boxes import Boxes, contains, overlap_share
from nnssl.views.points import cell_centres_vox
from nnssl.views.spatial import AffineParams, AffineRange, draw_affine, map_points, pick

LATTICE_POINTS = 24
OVERLAP_TRIES = 8
"""Largest number of second crops that are drawn until one overlaps enough."""
ON_VOXEL = 1e-3
"""Distance in voxels by which rounding may move a point."""


def draw_overlapping(
    generators: Sequence[torch.Generator],
    ranges: AffineRange,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    least: float,
    measure: Literal["share", "iou"] = "share",
) -> tuple[AffineParams, AffineParams]:
    """Draw two overlapping crops of each patch.

    The second crop is drawn until it overlaps enough, at most eight times. Otherwise its centre is moved to that of the first,
    as far as the patch has room, and with ``iou`` it gets the zoom of the first. Rotated crops that are nearly as large as the
    patch may still overlap a little less.

    Args:
        generators: One generator per sample; each always gives the same number of random numbers.
        ranges: Range from which both crops are drawn.
        shape: Number of voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: Spacing of the patch along each axis.
        least: Smallest overlap, 0 to 1.
        measure: Measure of the overlap by volume: ``share`` of the smaller crop that both have in common, or ``iou``, the
            intersection over union.
    """
    first = draw_affine(generators, ranges, shape, spacing_mm)
    tries = [draw_affine(generators, ranges, shape, spacing_mm) for _ in range(OVERLAP_TRIES)]
    second = tries[-1]
    if measure == "iou":
        ratio = (_volume_share(first) / _volume_share(second)) ** (1 / len(shape))
        second = replace(second, linear=second.linear * ratio[:, None, None])
    second = _moved_to(second, first)
    linear, centre_mm = second.linear.clone(), second.centre_mm.clone()
    missing = torch.arange(len(generators))
    for each in tries:
        one, other = pick(first, missing), pick(each, missing)
        enough = (common_share(one, other) if measure == "share" else crop_iou(one, other)) >= least
        taken, missing = missing[enough], missing[~enough]
        linear[taken], centre_mm[taken] = each.linear[taken], each.centre_mm[taken]
        if not len(missing):
            break
    return first, replace(second, linear=linear, centre_mm=centre_mm)


def crop_boxes(params: AffineParams) -> Boxes:
    """Return the bounding box of each crop in voxels of the patch; for a crop that is not rotated, the crop itself."""
    spacing = torch.tensor(params.spacing_mm, dtype=torch.float64)
    voxels = torch.tensor(params.shape, dtype=torch.float64)
    half = params.linear.abs() @ (voxels * spacing / 2) / spacing
    centre = params.centre_mm / spacing + (voxels - 1) / 2
    return Boxes(centre - half, 2 * half)


def common_share(first: AffineParams, second: AffineParams) -> Float[Tensor, " batch"]:
    """Return the share of the smaller crop that two crops of the same patch have in common, 0 to 1, on the CPU.

    The share is exact if both crops are rotated only by right angles, or not at all. Otherwise it is counted on a lattice of
    24 points per axis.

    Args:
        first: Positions of the first crops, one record per sample.
        second: Positions of the second crops, drawn for the same patches.

    Raises:
        ValueError: If the patches differ in shape or spacing.
    """
    if (first.shape, first.spacing_mm) != (second.shape, second.spacing_mm):
        raise ValueError(
            f"second must be drawn for the shape and spacing of first, {(first.shape, first.spacing_mm)}, "
            f"got {(second.shape, second.spacing_mm)}"
        )
    share = overlap_share(crop_boxes(first), crop_boxes(second))
    turned = (~(_is_straight(first) & _is_straight(second))).nonzero()[:, 0]
    share[turned] = _counted_share(pick(first, turned), pick(second, turned))
    return share


def _counted_share(first: AffineParams, second: AffineParams) -> Float[Tensor, " batch"]:
    """Return the share of a lattice in the smaller crop that also lies in the other crop."""
    axes = [(torch.arange(LATTICE_POINTS).double() + 0.5) / LATTICE_POINTS * n - 0.5 for n in first.shape]
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    voxels = torch.tensor(first.shape, dtype=torch.float64)
    share = torch.empty(len(first.linear), dtype=torch.float64)
    first_is_smaller = _volume_share(first) <= _volume_share(second)
    for smaller, larger, chosen in ((first, second, first_is_smaller), (second, first, ~first_is_smaller)):
        rows = chosen.nonzero()[:, 0]
        places = map_points(lattice.expand(len(rows), *lattice.shape), pick(smaller, rows), "to_input")
        reached = map_points(places, pick(larger, rows), "to_output")
        whole = Boxes(torch.full((len(rows), len(voxels)), -0.5), voxels.expand(len(rows), -1))
        share[rows] = contains(whole, reached).double().mean(dim=1)
    return share


def crop_iou(first: AffineParams, second: AffineParams) -> Float[Tensor, " batch"]:
    """Return the intersection over union of two crops of the same patch by volume, 0 to 1.

    It is exact if ``common_share`` is.
    """
    one, other = _volume_share(first), _volume_share(second)
    common = common_share(first, second) * torch.minimum(one, other)
    return common / (one + other - common)


def map_across(
    points_vox: Float[Tensor, "batch points d"], own: AffineParams, other: AffineParams
) -> tuple[Float[Tensor, "batch points d"], Float[Tensor, "batch points d"]]:
    """Return the positions of one crop's points in the patch and in the other crop, zyx in voxels.

    Args:
        points_vox: Points of the crop, zyx in voxels.
        own: Position of the points' crop in the patch.
        other: Position of the other crop of the same patch.
    """
    places = map_points(points_vox, own, "to_input")
    return places, map_points(places, other, "to_output")


def shown_by_both(
    own: AffineParams, other: AffineParams, shape: Sequence[int], device: torch.device
) -> Bool[Tensor, " batch *shape"]:
    """Return which voxels of a crop are shown by the other crop too.

    These voxels lie inside the patch, and so do all voxels of the other crop that surround their position there.

    Args:
        own: Position of the crop whose voxels are returned.
        other: Position of the other crop of the same patch.
        shape: Number of voxels of the patch and of both crops along each axis.
        device: Device of the mask.
    """
    voxels = cell_centres_vox(shape, shape, device)
    places, there = map_across(voxels.expand(len(own.linear), *voxels.shape), own, other)
    there = torch.where((there - there.round()).abs() < ON_VOXEL, there.round(), there)
    last = torch.tensor([length - 1 for length in shape], device=device)
    inside = ((there >= 0) & (there <= last) & (places >= -ON_VOXEL) & (places <= last + ON_VOXEL)).all(dim=2)
    # Along each axis of the patch: the largest distances of the surrounding voxels of the other crop from the position.
    spacing = torch.tensor(other.spacing_mm, dtype=torch.float64)
    matrix = (other.linear * spacing / spacing[:, None]).to(places)  # (batch, patch axis, crop axis)
    below, above = there.floor() - there, there.ceil() - there
    for axis, length in enumerate(shape):
        steps = [matrix[:, axis, None] * side for side in (below, above)]
        least, most = (extreme(*steps).sum(dim=2) for extreme in (torch.minimum, torch.maximum))
        place = places[..., axis]
        inside &= (place + least >= -ON_VOXEL) & (place + most <= length - 1 + ON_VOXEL)
    return inside.unflatten(1, tuple(shape))


def _moved_to(params: AffineParams, other: AffineParams) -> AffineParams:
    """Return crops with their centres moved to those of others, and inwards if they would otherwise leave the patch."""
    spacing = torch.tensor(params.spacing_mm, dtype=torch.float64)
    reach_mm = (torch.tensor(params.shape) - 1) / 2 * spacing
    room_mm = (reach_mm - params.linear.abs() @ reach_mm).clamp_min(0)
    return replace(params, centre_mm=torch.minimum(torch.maximum(other.centre_mm, -room_mm), room_mm))


def _volume_share(params: AffineParams) -> Tensor:
    """Return the share of the patch that each crop covers (batch,)."""
    return torch.linalg.det(params.linear).abs()


def _is_straight(params: AffineParams) -> Tensor:
    """Return which crops have their edges parallel to the axes (batch,)."""
    magnitude = params.linear.abs()
    return (magnitude.amax(dim=2) >= (1 - 1e-12) * magnitude.square().sum(dim=2).sqrt()).all(dim=1)
