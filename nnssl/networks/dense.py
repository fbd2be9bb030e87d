"""Dense features of nnU-Net's U-Nets: the maps that the decoder makes on its way to the segmentation layers.

nnU-Net's forward pass returns the segmentations only.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

DenseKind = Literal["single", "pyramid"]


def decoder_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"]) -> list[Tensor]:
    """Return the bottleneck and the output of every decoder stage, coarsest first; the last has full resolution.

    Args:
        network: a U-Net of dynamic-network-architectures, plain or with residual encoder, or nnssl's hybrid of one.
        volumes: patches.

    Returns:
        Maps (batch, channel, *grid).
    """
    skips = network.encoder(volumes)
    decoder = network.decoder
    maps = [skips[-1]]
    for level, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
        maps.append(stage(torch.cat((upsample(maps[-1]), skips[-(level + 2)]), dim=1)))
    return maps


def dense_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"], kind: DenseKind) -> list[Tensor]:
    """Return the maps whose features, side by side, describe a point.

    Args:
        network: as ``decoder_maps``.
        volumes: patches.
        kind: ``single``: the last decoder stage, which the segmentation layer reads; ``pyramid``: all decoder stages and
            the bottleneck.

    Returns:
        Maps (batch, channel, *grid), coarsest first.
    """
    maps = decoder_maps(network, volumes)
    return maps[-1:] if kind == "single" else maps


def dense_channels(features_per_stage: list[int], kind: DenseKind) -> int:
    """Return the number of features of a point, from the plan's ``features_per_stage``."""
    return features_per_stage[0] if kind == "single" else sum(features_per_stage)
