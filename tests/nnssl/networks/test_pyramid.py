"""U-Nets whose segmentation reads all decoder maps: the same as one linear layer on what a dense method reads at each voxel."""

import pytest
import torch

from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps
from nnssl.networks.pyramid import PYRAMID_CLASSES
from nnssl.views.points import interpolate_at
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

dims = pytest.mark.parametrize("dim", [2, 3])
residuals = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def pyramid_network(dim: int, residual: bool, seed: int = 0):
    stock = architecture(dim, residual, False)
    return build_network({**stock, "network_class_name": PYRAMID_CLASSES[stock["network_class_name"]]}, 2, 3, seed)


@dims
@residuals
def test_segmentation_is_one_linear_layer_on_the_pyramid_of_every_voxel(dim, residual):
    """Features are interpolated voxel by voxel as in Pix2Rep, put side by side, and multiplied with one matrix."""
    network = pyramid_network(dim, residual)
    network.decoder.deep_supervision = False
    shape, volumes = PATCHES[dim], torch.randn(2, 2, *PATCHES[dim])
    *weights, bias = network.linear_layer()
    with torch.no_grad():
        bias.copy_(torch.randn(3))
        voxels = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in shape))[None].expand(2, -1, -1)
        features = torch.cat([interpolate_at(m, voxels, shape) for m in decoder_maps(network, volumes)], dim=2)
        matrix = torch.cat([weight.flatten(1) for weight in weights], dim=1)
        assert features.shape[2] == matrix.shape[1] == 4 + 8 + 12
        expected = (features @ matrix.T + bias).movedim(2, 1).unflatten(2, shape)
        torch.testing.assert_close(network(volumes), expected, atol=1e-5, rtol=1e-5)
        without = features.clone()
        without[:, :, :12] = 0  # the bottleneck comes first
        assert not torch.allclose(without @ matrix.T, features @ matrix.T, atol=1e-2)


@dims
@residuals
def test_all_other_parameters_are_those_of_the_stock_unet(dim, residual):
    """With nothing read from coarser maps it computes what the stock U-Net computes, at every resolution."""
    network, stock = pyramid_network(dim, residual), build_network(architecture(dim, residual, False), 2, 3, seed=1)
    assert set(network.state_dict()) - set(stock.state_dict()) == {"bottleneck.seg_layers.0.weight"}
    missing = network.load_state_dict(stock.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    volumes = torch.randn(2, 2, *PATCHES[dim])
    *weights, _ = network.linear_layer()
    with torch.no_grad():
        expected = stock(volumes)
        found = network(volumes)
        assert [each.shape for each in found] == [each.shape for each in expected]
        network.decoder.deep_supervision = False
        assert torch.equal(network(volumes), found[0])
        for weight in weights[:-1]:
            weight.zero_()
        assert torch.equal(network(volumes), expected[0])
