"""Random resized crops, rotations and flips of a batch, built in millimetres, and where a point goes under them.

A view is made by asking, for every voxel of the output, where in the input it comes from. In mm, from the centre of the
patch (c is where the centre of the crop lies, s <= 1 the zoom, R a rotation, F the flips)::

    x_input = s R F x_output + c

so the crop turns about its own centre, and the map is a similarity in mm whatever the spacing. It is conjugated with
the half extents of the patch, as ``grid_sample`` wants it with ``align_corners=False``: the same parameters then apply
to a feature map of another resolution that covers the same patch.

Source: random resized crop as in He et al., MoCo, CVPR 2020; rotation and validity for Pix2Rep, MIDL 2024.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.errors import UserError
from nnssl.views.boxes import Boxes, contains, overlap_share

VALID_TOLERANCE = 1e-4
LATTICE_POINTS = 24
OVERLAP_TRIES = 8
"""Crops that are drawn until one has the wanted overlap with another."""


@dataclass(frozen=True)
class AffineRange:
    """What may be drawn."""

    crop_fraction: tuple[float, float]
    """Least and largest share of the patch's volume (area in 2D) that a crop covers, above 0 and at most 1."""
    rotation_deg: tuple[float, ...]
    """Largest rotation, to either side, about each axis (z, y, x); a single angle in 2D."""
    flip_axes: tuple[int, ...]
    """Axes that may be flipped: 0 is z, or y in 2D."""
    flip_probability: float = 0.5
    """Of each of these axes, on its own."""


@dataclass(frozen=True)
class AffineParams:
    """What was drawn: one similarity per sample, in mm from the centre of the patch, zyx, on the CPU."""

    shape: tuple[int, ...]
    """Voxels of the patch, and of the view."""
    spacing_mm: tuple[float, ...]
    linear: Float[Tensor, "batch d d"]
    """Zoom times rotation times flips, from output to input."""
    centre_mm: Float[Tensor, "batch d"]
    """Where the centre of the crop lies."""


def draw_affine(
    generators: Sequence[torch.Generator], ranges: AffineRange, shape: Sequence[int], spacing_mm: Sequence[float]
) -> AffineParams:
    """Draw one crop, rotation and set of flips per sample.

    The share of volume is uniform in its range and the zoom is the same along all axes in mm. The crop's place is
    uniform over where all of its voxels lie inside the patch; along an axis on which a turned crop does not fit, it is
    centred.

    Args:
        generators: one per sample; each gives the same number of random numbers whatever the ranges.
        ranges: what may be drawn.
        shape: voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: of the patch's voxels.

    Raises:
        ValueError: the ranges do not fit a patch of this many axes, or a crop would be empty or larger than the patch.
    """
    dimensions = len(shape)
    low, high = ranges.crop_fraction
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop_fraction {ranges.crop_fraction} must rise within (0, 1]")
    if len(ranges.rotation_deg) != (1 if dimensions == 2 else 3) or len(spacing_mm) != dimensions:
        raise ValueError(f"rotation {ranges.rotation_deg} or spacing {tuple(spacing_mm)} is not for {dimensions} axes")
    if not all(0 <= axis < dimensions for axis in ranges.flip_axes):
        raise ValueError(f"flip_axes {ranges.flip_axes} are not all below {dimensions}")
    angles = len(ranges.rotation_deg)
    uniform = torch.stack(
        [torch.rand(1 + angles + 2 * dimensions, generator=each, dtype=torch.float64) for each in generators]
    )
    fraction, turn, place, flip = uniform.split([1, angles, dimensions, dimensions], dim=1)

    zoom = (low + (high - low) * fraction) ** (1 / dimensions)  # (batch, 1)
    angle_rad = torch.deg2rad((2 * turn - 1) * torch.tensor(ranges.rotation_deg, dtype=torch.float64))
    rotation = _rotation(angle_rad, dimensions)
    may_flip = torch.tensor([axis in ranges.flip_axes for axis in range(dimensions)])
    sign = torch.where((flip < ranges.flip_probability) & may_flip, -1.0, 1.0).double()

    # from the centre of the patch to the centre of its last voxel
    reach_mm = (torch.tensor(tuple(shape)) - 1) / 2 * torch.tensor(tuple(spacing_mm), dtype=torch.float64)
    needed_mm = zoom * (rotation.abs() @ reach_mm)
    return AffineParams(
        shape=tuple(int(n) for n in shape),
        spacing_mm=tuple(float(mm) for mm in spacing_mm),
        linear=zoom[..., None] * rotation * sign[:, None, :],
        centre_mm=(2 * place - 1) * (reach_mm - needed_mm).clamp_min(0),
    )


def check_affine(ranges: AffineRange, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Check that ranges that a user may have set fit a patch, before anything is drawn.

    Raises:
        UserError: they do not; names the settings.
    """
    try:
        draw_affine([torch.Generator()], ranges, shape, spacing_mm)
    except ValueError as error:
        raise UserError(f"crop_fraction, rotation_deg or flip_axes: {error}; --set others or none") from error


def draw_overlapping(
    generators: Sequence[torch.Generator],
    ranges: AffineRange,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    least: float,
    measure: Literal["share", "iou"] = "share",
) -> tuple[AffineParams, AffineParams]:
    """Draw two crops of each patch that overlap as much as wanted.

    The second is drawn until it overlaps enough, eight times at most; then its centre is moved to that of the first,
    as far as the patch leaves room, and for ``iou`` it gets the zoom of the first. Turned crops near the size of the patch may
    still overlap a little less than wanted.

    Args:
        generators: one per sample; each gives the same number of random numbers whatever is drawn.
        ranges: what may be drawn, for both.
        shape: voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: of the patch's voxels.
        least: overlap that is wanted, 0 to 1.
        measure: ``share`` of the smaller crop that both have in common, or ``iou``, what both have in common over what
            either covers; both by volume in mm.
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


def pick(params: AffineParams, samples: Int[Tensor, " picked"]) -> AffineParams:
    """Return the records of some samples."""
    return replace(params, linear=params.linear[samples], centre_mm=params.centre_mm[samples])


def _moved_to(params: AffineParams, other: AffineParams) -> AffineParams:
    """Return crops with their centres at those of others, moved so far inwards that they lie in the patch."""
    spacing = torch.tensor(params.spacing_mm, dtype=torch.float64)
    reach_mm = (torch.tensor(params.shape) - 1) / 2 * spacing
    room_mm = (reach_mm - params.linear.abs() @ reach_mm).clamp_min(0)
    return replace(params, centre_mm=torch.minimum(torch.maximum(other.centre_mm, -room_mm), room_mm))


def apply_affine(
    volumes: Float[Tensor, "batch channel *shape"],
    params: AffineParams,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "batch channel *shape"]:
    """Return the views, of the volumes' voxel shape; what comes from outside the patch is 0.

    Args:
        volumes: patches, or maps of another resolution that cover the same patches.
        params: one record per sample.
        mode: interpolation; "bilinear" is trilinear in 3D.

    Returns:
        New tensors; samples that are only flipped, or not changed at all, are bit-exact.
    """
    flips = torch.diagonal(params.linear, dim1=1, dim2=2)
    exact = ((params.linear == torch.diag_embed(flips.sign())) & (params.centre_mm == 0)[..., None]).flatten(1).all(1)
    if exact.all():
        return _flip(volumes, flips)
    warped = F.grid_sample(volumes, _sampling_grid(params, volumes), mode, padding_mode="zeros", align_corners=False)
    if exact.any():
        rows = exact.nonzero()[:, 0]
        warped[rows.to(volumes.device)] = _flip(volumes[rows.to(volumes.device)], flips[rows])
    return warped


def map_points(
    points_vox: Float[Tensor, "batch points d"], params: AffineParams, direction: Literal["to_input", "to_output"]
) -> Float[Tensor, "batch points d"]:
    """Return where points of the view lie in the patch (``to_input``), or the other way round (``to_output``).

    Args:
        points_vox: zyx in voxels of the patch or the view, both of ``params.shape``; voxel centres are integers.
        params: one record per sample.
        direction: which way.
    """
    spacing = torch.tensor(params.spacing_mm, dtype=torch.float64)
    middle = (torch.tensor(params.shape, dtype=torch.float64) - 1) / 2
    if direction == "to_input":
        linear, offset_mm = params.linear, params.centre_mm
    else:
        linear = torch.linalg.inv(params.linear)
        offset_mm = -(linear @ params.centre_mm[..., None])[..., 0]
    matrix = (linear * spacing / spacing[:, None])[:, None].to(points_vox)  # (batch, 1, d, d), voxels to voxels
    offset = (offset_mm / spacing + middle)[:, None].to(points_vox)
    # a sum, not a matrix product, which mixed precision or TF32 would round to some tenths of a voxel
    return (matrix * (points_vox - middle.to(points_vox))[..., None, :]).sum(dim=-1) + offset


def valid_mask(
    params: AffineParams, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Bool[Tensor, " batch *shape"]:
    """Return which voxels of the view are interpolated from voxels inside the patch only.

    Args:
        params: one record per sample.
        shape: voxels of the view or of a map of another resolution that covers it.
        device: where the mask is wanted.
    """
    ones = torch.ones(len(params.linear), 1, *shape, device=device)
    return apply_affine(ones, params)[:, 0] >= 1 - VALID_TOLERANCE


def crop_boxes(params: AffineParams) -> Boxes:
    """Return the box around each crop, in voxels of the patch; for a crop that is not turned, the crop itself."""
    spacing = torch.tensor(params.spacing_mm, dtype=torch.float64)
    voxels = torch.tensor(params.shape, dtype=torch.float64)
    half = params.linear.abs() @ (voxels * spacing / 2) / spacing
    centre = params.centre_mm / spacing + (voxels - 1) / 2
    return Boxes(centre - half, 2 * half)


def common_share(first: AffineParams, second: AffineParams) -> Float[Tensor, " batch"]:
    """Return the share of the smaller crop that two crops of the same patch have in common, 0 to 1, on the CPU.

    Exact where neither crop is turned by other than right angles; else counted on a lattice of 24 points per axis.

    Args:
        first: one record per sample.
        second: drawn for the same patches.

    Raises:
        ValueError: the patches differ in shape or spacing.
    """
    if (first.shape, first.spacing_mm) != (second.shape, second.spacing_mm):
        raise ValueError("crops of patches that differ in shape or spacing have no common share")
    share = overlap_share(crop_boxes(first), crop_boxes(second))
    turned = (~(_is_straight(first) & _is_straight(second))).nonzero()[:, 0]
    share[turned] = _counted_share(pick(first, turned), pick(second, turned))
    return share


def _counted_share(first: AffineParams, second: AffineParams) -> Float[Tensor, " batch"]:
    """Return the share of a lattice in the smaller crop that lies in the other crop too."""
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
    """Return the volume that two crops of the same patch have in common over the volume that either covers, 0 to 1.

    Exact where ``common_share`` is.
    """
    one, other = _volume_share(first), _volume_share(second)
    common = common_share(first, second) * torch.minimum(one, other)
    return common / (one + other - common)


def _volume_share(params: AffineParams) -> Tensor:
    """Return the share of the patch that each crop covers, (batch,)."""
    return torch.linalg.det(params.linear).abs()


def _rotation(angle_rad: Tensor, dimensions: int) -> Tensor:
    """Return rotation matrices (batch, d, d) in zyx: about z, y and x, multiplied in this order; in 2D from y to x."""
    planes = [(0, 1)] if dimensions == 2 else [(1, 2), (0, 2), (0, 1)]
    rotation = torch.eye(dimensions, dtype=torch.float64).expand(len(angle_rad), -1, -1)
    for angle, (i, j) in zip(angle_rad.T, planes, strict=True):
        about = torch.eye(dimensions, dtype=torch.float64).repeat(len(angle), 1, 1)
        about[:, i, i] = about[:, j, j] = angle.cos()
        about[:, i, j], about[:, j, i] = -angle.sin(), angle.sin()
        rotation = rotation @ about
    return rotation


def _is_straight(params: AffineParams) -> Tensor:
    """Return which crops (batch,) have their edges along the axes."""
    magnitude = params.linear.abs()
    return (magnitude.amax(dim=2) >= (1 - 1e-12) * magnitude.square().sum(dim=2).sqrt()).all(dim=1)


def _sampling_grid(params: AffineParams, volumes: Tensor) -> Tensor:
    """Return the input position of every output voxel as ``grid_sample`` wants it, (batch, *shape, d), x first."""
    shape = volumes.shape[2:]
    half_mm = torch.tensor(params.shape, dtype=torch.float64) * torch.tensor(params.spacing_mm, dtype=torch.float64) / 2
    matrix = (params.linear * half_mm / half_mm[:, None]).to(volumes.device, torch.float32)
    offset = (params.centre_mm / half_mm).to(volumes.device, torch.float32)
    ones = (1,) * len(shape)
    components = []
    for row in reversed(range(len(shape))):
        # sums of broadcast axes instead of F.affine_grid, whose matrix product mixed precision or TF32 would round
        component = offset[:, row].view(-1, *ones)
        for axis, length in enumerate(shape):
            place = (2 * torch.arange(length, device=volumes.device, dtype=torch.float32) + 1) / length - 1
            place = place.view([-1 if other == axis else 1 for other in range(len(shape))])
            component = component + matrix[:, row, axis].view(-1, *ones) * place
        components.append(component)
    return torch.stack(components, dim=-1).to(volumes.dtype)


def _flip(volumes: Tensor, sign: Tensor) -> Tensor:
    """Return copies of the volumes, each flipped along the axes where its ``sign`` (batch, d) is negative."""
    for axis in range(2, volumes.ndim):
        length = volumes.shape[axis]
        forward = torch.arange(length)
        place = torch.where(sign[:, axis - 2, None] < 0, length - 1 - forward, forward).to(volumes.device)
        place = place.view(len(volumes), *(length if other == axis else 1 for other in range(1, volumes.ndim)))
        volumes = volumes.gather(axis, place.expand(volumes.shape))
    return volumes
