"""Primus, a vision transformer for volumes, as a plan's network: all but its last layer fits any number of classes.

Source: Wald et al., Primus: Enforcing Attention Usage for 3D Medical Image Segmentation, 2025; its implementation in
dynamic-network-architectures, whose names the parameters of the encoder keep (``down_projection``, ``eva``).

Deviations: the widths of Primus's decoder depend on the number of classes, so that no pretrained decoder, and not even its
random start, would fit another data set. Here it ends in a fixed number of features, and a segmentation layer of one voxel
follows. nnU-Net asks for that layer by the name of its U-Nets' (``decoder.seg_layers``).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.primus import Primus
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl.networks.tokens import map_to_tokens, take_tokens


class SegmentationLayer(nn.Module):
    """The last layer, under the names that nnU-Net gives those of its U-Nets.

    Args:
        features: of the map.
        classes: of the segmentation.
        deep_supervision: whether logits come in a list, as nnU-Net's loss then wants them; there is one resolution.
    """

    def __init__(self, features: int, classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([nn.Conv3d(features, classes, 1)])
        self.deep_supervision = deep_supervision

    def forward(self, feature_map: Float[Tensor, "batch feature z y x"]) -> Tensor | list[Tensor]:
        """Return logits (batch, class, z, y, x), in a list with deep supervision."""
        logits = self.seg_layers[0](feature_map)
        return [logits] if self.deep_supervision else logits


class PlannedPrimus(Primus):
    """Primus as nnU-Net builds a plan's network.

    Args:
        input_channels: of the images.
        num_classes: outputs of the segmentation layer.
        deep_supervision: see ``SegmentationLayer``.
        embed_dim: channels of a token; a multiple of six times ``eva_numheads``.
        eva_depth: number of blocks.
        eva_numheads: attention heads.
        patch_embed_size: voxels of a token, (z, y, x), powers of two.
        input_shape: voxels of the patch, which is fixed; a multiple of the token along every axis.
        decoder_features: of the map that the segmentation layer reads.
        drop_path_rate: share of the last block's samples that skip it in training, rising from 0 over the blocks.
        strides: of no use here; nnU-Net reads from a plan at which resolutions logits come.

    Raises:
        ValueError: patch and token do not fit, or the width does not fit the heads.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        embed_dim: int,
        eva_depth: int,
        eva_numheads: int,
        patch_embed_size: Sequence[int],
        input_shape: Sequence[int],
        decoder_features: int,
        deep_supervision: bool = False,
        drop_path_rate: float = 0.0,
        strides: Sequence[Sequence[int]] = (),
    ) -> None:
        check_size(embed_dim, eva_numheads, patch_embed_size, input_shape)
        super().__init__(
            input_channels,
            embed_dim,
            tuple(patch_embed_size),
            decoder_features,
            eva_depth,
            eva_numheads,
            tuple(input_shape),
            drop_path_rate=drop_path_rate,
            init_values=0.1,  # these two as in nnU-Net's own trainers of Primus
            scale_attn_inner=True,
        )
        self.token_vox = tuple(patch_embed_size)
        self.grid = tuple(n // token for n, token in zip(input_shape, patch_embed_size, strict=True))
        self.decoder = SegmentationLayer(decoder_features, num_classes, deep_supervision)

    def forward(self, x: Float[Tensor, "batch channel z y x"], ret_mask: bool = False) -> Any:
        """Return logits, in a list with deep supervision; the second argument is Primus's and has no use."""
        return self.decoder(super().forward(x))

    def encode(
        self, volumes: Float[Tensor, "batch channel z y x"], visible: Int[Tensor, "batch visible"] | None = None
    ) -> Float[Tensor, "batch visible width"]:
        """Return tokens of patches, all of them or the visible ones, which then see nothing of the others.

        Args:
            volumes: patches.
            visible: which tokens each patch shows, counted in C order of the grid.
        """
        return encode_tokens(self.down_projection, self.eva, volumes, visible)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return nnU-Net's measure of memory for one patch: the number of values that layers put out."""
        tokens = math.prod(n // token for n, token in zip(input_size, self.token_vox, strict=True))
        first: Any = self.eva.blocks[0]
        mlp = first.mlp.fc2.in_features
        per_block = (3 + 1 + 1) * self.embed_dim + 2 * mlp
        total = tokens * (self.embed_dim + len(self.eva.blocks) * per_block)
        size = list(input_size)
        for stage in reversed(self.up_projection.decode):
            convolution: Any = stage[0] if isinstance(stage, nn.Sequential) else stage
            total += convolution.out_channels * math.prod(size)
            size = [n // step for n, step in zip(size, convolution.stride, strict=True)]
        last: Any = self.decoder.seg_layers[0]
        return total + last.out_channels * math.prod(input_size)


def encode_tokens(
    down_projection: Any, eva: Any, volumes: Float[Tensor, "batch channel z y x"], visible: Tensor | None
) -> Float[Tensor, "batch visible width"]:
    """Return tokens from the two parts of Primus's encoder; see ``PlannedPrimus.encode``."""
    tokens = map_to_tokens(down_projection(volumes)) + eva.pos_embed
    rotation = eva.rope.get_embed()  # (tokens, sine and cosine)
    if visible is not None:
        tokens = take_tokens(tokens, visible)
        # with an axis for the heads: without it the batch would be taken for heads where both are as many
        rotation = rotation[visible][:, None]
    for block in eva.blocks:
        tokens = block(tokens, rope=rotation)
    return eva.norm(tokens)


def check_size(width: int, heads: int, token_vox: Sequence[int], shape: Sequence[int]) -> None:
    """Check what Primus can be built for.

    Raises:
        ValueError: a token that is no power of two along some axis, or along all of them one voxel; a patch that is no
            multiple of it; a width that is no multiple of six times the heads, for the rotary embedding of three axes.
    """
    if len(token_vox) != 3 or len(shape) != 3:
        raise ValueError(f"Primus takes volumes, not patches of {tuple(shape)}")
    if any(size < 1 or size & (size - 1) for size in token_vox) or max(token_vox) < 2:
        raise ValueError(f"tokens of {tuple(token_vox)} voxels: every side must be a power of two, and one more than 1")
    if any(n % size for n, size in zip(shape, token_vox, strict=True)):
        raise ValueError(f"a patch of {tuple(shape)} voxels is no multiple of tokens of {tuple(token_vox)}")
    if width % (6 * heads):
        raise ValueError(f"width {width} is no multiple of six times {heads} heads")


def resample_positions(
    positions: Float[Tensor, "1 tokens width"], grid: Sequence[int], new_grid: Sequence[int]
) -> Float[Tensor, "1 new_tokens width"]:
    """Return learned position embeddings for another grid of tokens, interpolated linearly, as unchanged where grids agree.

    Args:
        positions: in C order of the grid.
        grid: tokens per axis that they were learned for.
        new_grid: tokens per axis that are wanted.
    """
    if tuple(grid) == tuple(new_grid):
        return positions
    volume = positions.transpose(1, 2).unflatten(2, tuple(grid))
    resampled = torch.nn.functional.interpolate(volume.float(), tuple(new_grid), mode="trilinear", align_corners=False)
    return map_to_tokens(resampled).to(positions.dtype)
