"""Sparse convolutions for masked images: masked voxels stay empty in all layers of a convolutional encoder.

Source: Tian et al., Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (SparK), ICLR 2023,
section 3.1; Wald et al., Revisiting MAE Pre-training for 3D Medical Image Segmentation, CVPR 2025.

Dense convolutions would erode the mask: after some layers, no position is empty, and the statistics of the normalisation are
those of an image that is mostly zero. Here the output of every convolution is set to 0 at masked positions, and instance
normalisation takes mean and variance from the visible ones. All arithmetic is dense, so neither time nor memory is saved.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnssl.networks.dense import encoder_parts
from nnssl.networks.pieces import recomputed

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def visible_maps(
    encoder: Any,
    volumes: Float[Tensor, "batch channel *shape"],
    shown: Bool[Tensor, " batch *grid"],
    recompute: bool = False,
) -> list[Tensor]:
    """Return the maps of an encoder's stages, full resolution first, computed from visible positions alone.

    Args:
        encoder: Encoder of a U-Net, plain or residual.
        volumes: Patches; voxels that are not shown do not matter.
        shown: Positions of the coarsest map that are visible; at least one of each patch.
        recompute: Whether each stage keeps only its inputs and is computed again in the backward pass.

    Returns:
        Maps (batch, channel, *grid), which are 0 at masked positions.
    """
    features, maps = volumes * enlarge(shown, volumes.shape[2:]), []
    parts = encoder_parts(encoder, len(encoder.stages) - 1)
    for part in parts:
        run = partial(_visible, encoder.get_submodule(part))
        features = recomputed(run, features, shown) if recompute else run(features, shown)
        maps.append(features)
    return maps[len(parts) - len(encoder.stages) :]


def enlarge(shown: Bool[Tensor, " batch *grid"], shape: Sequence[int]) -> Bool[Tensor, "batch 1 *shape"]:
    """Return a mask at a finer resolution, with an axis for the channels.

    Args:
        shown: Mask of the coarsest map.
        shape: Number of positions along each axis, multiples of those of the mask.
    """
    for axis, length in enumerate(shape, start=1):
        shown = shown.repeat_interleave(length // shown.shape[axis], dim=axis)
    return shown[:, None]


class SkipTokens(nn.Module):
    """Learned vectors that stand at the masked positions of the encoder's maps when the decoder reads them.

    Source: SparK, section 3.2. Deviation: SparK projects the filled maps by a convolution, because its decoder is narrower; here
    the decoder is that of the U-Net and gets the maps as they are, as in fine-tuning.

    Args:
        channels: Number of channels of each map.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(nn.Parameter(0.02 * torch.randn(count)) for count in channels)

    def forward(self, maps: Sequence[Tensor], shown: Bool[Tensor, " batch *grid"]) -> list[Tensor]:
        """Return the maps, filled.

        Args:
            maps: Maps of the encoder's stages, which are 0 at masked positions.
            shown: As in ``visible_maps``.
        """
        filled = []
        for features, token in zip(maps, self.tokens, strict=True):
            vector = token.to(features.dtype).view(1, -1, *(1,) * (features.ndim - 2))
            filled.append(torch.where(enlarge(shown, features.shape[2:]), features, vector))
        return filled


def _visible(stage: nn.Module, features: Tensor, shown: Tensor) -> Tensor:
    with _only_visible(stage, shown):
        result: Tensor = stage(features)
    return result


@contextmanager
def _only_visible(stage: nn.Module, shown: Tensor) -> Iterator[None]:
    """Within it, convolutions of a stage have no output at masked positions, and norms ignore these."""
    masks: dict[tuple[int, ...], Tensor] = {}

    def mask(features: Tensor) -> Tensor:
        shape = tuple(features.shape[2:])
        if shape not in masks:
            masks[shape] = enlarge(shown, shape)
        return masks[shape]

    def hide(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * mask(output)

    with ExitStack() as stack:
        for module in stage.modules():
            if isinstance(module, CONVOLUTIONS):
                stack.callback(module.register_forward_hook(hide).remove)
            elif isinstance(module, _InstanceNorm):
                module.forward = partial(_normalise, module, mask)  # type: ignore[method-assign]
                stack.callback(module.__dict__.pop, "forward")
        yield


def _normalise(norm: _InstanceNorm, mask: Any, features: Tensor) -> Tensor:
    """Return features normalised over the visible positions of each sample and channel, and 0 at the others."""
    axes = tuple(range(2, features.ndim))
    shown = mask(features)
    values = features.float()
    count = shown.sum(dim=axes, keepdim=True)
    mean = (values * shown).sum(dim=axes, keepdim=True) / count
    centred = (values - mean) * shown
    variance = centred.square().sum(dim=axes, keepdim=True) / count
    made = centred * (variance + norm.eps).rsqrt()
    if norm.affine:
        scale, shift = (each.float().view(1, -1, *(1,) * len(axes)) for each in (norm.weight, norm.bias))
        made = made * scale + shift * shown
    return made.to(features.dtype)
