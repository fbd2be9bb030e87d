"""PCRL's two crops of a patch, their mixing, and what a decoder must make of them.

Source: Zhou et al., PCRL, ICCV 2021, equation 8; the range of the voxels from the authors' code.

Deviations: the authors map voxels to [0, 1] by one window of Hounsfield units for all scans. Here, data are z-scored, and
``unit`` maps the percentiles 1 and 99 of both crops to 0 and 1, for each sample and channel, and clips what lies beyond.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from scipy.special import betaincinv
from torch import Tensor

from nnssl.views.intensity_changes import percentiles
from nnssl.views.turns import TurnParams, apply_turns

HybridTarget = Literal["mixed_then_turned", "turned_then_mixed"]
MODELS = ("o", "m", "h")
"""Names of the encoder, its moving average, and their hybrid."""
ReconstructionScale = Literal["z_score", "unit"]
UNIT_SHARES = (0.01, 0.99)
"""Shares of the voxels below 0 and below 1 of the unit range."""


@dataclass(frozen=True)
class ContextViews:
    """Two clean crops of each patch, their corrupted versions, and the transformations that the decoder must produce.

    Attributes:
        clean_o: Crop of the encoder (batch, channel, *shape).
        clean_m: Crop of the moving average, of the same shape.
        seen_o: ``clean_o``, corrupted.
        seen_m: ``clean_m``, corrupted.
        turns: Requested transformation, by model; no ``h`` without mixup.
        codes: Code of the requested transformation (batch, bits), by model.
        mixing: Share of ``o`` in the hybrid (batch,), 0 to 1.
        learnable_o: Mask of the voxels of ``clean_o`` that may be learned from (batch, *shape).
        learnable_m: The same for ``clean_m``.
    """

    clean_o: Float[Tensor, "batch channel *shape"]
    clean_m: Float[Tensor, "batch channel *shape"]
    seen_o: Float[Tensor, "batch channel *shape"]
    seen_m: Float[Tensor, "batch channel *shape"]
    turns: dict[str, TurnParams]
    codes: dict[str, Tensor]
    mixing: Float[Tensor, " batch"]
    learnable_o: Bool[Tensor, " batch *shape"]
    learnable_m: Bool[Tensor, " batch *shape"]


def draw_mixing(generators: Sequence[torch.Generator], alpha: float) -> Float[Tensor, " batch"]:
    """Draw the share of ``o`` in the hybrid of each sample from Beta(alpha, alpha), with one random number each.

    Args:
        generators: One generator per sample.
        alpha: Above 0. With 1, all shares are equally likely; with less, shares near 0 and 1; with more, those near 1/2.
    """
    uniform = torch.cat([torch.rand(1, generator=each) for each in generators])
    if alpha == 1:
        return uniform
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.double().numpy())).float()


def reconstruction_targets(
    views: ContextViews, hybrid_target: HybridTarget
) -> dict[str, Float[Tensor, "batch channel *shape"]]:
    """Return the targets of the decoder, by model: the clean crops, flipped and turned (equation 8)."""
    targets = {model: apply_turns(clean_crop(model, views), turns) for model, turns in views.turns.items()}
    if "h" in targets and hybrid_target == "turned_then_mixed":
        targets["h"] = mix(targets["o"], targets["m"], views.mixing)
    return targets


def counted_targets(views: ContextViews, hybrid_target: HybridTarget) -> dict[str, Bool[Tensor, " batch *shape"]]:
    """Return the voxels of each target that count: those of the clean crops that may be learned from, flipped and turned."""
    counted = {
        model: apply_turns(counted_clean(model, views)[:, None], turns)[:, 0] for model, turns in views.turns.items()
    }
    if "h" in counted and hybrid_target == "turned_then_mixed":
        counted["h"] = counted["o"] & counted["m"]
    return counted


def mix(first: Tensor, second: Tensor, share: Float[Tensor, " batch"]) -> Tensor:
    """Return ``share * first + (1 - share) * second`` for every sample."""
    share = share.to(first).view(-1, *(1,) * (first.ndim - 1))
    return share * first + (1 - share) * second


def clean_crop(model: str, views: ContextViews) -> Float[Tensor, "batch channel *shape"]:
    """Return the clean crop of a model before it is turned; for the hybrid, the mix of both crops."""
    if model == "h":
        return mix(views.clean_o, views.clean_m, views.mixing)
    return views.clean_o if model == "o" else views.clean_m


def counted_clean(model: str, views: ContextViews) -> Bool[Tensor, " batch *shape"]:
    """Return the voxels of a model's clean crop that may be learned from; for the hybrid, in both crops."""
    if model == "h":
        return views.learnable_o & views.learnable_m
    return views.learnable_o if model == "o" else views.learnable_m


def clean_in_scale(views: ContextViews, scale: ReconstructionScale) -> ContextViews:
    """Return the views with the clean crops in the scale of the reconstruction."""
    clean_o, clean_m = (in_scale(each, views, scale) for each in (views.clean_o, views.clean_m))
    return replace(views, clean_o=clean_o, clean_m=clean_m)


@torch.no_grad()
def in_scale(
    volumes: Float[Tensor, "batch channel *shape"], views: ContextViews, scale: ReconstructionScale
) -> Float[Tensor, "batch channel *shape"]:
    """Return crops in the scale of the reconstruction: as they are, or from 0 to 1 by the percentiles of both clean crops.

    One range for both crops of a sample keeps the mix of both in their scale.

    Args:
        volumes: Crops of the same samples as the views.
        views: Views whose clean crops give the range.
        scale: ``z_score`` leaves the crops as they are; ``unit`` maps them to [0, 1].
    """
    if scale == "z_score":
        return volumes
    both = torch.cat([views.clean_o, views.clean_m], dim=2).float()
    low, high = percentiles(both.flatten(0, 1), UNIT_SHARES).unbind(dim=1)
    per_channel = (*volumes.shape[:2], *(1,) * (volumes.ndim - 2))
    low, width = low.view(per_channel), (high - low).clamp_min(torch.finfo(torch.float32).tiny).view(per_channel)
    return ((volumes.float() - low) / width).clamp(0, 1).to(volumes.dtype)
