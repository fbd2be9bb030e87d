"""Planner rules for hybrid networks: the feature map that becomes tokens, and the size of the transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnssl.networks.backbone import encoder_strides
from nnssl.plan import Reasons, TokenGrid, TransformerSize
from nnssl.sizes import in_mm, in_voxels
from planners.presets import VIT_SIZES, Preset

TOKENS_WANTED = 196
"""Number of tokens in RepRec's 14 x 14 grid (224 pixels at stride 16), for which ViT-B/16 was designed."""
TOKENS_MIN, TOKENS_MAX = 64, 2000
"""Smallest and largest number of tokens. Fewer leave attention too little to relate; with more, attention becomes the most
expensive part of the network."""
FINE_TUNING_MAX = 8000
"""Largest number of tokens in the patch of fine-tuning, which is larger; that of Primus (Wald et al. 2025)."""
FEW_TOKENS = 128
"""Number of tokens below which the next smaller transformer is used."""
HYBRID_CLASSES = {"PlainConvUNet": "HybridUNet", "ResidualEncoderUNet": "HybridResidualEncoderUNet"}
"""Class of the hybrid network, by the class of its U-Net."""


def decide_tokens(
    architecture: dict[str, Any],
    patch: Sequence[int],
    spacing_mm: Sequence[float],
    largest: Sequence[int] | None = None,
    fixed_stage: int | None = None,
) -> tuple[TokenGrid | None, Reasons]:
    """Choose the encoder stage whose positions become tokens, and the block of tokens that is masked together.

    Args:
        architecture: Architecture of the U-Net.
        patch: Size of the patch in voxels.
        spacing_mm: Spacing of the patch in mm.
        largest: Patch of fine-tuning, if the network is fine-tuned with the transformer.
        fixed_stage: Stage that the network's transformer is on; None to choose it.

    Returns:
        The grid, or None if no stage has a suitable number of positions; and what, value and reason of every decision.
    """
    strides = np.cumprod(np.array(encoder_strides(architecture)), axis=0)
    grids = [[math.ceil(n / s) for n, s in zip(patch, stride, strict=True)] for stride in strides]
    counts = [math.prod(grid) for grid in grids]
    in_largest = [
        math.prod(math.ceil(n / s) for n, s in zip(largest or patch, stride, strict=True)) for stride in strides
    ]
    listed = " / ".join(f"{count:,}" for count in counts)
    fitting = [
        stage
        for stage, count in enumerate(counts)
        if TOKENS_MIN <= count <= TOKENS_MAX and in_largest[stage] <= FINE_TUNING_MAX and stage > 0
        if fixed_stage in (None, stage)
    ]
    if not fitting:
        reason = f"no encoder stage has {TOKENS_MIN} to {TOKENS_MAX:,} positions (the stages have {listed})"
        return None, [("left out", "-", reason)]
    stage = min(fitting, key=lambda s: abs(math.log(counts[s] / TOKENS_WANTED)))
    size_mm = [s * float(mm) for s, mm in zip(strides[stage], spacing_mm, strict=True)]
    block_mm = 2 * float(np.median(size_mm))
    block = [max(1, min(round(block_mm / mm), n // 2)) for mm, n in zip(size_mm, grids[stage], strict=True)]
    block_size_mm = [n * mm for n, mm in zip(block, size_mm, strict=True)]
    grid = TokenGrid(
        stage=stage,
        grid=tuple(grids[stage]),
        size_vox=tuple(int(s) for s in strides[stage]),
        size_mm=tuple(round(mm, 6) for mm in size_mm),
        width=architecture["arch_kwargs"]["features_per_stage"][stage],
        mask_block=tuple(block),
    )
    why_block = (
        f"about {block_mm:.0f} mm per axis, at most half of the grid; the neighbours of a single masked token have seen "
        "most of it"
    )
    return grid, [
        (
            "tokens",
            f"{in_voxels(grids[stage])} = {counts[stage]:,} at stage {stage}",
            f"closest to RepRec's {TOKENS_WANTED} tokens; the encoder stages have {listed} positions",
        ),
        (
            "token size",
            f"{in_voxels(strides[stage])} voxels, {in_mm(size_mm)} mm",
            "one position of this stage's feature map",
        ),
        ("mask block", f"{in_voxels(block)} tokens, {in_mm(block_size_mm)} mm", why_block),
    ]


def decide_transformer(tokens: TokenGrid, preset: Preset) -> tuple[TransformerSize, Reasons]:
    """Choose the transformer of the memory target, or one size smaller if there are few tokens."""
    size = preset.transformer
    count = math.prod(tokens.grid)
    reason = f"the size for a memory target of {preset.memory_gb:g} GB"
    index = VIT_SIZES.index(size)
    if count < FEW_TOKENS and index > 0:
        size = VIT_SIZES[index - 1]
        reason += f", one size smaller because of only {count} tokens"
    if size == VIT_SIZES[-1]:
        reason += "; ViT-Base, as in the paper"
    text = f"{size.depth} blocks of width {size.width} with {size.heads} heads; decoder of {size.decoder_depth} blocks"
    return size, [("transformer", text, reason)]


def hybrid_architecture(architecture: Mapping[str, Any], tokens: TokenGrid, size: TransformerSize) -> dict[str, Any]:
    """Return the ``architecture`` of a plan's configuration for a U-Net with a transformer on one stage.

    Args:
        architecture: Architecture of the U-Net.
        tokens: Token grid with the stage of the transformer.
        size: Size of the transformer.
    """
    stock = architecture["network_class_name"].rsplit(".", 1)[-1]
    return {
        "network_class_name": f"nnssl.networks.hybrid.{HYBRID_CLASSES[stock]}",
        "arch_kwargs": {
            **architecture["arch_kwargs"],
            "token_stage": tokens.stage,
            "transformer_width": size.width,
            "transformer_depth": size.depth,
            "transformer_heads": size.heads,
        },
        "_kw_requires_import": architecture["_kw_requires_import"],
    }
