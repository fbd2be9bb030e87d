"""Dense features of nnU-Net's U-Nets: the maps that the decoder makes on its way to the segmentation layers.

nnU-Net's forward pass returns the segmentations only.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

DenseKind = Literal["single", "pyramid"]
ENCODER_AND_DECODER = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
"""Prefixes of all but the segmentation layers of a U-Net; its decoder holds the encoder under a second name."""
ENCODER = ENCODER_AND_DECODER[:2]


def trained_up_to_segmentation(network: Any) -> Any:
    """Return the network with the gradient on for all but its segmentation layers."""
    network.requires_grad_(True)
    network.decoder.seg_layers.requires_grad_(False)
    return network


def trained_up_to_level(network: Any, last_level: int) -> Any:
    """Return the network with the gradient on for the encoder and the decoder up to the resolution of an encoder stage."""
    trained_encoder(network)
    for part in decoder_parts(network, last_level):
        network.get_submodule(part).requires_grad_(True)
    return network


def trained_encoder(network: Any) -> Any:
    """Return the network's encoder with its gradient on, and switch that of all the rest off."""
    network.requires_grad_(False)
    return network.encoder.requires_grad_(True)


def decoder_parts(network: Any, last_level: int) -> list[str]:
    """Return the names of the parts of a network that ``decode`` runs after the encoder, up to a level."""
    count = len(network.decoder.stages) - last_level
    return [f"decoder.{kind}.{index}" for kind in ("transpconvs", "stages") for index in range(count)]


def decoder_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"]) -> list[Tensor]:
    """Return the bottleneck and the output of every decoder stage, coarsest first; the last has full resolution.

    Args:
        network: a U-Net of dynamic-network-architectures, plain or with residual encoder, or nnssl's hybrid of one.
        volumes: patches.

    Returns:
        Maps (batch, channel, *grid).
    """
    return decode(network.decoder, network.encoder(volumes))


def decode(decoder: Any, skips: Sequence[Tensor], last_level: int = 0) -> list[Tensor]:
    """Return the bottleneck and the output of every decoder stage, coarsest first, from the maps of an encoder.

    Args:
        decoder: of a U-Net.
        skips: maps (batch, channel, *grid) of the encoder's stages, full resolution first.
        last_level: encoder stage whose resolution is the finest that is wanted; stages beyond it are not run.
    """
    maps = [skips[-1]]
    stages = list(zip(decoder.transpconvs, decoder.stages, strict=True))
    for level, (upsample, stage) in enumerate(stages[: len(stages) - last_level]):
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
