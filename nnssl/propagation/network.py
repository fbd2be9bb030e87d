"""The frozen network whose features carry labels: the decoder's maps if it was pretrained, else those of the encoder."""

from typing import Any

import torch

from nnssl.errors import ArgumentError, UserError
from nnssl.log import logger
from nnssl.networks.dense import DenseKind
from nnssl.pictures.dense_network import DenseNetwork, check_decoder, freeze
from nnssl.weights.opened_checkpoint import OpenedCheckpoint


def frozen_network(checkpoint: OpenedCheckpoint, kind: DenseKind | None, device: torch.device) -> DenseNetwork:
    """Build the network of a checkpoint of pretraining, load its weights, and choose the maps that are read.

    Args:
        checkpoint: The checkpoint.
        kind: Maps of the decoder; None for those that were pretrained, or all of them if the method compares no points.
        device: Device for the computation.

    Raises:
        UserError: If the network is Primus or has a transformer, or the weights do not fit it.
        ArgumentError: If a kind is given for weights without a pretrained decoder.
    """
    provenance, path = checkpoint.own_provenance, checkpoint.path
    network = checkpoint.build_network(0)
    if hasattr(network, "transformer"):
        raise UserError(
            f"{path}: its network {type(network).__name__} has a transformer, whose features are not used to carry labels; use "
            "weights of a U-Net configuration"
        )
    check_decoder(network, path)
    checkpoint.load_into(network)
    stages: tuple[int, ...] = ()
    if not provenance.pretrains("decoder.stages."):
        if kind is not None:
            raise ArgumentError(
                f"features must not be given for weights of {provenance.method}, which does not pretrain the decoder, got {kind}",
                "features",
            )
        stages = _pretrained_stages(network, checkpoint)
        logger.info(
            f"{provenance.method} does not pretrain the decoder: labels are carried by the maps of encoder stages "
            f"{', '.join(map(str, stages))}"
        )
    return freeze(network, checkpoint, kind, device, stages)


def _pretrained_stages(network: Any, checkpoint: OpenedCheckpoint) -> tuple[int, ...]:
    """Return the encoder stages that were pretrained; all if the file names none."""
    every = range(len(network.encoder.stages))
    provenance = checkpoint.own_provenance
    return tuple(stage for stage in every if provenance.pretrains(f"encoder.stages.{stage}.")) or tuple(every)
