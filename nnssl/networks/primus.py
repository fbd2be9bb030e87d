"""Primus, a vision transformer for volumes, as a plan's network, whose weights except the last layer fit any number of classes.

Source: Wald et al., Primus: Enforcing Attention Usage for 3D Medical Image Segmentation, 2025, and its implementation in
dynamic-network-architectures. The encoder's parameters keep the names that they have there (``down_projection``, ``eva``).

Deviations: the widths of Primus's decoder depend on the number of classes, so neither a pretrained decoder nor its random
initialisation would fit another data set. Here the decoder ends in a fixed number of features, followed by a segmentation layer
with a kernel of one voxel. nnU-Net finds this layer under the name that it has in its U-Nets (``decoder.seg_layers``).
"""

import math
from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.architectures.primus import Primus
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl.networks.primus_positions import INIT_VALUES, SCALE_ATTN_INNER, encode_tokens


class SegmentationLayer(nn.Module):
    """The segmentation layer, under the names that nnU-Net's U-Nets have for theirs.

    Args:
        features: Number of features of the map.
        classes: Number of classes of the segmentation.
        deep_supervision: Whether logits are returned in a list, as nnU-Net's loss for deep supervision requires; it contains
            one resolution.
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
    """Primus with the constructor that nnU-Net calls for a plan's network.

    Args:
        input_channels: Number of channels of the images.
        num_classes: Number of outputs of the segmentation layer.
        deep_supervision: See ``SegmentationLayer``.
        embed_dim: Width of a token, a multiple of six times ``eva_numheads``.
        eva_depth: Number of blocks.
        eva_numheads: Number of attention heads.
        patch_embed_size: Number of voxels of a token, (z, y, x), powers of two.
        input_shape: Number of voxels of the patch, which is fixed and a multiple of the token along every axis.
        decoder_features: Number of features of the map that the segmentation layer reads.
        drop_path_rate: Share of samples that skip the last block in training; it rises from 0 over the blocks.
        strides: Not used here; nnU-Net reads from the plan's strides at which resolutions there are logits.

    Raises:
        ValueError: If patch and token do not fit, or the width does not fit the heads.
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
            init_values=INIT_VALUES,
            scale_attn_inner=SCALE_ATTN_INNER,
        )
        self.token_vox = tuple(patch_embed_size)
        self.grid = tuple(n // token for n, token in zip(input_shape, patch_embed_size, strict=True))
        self.decoder = SegmentationLayer(decoder_features, num_classes, deep_supervision)

    def forward(self, x: Float[Tensor, "batch channel z y x"], ret_mask: bool = False) -> Any:
        """Return logits, in a list with deep supervision; ``ret_mask`` is an argument of Primus and is ignored."""
        return self.decoder(super().forward(x))

    def encode(
        self, volumes: Float[Tensor, "batch channel z y x"], visible: Int[Tensor, "batch visible"] | None = None
    ) -> Float[Tensor, "batch visible width"]:
        """Return all encoded tokens of patches, or only the visible ones, which then do not depend on the others.

        Args:
            volumes: Patches.
            visible: Indices of each patch's visible tokens, in C order of the grid; None for all tokens.
        """
        return encode_tokens(self.down_projection, self.eva, volumes, visible)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return nnU-Net's measure of memory for one patch, the number of output values of all layers."""
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


def check_size(width: int, heads: int, token_vox: Sequence[int], shape: Sequence[int]) -> None:
    """Check that Primus can be built with these sizes.

    Args:
        width: Width of a token (``embed_dim``).
        heads: Number of attention heads (``eva_numheads``).
        token_vox: Number of voxels of a token along each axis (``patch_embed_size``).
        shape: Number of voxels of the patch along each axis (``input_shape``).

    Raises:
        ValueError: If the patch or the token does not have three axes, a side of the token is not a power of two, the token is
            a single voxel, the patch is not a multiple of the token, or the width is not a multiple of six times the heads, as
            the rotary embedding of three axes requires.
    """
    if len(token_vox) != 3 or len(shape) != 3:
        raise ValueError(
            f"input_shape and patch_embed_size must have 3 axes, got {tuple(shape)} and {tuple(token_vox)}"
        )
    if any(size < 1 or size & (size - 1) for size in token_vox) or max(token_vox) < 2:
        raise ValueError(f"patch_embed_size must be powers of two, at least one above 1, got {tuple(token_vox)}")
    if any(n % size for n, size in zip(shape, token_vox, strict=True)):
        raise ValueError(f"input_shape must be a multiple of patch_embed_size {tuple(token_vox)}, got {tuple(shape)}")
    if width % (6 * heads):
        raise ValueError(f"embed_dim must be a multiple of six times the {heads} heads, got {width}")
