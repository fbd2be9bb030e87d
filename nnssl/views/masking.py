"""Random masks of the tokens of a grid.

Source: He et al., MAE, CVPR 2022, section 3 (a fixed share at random); Xie et al., SimMIM, CVPR 2022 (whole blocks).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnssl.errors import UserError


def draw_block_mask(
    generators: Sequence[torch.Generator], grid: Sequence[int], block: Sequence[int], ratio: float
) -> Bool[Tensor, "batch tokens"]:
    """Draw whole blocks of tokens until exactly ``ceil(ratio * N)`` of each sample's N tokens are masked.

    The grid is tiled with blocks from its origin; the last ones are smaller if the grid is not a multiple of the block. Blocks
    are masked in random order. In the last one, only as many random tokens are masked as are still missing.

    Args:
        generators: One generator per sample.
        grid: Number of tokens per axis, (z, y, x) or (y, x).
        block: Number of tokens per axis of a block.
        ratio: Share of masked tokens, above 0; at least one token must stay visible.

    Returns:
        Mask that is True for masked tokens, on the CPU; tokens are in C order of the grid.

    Raises:
        ValueError: If grid and block differ in the number of axes, or no token would stay visible or be masked.
    """
    if len(grid) != len(block):
        raise ValueError(f"block must have {len(grid)} axes, as the grid has, got {len(block)}")
    tokens = math.prod(grid)
    # Without the subtraction, rounding errors would mask one token too many: 0.55 * 100 is 55.00000000000001.
    masked = math.ceil(ratio * tokens - 1e-9)
    if not 0 < masked < tokens:
        raise ValueError(f"ratio must leave some of {tokens} tokens visible and some masked, got {ratio:g}")
    blocks_per_axis = [-(-length // side) for length, side in zip(grid, block, strict=True)]
    block_of_token = torch.zeros(tuple(grid), dtype=torch.long)
    for axis, (length, side, count) in enumerate(zip(grid, block, blocks_per_axis, strict=True)):
        place = (torch.arange(length) // side).view([-1 if other == axis else 1 for other in range(len(grid))])
        block_of_token = block_of_token * count + place
    block_of_token = block_of_token.flatten()
    mask = torch.zeros(len(generators), tokens, dtype=torch.bool)
    for sample, generator in enumerate(generators):
        block_order = torch.randperm(math.prod(blocks_per_axis), generator=generator)
        shuffled = torch.randperm(tokens, generator=generator)
        # A stable sort by block keeps the tokens of a block in random order, so that the last block is masked at random.
        order = shuffled[block_order[block_of_token[shuffled]].argsort(stable=True)]
        mask[sample, order[:masked]] = True
    return mask


def visible_tokens(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch visible"]:
    """Return the indices of each sample's visible tokens, ascending.

    Call this before the mask is moved to a device, because counting tokens there would make the host wait.

    Raises:
        ValueError: If the samples differ in the number of masked tokens.
    """
    counts = mask.sum(dim=1)
    least, most = torch.stack([counts.min(), counts.max()]).tolist()
    if least != most:
        raise ValueError(
            f"all samples of mask must have the same number of masked tokens, got between {least} and {most}"
        )
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1] - most]


def check_mask(grid: Sequence[int], block: Sequence[int], ratio: float) -> None:
    """Check that the settings ``mask_block`` and ``mask_ratio`` fit a grid, before anything is drawn.

    Raises:
        UserError: If they do not fit; the message names the setting.
    """
    if len(grid) != len(block):
        raise UserError(
            f"mask_block must have {len(grid)} numbers, one for each axis of the token grid, got {','.join(map(str, block))}"
        )
    try:
        draw_block_mask([], grid, block, ratio)
    except ValueError as error:
        raise UserError(
            f"mask_ratio must leave some of {math.prod(grid)} tokens visible and some masked, got {ratio:g}"
        ) from error
