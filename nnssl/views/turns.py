"""Flips and quarter turns, which keep every voxel as it is, and the code that names them.

Source: Zhou et al., PCRL, ICCV 2021: the transformations T that the decoder is asked for, and the indicator vec(T) that
asks for them: a bit for each flip, then one of four bits for the turn by 0, 90, 180 or 270 degrees.

Deviations: the authors turn in the plane of the first two axes of 64 x 64 x 32 voxels. Here the plane is chosen so that
its two sides are alike and the thick axis is not in it; where there is none, only half turns are drawn, and the code
keeps its length. Different codes can name the same map (two flips in the plane are a half turn): of 32 codes in 3D, 16
differ in what they do. The paper and the code have this too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.errors import UserError

SPACING_TOLERANCE = 1e-3
TurnSteps = Literal["none", "half", "quarter"]
TURN_STEPS: dict[TurnSteps, tuple[int, ...]] = {"none": (0,), "half": (0, 2), "quarter": (0, 1, 2, 3)}
"""Numbers of quarter turns that may be drawn."""
PLANES = {2: ((0, 1),), 3: ((1, 2), (0, 2), (0, 1))}
"""Where to turn, in order of preference, by the number of axes; zyx, counted without batch and channel."""


@dataclass(frozen=True)
class TurnParams:
    """What was drawn: for each sample the axes to flip, then the quarter turns; on the CPU."""

    flips: Bool[Tensor, "batch d"]
    """Which axes are flipped: 0 is z, or y in 2D."""
    quarter_turns: Int[Tensor, " batch"]
    """0 to 3, each of which turns the plane's first axis towards its second."""
    plane: tuple[int, int]
    """The two axes to turn in, ascending."""


def turn_plane(
    shape: Sequence[int], spacing_mm: Sequence[float], thick_axis: int | None
) -> tuple[tuple[int, int], bool]:
    """Return the plane to turn in, and whether quarter turns keep shape and spacing in it.

    It is the first of (y, x), (z, x), (z, y) without the thick axis whose sides have the same number of voxels of the
    same size. Where there is none it is (y, x), in which half turns always keep the geometry.

    Args:
        shape: voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: of the patch's voxels; sizes are the same up to a share of 1e-3.
        thick_axis: the one with slices that are much thicker than the voxels are wide, if any.

    Raises:
        ValueError: the patch has neither 2 nor 3 axes, or shape and spacing differ in their number.
    """
    if len(shape) not in PLANES or len(spacing_mm) != len(shape):
        raise ValueError(f"no plane to turn in: shape {tuple(shape)}, spacing {tuple(spacing_mm)}")
    planes = PLANES[len(shape)]
    for plane in planes:
        if thick_axis not in plane and keeps_grid(shape, spacing_mm, plane):
            return plane, True
    return planes[0], False


def keeps_grid(shape: Sequence[int], spacing_mm: Sequence[float], plane: tuple[int, int]) -> bool:
    """Return whether a quarter turn in a plane keeps the number of voxels and their size along every axis."""
    first, second = plane
    same_size = math.isclose(spacing_mm[first], spacing_mm[second], rel_tol=SPACING_TOLERANCE)
    return shape[first] == shape[second] and same_size


def draw_turns(
    generators: Sequence[torch.Generator],
    dimensions: int,
    plane: tuple[int, int],
    steps: TurnSteps,
    flip_axes: Sequence[int],
) -> TurnParams:
    """Draw flips, each with probability 1/2, and a uniform number of the quarter turns there are, for each sample.

    Args:
        generators: one per sample; each gives the same number of random numbers whatever may be drawn.
        dimensions: axes of the patch, 2 or 3.
        plane: the axes to turn in, as from ``turn_plane``.
        steps: whether to turn by quarters, by halves, or not at all.
        flip_axes: those that may be flipped; 0 is z, or y in 2D.

    Raises:
        ValueError: the plane or an axis to flip is not one of the patch's.
    """
    _check_plane(dimensions, plane)
    if not all(0 <= axis < dimensions for axis in flip_axes):
        raise ValueError(f"flip_axes {tuple(flip_axes)} are not all below {dimensions}")
    uniform = torch.stack([torch.rand(dimensions + 1, generator=each, dtype=torch.float64) for each in generators])
    may_flip = torch.tensor([axis in flip_axes for axis in range(dimensions)])
    choices = torch.tensor(TURN_STEPS[steps])
    return TurnParams(
        flips=(uniform[:, :-1] < 0.5) & may_flip,
        quarter_turns=choices[(len(choices) * uniform[:, -1]).long()],
        plane=plane,
    )


def check_turns(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    plane: tuple[int, int],
    steps: TurnSteps,
    flip_axes: Sequence[int],
) -> None:
    """Check that turns that a user may have set can be asked for in a patch and keep its grid, before any is drawn.

    Args:
        shape: voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: of the patch's voxels.
        plane: as in ``draw_turns``.
        steps: as in ``draw_turns``.
        flip_axes: as in ``draw_turns``.

    Raises:
        UserError: they cannot, or would not.
    """
    try:
        draw_turns([torch.Generator()], len(shape), plane, steps, flip_axes)
    except ValueError as error:
        raise UserError(f"turn_plane or asked_flips: {error}; --set others, or plan again") from error
    if steps == "quarter" and not keeps_grid(shape, spacing_mm, plane):
        sides = " and ".join(f"{shape[axis]} voxels of {spacing_mm[axis]:g} mm" for axis in plane)
        raise UserError(
            f"asked_turns=quarter: a quarter turn in plane {plane} exchanges {sides}; --set asked_turns=half"
        )


def no_turns(batch: int, dimensions: int, plane: tuple[int, int]) -> TurnParams:
    """Return the parameters that leave every sample as it is.

    Args:
        batch: number of samples.
        dimensions: axes of the patch, 2 or 3.
        plane: as for the samples that are turned.

    Raises:
        ValueError: the plane is not one of the patch's.
    """
    _check_plane(dimensions, plane)
    return TurnParams(torch.zeros(batch, dimensions, dtype=torch.bool), torch.zeros(batch, dtype=torch.long), plane)


def apply_turns(
    volumes: Float[Tensor, "batch channel *shape"], params: TurnParams
) -> Float[Tensor, "batch channel *shape"]:
    """Return ``turn(flip(x))`` of each sample, bit-exact, as new tensors.

    Args:
        volumes: on any device.
        params: one record per sample.

    Raises:
        ValueError: an odd number of quarter turns in a plane whose sides differ in voxels, or the parameters are for
            another number of samples or axes.
    """
    _check_volumes(volumes, params)
    first, second = (axis + 1 for axis in params.plane)
    moved = []
    for volume, axes, swap in zip(volumes, *_flips_and_swap(params), strict=True):
        flipped = volume.flip(axes)
        moved.append(flipped.transpose(first, second) if swap else flipped)
    return torch.stack(moved)


def undo_turns(
    volumes: Float[Tensor, "batch channel *shape"], params: TurnParams
) -> Float[Tensor, "batch channel *shape"]:
    """Return the volumes that ``apply_turns`` was given, from what it returned.

    Args:
        volumes: on any device.
        params: one record per sample.

    Raises:
        ValueError: as ``apply_turns``.
    """
    _check_volumes(volumes, params)
    first, second = (axis + 1 for axis in params.plane)
    moved = []
    for volume, axes, swap in zip(volumes, *_flips_and_swap(params), strict=True):
        moved.append((volume.transpose(first, second) if swap else volume).flip(axes))
    return torch.stack(moved)


@torch.no_grad()
def mean_over_turns(
    volumes: Float[Tensor, "batch channel *shape"], plane: tuple[int, int], steps: TurnSteps, flip_axes: Sequence[int]
) -> Float[Tensor, "batch channel *shape"]:
    """Return the mean of all versions of each volume that ``draw_turns`` may ask for, by their probability.

    It is the answer of least mean squared error that is the same for all of them; its own is the mean square of the volumes
    less that of the answer.
    """
    mean = volumes.float()
    for axis in flip_axes:
        mean = (mean + mean.flip(axis + 2)) / 2
    first, second = (axis + 2 for axis in plane)
    versions = [torch.rot90(mean, turn, (first, second)) for turn in TURN_STEPS[steps]]
    return torch.stack(versions).mean(dim=0)


def turn_code(params: TurnParams) -> Float[Tensor, "batch bits"]:
    """Return PCRL's indicator, 0 or 1: a bit for each axis's flip, then one of four for the number of quarter turns.

    Seven bits in 3D, six in 2D, on the CPU; see the module for codes that name the same map.
    """
    return torch.cat([params.flips, F.one_hot(params.quarter_turns, 4)], dim=1).float()


def _flips_and_swap(params: TurnParams) -> tuple[list[list[int]], list[bool]]:
    """Return each sample's map as axes (of channel, *shape) to flip, and whether then to swap the axes of the plane.

    One quarter turn is a flip of the plane's second axis and a swap; two are flips of both; three a flip of the first
    and a swap.
    """
    first, second = params.plane
    flips, turns = params.flips.clone(), params.quarter_turns
    flips[:, first] ^= turns >= 2
    flips[:, second] ^= (turns == 1) | (turns == 2)
    return [[axis + 1 for axis, flip in enumerate(row) if flip] for row in flips.tolist()], (turns % 2 == 1).tolist()


def _check_plane(dimensions: int, plane: tuple[int, int]) -> None:
    if plane not in PLANES.get(dimensions, ()):
        raise ValueError(f"plane {plane} is none of two ascending axes of {dimensions}")


def _check_volumes(volumes: Tensor, params: TurnParams) -> None:
    shape = volumes.shape[2:]
    if (len(volumes), len(shape)) != params.flips.shape:
        raise ValueError(f"turns were drawn for (samples, axes) {tuple(params.flips.shape)}, not for {volumes.shape}")
    first, second = params.plane
    if shape[first] != shape[second] and (params.quarter_turns % 2 == 1).any():
        raise ValueError(f"quarter turns in plane {params.plane} of {tuple(shape)} voxels would change the shape")
