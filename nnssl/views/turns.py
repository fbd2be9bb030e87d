"""Flips and quarter turns, which permute voxels without changing them, and the code that names them.

Source: Zhou et al., PCRL, ICCV 2021: the transformations T that the decoder must produce, and the indicator vec(T) that
names them: a bit for each flip, then one of four bits for the turn by 0, 90, 180 or 270 degrees.

Deviations: the authors turn in the plane of the first two axes of 64 x 64 x 32 voxels. Here the plane has two equal sides and
excludes the thick axis; if there is no such plane, only half turns are drawn, which with flips name the same maps as flips
alone, and the code keeps its length. Different codes
can name the same map (two flips in the plane are a half turn): the 32 codes in 3D name 16 different maps. This also holds for
the paper and the authors' code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nnssl.errors import UserError

SPACING_TOLERANCE = 1e-3
TurnSteps = Literal["none", "half", "quarter"]
TURN_STEPS: dict[TurnSteps, tuple[int, ...]] = {"none": (0,), "half": (0, 2), "quarter": (0, 1, 2, 3)}
"""Numbers of quarter turns that may be drawn."""
PLANES = {2: ((0, 1),), 3: ((1, 2), (0, 2), (0, 1))}
"""Planes of turns in order of preference, by the number of axes; zyx, counted without batch and channel."""


@dataclass(frozen=True)
class TurnParams:
    """Drawn flips and turns of a batch, on the CPU. Flips are applied before turns."""

    flips: Bool[Tensor, "batch d"]
    """Which axes are flipped: 0 is z, or y in 2D."""
    quarter_turns: Int[Tensor, " batch"]
    """Number of quarter turns, 0 to 3; each turns the plane's first axis towards its second."""
    plane: tuple[int, int]
    """The two axes of the plane, ascending."""


def turn_plane(
    shape: Sequence[int], spacing_mm: Sequence[float], thick_axis: int | None
) -> tuple[tuple[int, int], bool]:
    """Return the plane of turns, and whether quarter turns in it keep shape and spacing.

    The plane is the first of (y, x), (z, x), (z, y) that excludes the thick axis and whose sides have the same number of voxels
    of the same size. If there is none, it is (y, x), in which half turns always keep the geometry.

    Args:
        shape: Number of voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: Spacing of the patch along each axis; values within a relative tolerance of 1e-3 are considered equal.
        thick_axis: Axis of slices that are much thicker than the voxels are wide; None if there is none.

    Raises:
        ValueError: If the patch has neither 2 nor 3 axes, or shape and spacing differ in their number of axes.
    """
    if len(shape) not in PLANES or len(spacing_mm) != len(shape):
        raise ValueError(
            f"shape and spacing_mm must both have 2 or 3 axes, got shape {tuple(shape)}, spacing {tuple(spacing_mm)}"
        )
    for plane in planes_of_turns(spacing_mm, thick_axis):
        if keeps_grid(shape, spacing_mm, plane):
            return plane, True
    return PLANES[len(shape)][0], False


def planes_of_turns(spacing_mm: Sequence[float], thick_axis: int | None) -> list[tuple[int, int]]:
    """Return the planes without the thick axis in which voxels are as long as wide, in order of preference.

    Quarter turns in them keep the voxel grid of every patch that has equal sides there.

    Args:
        spacing_mm: Spacing of the patch along each axis, in 2D or 3D.
        thick_axis: Axis of thick slices; None if there is none.
    """
    planes = PLANES[len(spacing_mm)]
    return [plane for plane in planes if thick_axis not in plane and _same_size(spacing_mm, plane)]


def keeps_grid(shape: Sequence[int], spacing_mm: Sequence[float], plane: tuple[int, int]) -> bool:
    """Return whether a quarter turn in the plane keeps the number of voxels and their size along every axis."""
    first, second = plane
    return shape[first] == shape[second] and _same_size(spacing_mm, plane)


def _same_size(spacing_mm: Sequence[float], plane: tuple[int, int]) -> bool:
    return math.isclose(spacing_mm[plane[0]], spacing_mm[plane[1]], rel_tol=SPACING_TOLERANCE)


def draw_turns(
    generators: Sequence[torch.Generator],
    dimensions: int,
    plane: tuple[int, int],
    steps: TurnSteps,
    flip_axes: Sequence[int],
) -> TurnParams:
    """Draw flips, each with probability 1/2, and one of the allowed turns with equal probability, for each sample.

    Args:
        generators: One generator per sample; each always gives the same number of random numbers.
        dimensions: Number of axes of the patch, 2 or 3.
        plane: The two axes of the plane of turns, as from ``turn_plane``.
        steps: Allowed turns: quarters, halves or none.
        flip_axes: Axes that may be flipped; 0 is z, or y in 2D.

    Raises:
        ValueError: If the plane or an axis to flip does not belong to the patch.
    """
    _check_plane(dimensions, plane)
    _check_flip_axes(dimensions, flip_axes)
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
    """Check that turns from a user's settings fit a patch and keep its grid, before anything is drawn.

    The settings are those of PCRL: ``turn_plane``, ``asked_turns`` and ``asked_flips``.

    Args:
        shape: Number of voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: Spacing of the patch along each axis.
        plane: As in ``draw_turns``.
        steps: As in ``draw_turns``.
        flip_axes: As in ``draw_turns``.

    Raises:
        UserError: If they do not fit, or would not keep the grid.
    """
    try:
        _check_plane(len(shape), plane, "turn_plane")
        _check_flip_axes(len(shape), flip_axes, "asked_flips")
    except ValueError as error:
        raise UserError(str(error)) from error
    if steps == "quarter" and not keeps_grid(shape, spacing_mm, plane):
        sides = " and ".join(f"{shape[axis]} voxels of {spacing_mm[axis]:g} mm" for axis in plane)
        raise UserError(
            f"asked_turns must be half or none, got quarter: a quarter turn in plane {plane} exchanges {sides}; "
            "set asked_turns=half"
        )


def no_turns(batch: int, dimensions: int, plane: tuple[int, int]) -> TurnParams:
    """Return the parameters of the identity.

    Args:
        batch: Number of samples.
        dimensions: Number of axes of the patch, 2 or 3.
        plane: The two axes of the plane of turns.

    Raises:
        ValueError: If the plane does not belong to the patch.
    """
    _check_plane(dimensions, plane)
    return TurnParams(torch.zeros(batch, dimensions, dtype=torch.bool), torch.zeros(batch, dtype=torch.long), plane)


def apply_turns(
    volumes: Shaped[Tensor, "batch channel *shape"], params: TurnParams
) -> Shaped[Tensor, "batch channel *shape"]:
    """Return ``turn(flip(x))`` of each sample, bit-exact, as new tensors.

    Args:
        volumes: Volumes on any device.
        params: Drawn turns, one record per sample.

    Raises:
        ValueError: If an odd number of quarter turns is drawn in a plane whose sides differ in voxels, or the parameters are
            for another number of samples or axes.
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
    """Return the inverse of ``apply_turns``, bit-exact.

    Args:
        volumes: Volumes on any device, as ``apply_turns`` returned them.
        params: Drawn turns, one record per sample.

    Raises:
        ValueError: If ``apply_turns`` would raise it.
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
    """Return the mean of all versions of each volume that ``draw_turns`` may draw, weighted by their probability.

    Of all answers that are the same for every version, this one has the smallest mean squared error, which is the mean square
    of the volumes minus the mean square of the answer.
    """
    mean = volumes.float()
    for axis in flip_axes:
        mean = (mean + mean.flip(axis + 2)) / 2
    first, second = (axis + 2 for axis in plane)
    versions = [torch.rot90(mean, turn, (first, second)) for turn in TURN_STEPS[steps]]
    return torch.stack(versions).mean(dim=0)


def turn_code(params: TurnParams) -> Float[Tensor, "batch bits"]:
    """Return PCRL's indicator: a bit for the flip of each axis, then one of four bits for the number of quarter turns.

    The code has seven bits in 3D and six in 2D, and is on the CPU. Some codes name the same map; see the module's docstring.
    """
    return torch.cat([params.flips, F.one_hot(params.quarter_turns, 4)], dim=1).float()


def _flips_and_swap(params: TurnParams) -> tuple[list[list[int]], list[bool]]:
    """Return each sample's axes (of channel, *shape) to flip, and whether to swap the axes of the plane afterwards.

    One quarter turn is a flip of the plane's second axis and a swap; two are flips of both axes; three are a flip of the first
    axis and a swap.
    """
    first, second = params.plane
    flips, turns = params.flips.clone(), params.quarter_turns
    flips[:, first] ^= turns >= 2
    flips[:, second] ^= (turns == 1) | (turns == 2)
    return [[axis + 1 for axis, flip in enumerate(row) if flip] for row in flips.tolist()], (turns % 2 == 1).tolist()


def _check_plane(dimensions: int, plane: tuple[int, int], name: str = "plane") -> None:
    if plane not in PLANES.get(dimensions, ()):
        raise ValueError(f"{name} must be two ascending axes of {dimensions}, got {plane}")


def _check_flip_axes(dimensions: int, flip_axes: Sequence[int], name: str = "flip_axes") -> None:
    if not all(0 <= axis < dimensions for axis in flip_axes):
        raise ValueError(f"{name} must be axes from 0 to {dimensions - 1}, got {tuple(flip_axes)}")


def _check_volumes(volumes: Tensor, params: TurnParams) -> None:
    shape = volumes.shape[2:]
    if (len(volumes), len(shape)) != params.flips.shape:
        drawn = tuple(params.flips.shape)
        raise ValueError(f"(samples, axes) of volumes must be {drawn}, as drawn, got {(len(volumes), len(shape))}")
    first, second = params.plane
    if shape[first] != shape[second] and (params.quarter_turns % 2 == 1).any():
        raise ValueError(
            f"quarter_turns must be even, because quarter turns in plane {params.plane} would change the shape {tuple(shape)}"
        )
