"""What of Primus needs no class of it: position embeddings, the patch in an architecture, and encoding by its two parts.

``nnssl.networks.primus`` builds it and imports timm and torchvision for that, which takes longer than all else that a command
imports besides PyTorch and nnU-Net.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.tokens import map_to_tokens, take_tokens

MODULE = "nnssl.networks.primus"
"""Module of the class of Primus, imported when a network is built."""
POSITIONS = "eva.pos_embed"
"""Name of the position embeddings, the only weights whose shape depends on the patch."""

INIT_VALUES, SCALE_ATTN_INNER = 0.1, True
"""Scale of a block's output at the start, and whether attention is normalised within; those of nnU-Net's trainers of Primus."""


def is_primus(network: nn.Module) -> bool:
    """Return whether a network is Primus as nnssl plans it."""
    module = sys.modules.get(MODULE)  # no object of a class that was never imported can exist
    return module is not None and isinstance(network, module.PlannedPrimus)


def architecture_of_patch(architecture: dict[str, Any], patch: Sequence[int]) -> dict[str, Any]:
    """Return an architecture for another patch: that of Primus has the patch in it, all others are unchanged."""
    arguments = architecture["arch_kwargs"]
    if "input_shape" not in arguments:
        return architecture
    return {**architecture, "arch_kwargs": {**arguments, "input_shape": list(patch)}}


def fit_positions(
    weights: dict[str, Tensor], shape: Sequence[int], new_shape: Sequence[int], network: nn.Module
) -> None:
    """Resample the position embeddings of Primus's weights to another patch, in place; other weights are unchanged.

    Args:
        weights: Weights by name.
        shape: Number of voxels of the patch that the weights belong to.
        new_shape: Number of voxels of the other patch.
        network: Network that the weights belong to, of any patch.
    """
    if is_primus(network):
        tokens_vox: Any = network.token_vox
        grids = [[n // token for n, token in zip(size, tokens_vox, strict=True)] for size in (shape, new_shape)]
        if weights[POSITIONS].shape[1] != math.prod(grids[1]):
            weights[POSITIONS] = resample_positions(weights[POSITIONS], *grids)


def resample_positions(
    positions: Float[Tensor, "1 tokens width"], grid: Sequence[int], new_grid: Sequence[int]
) -> Float[Tensor, "1 new_tokens width"]:
    """Return learned position embeddings for another grid of tokens by linear interpolation; unchanged if the grids agree.

    Args:
        positions: Position embeddings in C order of the grid.
        grid: Number of tokens per axis for which they were learned.
        new_grid: Number of tokens per axis of the result.
    """
    if tuple(grid) == tuple(new_grid):
        return positions
    volume = positions.transpose(1, 2).unflatten(2, tuple(grid))
    resampled = torch.nn.functional.interpolate(volume.float(), tuple(new_grid), mode="trilinear", align_corners=False)
    return map_to_tokens(resampled).to(positions.dtype)


def encode_tokens(
    down_projection: Any, eva: Any, volumes: Float[Tensor, "batch channel z y x"], visible: Tensor | None
) -> Float[Tensor, "batch visible width"]:
    """Return encoded tokens, given the two parts of Primus's encoder; see ``encode`` of Primus."""
    tokens = map_to_tokens(down_projection(volumes)) + eva.pos_embed
    rotation = eva.rope.get_embed()  # (tokens, sine and cosine)
    if visible is not None:
        tokens = take_tokens(tokens, visible)
        # Without an axis for the heads, the batch would be broadcast over the heads if both have the same size.
        rotation = rotation[visible][:, None]
    for block in eva.blocks:
        tokens = block(tokens, rope=rotation)
    return eva.norm(tokens)
