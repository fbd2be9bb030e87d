"""Intensity changes of a batch of z-scored volumes, drawn per sample and channel and applied on the volumes' device.

Each change (``nnssl.views.intensity_changes``) is applied only to the channels for which it was drawn. The other channels stay
bit-identical, and a change that is switched off costs nothing.

Source: colour jitter as in He et al., MoCo, CVPR 2020 (contrast, brightness); noise, blur, gamma, bias field and
inversion as in Pix2Rep, MIDL 2024.

Deviations: Pix2Rep inverts by ``1 - x`` without scaling to [0, 1] first; here ``p1 + p99 - x``, which is the same on scaled
data. Ranges are in standard deviations of the channel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.errors import UserError
from nnssl.views.intensity_changes import (
    BIAS_EXPONENTS,
    add_noise,
    blur,
    change_gamma,
    invert_contrast,
    jitter_window,
    multiply_bias_field,
    scale_contrast,
    shift_brightness,
)

BLUR_REACH = 3.0
"""Reach of a blur's kernel to either side, in standard deviations of the kernel."""


@dataclass(frozen=True)
class IntensityRange:
    """Ranges from which intensity changes are drawn. A probability of 0 switches a change off.

    Standard deviations are those of the channel in its patch. Probabilities apply to each channel of each sample.
    """

    bias_field: float = 0.3
    """Largest coefficient of the polynomial whose exponential is the field (degree 3, coordinates from -1 to 1)."""
    bias_field_probability: float = 0.5
    inversion_probability: float = 0.35
    window_std: float = 0.3
    """Largest shift of each bound of the window, in standard deviations; below 1."""
    window_probability: float = 0.5
    contrast: float = 0.4
    """Largest change of the contrast factor, which is uniform between 1 - contrast and 1 + contrast."""
    contrast_probability: float = 1.0
    brightness_std: float = 0.4
    """Largest shift to either side, in standard deviations."""
    brightness_probability: float = 1.0
    gamma: tuple[float, float] = (0.7, 1.5)
    """Smallest and largest exponent, whose logarithm is uniform."""
    gamma_probability: float = 0.5
    blur_vox: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Largest sigma along z, y, x in voxels, scaled by one drawn share; 2D uses the last two."""
    blur_probability: float = 0.5
    noise_std: float = 0.2
    """Largest sigma of Gaussian noise, in standard deviations."""
    noise_probability: float = 0.3


@dataclass(frozen=True)
class Drawn:
    """Draws of one intensity change."""

    rows: tuple[int, ...]
    """Channels that are changed, counted as sample * channels + channel."""
    values: Float[Tensor, "rows values"]
    """Parameters of the change for each of these channels."""


@dataclass(frozen=True)
class IntensityParams:
    """Drawn intensity changes of a batch, on the CPU."""

    samples: int
    channels: int
    blur_radius_vox: tuple[int, int, int]
    """Reach of the blur along z, y, x. It follows from the range, so that a sample's result does not depend on its batch."""
    changes: dict[str, Drawn]
    """Draws by the name of the change, in the order in which changes are applied."""


def draw_intensity(generators: Sequence[torch.Generator], ranges: IntensityRange, channels: int) -> IntensityParams:
    """Draw the intensity changes of every channel of every sample.

    Args:
        generators: One generator per sample. Each gives the same number of random numbers for all ranges, so that switching
            one change off does not affect the draws of the others.
        ranges: Ranges from which the changes are drawn.
        channels: Number of channels of the volumes.

    Raises:
        ValueError: If a range cannot be used (a window of 1 or more, negative contrast factors, a descending or non-positive
            gamma).
    """
    _check(ranges)
    width = sum(1 + change.width for change in _CHANGES.values())
    uniform = torch.cat([torch.rand(channels, width, generator=each, dtype=torch.float64) for each in generators])
    drawn, column = {}, 0
    for name, change in _CHANGES.items():
        own = uniform[:, column : column + 1 + change.width]
        column += 1 + change.width
        rows = (own[:, 0] < getattr(ranges, f"{name}_probability")).nonzero()[:, 0]
        if len(rows):
            drawn[name] = Drawn(tuple(rows.tolist()), change.values(ranges, own[rows, 1:]))
    radius_z, radius_y, radius_x = (math.ceil(BLUR_REACH * sigma) for sigma in ranges.blur_vox)
    return IntensityParams(len(generators), channels, (radius_z, radius_y, radius_x), drawn)


def check_intensity(ranges: IntensityRange) -> None:
    """Check that ranges from a user's settings can be used, before anything is drawn.

    Raises:
        UserError: If a range cannot be used; the message names it.
    """
    try:
        _check(ranges)
    except ValueError as error:
        raise UserError(str(error)) from error


def apply_intensity(
    volumes: Float[Tensor, "batch channel *shape"], params: IntensityParams
) -> Float[Tensor, "batch channel *shape"]:
    """Return changed copies of the volumes.

    Noise is generated on the volumes' device from drawn seeds, so it is the same on the same kind of device.

    Raises:
        ValueError: If the changes were drawn for another number of samples or channels.
    """
    if volumes.shape[:2] != (params.samples, params.channels):
        wanted = (params.samples, params.channels)
        raise ValueError(f"(samples, channels) of volumes must be {wanted}, as drawn, got {tuple(volumes.shape[:2])}")
    changed = volumes.flatten(0, 1).clone()  # (batch * channel, *shape)
    for name, drawn in params.changes.items():
        rows = torch.tensor(drawn.rows, device=volumes.device)
        changed[rows] = _CHANGES[name].apply(changed[rows], drawn.values, params)
    return changed.view(volumes.shape)


def restrict_to(ranges: IntensityRange, names: Sequence[str]) -> IntensityRange:
    """Return the ranges with only the named changes switched on.

    Args:
        ranges: Ranges from which the changes are drawn.
        names: Names of changes, as in the plan's ``intensity_views``.

    Raises:
        UserError: If a name is unknown; the message lists the available ones.
    """
    for name in names:
        if name not in _CHANGES:
            raise UserError(f"Unknown intensity change {name!r} in intensity_views. Available: {', '.join(_CHANGES)}")
    off: dict[str, Any] = {f"{name}_probability": 0.0 for name in _CHANGES if name not in names}
    return replace(ranges, **off)


def even_blur(largest_vox: float, spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Return the largest sigma along z, y, x in voxels of a blur that has the same width in mm along all axes.

    Such a blur hardly mixes thick slices.

    Args:
        largest_vox: Largest sigma along the finest axis, in voxels.
        spacing_mm: Spacing of the patches along each axis; two values are those of y and x.
    """
    z, y, x = (largest_vox * min(spacing_mm) / mm for mm in (spacing_mm[0], *spacing_mm)[-3:])
    return z, y, x


@dataclass(frozen=True)
class _Change:
    width: int
    """Number of uniform random numbers for one channel."""
    values: Callable[[IntensityRange, Tensor], Tensor]
    apply: Callable[[Tensor, Tensor, IntensityParams], Tensor]


def _symmetric(largest: float, uniform: Tensor) -> Tensor:
    return (2 * uniform - 1) * largest


def _draw_gamma(ranges: IntensityRange, uniform: Tensor) -> Tensor:
    low, high = (math.log(gamma) for gamma in ranges.gamma)
    return torch.exp(low + (high - low) * uniform)


def _apply_blur(rows: Tensor, values: Tensor, params: IntensityParams) -> Tensor:
    dimensions = rows.ndim - 1
    return blur(rows, values[:, -dimensions:], params.blur_radius_vox[-dimensions:])


# The order follows the physics: the scanner's field, the display's contrast, the detector's blur and noise.
_CHANGES = {
    "bias_field": _Change(
        width=len(BIAS_EXPONENTS),
        values=lambda ranges, uniform: _symmetric(ranges.bias_field, uniform),
        apply=lambda rows, values, _: multiply_bias_field(rows, values),
    ),
    "inversion": _Change(0, lambda _, uniform: uniform, lambda rows, values, _: invert_contrast(rows)),
    "window": _Change(
        width=2,
        values=lambda ranges, uniform: _symmetric(ranges.window_std, uniform),
        apply=lambda rows, values, _: jitter_window(rows, values),
    ),
    "contrast": _Change(
        width=1,
        values=lambda ranges, uniform: 1 + _symmetric(ranges.contrast, uniform),
        apply=lambda rows, values, _: scale_contrast(rows, values[:, 0]),
    ),
    "brightness": _Change(
        width=1,
        values=lambda ranges, uniform: _symmetric(ranges.brightness_std, uniform),
        apply=lambda rows, values, _: shift_brightness(rows, values[:, 0]),
    ),
    "gamma": _Change(1, _draw_gamma, lambda rows, values, _: change_gamma(rows, values[:, 0])),
    "blur": _Change(
        width=1,
        values=lambda ranges, uniform: uniform * torch.tensor(ranges.blur_vox, dtype=torch.float64),
        apply=_apply_blur,
    ),
    "noise": _Change(
        width=2,
        # 53 random bits of a float64 become the seed
        values=lambda ranges, uniform: uniform * torch.tensor([ranges.noise_std, 2.0**53], dtype=torch.float64),
        apply=lambda rows, values, _: add_noise(rows, values[:, 0], values[:, 1].long().tolist()),
    ),
}


def _check(ranges: IntensityRange) -> None:
    if ranges.window_probability > 0 and not 0 <= ranges.window_std < 1:
        raise ValueError(f"window_std must be within [0, 1), so that the bounds cannot cross, got {ranges.window_std}")
    if ranges.contrast_probability > 0 and not 0 <= ranges.contrast <= 1:
        raise ValueError(f"contrast must be within [0, 1], so that no factor is negative, got {ranges.contrast}")
    if ranges.gamma_probability > 0 and not 0 < ranges.gamma[0] <= ranges.gamma[1]:
        raise ValueError(f"gamma must be two ascending numbers above 0, got {ranges.gamma}")
