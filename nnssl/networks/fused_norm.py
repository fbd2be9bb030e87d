"""Instance normalisation with LeakyReLU as one operation, for bfloat16 on CPUs with AMX.

PyTorch's instance normalisation copies its input into the default layout and the result back into channels-last, and the
activation reads and writes the whole map once more. Together they take about as long as the convolutions, which AMX makes
fast. Here every sample is normalised by itself, by the kernel of batch normalisation, which reads channels-last directly, and
the activation follows while the sample is in the cache. Times are in ``documentation/speed.md``.
"""

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.instancenorm import _InstanceNorm

SMALLEST_SAMPLE = 20_000
"""Values per sample below which PyTorch's own operations are faster, because each call takes some microseconds."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory format by the number of axes of a batch."""


class _NormAndActivation(torch.autograd.Function):
    """Instance normalisation with scale and shift, then LeakyReLU; a slope of 1 is no activation."""

    @staticmethod
    def forward(ctx: Any, volumes: Tensor, weight: Tensor, bias: Tensor, epsilon: float, slope: float) -> Tensor:
        output = torch.empty_like(volumes)
        means, scales = (torch.empty(volumes.shape[:2]) for _ in range(2))
        for i in range(len(volumes)):
            torch.ops.aten.native_batch_norm.out(
                *(volumes[i : i + 1], weight, bias, None, None, True, 0.0, epsilon),
                **{"out": output[i : i + 1], "save_mean": means[i], "save_invstd": scales[i]},
            )
            if slope != 1:
                nn.functional.leaky_relu_(output[i : i + 1], slope)
        # Without an activation the output is not needed, and residual blocks add to it in place.
        ctx.save_for_backward(volumes, output if slope != 1 else None, weight, means, scales)
        ctx.epsilon, ctx.slope = epsilon, slope
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        volumes, output, weight, means, scales = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=CHANNELS_LAST[volumes.ndim])
        of_volumes = torch.empty_like(volumes)
        of_weights, of_biases = [], []
        for i in range(len(volumes)):
            own = gradient[i : i + 1]
            if ctx.slope != 1:  # the sign of the output is that of the input
                own = torch.ops.aten.leaky_relu_backward(own, output[i : i + 1], ctx.slope, True)
            found = torch.ops.aten.native_batch_norm_backward(
                *(own, volumes[i : i + 1], weight, None, None, means[i], scales[i], True, ctx.epsilon, [True] * 3)
            )
            of_volumes[i : i + 1] = found[0]
            of_weights.append(found[1])
            of_biases.append(found[2])
        return of_volumes, torch.stack(of_weights).sum(0), torch.stack(of_biases).sum(0), None, None


class _FusedBlock(ConvDropoutNormReLU):
    """A block of nnU-Net's networks that normalises and activates in one operation where this is faster."""

    norm: _InstanceNorm

    def forward(self, volumes: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            volumes: Input (batch, channel, [z,] y, x).
        """
        layers = list(self.all_modules)
        place = layers.index(self.norm)
        for layer in layers[:place]:
            volumes = layer(volumes)
        activation = layers[place + 1] if place + 1 < len(layers) else None
        if not _is_faster(volumes) or "forward" in self.norm.__dict__:  # sparse convolutions put their own norm there
            for layer in layers[place:]:
                volumes = layer(volumes)
            return volumes
        slope = 1.0 if activation is None else activation.negative_slope
        norm, laid_out = self.norm, volumes.contiguous(memory_format=CHANNELS_LAST[volumes.ndim])
        result: Tensor = _NormAndActivation.apply(laid_out, norm.weight, norm.bias, norm.eps, slope)
        return result


def fuse_norms(module: nn.Module) -> None:
    """Let the blocks of nnU-Net's networks normalise and activate in one operation, which changes neither weights nor names.

    It takes effect for bfloat16 on the CPU, in maps that are not small, and is worthwhile only in channels-last.

    Args:
        module: Network or method; changed in place. Blocks with other norms or other activations after the norm stay as they are.
    """
    for block in module.modules():
        if type(block) is ConvDropoutNormReLU and _can_be_fused(block):
            block.__class__ = _FusedBlock


def _can_be_fused(block: ConvDropoutNormReLU) -> bool:
    """Return whether a block ends in an instance norm with scale and shift, followed by LeakyReLU or nothing."""
    norm, layers = getattr(block, "norm", None), list(block.all_modules)
    if not isinstance(norm, (nn.InstanceNorm2d, nn.InstanceNorm3d)) or not norm.affine or norm.track_running_stats:
        return False
    after = layers[layers.index(norm) + 1 :]
    return not after or (len(after) == 1 and type(after[0]) is nn.LeakyReLU and after[0].negative_slope > 0)


def _is_faster(volumes: Tensor) -> bool:
    """Return whether one operation is faster for a map. In float32, the kernel's sums would be too inexact for large maps."""
    return (
        volumes.device.type == "cpu"
        and volumes.dtype is torch.bfloat16
        and volumes.ndim in CHANNELS_LAST
        and len(volumes) > 0
        and volumes.shape[1:].numel() >= SMALLEST_SAMPLE
    )
