"""Corruption of views that a network learns to restore: noise inside or outside boxes, and shuffled voxels.

Inpainting replaces the inside of a few small boxes by noise, outpainting the outside of a few large ones. Local shuffling
permutes the voxels inside small windows. A sample is shuffled first, then painted.

Source: Zhou et al., PCRL, ICCV 2021, section 3.1 and the authors' code, which takes these three from Zhou et al., Models
Genesis, MICCAI 2019.

Deviations from the authors' code:

* Noise: the code draws it uniformly in [0, 1], the range of its data. Here it lies between the percentiles 1 and 99 of the
  channel in its patch, because data are z-scored. Every channel has its own noise.
* Windows: the code pastes 10,000 overlapping windows one after the other, each shuffled from the uncorrupted patch, so
  that voxels can be lost or duplicated. Here windows of one size per sample tile the patch at a random shift, all of them
  are shuffled, and no voxel is lost.
* Sides of windows: in the code, they are up to a tenth of the patch's voxels along each axis. Here they are up to one length
  in mm along all axes, so that thick slices are mixed less than voxels in the plane. If two voxels fit, a side has at least
  two.
* Channels: the code shuffles only the first channel; here all channels of a sample are shuffled in the same way.
* Number of boxes: inpainting in the code draws no box for 5 % of the samples; here the first box is always drawn.
* Border: in the code, boxes keep 3 voxels from the border, and a patch without room for this is an error; here they come
  closer to the border.
* Sides of boxes: in the code, they range from floor to floor of their shares of the patch; here they are whole voxels within
  these shares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.views.intensity_changes import percentiles

NOT_PAINTED, INPAINTING, OUTPAINTING = 0, 1, 2
NOISE_SHARES = (0.01, 0.99)
SEED_BITS = 53
"""Number of random bits of a float64."""
KEY_BITS = 32
"""Number of bits of the random numbers by which a window's voxels are sorted; higher bits hold the window's number."""
SHUFFLE_SHARE = 0.1
ROUNDING = 1e-9


@dataclass(frozen=True)
class CorruptionRange:
    """Ranges from which a corruption is drawn. A probability of 0 switches painting or shuffling off.

    Sides of boxes are shares of the patch's extent along each axis, so that boxes have the proportions of the patch in mm.
    They are whole voxels. If a range contains no whole number, the largest one below it is used, but at least 1.
    """

    paint_probability: float = 0.9
    """Probability that a sample is in- or outpainted."""
    inpainting_share: float = 0.2
    """Share of the painted samples that are inpainted; the others are outpainted."""
    boxes: int = 5
    """Largest number of boxes per sample."""
    box_continues: float = 0.95
    """Probability of each box after the first, given the one before it."""
    inpainting_side: tuple[float, float] = (1 / 6, 1 / 3)
    """Smallest and largest side of a box that is filled with noise."""
    outpainting_side: tuple[float, float] = (3 / 7, 4 / 7)
    """Smallest and largest side of a box that is kept."""
    margin_vox: int = 3
    """Smallest distance of a box from the border in voxels; less if there is no room for it on both sides."""
    shuffle_probability: float = 0.5
    """Probability that a sample is shuffled."""
    shuffle_side_mm: float | None = None
    """Largest side of a window along every axis in mm; along axes of larger spacing, windows are one voxel thick.

    None for a tenth of the patch's shortest extent, ignoring axes of one voxel, but at least two of its smallest voxels.
    """


@dataclass(frozen=True)
class CorruptionParams:
    """Drawn corruption of a batch, on the CPU; zyx in voxels."""

    shape: tuple[int, ...]
    """Number of voxels of the patch along each axis."""
    kind: Int[Tensor, " batch"]
    """Kind of painting: NOT_PAINTED, INPAINTING or OUTPAINTING."""
    lower_vox: Int[Tensor, "batch boxes d"]
    """First voxel of each box."""
    size_vox: Int[Tensor, "batch boxes d"]
    """Sides of each box."""
    used: Bool[Tensor, "batch boxes"]
    """Whether the box is used; no box of a sample that is not painted is."""
    noise_seed: Int[Tensor, " batch"]
    """Random seed of the noise."""
    window_vox: Int[Tensor, "batch d"]
    """Sides of the windows whose voxels are shuffled; 0 for a sample that is not shuffled."""
    shift_vox: Int[Tensor, "batch d"]
    """Number of voxels by which the first window is cut off, less than its side; 0 for a sample that is not shuffled."""
    shuffle_seed: Int[Tensor, " batch"]
    """Random seed of the order of the voxels."""


def draw_corruption(
    generators: Sequence[torch.Generator],
    ranges: CorruptionRange,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    paint_like: CorruptionParams | None = None,
) -> CorruptionParams:
    """Draw the kind of painting, the boxes and the windows of each sample.

    Args:
        generators: One generator per sample. How many random numbers each gives depends only on the number of boxes and of
            axes, not on what is drawn.
        ranges: Ranges from which the corruption is drawn.
        shape: Number of voxels of the patch, (z, y, x) or (y, x).
        spacing_mm: Spacing of the patch along each axis.
        paint_like: Corruption of the other view of the same samples, whose kind of painting is used; everything else is drawn
            independently. None to draw the kind too.

    Raises:
        ValueError: If a range cannot be used, shape and spacing differ in their number of axes, or the other view has another
            number of samples.
    """
    _check(ranges)
    dimensions, boxes = len(shape), ranges.boxes
    if len(spacing_mm) != dimensions:
        raise ValueError(f"spacing_mm must have {dimensions} axes, as shape has, got {tuple(spacing_mm)}")
    if paint_like is not None and len(paint_like.kind) != len(generators):
        raise ValueError(f"paint_like must have {len(generators)} samples, got {len(paint_like.kind)}")
    # The boxes are drawn last, so that their number does not change the other draws.
    widths = [1, 1, 1, 1, 1, dimensions, dimensions, boxes, boxes * dimensions, boxes * dimensions]
    uniform = torch.stack([torch.rand(sum(widths), generator=each, dtype=torch.float64) for each in generators])
    paint, share, noise_seed, shuffle, shuffle_seed, side, shift, further, size, place = uniform.split(widths, dim=1)

    inside = torch.where(share[:, 0] < ranges.inpainting_share, INPAINTING, OUTPAINTING)
    kind = torch.where(paint[:, 0] < ranges.paint_probability, inside, NOT_PAINTED)
    if paint_like is not None:
        kind = paint_like.kind
    goes_on = further < ranges.box_continues
    goes_on[:, 0] = kind != NOT_PAINTED
    per_box = (-1, boxes, dimensions)
    lower_vox, size_vox = _place_boxes(size.reshape(per_box), place.reshape(per_box), ranges, kind, shape)

    is_shuffled = shuffle < ranges.shuffle_probability  # (batch, 1)
    most = _largest_window(ranges.shuffle_side_mm, shape, spacing_mm)
    window_vox = _whole(side, most.clamp_max(2), most) * is_shuffled
    return CorruptionParams(
        shape=tuple(int(n) for n in shape),
        kind=kind,
        lower_vox=lower_vox,
        size_vox=size_vox,
        used=goes_on.long().cumprod(dim=1).bool(),
        noise_seed=(noise_seed[:, 0] * 2**SEED_BITS).long(),
        window_vox=window_vox,
        shift_vox=(shift * window_vox).long(),
        shuffle_seed=(shuffle_seed[:, 0] * 2**SEED_BITS).long(),
    )


def painted_mask(params: CorruptionParams, device: torch.device | str = "cpu") -> Bool[Tensor, " batch *shape"]:
    """Return which voxels are replaced by noise: those in a box for inpainting, those outside all boxes for outpainting.

    Args:
        params: Drawn corruption of the batch.
        device: Device of the mask.
    """
    kind, used = params.kind.to(device), params.used.to(device)
    lower = params.lower_vox.to(device)
    upper = lower + params.size_vox.to(device)
    per_sample = (-1, *(1,) * len(params.shape))
    in_a_box = torch.zeros(len(kind), *params.shape, dtype=torch.bool, device=device)
    for box in range(used.shape[1]):
        covered = used[:, box].view(per_sample)
        for axis, length in enumerate(params.shape):
            place = torch.arange(length, device=device)
            along = (place >= lower[:, box, axis, None]) & (place < upper[:, box, axis, None])  # (batch, length)
            covered = covered & along.view(-1, *(length if other == axis else 1 for other in range(len(params.shape))))
        in_a_box |= covered
    return (in_a_box ^ (kind == OUTPAINTING).view(per_sample)) & (kind != NOT_PAINTED).view(per_sample)


def apply_corruption(
    volumes: Float[Tensor, "batch channel *shape"], params: CorruptionParams
) -> Float[Tensor, "batch channel *shape"]:
    """Return copies of the volumes, first shuffled, then painted.

    All channels of a sample are shuffled in the same way. Noise is uniform between the percentiles 1 and 99 of the channel in
    its patch, with one value per voxel and channel. Noise and the order of the voxels are generated on the volumes' device
    from drawn seeds, so they are the same on the same kind of device.

    Args:
        volumes: Volumes on any device.
        params: Drawn corruption of the batch.

    Raises:
        ValueError: If the corruption was drawn for another number of samples or another shape.
    """
    if (len(volumes), *volumes.shape[2:]) != (len(params.kind), *params.shape):
        drawn = (len(params.kind), *params.shape)
        raise ValueError(
            f"(samples, *shape) of volumes must be {drawn}, as drawn, got a batch of {tuple(volumes.shape)}"
        )
    corrupted = volumes.clone()
    for sample, window in enumerate(params.window_vox.tolist()):
        if any(window):
            seed = int(params.shuffle_seed[sample])
            places = _shuffled_places(params.shape, window, params.shift_vox[sample].tolist(), seed, volumes.device)
            corrupted[sample] = volumes[sample].flatten(1)[:, places].view(volumes.shape[1:])
    painted = (params.kind != NOT_PAINTED).nonzero()[:, 0].tolist()
    if painted:
        mask = painted_mask(params, volumes.device)
        bounds = percentiles(volumes.flatten(0, 1), NOISE_SHARES).view(*volumes.shape[:2], 2)
        for sample in painted:  # one random stream per sample, so that it does not depend on the rest of the batch
            noise = _noise(volumes[sample], bounds[sample], int(params.noise_seed[sample]))
            corrupted[sample] = torch.where(mask[sample], noise, corrupted[sample])
    return corrupted


def _place_boxes(
    size: Tensor, place: Tensor, ranges: CorruptionRange, kind: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the first voxels and sides of boxes (batch, boxes, d) from uniform numbers of this shape."""
    is_out = (kind == OUTPAINTING)[:, None, None]
    (in_least, in_most), (out_least, out_most) = (
        _limits(sides, shape) for sides in (ranges.inpainting_side, ranges.outpainting_side)
    )
    size_vox = _whole(size, torch.where(is_out, out_least, in_least), torch.where(is_out, out_most, in_most))
    room = torch.tensor(tuple(shape)) - size_vox
    margin = (room // 2).clamp_max(ranges.margin_vox)
    return _whole(place, margin, room - margin), size_vox


def _limits(sides: tuple[float, float], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest number of voxels (d,) within shares of the patch, at least 1."""
    low, high = sides
    most = torch.tensor([max(1, math.floor(high * n + ROUNDING)) for n in shape])
    least = torch.tensor([max(1, math.ceil(low * n - ROUNDING)) for n in shape])
    return torch.minimum(least, most), most


def _largest_window(side_mm: float | None, shape: Sequence[int], spacing_mm: Sequence[float]) -> Tensor:
    """Return the largest number of voxels (d,) of a window along each axis."""
    if side_mm is None:
        long_axes = [(n * mm, mm) for n, mm in zip(shape, spacing_mm, strict=True) if n > 1]
        shortest_mm = min((extent for extent, _ in long_axes), default=0.0)
        smallest_mm = min((mm for _, mm in long_axes), default=0.0)
        side_mm = max(SHUFFLE_SHARE * shortest_mm, 2 * smallest_mm)
    voxels = [math.floor(side_mm / mm + ROUNDING) for mm in spacing_mm]
    return torch.tensor([min(max(1, side), n) for side, n in zip(voxels, shape, strict=True)])


def _whole(uniform: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return whole numbers from ``least`` to ``most``, inclusive, from uniform numbers in [0, 1)."""
    return least + (uniform * (most - least + 1)).long()


def _shuffled_places(
    shape: Sequence[int], window: Sequence[int], shift: Sequence[int], seed: int, device: torch.device
) -> Tensor:
    """Return the voxel of the same window that replaces each voxel (voxels,), in C order."""
    number = torch.zeros(tuple(shape), dtype=torch.long, device=device)
    for axis, (length, side, cut) in enumerate(zip(shape, window, shift, strict=True)):
        along = (torch.arange(length, device=device) + cut) // side
        windows = (length - 1 + cut) // side + 1
        number = number * windows + along.view([-1 if other == axis else 1 for other in range(len(shape))])
    number = number.flatten()
    generator = torch.Generator(device).manual_seed(seed)
    key = torch.randint(2**KEY_BITS, number.shape, generator=generator, device=device)
    # Both sorted lists go window by window: this one in random order, the one below in the order of the voxels.
    mixed = (number << KEY_BITS | key).argsort(stable=True)
    places = torch.empty_like(mixed)
    places[number.int().argsort(stable=True)] = mixed  # a sort of int32 takes half the time
    return places


def _noise(volume: Tensor, bounds: Tensor, seed: int) -> Tensor:
    """Return uniform noise for a volume (channel, *shape) between each channel's bounds (channel, 2)."""
    generator = torch.Generator(volume.device).manual_seed(seed)
    uniform = torch.rand(volume.shape, generator=generator, device=volume.device, dtype=volume.dtype)
    low, high = (bound.view(-1, *(1,) * (volume.ndim - 1)) for bound in bounds.unbind(dim=1))
    return low + (high - low) * uniform


def _check(ranges: CorruptionRange) -> None:
    for name in ("paint_probability", "inpainting_share", "box_continues", "shuffle_probability"):
        if not 0 <= getattr(ranges, name) <= 1:
            raise ValueError(f"{name} must be within [0, 1], got {getattr(ranges, name)}")
    for name in ("inpainting_side", "outpainting_side"):
        low, high = getattr(ranges, name)
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name} must be two ascending numbers within (0, 1], got {(low, high)}")
    if ranges.boxes < 1:
        raise ValueError(f"boxes must be at least 1, got {ranges.boxes}")
    if ranges.margin_vox < 0:
        raise ValueError(f"margin_vox must be at least 0, got {ranges.margin_vox}")
    if ranges.shuffle_side_mm is not None and ranges.shuffle_side_mm <= 0:
        raise ValueError(f"shuffle_side_mm must be above 0, got {ranges.shuffle_side_mm}")
