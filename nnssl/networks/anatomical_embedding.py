"""Anatomical embeddings: a vector for every place of a patch that identifies this place in the body.

Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological Images, TMI 2022.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.backbone import stage_strides
from nnssl.networks.dense import decode

EmbeddingKind = Literal["fine", "coarse"]


class Embeddings(NamedTuple):
    """Maps of unit vectors, in float32.

    Attributes:
        fine: Fine embeddings, which localise precisely, at the resolution of an early stage.
        coarse: Coarse embeddings, which identify the part of the body, at the resolution of a late stage.
    """

    fine: Float[Tensor, "batch dimension *fine_grid"]
    coarse: Float[Tensor, "batch dimension *coarse_grid"]


class AnatomicalEmbedding(nn.Module):
    """A U-Net with two heads: fine embeddings from its decoder, coarse ones from its encoder.

    Source: SAM, section III-A: fine embeddings from a feature pyramid at half the resolution, coarse ones from the last stage;
    convolutions of 3 voxels, 128 dimensions, unit norm.
    Deviations: SAM's backbone is a ResNet-18 with batch normalisation, inflated from ImageNet weights. Here the decoder of the
    U-Net replaces the pyramid.

    Args:
        network: U-Net of dynamic-network-architectures.
        fine_stage: Encoder stage of the fine embedding, which localises precisely; not the last stage.
        coarse_stage: Encoder stage of the coarse embedding, which identifies the part of the body.
        dimensions: Number of dimensions of each embedding.
    """

    def __init__(self, network: Any, fine_stage: int, coarse_stage: int, dimensions: int) -> None:
        super().__init__()
        self.network = network
        self.fine_stage, self.coarse_stage = fine_stage, coarse_stage
        channels = network.encoder.output_channels
        convolution: Any = network.encoder.conv_op
        self.fine = convolution(channels[fine_stage], dimensions, 3, padding=1)
        self.coarse = nn.Sequential(
            convolution(channels[coarse_stage], dimensions, 1), convolution(dimensions, dimensions, 3, padding=1)
        )

    def forward(self, volumes: Float[Tensor, "batch channel *shape"]) -> Embeddings:
        """Return both embeddings of every place."""
        skips = self.network.encoder(volumes)
        fine = self.fine(decode(self.network.decoder, skips, self.fine_stage)[-1])
        coarse = self.coarse(skips[self.coarse_stage])
        return Embeddings(F.normalize(fine.float(), dim=1), F.normalize(coarse.float(), dim=1))

    def grids(self, shape: Sequence[int]) -> dict[EmbeddingKind, tuple[int, ...]]:
        """Return the number of cells along each axis of the map of each kind, for a patch of this shape."""
        strides = stage_strides(self.network.encoder, len(shape))
        stages: dict[EmbeddingKind, int] = {"fine": self.fine_stage, "coarse": self.coarse_stage}
        return {
            kind: tuple(-(-n // step) for n, step in zip(shape, strides[stage], strict=True))
            for kind, stage in stages.items()
        }
