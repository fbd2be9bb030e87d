"""Encoders of visible tokens for masked image modelling: those of Primus and of a convolutional U-Net.

Source: He et al., MAE, CVPR 2022 (visible tokens only); Tian et al., SparK, ICLR 2023 (convolutions: features are masked again
after every stage, so that visible features do not spread into masked positions).

Deviations from SparK: normalisation includes the zeros of masked positions; only the last stage is read.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnssl.networks.backbone import stage_strides
from nnssl.networks.dense import ENCODER
from nnssl.networks.primus_positions import encode_tokens, is_primus
from nnssl.networks.tokens import map_to_tokens, take_tokens


class TokenEncoder(nn.Module):
    """Interface of an encoder for masked modelling.

    Attributes:
        token_vox: Number of voxels of a token along each axis.
        grid: Number of tokens of a patch along each axis.
        width: Width of an encoded token.
        exported: Prefixes of the names that the encoder's parameters have in the plan's network.
    """

    token_vox: tuple[int, ...]
    grid: tuple[int, ...]
    width: int
    exported: tuple[str, ...]

    def forward(
        self, volumes: Float[Tensor, "batch channel *shape"], visible: Int[Tensor, "batch visible"] | None = None
    ) -> Float[Tensor, "batch visible width"]:
        """Return all encoded tokens, or only the visible ones, which then do not depend on the voxels of other tokens.

        Args:
            volumes: Patches.
            visible: Indices of each patch's visible tokens, in C order of the grid; None for all tokens.
        """
        raise NotImplementedError


class PrimusTokens(TokenEncoder):
    """The encoder of Primus, which receives only the visible tokens, so that masked tokens cost nothing.

    Its blocks are never dropped at random. Dropping is meant for fine-tuning, and would change a teacher's target each time.

    Args:
        network: Network of the plan.
    """

    exported = ("down_projection.", "eva.")

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.down_projection, self.eva = network.down_projection, network.eva
        self.token_vox, self.grid, self.width = network.token_vox, network.grid, network.embed_dim
        for layer in self.eva.modules():
            if hasattr(layer, "drop_prob"):  # the probability of dropping a whole block, in Primus's library
                layer.drop_prob = 0.0

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return encoded tokens; see ``TokenEncoder``."""
        return encode_tokens(self.down_projection, self.eva, volumes, visible)


class UNetTokens(TokenEncoder):
    """The encoder of a U-Net up to one stage, whose positions are the tokens.

    Args:
        encoder: Encoder of the plan's network.
        stage: Encoder stage whose positions are the tokens.
        shape: Number of voxels of a patch, a multiple of the stage's stride along every axis.
    """

    def __init__(self, encoder: Any, stage: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.stage = stage
        stem = ["stem."] if hasattr(encoder, "stem") else []
        used = [*stem, *(f"stages.{index}." for index in range(stage + 1))]
        self.exported = tuple(f"{prefix}{part}" for prefix in ENCODER for part in used)
        self.token_vox = stage_strides(encoder, len(shape))[stage]
        self.grid = tuple(n // size for n, size in zip(shape, self.token_vox, strict=True))
        self.width = encoder.output_channels[stage]

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return encoded tokens; see ``TokenEncoder``."""
        shown = None
        if visible is not None:
            shown = torch.zeros(len(volumes), math.prod(self.grid), dtype=torch.bool, device=volumes.device)
            shown = shown.scatter(1, visible, True).unflatten(1, self.grid)
        features = _show(volumes, shown)
        stem = getattr(self.encoder, "stem", None)
        if stem is not None:
            features = _show(stem(features), shown)
        for stage in self.encoder.stages[: self.stage + 1]:
            features = _show(stage(features), shown)
        tokens = map_to_tokens(features)
        return tokens if visible is None else take_tokens(tokens, visible)


def trained_up_to_tokens(encoder: TokenEncoder) -> TokenEncoder:
    """Switch on the gradient of all parts that compute tokens, but not of later stages of a U-Net; return the encoder."""
    encoder.requires_grad_(True)
    if isinstance(encoder, UNetTokens):
        encoder.encoder.stages[encoder.stage + 1 :].requires_grad_(False)
    return encoder


def token_encoder(network: Any, stage: int | None, shape: Sequence[int]) -> TokenEncoder:
    """Return the token encoder of a plan's network.

    Args:
        network: Network of the plan, Primus or a U-Net.
        stage: Stage of the U-Net whose positions are the tokens; None for Primus.
        shape: Number of voxels of a patch along each axis.
    """
    if is_primus(network):
        return PrimusTokens(network)
    assert stage is not None
    return UNetTokens(network.encoder, stage, shape)


def _show(features: Tensor, shown: Bool[Tensor, " batch *grid"] | None) -> Tensor:
    """Return a map that is 0 at all positions whose token is not shown; unchanged if ``shown`` is None."""
    if shown is None:
        return features
    for axis, length in enumerate(features.shape[2:]):
        shown = shown.repeat_interleave(length // shown.shape[axis + 1], dim=axis + 1)
    return features * shown[:, None]
