"""Intensity changes of volumes, each a function of the channels that it changes and of its drawn values.

``rows`` are channels of samples, (row, *shape), in 3D or 2D. Standard deviations, ranges and percentiles are those of the row.

Source: see ``nnssl.views.intensity``, which draws the values.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PERCENTILE_VOXELS = 65_536
BIAS_POWERS = 3
BIAS_EXPONENTS = [e for e in itertools.product(range(BIAS_POWERS + 1), repeat=3) if 1 <= sum(e) <= BIAS_POWERS]
"""Powers of (z, y, x) in the bias field: all monomials of degree 1 to 3."""
Rows = Float[Tensor, " rows *shape"]


def scale_contrast(rows: Rows, factor: Float[Tensor, " rows"]) -> Rows:
    """Return ``mean + factor * (x - mean)``."""
    mean = rows.mean(dim=_axes(rows), keepdim=True)
    return mean + _per_row(factor, rows) * (rows - mean)


def shift_brightness(rows: Rows, shift_std: Float[Tensor, " rows"]) -> Rows:
    """Return ``x + shift_std * std``."""
    return rows + _per_row(shift_std, rows) * _std(rows)


def change_gamma(rows: Rows, gamma: Float[Tensor, " rows"]) -> Rows:
    """Return ``min + range * ((x - min) / range)^gamma``, which keeps the range of the row."""
    low, extent = _low_and_extent(rows)
    share = ((rows - low) / extent.clamp_min(torch.finfo(rows.dtype).tiny)).clamp(0, 1)
    return low + extent * share ** _per_row(gamma, rows)


def percentiles(rows: Rows, shares: Sequence[float]) -> Float[Tensor, "rows shares"]:
    """Return percentiles of each row, from at most 131,072 of its voxels at a constant stride.

    Args:
        rows: Channels of samples.
        shares: Shares of the voxels that are smaller, 0 to 1.
    """
    flat = rows.flatten(1)
    # An odd stride does not align with the even sides of patches.
    stride = max(1, flat.shape[1] // PERCENTILE_VOXELS) | 1
    sample = flat[:, ::stride]
    last = sample.shape[1] - 1
    below = [min(int(share * last), max(last - 1, 0)) for share in shares]
    values = values_of_ranks(sample, [*below, *(min(rank + 1, last) for rank in below)])
    lower, upper = values.chunk(2, dim=1)
    between = [share * last - rank for share, rank in zip(shares, below, strict=True)]
    found = [torch.lerp(lower[:, place], upper[:, place], weight) for place, weight in enumerate(between)]
    return torch.stack(found, dim=1)


def values_of_ranks(rows: Float[Tensor, "rows values"], ranks: Sequence[int]) -> Float[Tensor, "rows ranks"]:
    """Return the values of each row that have the given ranks, counted from 0.

    On a CPU with AVX-512, NumPy's sort takes a quarter to a tenth of the time of PyTorch's selection of four values.
    """
    if numpy_sorts(rows):
        return torch.from_numpy(np.sort(rows.numpy(), axis=1)[:, list(ranks)])
    return torch.stack([rows.kthvalue(rank + 1, dim=1).values for rank in ranks], dim=1)


def numpy_sorts(rows: Tensor) -> bool:
    """Return whether NumPy sorts values: those in float32 on a CPU."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32


def invert_contrast(rows: Rows) -> Rows:
    """Return ``p1 + p99 - x`` with the percentiles 1 and 99 of the row."""
    low, high = percentiles(rows, (0.01, 0.99)).unbind(dim=1)
    return _per_row(low + high, rows) - rows


def jitter_window(rows: Rows, shifts_std: Float[Tensor, "rows 2"]) -> Rows:
    """Clip each row to its window with both bounds shifted, and stretch the shifted window to the original one.

    The window is the row's range. For CT, preprocessing has clipped the intensities to this range.

    Args:
        rows: Channels of samples.
        shifts_std: Shifts of the lower and the upper bound, each between -1 and 1 standard deviations.
    """
    low, extent = _low_and_extent(rows)
    std = _std(rows)
    shifted_low = low + _per_row(shifts_std[:, 0], rows) * std
    shifted_high = low + extent + _per_row(shifts_std[:, 1], rows) * std
    # A standard deviation is at most half the range, so the shifted bounds cannot cross unless the row is constant.
    width = (shifted_high - shifted_low).clamp_min(torch.finfo(rows.dtype).tiny)
    return low + extent * (rows.clamp(shifted_low, shifted_high) - shifted_low) / width


def blur(rows: Rows, sigma_vox: Float[Tensor, "rows d"], radius_vox: Sequence[int]) -> Rows:
    """Convolve each row with a Gaussian, axis by axis, repeating the border.

    Args:
        rows: Channels of samples.
        sigma_vox: Sigma along each axis in voxels; 0 leaves the values along this axis unchanged.
        radius_vox: Reach of the kernel to either side along each axis, in voxels.
    """
    for axis, radius in enumerate(radius_vox):
        offset = torch.arange(-radius, radius + 1, device=rows.device, dtype=rows.dtype)
        sigma = sigma_vox[:, axis, None].to(rows).clamp_min(1e-3)
        kernel = torch.exp(-0.5 * (offset / sigma).square())
        kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (rows, 2 * radius + 1)
        length = rows.shape[axis + 1]
        taps = torch.arange(-radius, radius + 1, device=rows.device)
        places = (torch.arange(length, device=rows.device)[:, None] + taps).clamp(0, length - 1)
        # (rows, to, from): a product of matrices is faster than a sum of shifted rows. On GPUs, PyTorch computes it in float32
        # unless TF32 is switched on for products, whereas convolutions use TF32 by default.
        matrix = rows.new_zeros(len(rows), length, length)
        matrix.scatter_add_(2, places.expand(len(rows), -1, -1), kernel[:, None].expand(-1, length, -1))
        with torch.autocast(rows.device.type, enabled=False):
            if axis == len(radius_vox) - 1:
                rows = (rows.flatten(1, -2) @ matrix.mT).view(rows.shape)
            else:
                behind = rows.shape[axis + 2 :].numel()
                rows = (
                    matrix[:, None] @ rows.reshape(len(rows), rows.shape[1 : axis + 1].numel(), length, behind)
                ).view(rows.shape)
    return rows


def add_noise(rows: Rows, sigma_std: Float[Tensor, " rows"], seeds: Sequence[int]) -> Rows:
    """Return ``x + sigma_std * std * noise``, with normal noise from each row's own seed."""
    noise = torch.empty_like(rows)
    # One random stream per row makes the noise independent of the rest of the batch.
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator(rows.device).manual_seed(seed))
    return rows + _per_row(sigma_std, rows) * _std(rows) * noise


def multiply_bias_field(rows: Rows, coefficients: Float[Tensor, "rows 19"]) -> Rows:
    """Return ``min + (x - min) * exp(P)``, P a polynomial in coordinates that go from -1 to 1 across the patch.

    Args:
        rows: Channels of samples, in 3D or 2D.
        coefficients: Coefficients of z^a y^b x^c for 1 <= a + b + c <= 3, in ascending order of (a, b, c); those with z are
            not used in 2D.
    """
    powers = BIAS_POWERS + 1
    cube = coefficients.new_zeros(len(rows), powers, powers, powers)
    z, y, x = torch.tensor(BIAS_EXPONENTS).T
    cube[:, z, y, x] = coefficients
    field = cube.to(rows) if rows.ndim == 4 else cube[:, 0].to(rows)
    for axis in reversed(range(1, rows.ndim)):  # each iteration replaces an axis of powers by an axis of voxels
        length = rows.shape[axis]
        place = (2 * torch.arange(length, device=rows.device, dtype=rows.dtype) + 1) / length - 1
        place = place.view(-1, *(1,) * (rows.ndim - 1 - axis))
        terms = (field.select(axis, power).unsqueeze(axis) * place**power for power in range(powers))
        field = functools.reduce(torch.add, terms)
    low = rows.amin(dim=_axes(rows), keepdim=True)
    return low + (rows - low) * field.exp()


def _axes(rows: Tensor) -> tuple[int, ...]:
    return tuple(range(1, rows.ndim))


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    return values.to(rows).view(-1, *(1,) * (rows.ndim - 1))


def _std(rows: Tensor) -> Tensor:
    return rows.std(dim=_axes(rows), keepdim=True, unbiased=False)


def _low_and_extent(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(dim=_axes(rows), keepdim=True), rows.amax(dim=_axes(rows), keepdim=True)
    return low, high - low
