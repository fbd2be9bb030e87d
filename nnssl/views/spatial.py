"""Random resized crops, rotations and flips of a batch, built in millimetres, and the mapping of points under them.

A view is computed by mapping every voxel of the output to its position in the input. In mm from the centre of the patch, with
the centre c of the crop, the zoom s <= 1, a rotation R and the flips F::

    x_input = s R F x_output + c

The crop is therefore rotated about its own centre, and the map is a similarity in mm for every spacing. It is conjugated with
the half extents of the patch, as ``grid_sample`` requires with ``align_corners=False``. The same parameters then apply to a
feature map of another resolution that covers the same patch.

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

VALID_TOLERANCE = 1e-4


@dataclass(frozen=True)
class AffineRange:
    """Ranges from which crops, rotations and flips are drawn."""

    crop_fraction: tuple[float, float]
    """Smallest and largest share of the patch's volume (area in 2D) that a crop covers, above 0 and at most 1."""
    rotation_deg: tuple[float, ...] = ()
    """Largest rotation to either side about each axis (z, y, x); one angle in 2D; empty for no rotation."""
    flip_axes: tuple[int, ...] = ()
    """Axes that may be flipped: 0 is z, or y in 2D; -1 is x."""
    flip_probability: float = 0.5
    """Probability that each of these axes is flipped, independently of the others."""
    uniform_in: Literal["volume", "side"] = "volume"
    """Whether the share of the volume or that of the side is uniform between its bounds; the latter draws more small crops."""


@dataclass(frozen=True)
class AffineParams:
    """Drawn crops of a batch: one similarity per sample, in mm from the centre of the patch, zyx, on the CPU."""

    shape: tuple[int, ...]
    """Number of voxels of the patch and of the view along each axis."""
    spacing_mm: tuple[float, ...]
    linear: Float[Tensor, "batch d d"]
    """Zoom times rotation times flips, from output to input."""
    centre_mm: Float[Tensor, "batch d"]
    """Position of the crop's centre."""


def draw_affine(
    generators: Sequence[torch.Generator], ranges: AffineRange, shape: Sequence[int], spacing_mm: Sequence[float]
) -> AffineParams:
    """Draw one crop, rotation and set of flips per sample.

    The share of volume or of the side is uniform in its range, and the zoom is the same along all axes in mm. The crop's
    position is uniform over all positions at which its voxels lie inside the patch. Along an axis on which a rotated crop does
    not fit, it is centred.

    Args:
        generators: One generator per sample; each gives the same number of random numbers for all ranges.
        ranges: Ranges from which crops, rotations and flips are drawn.
        shape: Number of voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: Spacing of the patch along each axis.

    Raises:
        ValueError: If the ranges do not fit the number of axes, or a crop would be empty or larger than the patch.
    """
    dimensions = len(shape)
    low, high = ranges.crop_fraction
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop_fraction must be two ascending numbers within (0, 1], got {ranges.crop_fraction}")
    angles = 1 if dimensions == 2 else 3
    rotation_deg = ranges.rotation_deg or (0.0,) * angles
    if len(rotation_deg) != angles:
        raise ValueError(
            f"rotation_deg must have {angles} value(s) for a patch of {dimensions} axes, got {ranges.rotation_deg}"
        )
    if len(spacing_mm) != dimensions:
        raise ValueError(f"spacing_mm must have {dimensions} axes, as the patch has, got {tuple(spacing_mm)}")
    if not all(-dimensions <= axis < dimensions for axis in ranges.flip_axes):
        raise ValueError(
            f"flip_axes must be axes of the patch, from {-dimensions} to {dimensions - 1}, got {ranges.flip_axes}"
        )
    uniform = torch.stack(
        [torch.rand(1 + angles + 2 * dimensions, generator=each, dtype=torch.float64) for each in generators]
    )
    fraction, turn, place, flip = uniform.split([1, angles, dimensions, dimensions], dim=1)

    if ranges.uniform_in == "side":
        low, high = (share ** (1 / dimensions) for share in (low, high))
    zoom = low + (high - low) * fraction  # (batch, 1)
    if ranges.uniform_in == "volume":
        zoom = zoom ** (1 / dimensions)
    angle_rad = torch.deg2rad((2 * turn - 1) * torch.tensor(rotation_deg, dtype=torch.float64))
    rotation = _rotation(angle_rad, dimensions)
    may_flip = torch.zeros(dimensions, dtype=torch.bool)
    may_flip[list(ranges.flip_axes)] = True
    sign = torch.where((flip < ranges.flip_probability) & may_flip, -1.0, 1.0).double()

    # Distance from the centre of the patch to the centre of its last voxel.
    reach_mm = (torch.tensor(tuple(shape)) - 1) / 2 * torch.tensor(tuple(spacing_mm), dtype=torch.float64)
    needed_mm = zoom * (rotation.abs() @ reach_mm)
    return AffineParams(
        shape=tuple(int(n) for n in shape),
        spacing_mm=tuple(float(mm) for mm in spacing_mm),
        linear=zoom[..., None] * rotation * sign[:, None, :],
        centre_mm=(2 * place - 1) * (reach_mm - needed_mm).clamp_min(0),
    )


def check_affine(ranges: AffineRange, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Check that ranges from a user's settings fit a patch, before anything is drawn.

    Raises:
        UserError: If they do not fit; the message names the setting.
    """
    try:
        draw_affine([torch.Generator()], ranges, shape, spacing_mm)
    except ValueError as error:
        raise UserError(str(error)) from error


def pick(params: AffineParams, samples: Int[Tensor, " picked"]) -> AffineParams:
    """Return the records of some samples."""
    return replace(params, linear=params.linear[samples], centre_mm=params.centre_mm[samples])


def apply_affine(
    volumes: Float[Tensor, "batch channel *shape"],
    params: AffineParams,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "batch channel *shape"]:
    """Return the views, of the same shape as the volumes; values from outside the patch are 0.

    Args:
        volumes: Patches, or maps of another resolution that cover the same patches.
        params: Drawn crops, one record per sample.
        mode: Interpolation; ``bilinear`` is trilinear in 3D.

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
    """Map points of the view into the patch (``to_input``), or points of the patch into the view (``to_output``).

    Args:
        points_vox: Points, zyx in voxels of the view or the patch, both of ``params.shape``; voxel centres are integers.
        params: Drawn crops, one record per sample.
        direction: Direction of the map.
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
    # This is a sum, because mixed precision or TF32 would round a matrix product to some tenths of a voxel.
    return (matrix * (points_vox - middle.to(points_vox))[..., None, :]).sum(dim=-1) + offset


def valid_mask(
    params: AffineParams, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Bool[Tensor, " batch *shape"]:
    """Return which voxels of the view are interpolated only from voxels inside the patch.

    Args:
        params: Drawn crops, one record per sample.
        shape: Number of voxels of the view, or of a map of another resolution that covers it, along each axis.
        device: Device of the mask.
    """
    ones = torch.ones(len(params.linear), 1, *shape, device=device)
    return apply_affine(ones, params)[:, 0] >= 1 - VALID_TOLERANCE


def _rotation(angle_rad: Tensor, dimensions: int) -> Tensor:
    """Return rotation matrices (batch, d, d) in zyx: about z, y and x, multiplied in this order; in 2D, from y to x."""
    planes = [(0, 1)] if dimensions == 2 else [(1, 2), (0, 2), (0, 1)]
    rotation = torch.eye(dimensions, dtype=torch.float64).expand(len(angle_rad), -1, -1)
    for angle, (i, j) in zip(angle_rad.T, planes, strict=True):
        about = torch.eye(dimensions, dtype=torch.float64).repeat(len(angle), 1, 1)
        about[:, i, i] = about[:, j, j] = angle.cos()
        about[:, i, j], about[:, j, i] = -angle.sin(), angle.sin()
        rotation = rotation @ about
    return rotation


def _sampling_grid(params: AffineParams, volumes: Tensor) -> Tensor:
    """Return the input position of every output voxel, as ``grid_sample`` requires it: (batch, *shape, d), x first."""
    shape = volumes.shape[2:]
    half_mm = torch.tensor(params.shape, dtype=torch.float64) * torch.tensor(params.spacing_mm, dtype=torch.float64) / 2
    matrix = (params.linear * half_mm / half_mm[:, None]).to(volumes.device, torch.float32)
    offset = (params.centre_mm / half_mm).to(volumes.device, torch.float32)
    ones = (1,) * len(shape)
    components = []
    for row in reversed(range(len(shape))):
        # These are sums of broadcast axes, because mixed precision or TF32 would round the matrix product of F.affine_grid.
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
