"""The mask of a case that is true where a pretext method may learn: the body, without regions that were masked out.

Source: Wald et al., Revisiting MAE Pre-training for 3D Medical Image Segmentation, CVPR 2025, whose reconstruction loss leaves
out anonymised regions; Otsu, IEEE Trans. SMC 9(1), 1979, for the thresholds.

``nnssl.data.body.body_mask`` finds bright voxels, for statistics and for the centres of patches. This mask is generous instead,
because no anatomy may be thrown away: dim tissue, fat, lungs and gas in the bowel belong to the body. It is computed on blocks of
about 3 mm:

1. Air is what is as dark as the darkest voxels, up to their spread. An image without air belongs to the body as a whole.
2. Of the rest, large connected parts are the body, which drops the table of a scanner.
3. Whatever the body encloses in a slice along any of the three axes belongs to it. Gaps of up to 20 mm are closed before this is
   done again. Dark regions that touch little of the border of the image are organs that the field of view cuts.
4. Constant slices at the ends of the image are padding. Solid regions of one constant value, zero or the lowest, are padding or
   were masked out (defaced) if they reach the air, or, in an image without air, the border of the image. Such regions inside the
   body, for example gas at the lowest value that a file stores, stay in the mask.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32
from scipy import ndimage
from skimage.filters import threshold_otsu

from nnssl.data.body import AIR_LEVEL, scale_by_power_of_two, spread_sample
from nnssl.data.bounding_box import find_box

LEARNABLE_VERSION = 1
"""Version of this computation; cases whose masks another version computed are preprocessed again."""
BLOCK_MM = 3.0
"""Largest edge of the blocks on which the mask is computed; voxels that are larger are blocks of their own."""
LEAST_VOXELS = 4
"""Number of voxels of a block below which neighbouring blocks are averaged, not counting those along much thicker axes."""
AIR_SPREADS = 4.0
"""Number of standard deviations above the median of the air up to which a block counts as air."""
AIR_MARGIN = 0.02
"""Width that is added to this range, as a fraction of the range of intensities from percentile 0.5 to 99.5."""
LOWEST_HU = -1100.0
"""Value below which CT measures nothing (air has -1000), so that a constant region of lower values is padding."""
PADDING_GAP = 0.1
"""Smallest distance of such padding from all other values, as a fraction of their range."""
PART_SHARE = 0.1
"""Smallest size of a connected part of the body, as a share of the largest part."""
GAP_MM = 20.0
"""Largest gap in the outline of the body that is closed."""
BORDER_SHARE = 0.15
"""Smallest share of the border of all slices along the thickest axis that connected air covers; other dark regions at the
border are organs that the field of view cuts. On ACDC, air covered 0.15 to 0.96 of it, and lungs up to 0.12."""
SOLID_MM = 9.0
"""Smallest thickness of a constant region that counts as masked out; thin leaks between such regions do not join them."""


def learnable_mask(
    volume: Float32[np.ndarray, "channel z y x"], spacing_mm: Sequence[float]
) -> Bool[np.ndarray, "z y x"]:
    """Compute where a method may learn, without labels.

    Args:
        volume: Finite intensities as measured; the first channel decides what is air.
        spacing_mm: Spacing (z, y, x) in mm.

    Returns:
        Mask that is true inside the body. For a volume without contrast, it is true everywhere.
    """
    volume = scale_by_power_of_two(volume)
    whole = np.zeros(volume.shape[1:], dtype=bool)
    constant = _constant_voxels(volume)
    if constant.all():
        return ~whole
    box = find_box(~constant)
    whole[box] = _mask_of_box(volume[0][box], constant[box], spacing_mm)
    return whole


def _mask_of_box(
    first: Float32[np.ndarray, "z y x"], constant: Bool[np.ndarray, "z y x"], spacing_mm: Sequence[float]
) -> Bool[np.ndarray, "z y x"]:
    edges = [max(1, int(BLOCK_MM / mm)) for mm in spacing_mm]
    block_mm = [edge * mm for edge, mm in zip(edges, spacing_mm, strict=True)]
    blocks = _smoothed(block_means(first, edges), edges, block_mm)
    enclosed = _body_of_blocks(blocks, block_mm, _highest_air(_values_above_padding(first, constant, blocks)))
    outside = ~enclosed if not enclosed.all() else _faces(enclosed.shape, range(3))
    body = enclosed | _cut_off_parts(~enclosed, int(np.argmax(block_mm)))
    solid = ~block_means((~constant).astype(np.float32), edges).astype(bool)
    masked_out = _enlarge(_solid_regions(solid, outside, block_mm), edges, first.shape)
    return _enlarge(body, edges, first.shape) & ~(constant & masked_out)


def resample_mask(mask: Bool[np.ndarray, "z y x"], shape: Sequence[int]) -> Bool[np.ndarray, "z2 y2 x2"]:
    """Resample a mask to another grid over the same field of view, by the nearest voxel."""
    places = [
        np.minimum(((np.arange(wanted) + 0.5) * length / wanted).astype(int), length - 1)
        for length, wanted in zip(mask.shape, shape, strict=True)
    ]
    return mask[np.ix_(*places)]


def fill_slices(mask: Bool[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """Add what the mask encloses in a slice along any of the three axes.

    A region is enclosed in a slice if no path through the slice leads from it to the border of the slice, without crossing
    corners of the mask.
    """
    filled = mask.copy()
    for axis in range(3):
        within = [other for other in range(3) if other != axis]
        neighbours = ndimage.generate_binary_structure(3, 1)
        neighbours[tuple(slice(None) if other != axis else slice(0, 3, 2) for other in range(3))] = False
        parts, count = ndimage.label(~mask, neighbours)
        is_open = np.zeros(count + 1, bool)
        for other in within:
            is_open[parts.take(0, other)] = True
            is_open[parts.take(-1, other)] = True
        is_open[0] = True  # the mask itself
        filled |= ~is_open[parts]
    return filled


def block_means(
    values: Float32[np.ndarray, "z y x"], edges: Sequence[int]
) -> Float32[np.ndarray, "block_z block_y block_x"]:
    """Return the mean of each block of voxels; the last ones are smaller if the volume is no multiple of the block."""
    for axis, edge in enumerate(edges):
        if edge > 1:
            starts = np.arange(0, values.shape[axis], edge)
            sizes = np.diff(np.append(starts, values.shape[axis])).astype(np.float32)
            sums = np.add.reduceat(values, starts, axis=axis)
            values = sums / sizes.reshape([-1 if other == axis else 1 for other in range(3)])
    return values


def _smoothed(
    blocks: Float32[np.ndarray, "z y x"], edges: Sequence[int], block_mm: Sequence[float]
) -> Float32[np.ndarray, "z y x"]:
    """Return the means of neighbouring blocks if a block has fewer than four voxels, whose noise would pass for dim tissue."""
    if np.prod(edges) >= LEAST_VOXELS:
        return blocks
    near = [3 if mm <= 2 * min(block_mm) else 1 for mm in block_mm]
    return ndimage.uniform_filter(blocks, near, mode="nearest")


def _values_above_padding(
    first: Float32[np.ndarray, "z y x"], constant: Bool[np.ndarray, "z y x"], blocks: Float32[np.ndarray, "z y x"]
) -> Float32[np.ndarray, "..."]:
    """Return the values that air is found in: of blocks, or of voxels that are not padded far below air, as CT often is."""
    if constant.any() and first.min() < LOWEST_HU:
        rest = first[~constant]
        low, high = np.percentile(spread_sample(rest), (0.5, 99.5))
        if low - first.min() > PADDING_GAP * (high - low):
            return rest
    return blocks


def _body_of_blocks(
    blocks: Float32[np.ndarray, "z y x"], block_mm: Sequence[float], air: float | None
) -> Bool[np.ndarray, "z y x"]:
    if air is None:
        return np.ones_like(blocks, dtype=bool)
    parts, _ = ndimage.label(blocks > air)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    body = fill_slices((sizes >= max(1, PART_SHARE * sizes.max()))[parts])
    return fill_slices(_closed(body, _lengths(GAP_MM, block_mm)))


def _cut_off_parts(outside: Bool[np.ndarray, "z y x"], thick_axis: int) -> Bool[np.ndarray, "z y x"]:
    """Return connected parts of the outside that cover little of the border: lungs that the field of view cuts."""
    border = _faces(outside.shape, [axis for axis in range(3) if axis != thick_axis])
    parts, count = ndimage.label(outside)
    covered = np.bincount(parts[border], minlength=count + 1)
    small = covered < BORDER_SHARE * border.sum()
    small[0] = False
    return small[parts]


def _highest_air(values: Float32[np.ndarray, "..."]) -> float | None:
    """Return the intensity up to which values are air; None if there is no air, as in a crop around an organ."""
    values = spread_sample(values)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        return None
    values = np.clip(values, low, high)
    dark = values[values <= threshold_otsu(values)]
    if np.median(dark) - low >= AIR_LEVEL * (high - low):
        return None
    # The dark class of an image of low contrast contains dim tissue, which a second threshold separates from the air.
    second = threshold_otsu(dark) if np.ptp(dark) > 0 else low
    darkest = dark[dark <= second]
    median = np.median(darkest)
    # The spread is measured below the median, because dim tissue lies above it.
    spread = np.sqrt(np.square(darkest[darkest <= median] - median).mean())
    highest = median + AIR_SPREADS * spread + AIR_MARGIN * (high - low)
    return float(min(highest, second) if np.ptp(dark) > 0 else highest)


def _constant_voxels(volume: Float32[np.ndarray, "channel z y x"]) -> Bool[np.ndarray, "z y x"]:
    """Return where all channels are 0, or all have their lowest value."""
    constant = np.all(volume == 0, axis=0)
    lowest = volume.min(axis=(1, 2, 3), keepdims=True)
    return constant | np.all(volume == lowest, axis=0) if lowest.any() else constant


def _solid_regions(
    constant: Bool[np.ndarray, "z y x"], outside: Bool[np.ndarray, "z y x"], block_mm: Sequence[float]
) -> Bool[np.ndarray, "z y x"]:
    """Return the surroundings of those solid constant regions that reach the outside."""
    lengths = _lengths(SOLID_MM, block_mm)
    cores = ndimage.minimum_filter(constant.view(np.uint8), lengths, mode="nearest")
    parts, count = ndimage.label(ndimage.maximum_filter(cores, lengths, mode="nearest"))
    near = ndimage.maximum_filter(outside.view(np.uint8), 3, mode="nearest").astype(bool)
    chosen = np.zeros(count + 1, bool)
    chosen[np.unique(parts[near])] = True
    chosen[0] = False
    return ndimage.maximum_filter(chosen[parts].view(np.uint8), 3, mode="nearest").astype(bool)


def _closed(mask: Bool[np.ndarray, "z y x"], lengths: Sequence[int]) -> Bool[np.ndarray, "z y x"]:
    """Return the closing of a mask with a box; beyond the volume there is no mask."""
    pads = [(length // 2, length // 2) for length in lengths]
    grown = ndimage.maximum_filter(np.pad(mask, pads).view(np.uint8), lengths, mode="constant")
    closed = ndimage.minimum_filter(grown, lengths, mode="constant", cval=1).astype(bool)
    return closed[tuple(slice(pad, pad + extent) for (pad, _), extent in zip(pads, mask.shape, strict=True))] | mask


def _lengths(length_mm: float, block_mm: Sequence[float]) -> list[int]:
    """Return the odd number of blocks along each axis that is nearest to a length."""
    return [2 * round(length_mm / mm / 2) + 1 for mm in block_mm]


def _faces(shape: Sequence[int], axes: Sequence[int]) -> Bool[np.ndarray, "z y x"]:
    """Return the first and last blocks along axes; an axis of one block has no border."""
    faces = np.zeros(tuple(shape), bool)
    for axis in axes:
        if shape[axis] > 1:
            at = np.moveaxis(faces, axis, 0)
            at[0] = at[-1] = True
    return faces


def _enlarge(
    blocks: Bool[np.ndarray, "block_z block_y block_x"], edges: Sequence[int], shape: Sequence[int]
) -> Bool[np.ndarray, "z y x"]:
    """Return the mask of the voxels of all blocks in a mask."""
    return blocks[np.ix_(*(np.arange(length) // edge for length, edge in zip(shape, edges, strict=True)))]
