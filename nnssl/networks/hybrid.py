"""The RepRec network: a convolutional U-Net with a vision transformer on one of its feature maps.

``E_c -> E_t -> D_c`` with skips from every stage of ``E_c`` (Yan et al., Representation Recovering, WACV 2023, figure 2).
Both classes are stock U-Nets of nnU-Net with one additional module, ``transformer``. Encoder and decoder keep the parameter
names of the stock U-Net, so one state dict fits both. A plan names the class, and nnU-Net builds, trains and predicts with it.

Deviations from the paper:
    * In the paper, ``E_t`` stands between encoder and decoder. Here it works on the encoder stage that the plan names, because
      the bottleneck of small patches has too few positions for a transformer. All that follows reads its output: the decoder,
      and the deeper stages of the encoder, if there are any.
    * In the paper, the output of ``E_t`` replaces the feature map. Here the map becomes ``f + gate * project(E_t(f))`` with a
      learned gate that starts at 0, so that a network with random weights starts as the plain U-Net; pretraining sets the gate
      to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.backbone import stage_strides
from nnssl.networks.dense import maps_up_to
from nnssl.networks.tokens import (
    MLP_RATIO,
    initialise_linear,
    map_to_tokens,
    sine_cosine_positions,
    tokens_to_map,
    transformer_blocks,
)


class BottleneckTransformer(nn.Module):
    """``E_t``: embeds the positions of a feature map as tokens, relates them, and adds the result to the map.

    Args:
        channels: Number of channels of the feature map.
        width: Width of a token, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Number of attention heads.
    """

    def __init__(self, channels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.depth = depth
        self.embed = nn.Linear(channels, width)
        self.blocks = transformer_blocks(width, depth, heads)
        self.project = nn.Linear(width, channels)
        self.gate = nn.Parameter(torch.zeros(1))
        initialise_linear(self)

    def encode(
        self, features: Float[Tensor, "batch tokens channel"], positions: Float[Tensor, "#batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Embed features, add positions and run the blocks, for all tokens of a map or any subset."""
        return self.blocks(self.embed(features) + positions)

    def forward(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch channel *grid"]:
        """Return the feature map plus the gated output of the transformer."""
        grid = feature_map.shape[2:]
        positions = sine_cosine_positions(grid, self.width, feature_map.device)
        tokens = self.encode(map_to_tokens(feature_map), positions[None])
        return feature_map + self.gate * tokens_to_map(self.project(tokens), grid)

    def compute_feature_size(self, tokens: int) -> int:
        """Return nnU-Net's measure of memory, the number of output values of the linear layers for one sample."""
        per_block = (3 + 1 + MLP_RATIO + 1) * self.width
        return tokens * (2 * self.width + self.depth * per_block)


class _TransformerOnStage(nn.Module):
    """Mixin that adds a transformer to one encoder stage of the U-Net class that follows it among the bases.

    Args:
        token_stage: Encoder stage whose positions become tokens; 0 is full resolution.
        transformer_width: Width of a token.
        transformer_depth: Number of transformer blocks.
        transformer_heads: Number of attention heads.
        **unet: Arguments of the U-Net.

    Raises:
        ValueError: If the encoder does not have the stage.
    """

    encoder: Any
    decoder: Any

    def __init__(
        self, *, token_stage: int, transformer_width: int, transformer_depth: int, transformer_heads: int, **unet: Any
    ) -> None:
        super().__init__(**unet)
        channels = self.encoder.output_channels
        if not 0 <= token_stage < len(channels):
            raise ValueError(f"token_stage must be from 0 to {len(channels) - 1}, got {token_stage}")
        self.token_stage = token_stage
        self.transformer = BottleneckTransformer(
            channels[token_stage], transformer_width, transformer_depth, transformer_heads
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (batch, class, *shape), or a list with one tensor per resolution with deep supervision."""
        return self.decoder(self.transformed_maps(x))

    def transformed_maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps of all encoder stages, full resolution first; from the transformer's stage on, after it."""
        maps = maps_up_to(self.encoder, x, self.token_stage)
        maps[-1] = self.transformer(maps[-1])
        for stage in self.encoder.stages[self.token_stage + 1 :]:
            maps.append(stage(maps[-1]))
        return maps

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return nnU-Net's measure of memory for one patch, including the transformer."""
        unet: Any = super()
        stride = stage_strides(self.encoder, len(input_size))[self.token_stage]
        tokens = math.prod(math.ceil(n / step) for n, step in zip(input_size, stride, strict=True))
        return int(unet.compute_conv_feature_map_size(input_size)) + self.transformer.compute_feature_size(tokens)


class HybridUNet(_TransformerOnStage, PlainConvUNet):
    """nnU-Net's plain U-Net with a transformer on one encoder stage.

    Args:
        token_stage: Encoder stage whose positions become tokens; 0 is full resolution.
        transformer_width: Width of a token.
        transformer_depth: Number of transformer blocks.
        transformer_heads: Number of attention heads.
        **unet: Arguments of ``PlainConvUNet``.

    Raises:
        ValueError: If the encoder does not have the stage.
    """


class HybridResidualEncoderUNet(_TransformerOnStage, ResidualEncoderUNet):
    """nnU-Net's residual encoder U-Net with a transformer on one encoder stage; arguments as in ``HybridUNet``."""
