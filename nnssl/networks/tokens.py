"""Tokens: cutting maps and patches into tokens and joining them, their position embeddings, and transformer blocks.

Tokens are counted in C order of their grid.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

MLP_RATIO = 4
"""Ratio of a block's hidden width to its token width (Dosovitskiy et al. 2021, table 1)."""


def map_to_tokens(feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch tokens channel"]:
    """Cut a feature map into one token per position, in C order of the grid."""
    return feature_map.flatten(2).transpose(1, 2)


def tokens_to_map(
    tokens: Float[Tensor, "batch tokens channel"], grid: Sequence[int]
) -> Float[Tensor, "batch channel *grid"]:
    """Join tokens in C order to a feature map; the inverse of ``map_to_tokens``."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def take_tokens(
    tokens: Float[Tensor, "batch tokens channel"], places: Int[Tensor, "batch taken"]
) -> Float[Tensor, "batch taken channel"]:
    """Return the tokens of each sample at the given indices, in this order."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def cut_into_tokens(
    volumes: Shaped[Tensor, "batch channel *shape"], token_vox: Sequence[int]
) -> Shaped[Tensor, "batch tokens values"]:
    """Return the voxels of every token, channels first; tokens in C order of the grid.

    Args:
        volumes: Patches or masks whose shape is a multiple of the token's.
        token_vox: Number of voxels of a token along each axis.
    """
    cells = volumes
    for axis, size in enumerate(token_vox):
        cells = cells.unflatten(2 + 2 * axis, (-1, size))  # (batch, channel, cells, size, cells, size, ...)
    axes = len(token_vox)
    order = [0, *(2 + 2 * axis for axis in range(axes)), 1, *(3 + 2 * axis for axis in range(axes))]
    return cells.permute(order).flatten(1 + axes).flatten(1, axes)


def join_tokens(
    tokens: Float[Tensor, "batch tokens values"], grid: Sequence[int], token_vox: Sequence[int], channels: int
) -> Float[Tensor, "batch channel *shape"]:
    """Return volumes from the voxels of every token; the inverse of ``cut_into_tokens``.

    Args:
        tokens: Voxels of each token, channels first.
        grid: Number of tokens along each axis.
        token_vox: Number of voxels of a token along each axis.
        channels: Number of channels of the volumes.
    """
    axes = len(token_vox)
    cells = tokens.unflatten(2, (channels, *token_vox)).unflatten(1, tuple(grid))
    order = [0, 1 + axes, *(place for axis in range(axes) for place in (1 + axis, 2 + axes + axis))]
    shape = [count * size for count, size in zip(grid, token_vox, strict=True)]
    return cells.permute(order).reshape(len(tokens), channels, *shape)


def sine_cosine_positions(
    grid: Sequence[int], width: int, device: torch.device | None = None
) -> Float[Tensor, "tokens width"]:
    """Return fixed sine-cosine position embeddings for a grid of tokens.

    Source: Vaswani et al. 2017, section 3.5, with an equal share of the channels for each axis (as MAE does in 2D).

    Args:
        grid: Number of tokens along each axis; tokens are counted in C order.
        width: Width of a token. Channels that do not divide evenly into a sine and a cosine per axis are 0.
        device: Device of the result.

    Returns:
        Embeddings in float32. They depend only on the grid and the width, so that another patch size needs no new weights.
    """
    frequencies = width // (2 * len(grid))
    scale = torch.exp(-math.log(10_000.0) * torch.arange(frequencies, device=device, dtype=torch.float32) / frequencies)
    axes = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid), indexing="ij")
    parts = []
    for axis in axes:
        angle = axis.reshape(-1, 1) * scale
        parts += [angle.sin(), angle.cos()]
    positions = torch.cat(parts, dim=1)
    return nn.functional.pad(positions, (0, width - positions.shape[1]))


def transformer_blocks(width: int, depth: int, heads: int) -> nn.Module:
    """Return pre-norm transformer blocks with a final norm, as in a vision transformer (GELU, no dropout)."""
    block = nn.TransformerEncoderLayer(
        width, heads, MLP_RATIO * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def initialise_linear(module: nn.Module) -> None:
    """Give linear layers and attention projections Xavier-uniform weights and zero biases, as MAE does.

    Biases as ``nn.Linear`` draws them would be far larger than the differences between tokens.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.MultiheadAttention):
            nn.init.xavier_uniform_(child.in_proj_weight)
