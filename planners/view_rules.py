"""Planner rules for random views: crop, rotation, flips and intensity changes."""

from collections.abc import Sequence

import numpy as np

from nnssl.plan import Reasons
from planners.modality_rules import CT, X_RAY

LEAST_CROP_VOX = 4
"""Smallest number of voxels that a random crop covers along every axis."""


def decide_crop(patch: Sequence[int]) -> tuple[tuple[float, float], float, Reasons]:
    """Choose the range of the share of a patch that a crop covers.

    Args:
        patch: Size of the patch in voxels.

    Returns:
        The smallest and largest share; the mean overlap of two crops as a share of the smaller one; and what, value and reason
        of the decision.
    """
    least_zoom = max(0.2 ** (1 / len(patch)), min(1.0, LEAST_CROP_VOX / min(patch)))
    low = round(least_zoom ** len(patch), 4)
    overlap = mean_overlap(low, len(patch))
    reason = "RepRec's range, 0.2 to 1" if low <= 0.2 else f"at least {LEAST_CROP_VOX} voxels along the shortest axis"
    text = f"{reason}; on average, two crops share {overlap:.0%} of the smaller one"
    return (low, 1.0), overlap, [("crop", f"{low:g} to 1 of the patch", text)]


def decide_rotation(dimensions: int, thick_axis: int | None) -> tuple[tuple[float, ...], Reasons]:
    """Choose the largest rotation about each axis in degrees, without mixing thick slices.

    Args:
        dimensions: Number of axes of the patch.
        thick_axis: Axis along which voxels are much longer than along the others; None if there is none.
    """
    if dimensions == 2:
        reason = "rotating a single slice moves no voxel out of it"
        return (180.0,), [("rotation", "up to 180 degrees in the plane", reason)]
    if thick_axis is not None:
        reason = "any other rotation would mix voxels of different thick slices"
        angles = tuple(180.0 if axis == thick_axis else 0.0 for axis in range(3))
        return angles, [("rotation", f"up to 180 degrees about axis {thick_axis} only", reason)]
    return (30.0, 30.0, 30.0), [
        ("rotation", "up to 30 degrees about every axis", "the spacing is similar along all axes")
    ]


def decide_flips(dimensions: int) -> tuple[tuple[int, ...], Reasons]:
    """Choose the axes that may be flipped: the in-plane axes."""
    axes = tuple(range(dimensions - 2, dimensions))
    reason = "the in-plane axes: RepRec's horizontal flip and its counterpart along the other axis"
    return axes, [("flips", f"axes {axes[0]} and {axes[1]}", reason)]


def decide_intensity(modalities: Sequence[str]) -> tuple[tuple[str, ...], Reasons]:
    """Choose the intensity changes that the modality allows.

    Args:
        modalities: Modality of each channel. One channel of CT is enough for the changes of CT; those of X-ray need X-ray in
            all channels.
    """
    views: tuple[str, ...]
    if CT in modalities:
        views = ("contrast", "brightness", "noise", "blur", "window")
        reason = "CT: Hounsfield units identify tissue, so the window moves and the contrast is never inverted"
    elif set(modalities) == {X_RAY}:
        views = ("contrast", "brightness", "noise", "blur", "gamma", "inversion")
        reason = (
            "X-ray: exposure and processing change brightness, contrast and gamma, and images are stored in both polarities "
            "(MONOCHROME1 and MONOCHROME2), so they may be inverted; there is no coil that would cause a bias field"
        )
    else:
        views = ("contrast", "brightness", "noise", "blur", "gamma", "bias_field", "inversion")
        reason = "MR: units, coil sensitivity and contrast depend on the scanner, so all of them may change"
    return views, [("intensity views", ", ".join(views), reason)]


def mean_overlap(low: float, dimensions: int, draws: int = 4096) -> float:
    """Estimate the mean overlap of two random crops, as a share of the smaller one, with a fixed seed.

    Args:
        low: Smallest share of the patch that a crop covers.
        dimensions: Number of axes of the patch.
        draws: Number of pairs of crops.
    """
    rng = np.random.default_rng(0)
    zoom = rng.uniform(low, 1.0, size=(2, draws)) ** (1 / dimensions)
    start = rng.uniform(size=(2, draws, dimensions)) * (1 - zoom[..., None])
    end = start + zoom[..., None]
    common = (end.min(axis=0) - start.max(axis=0)).clip(0).prod(axis=1)
    return round(float((common / zoom.min(axis=0) ** dimensions).mean()), 3)
