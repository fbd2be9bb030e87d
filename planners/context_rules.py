"""What reconstructing transformed crops needs of a plan: a plane to turn in, and the rank of the attention."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from nnssl.plan import ContextChoices, Reasons
from nnssl.views.turns import turn_plane

RANKS = (8, 16, 32, 64)


def decide_context(
    architecture: Mapping[str, Any], shape: Sequence[int], spacing_mm: Sequence[float], thick_axis: int | None
) -> tuple[ContextChoices, Reasons]:
    """Choose the plane of the turns and the rank of the attention.

    Args:
        architecture: of the plan's network.
        shape: voxels of the patch.
        spacing_mm: of its voxels.
        thick_axis: axis with thick slices, None if there is none.

    Returns:
        The choice, and (what, value, reason) for every decision.
    """
    plane, quarter = turn_plane(shape, spacing_mm, thick_axis)
    sides = " and ".join(f"{shape[axis]} voxels of {spacing_mm[axis]:.4g} mm" for axis in plane)
    channels, kernel_voxels = _bottleneck(architecture)
    convolution = channels * channels * kernel_voxels
    attention_rank = max((n for n in RANKS if channels * n * n <= convolution and n <= channels), default=RANKS[0])
    return ContextChoices(turn_plane=plane, quarter_turns=quarter, attention_rank=attention_rank), [
        (
            "turns",
            f"{'quarter' if quarter else 'half'} turns in the plane of axes {plane}",
            f"{sides}: " + ("a quarter turn keeps the grid" if quarter else "only a half turn keeps the grid"),
        ),
        (
            "attention rank",
            str(attention_rank),
            f"{channels * attention_rank**2 / 1e6:.2g} million weights, no more than the {convolution / 1e6:.2g} million of a "
            f"convolution beside it; PCRL's product of all {channels} channels would take {channels**3 / 1e6:.2g} million",
        ),
    ]


def _bottleneck(architecture: Mapping[str, Any]) -> tuple[int, int]:
    """Return the channels of the bottleneck and the voxels of its kernel."""
    arguments = architecture["arch_kwargs"]
    kernel = arguments["kernel_sizes"][-1]
    dimensions = 3 if "3d" in arguments["conv_op"].lower() else 2
    sides = kernel if isinstance(kernel, (list, tuple)) else [kernel] * dimensions
    return int(arguments["features_per_stage"][-1]), prod(int(n) for n in sides)
