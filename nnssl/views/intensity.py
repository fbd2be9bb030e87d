"""Changes of intensity of a batch of z-scored volumes: drawn per sample and channel, applied on the device.

Each change (``nnssl.views.intensity_changes``) is made to the channels, of all samples, that it was drawn for. It leaves the
other channels bit-exact, and a change that is switched off costs nothing.

Source: colour jitter as in He et al., MoCo, CVPR 2020 (contrast, brightness); noise, blur, gamma, bias field and
inversion as in Pix2Rep, MIDL 2024.

Deviations: Pix2Rep inverts by ``1 - x`` without scaling to [0, 1] first; here ``p1 + p99 - x``, which is the same on
data that is scaled. Ranges are in standard deviations of the channel.
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
"""Standard deviations that the kernel of a blur reaches to either side."""


@dataclass(frozen=True)
class IntensityRange:
    """What may be drawn; a change is off when its probability is 0.

    Standard deviations are those of the channel in its patch. Probabilities are of each channel of each sample.
    """

    bias_field: float = 0.3
    """Largest coefficient of the polynomial (degree 3, coordinates from -1 to 1) whose exponential is the field."""
    bias_field_probability: float = 0.5
    inversion_probability: float = 0.35
    window_std: float = 0.3
    """Largest shift of either bound of the window, in standard deviations; below 1."""
    window_probability: float = 0.5
    contrast: float = 0.4
    """The factor is uniform between 1 - contrast and 1 + contrast."""
    contrast_probability: float = 1.0
    brightness_std: float = 0.4
    """Largest shift to either side, in standard deviations."""
    brightness_probability: float = 1.0
    gamma: tuple[float, float] = (0.7, 1.5)
    """Least and largest exponent; its logarithm is uniform."""
    gamma_probability: float = 0.5
    blur_vox: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Largest sigma along z, y, x in voxels; one share of all three is drawn. 2D uses the last two."""
    blur_probability: float = 0.5
    noise_std: float = 0.2
    """Largest sigma of Gaussian noise, in standard deviations."""
    noise_probability: float = 0.3


@dataclass(frozen=True)
class Drawn:
    """One change: the channels that it is drawn for, as sample * channels + channel, and its values."""

    rows: tuple[int, ...]
    values: Float[Tensor, "rows values"]


@dataclass(frozen=True)
class IntensityParams:
    """What was drawn for a batch, on the CPU; changes in the order in which they are applied."""

    samples: int
    channels: int
    blur_radius_vox: tuple[int, int, int]
    """Reach of the blur along z, y, x: from the range, so that a sample's result does not depend on its batch."""
    changes: dict[str, Drawn]


def draw_intensity(generators: Sequence[torch.Generator], ranges: IntensityRange, channels: int) -> IntensityParams:
    """Draw the changes of every channel of every sample.

    Args:
        generators: one per sample; each gives the same number of random numbers whatever the ranges, so that switching
            one change off leaves the draws of the others as they are.
        ranges: what may be drawn.
        channels: of the volumes.

    Raises:
        ValueError: a range is not usable (window of 1 or more, negative contrast factor, falling or negative gamma).
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
    """Check ranges that a user may have set, before anything is drawn.

    Raises:
        UserError: a range is not usable; names it.
    """
    try:
        _check(ranges)
    except ValueError as error:
        raise UserError(f"{error}; --set another") from error


def apply_intensity(
    volumes: Float[Tensor, "batch channel *shape"], params: IntensityParams
) -> Float[Tensor, "batch channel *shape"]:
    """Return the changed volumes; the given ones stay as they are.

    Noise is made on the volumes' device from drawn seeds: the same on the same kind of device.

    Raises:
        ValueError: the parameters were drawn for another number of samples or channels.
    """
    if volumes.shape[:2] != (params.samples, params.channels):
        raise ValueError(f"volumes are {tuple(volumes.shape[:2])}, drawn was for {(params.samples, params.channels)}")
    changed = volumes.flatten(0, 1).clone()  # (batch * channel, *shape)
    for name, drawn in params.changes.items():
        rows = torch.tensor(drawn.rows, device=volumes.device)
        changed[rows] = _CHANGES[name].apply(changed[rows], drawn.values, params)
    return changed.view(volumes.shape)


def restrict_to(ranges: IntensityRange, names: Sequence[str]) -> IntensityRange:
    """Return the ranges with every change switched off that is not named.

    Args:
        ranges: what may be drawn.
        names: as in the plan's ``intensity_views``.

    Raises:
        UserError: a name is not that of a change; lists those there are.
    """
    for name in names:
        if name not in _CHANGES:
            raise UserError(f"intensity view {name!r}: there is none of this name; choose from {', '.join(_CHANGES)}")
    off: dict[str, Any] = {f"{name}_probability": 0.0 for name in _CHANGES if name not in names}
    return replace(ranges, **off)


def even_blur(largest_vox: float, spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Return the largest sigma along z, y, x in voxels of a blur as wide in mm along all axes: it hardly mixes thick slices.

    Args:
        largest_vox: sigma along the finest axis.
        spacing_mm: of the patches' voxels; two axes stand for y and x.
    """
    z, y, x = (largest_vox * min(spacing_mm) / mm for mm in (spacing_mm[0], *spacing_mm)[-3:])
    return z, y, x


@dataclass(frozen=True)
class _Change:
    width: int
    """Uniform random numbers that one channel's values need."""
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


# in the order of the physics: what the scanner sees, what the display makes of it, what the detector adds
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
        raise ValueError(f"window_std {ranges.window_std} must be within [0, 1), or the bounds could cross")
    if ranges.contrast_probability > 0 and not 0 <= ranges.contrast <= 1:
        raise ValueError(f"contrast {ranges.contrast} must be within [0, 1], or factors could be negative")
    if ranges.gamma_probability > 0 and not 0 < ranges.gamma[0] <= ranges.gamma[1]:
        raise ValueError(f"gamma {ranges.gamma} must be positive and rise")
