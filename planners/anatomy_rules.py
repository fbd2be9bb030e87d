"""Planner rules for anatomical embeddings: the encoder stages of both embeddings, and how places of scans are paired."""

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

from nnssl.networks.backbone import encoder_strides
from nnssl.plan import LEAST_PATCHES, AnatomyChoices, Reasons
from nnssl.sizes import in_mm, in_voxels, length_in_patches

LARGEST_STRIDE = 16
"""Largest stride of the coarse embedding in voxels; SAM's coarse cells are 16 voxels long."""
LEAST_COARSE_CELLS = 27
"""Smallest number of coarse cells in a patch. With fewer, all cells are direct neighbours of a query."""


def decide_anatomy(
    architecture: Mapping[str, Any],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    scan_mm: Sequence[float],
) -> tuple[AnatomyChoices, Reasons]:
    """Choose the stages of the fine and coarse embeddings, and how places of different scans are paired.

    Args:
        architecture: Architecture of the plan's U-Net, also for a stage that runs on Primus.
        shape: Size of the stage's own patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        scan_mm: Size of the median scan in mm.

    Returns:
        The choice, and what, value and reason of every decision.
    """
    total, strides = [1] * len(shape), []
    for stage in encoder_strides(dict(architecture)):
        total = [a * b for a, b in zip(total, stage, strict=True)]
        strides.append(tuple(total))
    grids = [[ceil(n / step) for n, step in zip(shape, stride, strict=True)] for stride in strides]
    halved = [stage for stage, stride in enumerate(strides[:-1]) if max(stride) <= 2]
    fine = halved[-1]
    wide = [
        stage
        for stage in range(fine + 1, len(strides))
        if max(strides[stage]) <= LARGEST_STRIDE and prod(grids[stage]) >= LEAST_COARSE_CELLS
    ]
    coarse = wide[-1] if wide else fine + 1

    def cell(stage: int) -> str:
        return in_mm(step * mm for step, mm in zip(strides[stage], spacing_mm, strict=True)) + " mm"

    patches = length_in_patches(scan_mm, shape, spacing_mm)
    choice = AnatomyChoices(fine, coarse, "sam", tuple(float(mm) for mm in scan_mm)).of_patch(shape, spacing_mm)
    return choice, [
        (
            "anatomical embeddings",
            f"fine at stage {fine}, cells of {cell(fine)}; coarse at stage {coarse}, cells of {cell(coarse)}",
            "SAM embeds at a half and a sixteenth of the resolution; the coarse embedding needs at least "
            f"{LEAST_COARSE_CELLS} cells per patch and has {prod(grids[coarse]):,}",
        ),
        (
            "places in other scans",
            "matched by anatomical embeddings" if choice.partners == "sam" else "matched by position in the body's box",
            f"the median scan is {' x '.join(f'{n:.1f}' for n in patches)} patches of {in_voxels(shape)} voxels long; training "
            f"embeddings pays off from {LEAST_PATCHES} patches along one axis",
        ),
    ]
