"""Planner rules for the patch and the batch of a pretext stage, which are chosen together.

A chain of steps of increasing size leads from the least to the largest: the useful batch of the least patch, larger patches up
to the paper's crop, larger batches up to the paper's, larger patches up to the median scan. The plan takes the last step
that fits. The chain does not depend on the memory, so more memory never yields a smaller batch or fewer voxels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from nnssl.methods import Stage
from nnssl.plan import StageCost
from nnssl.sizes import in_mm, in_voxels
from nnssl.views.turns import planes_of_turns

FALSE_NEGATIVES = 0.05
"""Largest share of a patch's negatives that show mostly the same place, beyond the useful batch. Negatives of the same class
cost accuracy: with ten classes, a tenth of them, Chuang et al. (2020) gain several points by correcting for them."""
LEAST_SHARE_OF_SCAN = 0.6
"""Edge of the least patch relative to that of the scan, for scans that are hardly larger than a patch."""
SLICE_MM = 10.0
"""Thickness in mm within which slices of a scan look alike."""
MEMORY, TIME = "the memory target", "the time of a step"
"""What may limit a step."""
USEFUL, TO_CROP, TO_BATCH, TO_SCAN = SPENT = (
    "the useful batch of the least patch",
    "larger patches up to the paper's crop",
    "larger batches up to the paper's",
    "larger patches up to the median scan",
)
"""What memory is spent on, in this order."""
CROP_TOLERANCE = 1.1
"""Edge of the largest patch that counts as the paper's crop, relative to it; sides are multiples of the network's stride."""
LEAST_POSITIONS = 4
"""Positions of the network's deepest stage in the least patch, over which its norms standardise."""
EXTENT_STEP = 2 ** (1 / 8)
"""Ratio of the edges that are tried one after the other."""


@dataclass(frozen=True)
class Step:
    """Patch and batch of a step, and what memory was spent on last."""

    patch: tuple[int, ...]
    batch: int
    spent_on: str


@dataclass(frozen=True)
class ChosenStep:
    """A step that fits, with the pieces and checkpointing that it needs.

    Attributes:
        step: Patch and batch.
        cost: Estimated cost.
        pieces: Number of pieces of the batch.
        checkpointing: Whether activations are computed again.
        limit: What the next larger step exceeds.
        largest_batch: Largest batch of the chain.
    """

    step: Step
    cost: StageCost
    pieces: int
    checkpointing: bool
    limit: str
    largest_batch: int


def patches_of_scan(
    scan_mm: Sequence[float],
    spacing_mm: Sequence[float],
    multiple: Sequence[int],
    largest: Sequence[int],
    plane: tuple[int, int] | None = None,
) -> list[tuple[int, ...]]:
    """Return the patches with the aspect of a scan, within a multiple along every axis, in ascending size up to the largest.

    Args:
        scan_mm: Size of the median scan in mm.
        spacing_mm: Spacing of the patch in mm.
        multiple: Number of voxels of which every side is a multiple: the network's total stride.
        largest: Largest patch in voxels.
        plane: Two axes along which all patches have the same number of voxels, as from ``plane_of_equal_sides``; the scan then
            counts as square in this plane, as wide as it is along the shorter axis. None if no sides need to be equal.
    """
    strides = np.array(multiple)
    if plane is not None:
        multiple, largest = equal_sides(multiple, largest, plane)
        scan_mm = [min(scan_mm[i] for i in plane) if axis in plane else mm for axis, mm in enumerate(scan_mm)]
    scan = np.array(scan_mm, dtype=float)
    aspect = scan / np.exp(np.log(scan).mean())
    unit, most = np.array(multiple), np.array(largest)
    least = unit.copy()
    while (least / strides).prod() < LEAST_POSITIONS and (least < most).any():
        shortest = int(np.argmin(np.where(least < most, least * np.array(spacing_mm), np.inf)))
        together = [shortest]
        if plane is not None and shortest in plane:
            # Both sides of the plane double together, which makes the patch larger than needed if the other axis is enough.
            other = [axis for axis in range(len(least)) if axis not in plane and least[axis] < most[axis]]
            enough = bool(other) and 2 * (least / strides).prod() >= LEAST_POSITIONS
            sizes_mm = least * np.array(spacing_mm)
            together = min([list(plane), other][: 2 if enough else 1], key=partial(_unlike, scan, sizes_mm))
        least[together] = np.minimum(2 * least[together], most[together])
    found: list[tuple[int, ...]] = []
    edge = float(min(n * mm for n, mm in zip(least, spacing_mm, strict=True))) / float(aspect.max())
    while not found or found[-1] != tuple(largest):
        sides = np.maximum(np.round(edge * aspect / np.array(spacing_mm) / unit) * unit, least)
        patch = tuple(int(n) for n in np.minimum(sides, most))
        found += _between(found[-1], patch, spacing_mm, plane) if found else [patch]
        edge *= EXTENT_STEP
    return found


def _unlike(scan_mm: Float[np.ndarray, " axis"], sizes_mm: Float[np.ndarray, " axis"], axes: list[int]) -> float:
    """Return how far the proportions of a patch are from those of the scan if its sides along some axes are doubled."""
    doubled = sizes_mm.copy()
    doubled[axes] *= 2
    return float(np.ptp(np.log(doubled / scan_mm)))


def _between(
    patch: tuple[int, ...], larger: tuple[int, ...], spacing_mm: Sequence[float], plane: tuple[int, int] | None
) -> list[tuple[int, ...]]:
    """Return the patches that lead from one to a larger one, along one axis at a time, the shortest in mm first.

    The two axes of the plane grow together, so that its sides stay equal.
    """
    steps, sides = [], list(patch)
    growing = [axis for axis, (old, new) in enumerate(zip(patch, larger, strict=True)) if old != new]
    for axis in sorted(growing, key=lambda each: patch[each] * spacing_mm[each]):
        for each in plane if plane and axis in plane else (axis,):
            sides[each] = larger[each]
        if tuple(sides) not in steps:
            steps.append(tuple(sides))
    return steps


def plane_of_equal_sides(
    spacing_mm: Sequence[float], multiple: Sequence[int], largest: Sequence[int], thick_axis: int | None
) -> tuple[int, int] | None:
    """Return the plane in which patches can have equal sides and quarter turns keep the voxel grid; None if there is none.

    If there are several, it is the one that leaves the largest patch, and among equal ones the first of (y, x), (z, x), (z, y).

    Args:
        spacing_mm: Spacing of the patch in mm.
        multiple: Number of voxels of which every side is a multiple.
        largest: Largest patch in voxels.
        thick_axis: Axis of thick slices, which is in no plane; None if there is none.
    """
    found = {}
    for plane in planes_of_turns(spacing_mm, thick_axis):
        _, most = equal_sides(multiple, largest, plane)
        if min(most) > 0:
            found[plane] = math.prod(most)
    return max(found, key=lambda plane: found[plane], default=None)


def equal_sides(
    multiple: Sequence[int], largest: Sequence[int], plane: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return multiple and largest patch for patches of equal sides in a plane: at most as long as the shorter side was."""
    unit = math.lcm(*(int(multiple[axis]) for axis in plane))
    most = min(int(largest[axis]) for axis in plane) // unit * unit
    return (
        tuple(unit if axis in plane else int(n) for axis, n in enumerate(multiple)),
        tuple(most if axis in plane else int(n) for axis, n in enumerate(largest)),
    )


def edge_mm(patch: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Return the edge of the cube (or square) with the volume of a patch, in mm."""
    return math.prod(n * mm for n, mm in zip(patch, spacing_mm, strict=True)) ** (1 / len(patch))


def chain_of_steps(
    stage: Stage, patches: Sequence[tuple[int, ...]], spacing_mm: Sequence[float], scan_mm: Sequence[float], cases: int
) -> list[Step]:
    """Return the steps to choose from, in ascending size.

    Args:
        stage: Stage of a method.
        patches: Patches in ascending size.
        spacing_mm: Spacing of the patches in mm.
        scan_mm: Size of the median scan in mm (z, y, x), also in 2D.
        cases: Number of cases.
    """
    needs, flat = stage.needs, len(spacing_mm) == 2
    seen_mm = scan_mm[-len(spacing_mm) :]
    of_scan = LEAST_SHARE_OF_SCAN * math.prod(seen_mm) ** (1 / len(seen_mm))
    least_mm = min(needs.least_mm[0 if flat else 1], of_scan)
    crop_mm = needs.crop_mm[0 if flat else 1]
    least = _first_of(patches, spacing_mm, least_mm)
    crop = max(
        [least, *(i for i, patch in enumerate(patches) if edge_mm(patch, spacing_mm) <= CROP_TOLERANCE * crop_mm)]
    )
    useful = _rounded_up(needs.useful_batch, stage.batch_multiple)
    steps = [Step(patches[least], useful, USEFUL)]
    steps += [Step(patch, useful, TO_CROP) for patch in patches[least + 1 : crop + 1]]
    same = share_of_same_places(patches[crop], spacing_mm, scan_mm) if needs.contrasts_patches else 0.0
    batch, unit = useful, _rounded_up(max(2, useful // 4), stage.batch_multiple)
    while batch + unit <= needs.paper_batch and false_negatives(batch + unit, cases, same) <= FALSE_NEGATIVES:
        batch += unit
        steps.append(Step(patches[crop], batch, TO_BATCH))
    return steps + [Step(patch, batch, TO_SCAN) for patch in patches[crop + 1 :]]


def choose_step(
    steps: Sequence[Step], cost: Callable[[Step, int, bool], StageCost], memory_gb: float, multiply_adds: float | None
) -> ChosenStep | None:
    """Return the last step of a chain that fits, or its first step in pieces.

    Args:
        steps: Chain of steps.
        cost: Function that returns the cost of a step, given the number of pieces and whether activations are computed again.
        memory_gb: Memory that a step may take.
        multiply_adds: Multiply-adds that a step may compute; None for no limit.

    Returns:
        The step, or None if not even the first step fits with one patch per piece and checkpointing.
    """
    chosen: ChosenStep | None = None
    for step in steps:
        found = cost(step, 1, False)
        limit = _exceeded(found, memory_gb, multiply_adds)
        if limit:
            return replace(chosen, limit=limit) if chosen else _in_pieces(step, cost, memory_gb, limit, steps[-1].batch)
        chosen = ChosenStep(step, found, 1, False, "nothing, as it is the largest useful step", steps[-1].batch)
    return chosen


def _exceeded(cost: StageCost, memory_gb: float, multiply_adds: float | None) -> str:
    """Return what a step exceeds; empty if it fits."""
    if cost.memory_gb > memory_gb:
        return MEMORY
    return TIME if multiply_adds is not None and cost.multiply_adds > multiply_adds else ""


def _in_pieces(
    step: Step, cost: Callable[[Step, int, bool], StageCost], memory_gb: float, limit: str, largest_batch: int
) -> ChosenStep | None:
    """Return a step with the fewest pieces that fit into memory, with checkpointing only if necessary; None if none fit."""
    for checkpointing in (False, True):
        for pieces in [n for n in range(1, step.batch + 1) if step.batch % n == 0]:
            found = cost(step, pieces, checkpointing)
            if found.memory_gb <= memory_gb:
                return ChosenStep(step, found, pieces, checkpointing, limit, largest_batch)
    return None


def explain_step(
    stage: Stage,
    chosen: ChosenStep,
    spacing_mm: Sequence[float],
    memory_gb: float,
    plane: tuple[int, int] | None = None,
) -> list[tuple[str, str, str]]:
    """Return what, value and reason of patch and batch; the sides of ``plane`` should be equal, None for no plane."""
    step = chosen.step
    sides = [n * mm for n, mm in zip(step.patch, spacing_mm, strict=True)]
    used = f"a step takes {chosen.cost.memory_gb:.2g} GB of {memory_gb:g} GB"
    spent = SPENT[: SPENT.index(step.spent_on) + 1]
    how = f"memory is spent on {', then '.join(spent)}, limited by {chosen.limit}; {used}"
    if chosen.pieces > 1:
        how += f"; the batch passes the network in {chosen.pieces} pieces"
    if chosen.checkpointing:
        how += "; activations are computed again in the backward pass"
    if plane is not None:
        sides_of_plane = f"the sides along axes {plane[0]} and {plane[1]}"
        if step.patch[plane[0]] == step.patch[plane[1]]:
            how += f"; {sides_of_plane} are equal, so that quarter turns keep the voxel grid"
        else:
            how += (
                f"; {sides_of_plane} differ, because not even the least patch with equal ones fits at once and in time"
            )
    why = f"useful from {stage.needs.useful_batch}, the paper's is {stage.needs.paper_batch:,}: {stage.needs.source}"
    if stage.needs.contrasts_patches and step.batch == chosen.largest_batch < stage.needs.paper_batch:
        why += (
            f"; in a larger batch, more than {FALSE_NEGATIVES:.0%} of the negatives would show the same place of a scan"
        )
    return [
        (f"patch ({stage.name})", f"{in_voxels(step.patch)} ({in_mm(sides)} mm)", how),
        (f"batch size ({stage.name})", str(step.batch), why),
    ]


def share_of_same_places(
    patch: Sequence[int], spacing_mm: Sequence[float], scan_mm: Sequence[float], draws: int = 4096
) -> float:
    """Estimate how often two random patches of one scan share more than half of their volume, with a fixed seed.

    Args:
        patch: Size of the patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        scan_mm: Size of the median scan in mm (z, y, x), also in 2D.
        draws: Number of pairs of patches.
    """
    size = np.array(patch) * np.array(spacing_mm)
    if len(size) == 2:
        size = np.array([SLICE_MM, *size])
    room = np.maximum(np.array(scan_mm) - size, 0.0)
    starts = np.random.default_rng(0).uniform(size=(2, draws, 3)) * room
    common = np.clip(1 - np.abs(starts[0] - starts[1]) / size, 0, None).prod(axis=1)
    return float((common > 0.5).mean())


def false_negatives(batch: int, cases: int, same: float) -> float:
    """Return the share of a patch's negatives that show mostly the same place of the same case.

    Args:
        batch: Patches per step. They take turns over the cases, so a case appears again only if the batch exceeds their number.
        cases: Number of cases.
        same: Share of pairs of patches of one case that show mostly the same place.
    """
    return 0.0 if batch <= cases else (batch / cases - 1) * same / (batch - 1)


def _first_of(patches: Sequence[tuple[int, ...]], spacing_mm: Sequence[float], edge: float) -> int:
    """Return the index of the first patch with at least the given edge; that of the last patch if there is none."""
    return next((i for i, patch in enumerate(patches) if edge_mm(patch, spacing_mm) >= edge), len(patches) - 1)


def _rounded_up(batch: int, multiple: int) -> int:
    return -(-batch // multiple) * multiple
