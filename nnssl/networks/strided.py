"""Strided convolutions in bfloat16 on CPUs, some of which are computed incorrectly.

On CPUs with AMX, oneDNN computes a few shapes of convolutions from memory that it has not set, so that a network returns
different values at every call and sometimes NaN. Measured with torch 2.14.1, 2D and 3D, against float32 (the error of all other
shapes is that of the format, 0.4 %):

- Output of one voxel along the last axis by a stride along it: the output is wrong, or the gradient of the weights if the input
  has one voxel, too. Known as pytorch/pytorch issue 169688. Deep U-Nets on small patches have such layers: 16 voxels halved four
  times.
- Transposed with a stride of 8 and few output channels: the gradient of the input is wrong.

These layers are therefore computed in float32. The first kind is small, so that this costs hardly any time; no network of a plan
has one of the second kind.
"""

from typing import Any

import torch
from torch import Tensor, nn

LARGEST_TRANSPOSED_STRIDE = 4
"""Largest stride of a transposed convolution whose gradients were measured to be right."""


class _Guarded:
    """Computes a layer in float32, inside autocast on the CPU, if it would be wrong; the layer's class must be the next base."""

    def forward(self, volumes: Tensor, *others: Any) -> Tensor:
        """Return what the layer computes, in the format of the autocast region.

        Args:
            volumes: Input (batch, channel, [z,] y, x).
            others: Further arguments of the layer's ``forward``.
        """
        layer: Any = super()
        if volumes.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not comes_out_wrong(self, volumes):
            return layer.forward(volumes, *others)
        with torch.autocast("cpu", enabled=False):
            exact = layer.forward(volumes.float(), *others)
        return exact.to(torch.get_autocast_dtype("cpu"))


class _Conv2d(_Guarded, nn.Conv2d):
    pass


class _Conv3d(_Guarded, nn.Conv3d):
    pass


class _ConvTranspose2d(_Guarded, nn.ConvTranspose2d):
    pass


class _ConvTranspose3d(_Guarded, nn.ConvTranspose3d):
    pass


GUARDED_BY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _Conv2d,
    nn.Conv3d: _Conv3d,
    nn.ConvTranspose2d: _ConvTranspose2d,
    nn.ConvTranspose3d: _ConvTranspose3d,
}


def comes_out_wrong(layer: Any, volumes: Tensor) -> bool:
    """Return whether a layer is one of those that come out wrong in bfloat16 on CPUs with AMX.

    Args:
        layer: Convolution or transposed convolution.
        volumes: Its input (batch, channel, [z,] y, x).
    """
    stride = layer.stride[-1]
    if isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return stride > LARGEST_TRANSPOSED_STRIDE
    if stride == 1 or isinstance(layer.padding, str):  # padding by name exists without strides only
        return False
    reach = layer.dilation[-1] * (layer.kernel_size[-1] - 1) + 1
    return (volumes.shape[-1] + 2 * layer.padding[-1] - reach) // stride == 0


def guard_strided(module: nn.Module) -> None:
    """Make the strided convolutions of a module compute correct results in bfloat16 on the CPU. Weights and names do not change.

    Args:
        module: Network or method; changed in place.
    """
    for layer in module.modules():
        guarded = GUARDED_BY.get(type(layer))
        if guarded is not None and layer.stride[-1] > 1:  # type: ignore[index]
            layer.__class__ = guarded
