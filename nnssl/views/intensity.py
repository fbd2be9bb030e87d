"""Changes of intensity of a batch of z-scored volumes: drawn per sample and channel, applied on the device.

Each change is a function of ``rows`` (the channels, of all samples, that it was drawn for) and of their drawn values.
It leaves the other channels bit-exact, and a change that is switched off costs nothing.

Source: colour jitter as in He et al., MoCo, CVPR 2020 (contrast, brightness); noise, blur, gamma, bias field and
inversion as in Pix2Rep, MIDL 2024.

Deviations: Pix2Rep inverts by ``1 - x`` without scaling to [0, 1] first; here ``p1 + p99 - x``, which is the same on
data that is scaled. Ranges are in standard deviations of the channel.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.errors import UserError

PERCENTILE_VOXELS = 65_536
BIAS_POWERS = 3
BLUR_REACH = 3.0
Rows = Float[Tensor, " rows *shape"]
# powers of (z, y, x) in the bias field: all polynomials of degree 1 to 3
_EXPONENTS = [e for e in itertools.product(range(BIAS_POWERS + 1), repeat=3) if 1 <= sum(e) <= BIAS_POWERS]


@dataclass(frozen=True)
class IntensityRange:
    """What may be drawn; a change is off when its value is None or its probability 0.

    Standard deviations are those of the channel in its patch. Probabilities are of each channel of each sample.
    """

    bias_field: float | None = 0.3
    """Largest coefficient of the polynomial (degree 3, coordinates from -1 to 1) whose exponential is the field."""
    bias_field_probability: float = 0.5
    inversion_probability: float = 0.35
    window_std: float | None = 0.3
    """Largest shift of either bound of the window, in standard deviations; below 1."""
    window_probability: float = 0.5
    contrast: float | None = 0.4
    """The factor is uniform between 1 - contrast and 1 + contrast."""
    contrast_probability: float = 1.0
    brightness_std: float | None = 0.4
    """Largest shift to either side, in standard deviations."""
    brightness_probability: float = 1.0
    gamma: tuple[float, float] | None = (0.7, 1.5)
    """Least and largest exponent; its logarithm is uniform."""
    gamma_probability: float = 0.5
    blur_vox: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    """Largest sigma along z, y, x in voxels; one share of all three is drawn. 2D uses the last two."""
    blur_probability: float = 0.5
    noise_std: float | None = 0.2
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
        if _is_on(ranges, name):
            rows = (own[:, 0] < getattr(ranges, f"{name}_probability")).nonzero()[:, 0]
            if len(rows):
                drawn[name] = Drawn(tuple(rows.tolist()), change.values(ranges, own[rows, 1:]))
    radius_z, radius_y, radius_x = (math.ceil(BLUR_REACH * sigma) for sigma in ranges.blur_vox or (0.0, 0.0, 0.0))
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


def scale_contrast(rows: Rows, factor: Float[Tensor, " rows"]) -> Rows:
    """Return ``mean + factor * (x - mean)``."""
    mean = rows.mean(dim=_axes(rows), keepdim=True)
    return mean + _per_row(factor, rows) * (rows - mean)


def shift_brightness(rows: Rows, shift_std: Float[Tensor, " rows"]) -> Rows:
    """Return ``x + shift_std * std``."""
    return rows + _per_row(shift_std, rows) * _std(rows)


def change_gamma(rows: Rows, gamma: Float[Tensor, " rows"]) -> Rows:
    """Return ``min + range * ((x - min) / range)^gamma``: the range of the row stays as it is."""
    low, extent = _low_and_extent(rows)
    share = ((rows - low) / extent.clamp_min(torch.finfo(rows.dtype).tiny)).clamp(0, 1)
    return low + extent * share ** _per_row(gamma, rows)


def percentiles(rows: Rows, shares: Sequence[float]) -> Float[Tensor, "rows shares"]:
    """Return percentiles of each row, from at most 131,072 of its voxels at a constant stride.

    Args:
        rows: one per sample and channel.
        shares: of the voxels that are smaller, 0 to 1.
    """
    flat = rows.flatten(1)
    # an odd stride does not fall into step with the even sides of patches
    stride = max(1, flat.shape[1] // PERCENTILE_VOXELS) | 1
    ordered = flat[:, ::stride].sort(dim=1).values
    last = ordered.shape[1] - 1
    found = []
    for share in shares:
        below = min(int(share * last), max(last - 1, 0))
        found.append(torch.lerp(ordered[:, below], ordered[:, min(below + 1, last)], share * last - below))
    return torch.stack(found, dim=1)


def invert_contrast(rows: Rows) -> Rows:
    """Return ``p1 + p99 - x`` with the percentiles 1 and 99 of the row."""
    low, high = percentiles(rows, (0.01, 0.99)).unbind(dim=1)
    return _per_row(low + high, rows) - rows


def jitter_window(rows: Rows, shifts_std: Float[Tensor, "rows 2"]) -> Rows:
    """Clip to the row's window with both bounds shifted, and spread the shifted window over the old one.

    The window is the row's range, which for CT ends where preprocessing clipped.

    Args:
        rows: one per sample and channel.
        shifts_std: of the lower and of the upper bound, each between -1 and 1 standard deviations.
    """
    low, extent = _low_and_extent(rows)
    std = _std(rows)
    shifted_low = low + _per_row(shifts_std[:, 0], rows) * std
    shifted_high = low + extent + _per_row(shifts_std[:, 1], rows) * std
    # a standard deviation is at most half the range, so the shifted bounds of a row that varies cannot cross
    width = (shifted_high - shifted_low).clamp_min(torch.finfo(rows.dtype).tiny)
    return low + extent * (rows.clamp(shifted_low, shifted_high) - shifted_low) / width


def blur(rows: Rows, sigma_vox: Float[Tensor, "rows d"], radius_vox: Sequence[int]) -> Rows:
    """Convolve with a Gaussian, axis by axis, repeating the border.

    Args:
        rows: one per sample and channel.
        sigma_vox: along each axis; 0 leaves the axis exactly as it is.
        radius_vox: voxels that the kernel reaches to either side along each axis.
    """
    for axis, radius in enumerate(radius_vox):
        offset = torch.arange(-radius, radius + 1, device=rows.device, dtype=rows.dtype)
        sigma = sigma_vox[:, axis, None].to(rows).clamp_min(1e-3)
        kernel = torch.exp(-0.5 * (offset / sigma).square())
        kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (rows, 2 * radius + 1)
        length = rows.shape[axis + 1]
        # a sum of shifted rows instead of a convolution, which mixed precision or TF32 would round
        blurred = torch.zeros_like(rows)
        for tap in range(2 * radius + 1):
            place = (torch.arange(length, device=rows.device) + tap - radius).clamp(0, length - 1)
            blurred += _per_row(kernel[:, tap], rows) * rows.index_select(axis + 1, place)
        rows = blurred
    return rows


def add_noise(rows: Rows, sigma_std: Float[Tensor, " rows"], seeds: Sequence[int]) -> Rows:
    """Return ``x + sigma_std * std * noise``, normal noise of each row from its own seed."""
    noise = torch.empty_like(rows)
    for row, seed in zip(noise, seeds, strict=True):  # one stream per row: it must not depend on the rest of the batch
        row.normal_(generator=torch.Generator(rows.device).manual_seed(seed))
    return rows + _per_row(sigma_std, rows) * _std(rows) * noise


def multiply_bias_field(rows: Rows, coefficients: Float[Tensor, "rows 19"]) -> Rows:
    """Return ``min + (x - min) * exp(P)``, P a polynomial in coordinates that go from -1 to 1 across the patch.

    Args:
        rows: one per sample and channel, in 3D or 2D.
        coefficients: of z^a y^b x^c for 1 <= a + b + c <= 3, in ascending order of (a, b, c); those with z are not used
            in 2D.
    """
    powers = BIAS_POWERS + 1
    cube = coefficients.new_zeros(len(rows), powers, powers, powers)
    z, y, x = torch.tensor(_EXPONENTS).T
    cube[:, z, y, x] = coefficients
    field = cube.to(rows) if rows.ndim == 4 else cube[:, 0].to(rows)
    for axis in reversed(range(1, rows.ndim)):  # each turn replaces an axis of powers by an axis of voxels
        length = rows.shape[axis]
        place = (2 * torch.arange(length, device=rows.device, dtype=rows.dtype) + 1) / length - 1
        place = place.view(-1, *(1,) * (rows.ndim - 1 - axis))
        terms = (field.select(axis, power).unsqueeze(axis) * place**power for power in range(powers))
        field = functools.reduce(torch.add, terms)
    low = rows.amin(dim=_axes(rows), keepdim=True)
    return low + (rows - low) * field.exp()


@dataclass(frozen=True)
class _Change:
    width: int
    """Uniform random numbers that one channel's values need."""
    values: Callable[[IntensityRange, Tensor], Tensor]
    apply: Callable[[Tensor, Tensor, IntensityParams], Tensor]


def _symmetric(largest: float | None, uniform: Tensor) -> Tensor:
    assert largest is not None
    return (2 * uniform - 1) * largest


def _draw_gamma(ranges: IntensityRange, uniform: Tensor) -> Tensor:
    assert ranges.gamma is not None
    low, high = (math.log(gamma) for gamma in ranges.gamma)
    return torch.exp(low + (high - low) * uniform)


def _apply_blur(rows: Tensor, values: Tensor, params: IntensityParams) -> Tensor:
    dimensions = rows.ndim - 1
    return blur(rows, values[:, -dimensions:], params.blur_radius_vox[-dimensions:])


# in the order of the physics: what the scanner sees, what the display makes of it, what the detector adds
_CHANGES = {
    "bias_field": _Change(
        width=len(_EXPONENTS),
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
_FIELDS = {"brightness": "brightness_std", "window": "window_std", "noise": "noise_std", "blur": "blur_vox"}


def _is_on(ranges: IntensityRange, name: str) -> bool:
    has_value = name == "inversion" or getattr(ranges, _FIELDS.get(name, name)) is not None
    return has_value and getattr(ranges, f"{name}_probability") > 0


def _check(ranges: IntensityRange) -> None:
    if _is_on(ranges, "window") and not 0 <= (ranges.window_std or 0) < 1:
        raise ValueError(f"window_std {ranges.window_std} must be within [0, 1), or the bounds could cross")
    if _is_on(ranges, "contrast") and not 0 <= (ranges.contrast or 0) <= 1:
        raise ValueError(f"contrast {ranges.contrast} must be within [0, 1], or factors could be negative")
    if _is_on(ranges, "gamma") and ranges.gamma is not None and not 0 < ranges.gamma[0] <= ranges.gamma[1]:
        raise ValueError(f"gamma {ranges.gamma} must be positive and rise")


def _axes(rows: Tensor) -> tuple[int, ...]:
    return tuple(range(1, rows.ndim))


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    return values.to(rows).view(-1, *(1,) * (rows.ndim - 1))


def _std(rows: Tensor) -> Tensor:
    return rows.std(dim=_axes(rows), keepdim=True, unbiased=False)


def _low_and_extent(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(dim=_axes(rows), keepdim=True), rows.amax(dim=_axes(rows), keepdim=True)
    return low, high - low
