import pytest

from nnssl.networks.backbone import build_network, measurable_network
from tests.nnssl.weights.tiny_networks import primus, unet


@pytest.mark.parametrize(
    ("architecture", "patch"),
    [(unet("plain", 2), (16, 16)), (unet("hybrid", 3), (16, 16, 16)), (primus(), (8, 16, 16))],
)
def test_a_network_without_weights_has_the_sizes_of_the_real_one(architecture, patch):
    measured, real = measurable_network(architecture, 2), build_network(architecture, 2, 2, seed=0)
    assert all(tensor.is_meta for tensor in measured.state_dict().values())
    assert {k: v.shape for k, v in measured.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    sizes = [each.compute_conv_feature_map_size(patch) for each in (measured, real)]
    assert sizes[0] == sizes[1] > 0
