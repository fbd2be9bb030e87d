"""Strided convolutions in bfloat16 on the CPU: compared with float32 where oneDNN reads memory that it has not set."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nnssl.networks.strided import comes_out_wrong, guard_strided

ROUNDING = 0.03
"""Largest error relative to the largest value; that of bfloat16 is 0.004."""


def leave_large_values_behind() -> None:
    """Fill memory that the next operations get with values that would show in their results."""
    sizes = (1000, 3000, 10000, 30000, 100000)
    kept = [torch.full((size,), 1e4, dtype=dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)]
    del kept


def run(layer: nn.Module, volumes: torch.Tensor, gradient: torch.Tensor, enabled: bool) -> list[torch.Tensor]:
    """Return output, gradient of the input and gradient of the weights."""
    layer = copy.deepcopy(layer)
    volumes = volumes.clone().requires_grad_()
    leave_large_values_behind()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = layer(volumes)
    leave_large_values_behind()
    output.backward(gradient.to(output.dtype))
    return [output.detach().float(), volumes.grad, layer.weight.grad]


def shapes(dimensions: int) -> list[tuple[int, ...]]:
    if dimensions == 2:
        return list(itertools.product((1, 2, 3, 4, 8, 9), (1, 2, 3, 4, 8)))
    return list(itertools.product((1, 2, 4), (1, 2, 3, 4, 6), (1, 2, 3, 4)))


@pytest.mark.parametrize("channels", [(16, 16), (64, 128)])
@pytest.mark.parametrize(
    ("kind", "kernel", "stride"),
    [
        (nn.Conv2d, (3, 3), (2, 2)),
        (nn.Conv2d, (3, 3), (1, 2)),
        (nn.Conv2d, (1, 1), (2, 2)),
        (nn.Conv3d, (3, 3, 3), (2, 2, 2)),
        (nn.Conv3d, (1, 3, 3), (1, 2, 2)),
        (nn.Conv3d, (3, 3, 3), (2, 2, 1)),
        (nn.ConvTranspose2d, (2, 2), (2, 2)),
        (nn.ConvTranspose3d, (2, 2, 2), (2, 2, 2)),
        (nn.ConvTranspose3d, (1, 2, 2), (1, 2, 2)),
    ],
)
def test_bfloat16_is_right_up_to_rounding(kind, kernel, stride, channels):
    torch.manual_seed(0)
    padding = 0 if "Transpose" in kind.__name__ else tuple(extent // 2 for extent in kernel)
    layer = kind(*channels, kernel, stride, padding)
    guard_strided(layer)
    for shape in shapes(len(kernel)):
        volumes = torch.randn(4, channels[0], *shape)
        gradient = torch.randn_like(layer(volumes))
        expected = run(layer, volumes, gradient, enabled=False)
        for name, value, right in zip(
            ("output", "gradient of the input", "gradient of the weights"),
            run(layer, volumes, gradient, enabled=True),
            expected,
            strict=True,
        ):
            error = (value - right).abs().max() / right.abs().max()
            assert error < ROUNDING, f"{name} of {shape}: {error}"


def test_a_transposed_convolution_with_a_large_stride_is_right():
    torch.manual_seed(0)
    layer = nn.ConvTranspose3d(96, 8, 8, 8)
    guard_strided(layer)
    volumes = torch.randn(2, 96, 2, 2, 2)
    gradient = torch.randn(2, 8, 16, 16, 16)
    pairs = zip(run(layer, volumes, gradient, True), run(layer, volumes, gradient, False), strict=True)
    assert all((value - right).abs().max() < ROUNDING * right.abs().max() for value, right in pairs)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_is_computed_in_float32_follows_from_the_width_of_the_output(width, kernel, stride):
    layer = nn.Conv3d(1, 1, kernel, stride, padding=kernel // 2)
    volumes = torch.zeros(1, 1, 8, 8, width)
    assert comes_out_wrong(layer, volumes) == (stride > 1 and layer(volumes).shape[-1] == 1)


def test_such_a_layer_is_computed_in_float32_on_any_cpu():
    """Values of the input are not rounded, although the result has the format of the others."""
    torch.manual_seed(0)
    layer, volumes = nn.Conv2d(8, 8, 3, 2, 1), torch.randn(2, 8, 6, 2)
    expected = layer(volumes).bfloat16()
    guard_strided(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(volumes)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert layer(volumes).dtype == torch.float32  # outside autocast nothing changes


def test_names_weights_and_copies_stay():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.ConvTranspose2d(2, 1, 2, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    guard_strided(network)
    guard_strided(network)
    assert type(network[1]) is nn.Conv2d
    assert isinstance(network[0], nn.Conv2d)
    twin = copy.deepcopy(network)
    assert type(twin[0]) is type(network[0])
    assert twin.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
