"""U-Nets whose segmentation layer reads the maps of all decoder stages and the bottleneck, for the linear probe of ``pyramid``.

Where pretraining describes a point by the pyramid (``nnssl.networks.dense``), what it learned is spread over all of these maps,
and nnU-Net's own segmentation layer reads the last one only. Both classes are stock U-Nets of nnU-Net with one additional layer,
``bottleneck.seg_layers.0``. All other parameters have the names of the stock U-Net, so its state dict fits; nnU-Net's loader
skips names with ``.seg_layers.``. A plan names the class, and nnU-Net builds, trains and predicts with it.

A linear layer commutes with linear interpolation. The layer that reads all maps, upsampled to full resolution and side by side,
is therefore computed as one 1 x 1 layer per map, whose outputs are upsampled and added, without any wide map at full
resolution. The parts for the decoder stages are ``decoder.seg_layers``, which every U-Net of nnU-Net has.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnssl.networks.dense import decoder_maps

INTERPOLATION = {2: "bilinear", 3: "trilinear"}
STOCK = "dynamic_network_architectures.architectures.unet."
PYRAMID_CLASSES = {
    f"{STOCK}PlainConvUNet": "nnssl.networks.pyramid.PyramidUNet",
    f"{STOCK}ResidualEncoderUNet": "nnssl.networks.pyramid.PyramidResidualEncoderUNet",
}
"""Class that adds the segmentation of all stages to each stock U-Net, by full names, as in a plan."""


class _Outputs(nn.Module):
    """The 1 x 1 layer of the bottleneck, in a list with nnU-Net's name for such layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([layer])


class PyramidSegmentation(nn.Module):
    """Mixin that lets the segmentation of the U-Net class that follows it among the bases read all decoder maps.

    Args:
        **unet: Arguments of the U-Net.
    """

    encoder: Any
    decoder: Any

    def __init__(self, **unet: Any) -> None:
        super().__init__(**unet)
        channels = self.encoder.output_channels[-1]
        self.bottleneck = _Outputs(self.encoder.conv_op(channels, self.decoder.num_classes, 1, bias=False))

    def linear_layer(self) -> list[nn.Parameter]:
        """Return the parameters of the linear layer that reads all maps: a weight for each, coarsest first, and one bias.

        ``decoder.seg_layers`` have further biases, which are 0 at the start and redundant.
        """
        layers = [self.bottleneck.seg_layers[0], *self.decoder.seg_layers]
        return [*(layer.weight for layer in layers), layers[-1].bias]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (batch, class, *shape), or a list with one tensor per resolution with deep supervision.

        At each resolution, the logits read the maps of this and of all coarser resolutions.
        """
        layers = [self.bottleneck.seg_layers[0], *self.decoder.seg_layers]
        parts = [layer(each) for layer, each in zip(layers, decoder_maps(self, x), strict=True)]
        if not self.decoder.deep_supervision:
            return _upsampled_sum(parts)
        return [_upsampled_sum(parts[:count]) for count in range(len(parts), 1, -1)]


def _upsampled_sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of logits of several resolutions at that of the last ones."""
    shape = parts[-1].shape[2:]
    total = parts[-1]
    for part in parts[:-1]:
        total = total + F.interpolate(part, size=shape, mode=INTERPOLATION[len(shape)])
    return total


class PyramidUNet(PyramidSegmentation, PlainConvUNet):
    """nnU-Net's plain U-Net whose segmentation reads all decoder stages and the bottleneck; arguments of ``PlainConvUNet``."""


class PyramidResidualEncoderUNet(PyramidSegmentation, ResidualEncoderUNet):
    """nnU-Net's residual encoder U-Net whose segmentation reads all decoder stages and the bottleneck.

    The arguments are those of ``ResidualEncoderUNet``.
    """
