"""Planner rules for Primus, a vision transformer: token, patch and size from the data and the memory target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nnssl.networks.backbone import build_network, measurable_network
from nnssl.plan import Reasons, TokenGrid, TransformerSize
from nnssl.sizes import in_mm, in_voxels
from planners.presets import PRIMUS_SIZES, Preset
from planners.step_rules import block_of

CLASS_NAME = "nnssl.networks.primus.PlannedPrimus"
TOKEN_VOX = 8
"""Length of Primus's tokens in voxels."""
LONGEST_TOKEN_VOX = 16
"""Longest side of a token in voxels that may be chosen."""
TOKENS = (64, 8000)
"""Smallest and largest number of tokens. Fewer leave attention too little to relate; 8,000 is the number for the largest patch
in the Primus paper, which has 160 voxels along every axis."""
LEAST_BATCH = 2
"""Smallest batch size that must fit into memory."""
LEAST_SHARE = 0.25
"""Smallest share of the U-Net's patch; longer tokens are preferred to a smaller patch."""
DECODER_FEATURES = 32
"""Number of channels of the map that the segmentation layer reads."""


@dataclass(frozen=True)
class PlannedTransformer:
    """Primus for one data set and memory target.

    Attributes:
        architecture: Architecture in the form of a plan's configuration.
        patch: Size of the patch in voxels.
        tokens: Token grid of a patch.
        size: Size of the transformer.
        values: Number of feature values of one patch, by nnU-Net's measure of memory.
        multiply_adds: Multiply-adds of the blocks for one patch.
        parameters: Number of parameters.
        batch: Batch size of fine-tuning.
    """

    architecture: dict[str, Any]
    patch: tuple[int, ...]
    tokens: TokenGrid
    size: TransformerSize
    values: float
    multiply_adds: float
    parameters: int
    batch: int


def decide_primus(
    patch: Sequence[int], spacing_mm: Sequence[float], channels: int, budget: float, largest_batch: int, preset: Preset
) -> tuple[PlannedTransformer | None, Reasons]:
    """Choose the token of Primus, then the largest patch that fits, then the largest transformer.

    Args:
        patch: Size of the U-Net's patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        channels: Number of input channels.
        budget: Number of feature values that fit into the memory target.
        largest_batch: Batch size with which the U-Net is fine-tuned.
        preset: Memory target.

    Returns:
        The choice, or None if nothing fits; and what, value and reason of every decision.
    """
    problem = what_cannot_run(channels)
    if problem:
        return None, [("left out", "-", f"the installed libraries cannot run Primus: {problem}")]
    sizes = PRIMUS_SIZES[: PRIMUS_SIZES.index(preset.primus) + 1]
    refused = []
    for longest in _token_lengths(patch, spacing_mm):
        token = token_vox(longest, patch, spacing_mm)
        shape = fitted_patch(patch, token)
        while (
            math.prod(shape) >= LEAST_SHARE * math.prod(patch)
            and len(_fitting(sizes, token, shape, channels, budget)) == 0
        ):
            shape = thinner_patch(shape, token, spacing_mm)
        fitting = _fitting(sizes, token, shape, channels, budget)
        if (
            not fitting
            or math.prod(shape) < LEAST_SHARE * math.prod(patch)
            or math.prod(_grid(shape, token)) < TOKENS[0]
        ):
            refused.append(in_voxels(token))
            continue
        size, values = fitting[-1]
        size_mm = tuple(round(n * float(mm), 6) for n, mm in zip(token, spacing_mm, strict=True))
        grid = tuple(_grid(shape, token))
        tokens = TokenGrid(
            stage=None, grid=grid, size_vox=token, size_mm=size_mm, width=size.width, mask_block=(1, 1, 1)
        )
        batch = max(LEAST_BATCH, min(largest_batch, int(budget // values)))
        architecture = primus_architecture(size, token, shape)
        parameters = sum(each.numel() for each in measurable_network(architecture, channels).parameters())
        work = size.depth * block_of(tokens, size)
        chosen = PlannedTransformer(architecture, shape, tokens, size, values, work, parameters, batch)
        return chosen, _explain(chosen, patch, preset, refused)
    return None, [("left out", "-", f"no suitable patch fits into memory with tokens of {' or '.join(refused)} voxels")]


def token_vox(longest: int, patch: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Return a token with a given length along the finest axis and about the same length in mm along the others.

    All sides are powers of two.

    Args:
        longest: Length along the finest axis in voxels, a power of two.
        patch: Size of the patch in voxels, which limits the sides of the token.
        spacing_mm: Spacing of the patch in mm.
    """
    finest = min(spacing_mm)
    sides = (max(0, round(math.log2(longest * finest / mm))) for mm in spacing_mm)
    return tuple(2 ** min(side, int(math.log2(n))) for side, n in zip(sides, patch, strict=True))


def fitted_patch(patch: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Return the multiple of a token that is closest to a patch along every axis."""
    return tuple(max(1, round(n / size)) * size for n, size in zip(patch, token, strict=True))


def thinner_patch(patch: Sequence[int], token: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Return a patch that is one token shorter along its longest axis in mm."""
    extents = [n * mm if n > size else 0.0 for n, size, mm in zip(patch, token, spacing_mm, strict=True)]
    axis = extents.index(max(extents))
    return tuple(n - size * (place == axis) for place, (n, size) in enumerate(zip(patch, token, strict=True)))


def _fitting(
    sizes: Sequence[TransformerSize], token: Sequence[int], patch: Sequence[int], channels: int, budget: float
) -> list[tuple[TransformerSize, float]]:
    """Return the transformers of which the smallest batch fits, in ascending size, each with the feature values of a patch."""
    if math.prod(_grid(patch, token)) > TOKENS[1]:
        return []
    fitting = []
    for size in sizes:
        values = _feature_values(primus_architecture(size, token, patch), channels, patch)
        if LEAST_BATCH * values > budget:
            break
        fitting.append((size, values))
    return fitting


def primus_architecture(size: TransformerSize, token: Sequence[int], patch: Sequence[int]) -> dict[str, Any]:
    """Return the ``architecture`` of a plan's configuration with Primus."""
    arch_kwargs = {
        "embed_dim": size.width,
        "eva_depth": size.depth,
        "eva_numheads": size.heads,
        "patch_embed_size": list(token),
        "input_shape": list(patch),
        "decoder_features": DECODER_FEATURES,
        "drop_path_rate": 0.2 if size.depth >= 12 else 0.0,  # as in nnU-Net's trainers of Primus
        # nnU-Net derives the resolutions of the logits from these, and gives the lowest one no weight
        "strides": [[1] * len(token), list(token), [1] * len(token)],
    }
    return {"network_class_name": CLASS_NAME, "arch_kwargs": arch_kwargs, "_kw_requires_import": []}


def _feature_values(architecture: dict[str, Any], channels: int, patch: Sequence[int]) -> float:
    network = measurable_network(architecture, channels)
    return float(network.compute_conv_feature_map_size(patch))


@lru_cache
def what_cannot_run(channels: int) -> str | None:
    """Return the error that a tiny Primus raises on a patch; None if it raises none."""
    try:
        architecture = primus_architecture(PRIMUS_SIZES[0], (2, 4, 4), (4, 8, 8))
        architecture["arch_kwargs"]["drop_path_rate"] = 0.2
        network = build_network(architecture, channels, 2, seed=0).train()
        with torch.no_grad():
            network(torch.zeros(2, channels, 4, 8, 8))
            network.encode(torch.zeros(2, channels, 4, 8, 8), torch.tensor([[0, 3], [1, 2]]))
    except Exception as error:  # another version of a library may raise any exception
        return f"{type(error).__name__}: {error}"
    return None


def _token_lengths(patch: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """Return the lengths of a token's longest side to try, in order of preference."""
    small = [TOKEN_VOX]
    # a patch too small for Primus's tokens gets shorter ones
    while small[-1] > 2 and math.prod(_grid(patch, token_vox(small[-1], patch, spacing_mm))) < TOKENS[0]:
        small.append(small[-1] // 2)
    return [*small, LONGEST_TOKEN_VOX]


def _grid(patch: Sequence[int], token: Sequence[int]) -> list[int]:
    return [n // size for n, size in zip(fitted_patch(patch, token), token, strict=True)]


def _explain(chosen: PlannedTransformer, patch: Sequence[int], preset: Preset, refused: Sequence[str]) -> Reasons:
    tokens, size = chosen.tokens, chosen.size
    longest = max(tokens.size_vox)
    why = "as in Primus" if longest == TOKEN_VOX else f"the feasible size closest to Primus's {TOKEN_VOX}"
    fitted = (
        "same as 3d_fullres"
        if tuple(patch) == chosen.patch
        else "the multiple of the token size closest to the patch of 3d_fullres"
    )
    if chosen.patch != fitted_patch(patch, tokens.size_vox):
        fitted = f"as much of the patch of 3d_fullres as {TOKENS[1]:,} tokens and the memory target allow"
    memory = f"the largest for a memory target of {preset.memory_gb:g} GB with this token and patch"
    if refused:
        memory += f"; tokens of {' or '.join(refused)} voxels are not feasible"
    return [
        ("patch (fine-tuning)", in_voxels(chosen.patch), fitted),
        (
            "token size",
            f"{in_voxels(tokens.size_vox)} voxels, {in_mm(tokens.size_mm)} mm",
            f"{longest} voxels along the finest axis, {why}; about the same length in mm along the others",
        ),
        (
            "tokens",
            f"{in_voxels(tokens.grid)} = {math.prod(tokens.grid):,}",
            f"the range is {TOKENS[0]} to {TOKENS[1]:,}",
        ),
        ("transformer", f"{size.depth} blocks of width {size.width} with {size.heads} heads", memory),
        (
            "backbone",
            "Primus",
            "a vision transformer; under masking, its encoder needs only the visible tokens",
        ),
        (
            "batch size (fine-tuning)",
            str(chosen.batch),
            "as many as the memory target allows, at most that of 3d_fullres",
        ),
    ]
