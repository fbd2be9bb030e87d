"""Which tokens of a grid are masked.

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

    The grid is tiled with blocks from its origin (the last ones are smaller where the grid is no multiple). Blocks are
    taken in random order; of the last one only as many tokens are masked, at random, as are still missing.

    Args:
        generators: one per sample.
        grid: tokens per axis, (z, y, x) or (y, x).
        block: tokens per axis of a block.
        ratio: share of masked tokens, above 0; at least one token must stay visible.

    Returns:
        True where a token is masked, on the CPU; tokens in C order of the grid.

    Raises:
        ValueError: grid and block differ in the number of axes, or no token would stay visible or masked.
    """
    if len(grid) != len(block):
        raise ValueError(f"a grid of {len(grid)} axes cannot be tiled with a block of {len(block)}")
    tokens = math.prod(grid)
    # 0.55 * 100 is 55.00000000000001, whose ceiling is 56
    masked = math.ceil(ratio * tokens - 1e-9)
    if not 0 < masked < tokens:
        raise ValueError(f"masking {ratio:g} of {tokens} tokens leaves none visible or none masked")
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
        # sorting stably by block keeps the tokens of a block in shuffled order, which trims the last block at random
        order = shuffled[block_order[block_of_token[shuffled]].argsort(stable=True)]
        mask[sample, order[:masked]] = True
    return mask


def visible_tokens(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch visible"]:
    """Return the places of the visible tokens of each sample, ascending.

    Ask before the mask moves to a device: counting tokens there would make the host wait.

    Raises:
        ValueError: the samples differ in how many tokens are masked.
    """
    counts = mask.sum(dim=1)
    least, most = torch.stack([counts.min(), counts.max()]).tolist()
    if least != most:
        raise ValueError(f"samples have between {least} and {most} masked tokens; a batch needs one number")
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1] - most]


def check_mask(grid: Sequence[int], block: Sequence[int], ratio: float) -> None:
    """Check that blocks that a user may have set fit a grid, before anything is drawn.

    Raises:
        UserError: they do not; names the settings.
    """
    if len(grid) != len(block):
        raise UserError(
            f"--set mask_block={','.join(map(str, block))}: the grid of tokens has {len(grid)} axes; give one number for each"
        )
    try:
        draw_block_mask([], grid, block, ratio)
    except ValueError as error:
        raise UserError(f"mask_ratio={ratio:g}: {error}; --set another") from error
