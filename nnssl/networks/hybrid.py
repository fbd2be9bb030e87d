"""The RepRec network: a convolutional U-Net with a vision transformer on one of its feature maps.

``E_c -> E_t -> D_c`` with skips from every stage of ``E_c`` (Yan et al., Representation Recovering, WACV 2023, figure 2).
Both classes are stock U-Nets of nnU-Net with one more module, ``transformer``: the names of encoder and decoder stay those
of the stock U-Net, so one state dict serves both. A plan names the classes and nnU-Net builds, trains and predicts with them.

Deviations from the paper:
    * Paper: ``E_t`` stands between encoder and decoder. Here: on the encoder stage that the plan names, and its output
      replaces that stage's feature map on the way to the decoder; at the bottleneck the two are the same thing. Small
      patches leave too few positions at the bottleneck for a transformer.
    * Paper: the output of ``E_t`` replaces the feature map. Here: ``f + gate * project(E_t(f))``, with a learned gate that
      starts at 0, so that a network with random weights starts as the plain U-Net; pretraining sets the gate to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.backbone import stage_strides
from nnssl.networks.tokens import (
    MLP_RATIO,
    initialise_linear,
    map_to_tokens,
    sine_cosine_positions,
    tokens_to_map,
    transformer_blocks,
)


class BottleneckTransformer(nn.Module):
    """``E_t``: embeds the positions of a feature map as tokens, relates them, and adds the result back.

    Args:
        channels: of the feature map.
        width: of a token; a multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
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
        """Embed features, add positions and run the blocks; any subset of the tokens of a map may be given."""
        return self.blocks(self.embed(features) + positions)

    def forward(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch channel *grid"]:
        """Return the feature map with what the transformer says of it added."""
        grid = feature_map.shape[2:]
        positions = sine_cosine_positions(grid, self.width, feature_map.device)
        tokens = self.encode(map_to_tokens(feature_map), positions[None])
        return feature_map + self.gate * tokens_to_map(self.project(tokens), grid)

    def compute_feature_size(self, tokens: int) -> int:
        """Return the number of output values of the linear layers for one sample, nnU-Net's measure of memory."""
        per_block = (3 + 1 + MLP_RATIO + 1) * self.width
        return tokens * (2 * self.width + self.depth * per_block)


def _attach(network: Any, token_stage: int, width: int, depth: int, heads: int) -> None:
    n_stages = len(network.encoder.output_channels)
    if not 0 <= token_stage < n_stages:
        raise ValueError(f"token_stage is {token_stage}, the encoder has stages 0 to {n_stages - 1}")
    network.token_stage = token_stage
    network.transformer = BottleneckTransformer(network.encoder.output_channels[token_stage], width, depth, heads)


def _forward(network: Any, volumes: Tensor) -> Tensor | list[Tensor]:
    skips = network.encoder(volumes)
    skips[network.token_stage] = network.transformer(skips[network.token_stage])
    return network.decoder(skips)


def _feature_size(network: Any, unet_size: int, input_size: Sequence[int]) -> int:
    stride = stage_strides(network.encoder, len(input_size))[network.token_stage]
    tokens = math.prod(math.ceil(n / step) for n, step in zip(input_size, stride, strict=True))
    return unet_size + network.transformer.compute_feature_size(tokens)


class HybridUNet(PlainConvUNet):
    """nnU-Net's plain U-Net with a transformer on one encoder stage.

    Args:
        token_stage: encoder stage whose positions become tokens; 0 is full resolution.
        transformer_width: channels of a token.
        transformer_depth: number of transformer blocks.
        transformer_heads: attention heads.
        **unet: what ``PlainConvUNet`` takes.

    Raises:
        ValueError: the encoder has no such stage.
    """

    def __init__(
        self, *, token_stage: int, transformer_width: int, transformer_depth: int, transformer_heads: int, **unet: Any
    ) -> None:
        super().__init__(**unet)
        _attach(self, token_stage, transformer_width, transformer_depth, transformer_heads)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (batch, class, *shape), or one per resolution with deep supervision."""
        return _forward(self, x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return nnU-Net's measure of memory for one patch, the transformer's share included."""
        return _feature_size(self, int(super().compute_conv_feature_map_size(input_size)), input_size)


class HybridResidualEncoderUNet(ResidualEncoderUNet):
    """nnU-Net's residual encoder U-Net with a transformer on one encoder stage; arguments as in ``HybridUNet``."""

    def __init__(
        self, *, token_stage: int, transformer_width: int, transformer_depth: int, transformer_heads: int, **unet: Any
    ) -> None:
        super().__init__(**unet)
        _attach(self, token_stage, transformer_width, transformer_depth, transformer_heads)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (batch, class, *shape), or one per resolution with deep supervision."""
        return _forward(self, x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return nnU-Net's measure of memory for one patch, the transformer's share included."""
        return _feature_size(self, int(super().compute_conv_feature_map_size(input_size)), input_size)
