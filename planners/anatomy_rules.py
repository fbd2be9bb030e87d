"""What anatomical embeddings need of a plan: which stages of the encoder name a place exactly, and which roughly."""

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any, Literal

from nnssl.networks.backbone import encoder_strides
from nnssl.plan import AnatomyChoices, Reasons
from nnssl.sizes import in_mm

LARGEST_STRIDE = 16
"""SAM's coarse cells are 16 voxels long."""
LEAST_COARSE_CELLS = 27
"""Fewer cells leave a query without others that are farther away than its neighbours."""
LEAST_PATCHES = 1.5
"""A scan hardly longer than a patch holds no other part of the body that a place could be taken for."""


def decide_anatomy(
    architecture: Mapping[str, Any],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    scan_mm: Sequence[float] | None = None,
) -> tuple[AnatomyChoices, Reasons]:
    """Choose the stages of the fine and of the coarse embeddings, and what pairs places of different scans.

    Args:
        architecture: of the plan's network.
        shape: voxels of the patch.
        spacing_mm: of its voxels.
        scan_mm: size of the median scan; None if it is not known.

    Returns:
        The choice, and (what, value, reason) for every decision.
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
