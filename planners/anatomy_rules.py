"""Planner rules for anatomical embeddings: the encoder stages of both embeddings, and how places of scans are paired."""

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any, Literal

from nnssl.networks.backbone import encoder_strides
from nnssl.plan import AnatomyChoices, Reasons
from nnssl.sizes import in_mm

LARGEST_STRIDE = 16
"""Largest stride of the coarse embedding in voxels; SAM's coarse cells are 16 voxels long."""
LEAST_COARSE_CELLS = 27
"""Smallest number of coarse cells in a patch. With fewer, all cells are direct neighbours of a query."""
LEAST_PATCHES = 1.5
"""Smallest length of the median scan, in patches. A scan hardly longer than a patch contains no other part of the body that
a place could be confused with."""


def decide_anatomy(
    architecture: Mapping[str, Any],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    scan_mm: Sequence[float] | None = None,
) -> tuple[AnatomyChoices, Reasons]:
    """Choose the stages of the fine and coarse embeddings, and how places of different scans are paired.

    Args:
        architecture: Architecture of the plan's network.
        shape: Size of the patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        scan_mm: Size of the median scan in mm; None if unknown.

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

    patches = (
        None if scan_mm is None else max(mm / (n * s) for mm, n, s in zip(scan_mm, shape, spacing_mm, strict=True))
    )
    length = "the size of the scans is unknown" if patches is None else f"the median scan is {patches:.1f} patches long"
    pairs: Literal["sam", "body_box"] = "sam" if patches is None or patches >= LEAST_PATCHES else "body_box"
    return AnatomyChoices(fine_stage=fine, coarse_stage=coarse, partners=pairs), [
        (
            "anatomical embeddings",
            f"fine at stage {fine}, cells of {cell(fine)}; coarse at stage {coarse}, cells of {cell(coarse)}",
            "SAM embeds at a half and a sixteenth of the resolution; the coarse embedding needs at least "
            f"{LEAST_COARSE_CELLS} cells per patch and has {prod(grids[coarse]):,}",
        ),
        (
            "places in other scans",
            "matched by anatomical embeddings" if pairs == "sam" else "matched by position in the body's box",
            f"{length}; training embeddings pays off from {LEAST_PATCHES} patches",
        ),
    ]
