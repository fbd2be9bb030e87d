"""Planner rules for the cost of a step: the memory that it takes and the multiply-adds that it computes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nnssl.methods import Stage
from nnssl.networks.backbone import measurable_network, planned_configuration
from nnssl.plan import StageCost, TokenGrid, TransformerSize

NO_GRAD_MAPS = 3
"""Maps of the largest size that exist at a time in a pass without a graph, fitted as ``TRANSIENT_MAPS``."""
TENSORS_PER_VALUE = 2
"""Tensors that the backward pass keeps of each convolution's output: the inputs of the norm and of the next convolution."""
BYTES = {"float32": 4, "mixed": 2}
"""Bytes of a feature value by precision."""
BYTES_OF_WEIGHT = 4
TRANSIENT_MAPS = 3
"""Maps of the largest size that exist in addition in the backward pass, twice as many in a decoder: gradients of a layer's inputs
and outputs, and copies in the layout of the convolutions. Fitted to the measurements of ``tools/step_memory.py`` on the CPU."""
VIEW_COPIES = 8
"""Copies of a raw patch in float32 that exist at a time while its views are made and compared."""
BACKWARD_FACTOR = 3
"""Multiply-adds of a pass with a graph, forward and backward, relative to those of the forward pass."""
VALUES_PER_TOKEN = 9
"""Feature values per token and channel that a transformer block keeps, by nnU-Net's measure."""
CHECKPOINT_SHARE = 0.6
"""Memory of a pass with activation checkpointing relative to one without."""


@dataclass(frozen=True)
class NetworkCost:
    """Cost of a pass through a plan's network, by voxel of the patch.

    Attributes:
        encoder_values: Output values of all layers of the encoder, nnU-Net's measure of memory.
        decoder_values: The same for the decoder.
        encoder_multiply_adds: Multiply-adds of the encoder.
        decoder_multiply_adds: Multiply-adds of the decoder.
        widest: Number of channels of the largest feature map; 0 for a transformer, which has no map at full resolution.
        parameters: Number of parameters.
        channels: Number of input channels.
    """

    encoder_values: float
    decoder_values: float
    encoder_multiply_adds: float
    decoder_multiply_adds: float
    widest: int
    parameters: int
    channels: int


def measure_network(architecture: dict[str, Any], patch: tuple[int, ...], channels: int) -> NetworkCost:
    """Measure a U-Net without allocating it.

    Args:
        architecture: Architecture of the configuration.
        patch: A patch that the network accepts; the cost by voxel hardly depends on it.
        channels: Number of input channels.
    """
    network = measurable_network(architecture, channels)
    voxels = math.prod(patch)
    with torch.no_grad(), torch.device("meta"):
        with FlopCounterMode(display=False) as encoder:
            skips = network.encoder(torch.zeros(1, channels, *patch))
        with FlopCounterMode(display=False) as decoder:
            network.decoder(skips)
    return NetworkCost(
        encoder_values=float(network.encoder.compute_conv_feature_map_size(patch)) / voxels,
        decoder_values=float(network.decoder.compute_conv_feature_map_size(patch)) / voxels,
        encoder_multiply_adds=encoder.get_total_flops() / 2 / voxels,
        decoder_multiply_adds=decoder.get_total_flops() / 2 / voxels,
        widest=int(architecture["arch_kwargs"]["features_per_stage"][0]),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        channels=channels,
    )


def multiply_adds_of_finetuning(nnunet: dict[str, Any], name: str) -> float:
    """Return the multiply-adds of a step of nnU-Net's own training in a configuration.

    Args:
        nnunet: nnU-Net's part of a plan.
        name: Configuration of a U-Net.
    """
    planned = planned_configuration(nnunet, name)
    patch = tuple(planned["patch_size"])
    cost = measure_network(planned["architecture"], patch, len(planned["normalization_schemes"]))
    of_voxel = cost.encoder_multiply_adds + cost.decoder_multiply_adds
    return BACKWARD_FACTOR * float(planned["batch_size"]) * math.prod(patch) * of_voxel


def cost_of_step(
    stage: Stage,
    network: NetworkCost,
    voxels: int,
    batch: int,
    tokens: TokenGrid | None,
    transformer: TransformerSize | None,
    points_bytes: float,
    on_gpu: bool,
    pieces: int = 1,
    checkpointing: bool = False,
) -> StageCost:
    """Estimate memory and multiply-adds of a step.

    Args:
        stage: Stage of a method.
        network: Cost of the network.
        voxels: Voxels of a patch.
        batch: Patches per step.
        tokens: Token grid of the patch; None if the stage reads none.
        transformer: Size of the transformer that reads the tokens; None for the encoder of a U-Net.
        points_bytes: Memory of the points that the stage compares, in bytes.
        on_gpu: Whether the step runs on a GPU, in mixed precision.
        pieces: Number of pieces of the batch.
        checkpointing: Whether activations are computed again.
    """
    optimizer = stage.load().defaults.training.optimizer
    copies = (
        2 + (2 if optimizer == "adamw" else 1) + (1 if stage.encoder_passes else 0)
    )  # weight, gradient, state, teacher
    weights = copies * network.parameters * BYTES_OF_WEIGHT
    values = values_of_patch(stage, network, voxels, tokens, transformer)
    if checkpointing:
        values *= CHECKPOINT_SHARE
    at_once = math.ceil(batch / pieces)
    bytes_per_value = BYTES["mixed" if on_gpu else "float32"]
    graph = values * at_once * TENSORS_PER_VALUE * bytes_per_value
    backward = TRANSIENT_MAPS * (2 * stage.decoder_graphs or 1) if has_graph_of_maps(stage, transformer) else 0
    without_graph = NO_GRAD_MAPS if stage.encoder_passes else 0
    graph += max(backward, without_graph) * network.widest * voxels * at_once * bytes_per_value
    heads = (batch * stage.batch_values + at_once * stage.piece_values) * BYTES["float32"]
    views = VIEW_COPIES * batch * network.channels * voxels * BYTES["float32"]
    passes = BACKWARD_FACTOR + (1 if pieces > 1 or checkpointing else 0)
    work = batch * multiply_adds_of_patch(stage, network, voxels, tokens, transformer, passes)
    return StageCost(
        memory_gb=round((weights + graph + heads + views + points_bytes) / 1e9, 3), multiply_adds=float(f"{work:.3g}")
    )


def has_graph_of_maps(stage: Stage, transformer: TransformerSize | None) -> bool:
    """Return whether a stage differentiates through feature maps, not only through tokens of a transformer."""
    return not sees_visible_tokens(stage, transformer)


def sees_visible_tokens(stage: Stage, transformer: TransformerSize | None) -> bool:
    """Return whether a stage runs a transformer encoder on the visible tokens only, and a decoder of tokens."""
    return (stage.reads_tokens or stage.masks_tokens) and transformer is not None


def values_of_patch(
    stage: Stage, network: NetworkCost, voxels: int, tokens: TokenGrid | None, transformer: TransformerSize | None
) -> float:
    """Return the number of feature values that one patch of a stage keeps in memory; see ``cost_of_step``."""
    encoder, decoder = network.encoder_values * voxels, network.decoder_values * voxels
    masked = sees_visible_tokens(stage, transformer)
    values = 0.0 if masked else stage.encoder_graphs * encoder + stage.decoder_graphs * decoder
    if tokens is None:
        return values
    count = math.prod(tokens.grid)
    if masked:
        assert transformer is not None
        # the token decoder reads all tokens, the encoder at most a quarter of them
        blocks = transformer.depth / 4 + transformer.decoder_depth
        values += count * VALUES_PER_TOKEN * transformer.width * blocks
    return values + count * stage.token_values


def multiply_adds_of_patch(
    stage: Stage,
    network: NetworkCost,
    voxels: int,
    tokens: TokenGrid | None,
    transformer: TransformerSize | None,
    passes_with_graph: int,
) -> float:
    """Return the multiply-adds of the network for one patch; see ``cost_of_step``.

    Args:
        stage: See ``cost_of_step``.
        network: See ``cost_of_step``.
        voxels: See ``cost_of_step``.
        tokens: See ``cost_of_step``.
        transformer: See ``cost_of_step``.
        passes_with_graph: Multiply-adds of a pass with a graph relative to those of its forward pass.
    """
    encoder, decoder = network.encoder_multiply_adds * voxels, network.decoder_multiply_adds * voxels
    masked = sees_visible_tokens(stage, transformer)
    graphs = 0 if masked else 1
    total = (passes_with_graph * graphs * stage.encoder_graphs + stage.encoder_passes) * encoder
    total += passes_with_graph * graphs * stage.decoder_graphs * decoder
    if masked and tokens is not None:
        assert transformer is not None
        total += passes_with_graph * (transformer.depth / 4 + transformer.decoder_depth) * block_of(tokens, transformer)
    return total


def block_of(tokens: TokenGrid, transformer: TransformerSize) -> float:
    """Return the multiply-adds of a transformer block: projections and MLP, and attention."""
    count, width = math.prod(tokens.grid), transformer.width
    return count * (12.0 * width**2 + 2.0 * count * width)
