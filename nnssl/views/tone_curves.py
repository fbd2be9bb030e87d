"""Monotone tone curves: random cubic Bezier curves that replace the intensities of a patch.

Source: Zhou et al., Models Genesis, MICCAI 2019 and Medical Image Analysis 2021, section 2.2 (non-linear transformation), and
the authors' code. A curve leads from (0, 0) to (1, 1); its two inner control points are uniform in the unit square, so it
never falls. Half of the curves are used backwards and never rise, which inverts the order of the intensities.

Deviations: the code expects intensities in [0, 1]. Here the percentiles 1 and 99 of the channel in its patch are the ends of the
curve, because data are z-scored, and values beyond them are clipped. Every channel has its own curve. A channel whose percentiles
are equal, such as one that shows almost only air, is left as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.views.intensity_changes import percentiles

CURVE_SHARES = (0.01, 0.99)
"""Shares of the voxels below both ends of a curve."""
TABLE_LENGTH = 257
"""Number of values of a curve; it is linear between them."""
CURVE_POINTS = 1025
"""Number of points of the Bezier curve from which the table is interpolated."""


@dataclass(frozen=True)
class ToneCurves:
    """Drawn curves of a batch, on the CPU."""

    table: Float[Tensor, "batch channel length"]
    """Output at equal steps of the input from 0 to 1, both as shares of the range of the channel."""
    used: Float[Tensor, " batch"]
    """1 for samples whose intensities are replaced, 0 for the others."""


def draw_tone_curves(
    generators: Sequence[torch.Generator], channels: int, probability: float, falling_share: float
) -> ToneCurves:
    """Draw a curve for every channel of every sample.

    Args:
        generators: One generator per sample; each always gives the same number of random numbers.
        channels: Number of channels.
        probability: Probability that the intensities of a sample are replaced.
        falling_share: Share of the curves that fall from 1 to 0.

    Raises:
        ValueError: If a probability is not within [0, 1].
    """
    for name, value in (("probability", probability), ("falling_share", falling_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be within [0, 1], got {value}")
    uniform = torch.stack([torch.rand(1 + 5 * channels, generator=each, dtype=torch.float64) for each in generators])
    own = uniform[:, 1:].unflatten(1, (channels, 5))
    inputs, outputs = bezier_curve(own[..., :4].unflatten(-1, (2, 2)))
    falls = own[..., 4:] < falling_share
    outputs = torch.where(falls, outputs.flip(-1), outputs)
    return ToneCurves(_at_equal_steps(inputs, outputs), (uniform[:, 0] < probability).float())


def bezier_curve(
    inner: Float[Tensor, "*rows point coordinate"],
) -> tuple[Float[Tensor, "*rows points"], Float[Tensor, "*rows points"]]:
    """Return both coordinates of points of cubic Bezier curves from (0, 0) to (1, 1).

    Args:
        inner: The two inner control points, each coordinate between 0 and 1.
    """
    t = torch.linspace(0, 1, CURVE_POINTS, dtype=inner.dtype)
    first, second = inner[..., 0, :, None], inner[..., 1, :, None]
    curve = 3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3
    return curve[..., 0, :], curve[..., 1, :]


def apply_tone_curves(
    volumes: Float[Tensor, "batch channel *shape"], curves: ToneCurves
) -> Float[Tensor, "batch channel *shape"]:
    """Return volumes whose intensities follow the drawn curves.

    Args:
        volumes: Volumes on any device.
        curves: Drawn curves of the batch.

    Raises:
        ValueError: If the curves were drawn for another number of samples or channels.
    """
    if volumes.shape[:2] != curves.table.shape[:2]:
        raise ValueError(
            f"(samples, channels) of volumes must be {tuple(curves.table.shape[:2])}, as drawn, got a batch of "
            f"{tuple(volumes.shape)}"
        )
    rows = volumes.flatten(0, 1)
    low, high = (bound.view(-1, 1) for bound in percentiles(rows, CURVE_SHARES).unbind(dim=1))
    extent = (high - low).clamp_min(torch.finfo(rows.dtype).tiny)
    last = TABLE_LENGTH - 1
    place = ((rows.flatten(1) - low) / extent).clamp(0, 1) * last
    below = place.long().clamp_max(last - 1)
    table = curves.table.flatten(0, 1).to(rows)
    made = torch.lerp(table.gather(1, below), table.gather(1, below + 1), place - below)
    made = (low + extent * made).view(volumes.shape)
    used = (curves.used.to(volumes.device)[:, None] > 0) & (high > low).view(volumes.shape[:2])
    return torch.where(used.view(*volumes.shape[:2], *(1,) * (volumes.ndim - 2)), made, volumes)


def _at_equal_steps(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the outputs (..., TABLE_LENGTH) at equal steps of the inputs, by linear interpolation, in float32."""
    wanted = torch.linspace(0, 1, TABLE_LENGTH, dtype=inputs.dtype).expand(*inputs.shape[:-1], -1).contiguous()
    above = torch.searchsorted(inputs.contiguous(), wanted).clamp(1, inputs.shape[-1] - 1)
    start, end = inputs.gather(-1, above - 1), inputs.gather(-1, above)
    share = ((wanted - start) / (end - start).clamp_min(torch.finfo(inputs.dtype).tiny)).clamp(0, 1)
    return torch.lerp(outputs.gather(-1, above - 1), outputs.gather(-1, above), share).float()
