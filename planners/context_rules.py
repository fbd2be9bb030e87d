"""Planner rules for the reconstruction of transformed crops: the plane of the turns and the rank of the attention."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from nnssl.plan import ContextChoices, Reasons
from nnssl.sizes import in_words
from nnssl.views.turns import turn_plane

RANKS = (8, 16, 32, 64)
"""Ranks of the attention that may be chosen."""


def decide_context(
    architecture: Mapping[str, Any], shape: Sequence[int], spacing_mm: Sequence[float], thick_axis: int | None
) -> tuple[ContextChoices, Reasons]:
    """Choose the plane of the turns and the rank of the attention.

    Args:
        architecture: Architecture of the plan's network.
        shape: Size of the patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        thick_axis: Axis with thick slices; None if there is none.

    Returns:
        The choice, and what, value and reason of every decision.
    """
    plane, quarter = turn_plane(shape, spacing_mm, thick_axis)
    turns = "quarter turns" if quarter else "half turns"
    sides = " and ".join(f"{shape[axis]} voxels of {spacing_mm[axis]:.4g} mm" for axis in plane)
    channels, kernel_voxels = _bottleneck(architecture)
    convolution = channels * channels * kernel_voxels
    attention_rank = max((n for n in RANKS if channels * n * n <= convolution and n <= channels), default=RANKS[0])
    return ContextChoices(turn_plane=plane, quarter_turns=quarter, attention_rank=attention_rank), [
        (
            "turns",
            f"{turns} in the plane of axes {plane[0]} and {plane[1]}",
            f"the sides have {sides}, so {'' if quarter else 'only '}{turns} keep the grid",
        ),
        (
            "attention rank",
            str(attention_rank),
            f"{in_words(channels * attention_rank**2)} weights, at most as many as a convolution of the bottleneck "
            f"({in_words(convolution)}); PCRL's product of all {channels} channels would need {in_words(channels**3)}",
        ),
    ]


def _bottleneck(architecture: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of channels of the bottleneck and the number of voxels in its kernel."""
    arguments = architecture["arch_kwargs"]
    kernel = arguments["kernel_sizes"][-1]
    dimensions = 3 if "3d" in arguments["conv_op"].lower() else 2
    sides = kernel if isinstance(kernel, (list, tuple)) else [kernel] * dimensions
    return int(arguments["features_per_stage"][-1]), prod(int(n) for n in sides)
