"""Dense features of nnU-Net's U-Nets: the maps of the decoder stages before the segmentation layers.

nnU-Net's own forward pass returns only the segmentations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.networks.pieces import recomputed, recomputes

DenseKind = Literal["single", "pyramid"]
ENCODER_AND_DECODER = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
"""Prefixes of all parameters of a U-Net except the segmentation layers; the decoder holds the encoder under a second name."""
ENCODER = ENCODER_AND_DECODER[:2]
"""Prefixes of the encoder's parameters, under both names."""


def trained_up_to_segmentation(network: Any) -> Any:
    """Switch on the gradient of all parameters except the segmentation layers, and return the network."""
    network.requires_grad_(True)
    network.decoder.seg_layers.requires_grad_(False)
    return network


def trained_up_to_level(network: Any, last_level: int) -> Any:
    """Switch on the gradient of only the encoder and the decoder up to an encoder stage's resolution; return the network."""
    trained_encoder(network)
    for part in decoder_parts(network, last_level):
        network.get_submodule(part).requires_grad_(True)
    return network


def trained_encoder(network: Any) -> Any:
    """Switch on the gradient of only the encoder, and return the encoder."""
    network.requires_grad_(False)
    return network.encoder.requires_grad_(True)


def trained_up_to_stage(network: Any, last: int) -> Any:
    """Switch on the gradient of only the encoder up to a stage, and return the encoder."""
    network.requires_grad_(False)
    for part in encoder_parts(network.encoder, last):
        network.encoder.get_submodule(part).requires_grad_(True)
    return network.encoder


def encoder_parts(encoder: Any, last: int) -> list[str]:
    """Return the names, within an encoder, of the modules that ``maps_up_to`` runs."""
    stem = ["stem"] if getattr(encoder, "stem", None) is not None else []  # of a residual encoder
    return stem + [f"stages.{number}" for number in range(last + 1)]


def prefixes_up_to(encoder: Any, last: int) -> tuple[str, ...]:
    """Return the prefixes of the parameters of an encoder up to a stage, under both names that they have in a U-Net."""
    return tuple(f"{prefix}{part}." for prefix in ENCODER for part in encoder_parts(encoder, last))


def maps_up_to(encoder: Any, volumes: Float[Tensor, "batch channel *shape"], last: int) -> list[Tensor]:
    """Return the maps (batch, channel, *grid) of an encoder's stages up to one, full resolution first."""
    *stem, first = encoder_parts(encoder, 0)
    features = volumes
    for part in stem:
        features = encoder.get_submodule(part)(features)
    maps = [encoder.get_submodule(first)(features)]
    for stage in encoder.stages[1 : last + 1]:
        maps.append(stage(maps[-1]))
    return maps


def decoder_parts(network: Any, last_level: int) -> list[str]:
    """Return the names of the modules that ``decode`` runs up to a level."""
    count = len(network.decoder.stages) - last_level
    return [f"decoder.{kind}.{index}" for kind in ("transpconvs", "stages") for index in range(count)]


def decoder_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"]) -> list[Tensor]:
    """Return the bottleneck and the output of every decoder stage, coarsest first; the last one has full resolution.

    Args:
        network: U-Net of dynamic-network-architectures, plain or with a residual encoder, or nnssl's hybrid of one.
        volumes: Patches.

    Returns:
        Maps (batch, channel, *grid).
    """
    return decode(network.decoder, network.encoder(volumes))


def decode(decoder: Any, skips: Sequence[Tensor], last_level: int = 0) -> list[Tensor]:
    """Return the bottleneck and the output of every decoder stage, coarsest first, given the maps of the encoder.

    Args:
        decoder: Decoder of a U-Net.
        skips: Maps of the encoder's stages (batch, channel, *grid), full resolution first.
        last_level: Encoder stage with the resolution of the last decoder stage to run.
    """

    def run(upsample: Any, stage: Any, below: Tensor, skip: Tensor) -> Tensor:
        return stage(torch.cat((upsample(below), skip), dim=1))

    maps = [skips[-1]]
    stages = list(zip(decoder.transpconvs, decoder.stages, strict=True))
    for level, (upsample, stage) in enumerate(stages[: len(stages) - last_level]):
        inputs = maps[-1], skips[-(level + 2)]
        step = partial(run, upsample, stage)
        maps.append(recomputed(step, *inputs) if recomputes(decoder) else step(*inputs))
    return maps


def dense_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"], kind: DenseKind) -> list[Tensor]:
    """Return the maps whose concatenated features describe a point.

    Args:
        network: As in ``decoder_maps``.
        volumes: Patches.
        kind: ``single`` for the last decoder stage, which the segmentation layer reads; ``pyramid`` for all decoder stages and
            the bottleneck.

    Returns:
        Maps (batch, channel, *grid), coarsest first.
    """
    maps = decoder_maps(network, volumes)
    return maps[-1:] if kind == "single" else maps


def dense_channels(features_per_stage: list[int], kind: DenseKind) -> int:
    """Return the number of features of a point, from the plan's ``features_per_stage``."""
    return features_per_stage[0] if kind == "single" else sum(features_per_stage)
