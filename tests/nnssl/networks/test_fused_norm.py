"""Instance norm and LeakyReLU as one operation: the same values and gradients as one after the other."""

import copy

import pytest
import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn

from nnssl.networks import fused_norm
from nnssl.networks.fused_norm import CHANNELS_LAST, fuse_norms
from nnssl.networks.visible_convolutions import _only_visible

ROUNDING = 0.1
"""Largest error of a tensor relative to its length: bfloat16 rounds by 0.004, and where that changes the sign of a value, its
gradient changes a hundredfold."""


@pytest.fixture
def called(monkeypatch) -> list[int]:
    """Return a list that grows with every call of the operation, also for small maps."""
    monkeypatch.setattr(fused_norm, "SMALLEST_SAMPLE", 0)
    calls: list[int] = []
    apply = fused_norm._NormAndActivation.apply
    monkeypatch.setattr(fused_norm._NormAndActivation, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def block_of(dimensions: int, nonlin: type[nn.Module] | None = nn.LeakyReLU, **others) -> ConvDropoutNormReLU:
    convolution, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimensions == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    norm_op_kwargs = {"eps": 1e-5, "affine": True, **others.pop("norm_op_kwargs", {})}
    block = ConvDropoutNormReLU(
        *(convolution, 3, 16, [3] * dimensions, [1] * dimensions, True, norm, norm_op_kwargs),
        **{"nonlin": nonlin, "nonlin_kwargs": {"inplace": True} if nonlin else None, **others},
    )
    if not norm_op_kwargs["affine"]:
        return block
    with torch.no_grad():
        block.norm.weight.copy_(torch.linspace(-1, 2, 16))  # also negative scales and one close to 0
        block.norm.bias.copy_(torch.linspace(0.5, -0.5, 16))
    return block


def run(module: nn.Module, volumes: torch.Tensor, enabled: bool = True) -> dict[str, torch.Tensor]:
    """Return output and gradients by name; ``module`` gets channels-last input."""
    volumes = volumes.to(memory_format=CHANNELS_LAST[volumes.ndim], copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = module(volumes)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.float() * weights).mean().mul(1000).backward()
    gradients = {name: each.grad for name, each in module.named_parameters() if not name.endswith("conv.bias")}
    return {"output": output.detach().float(), "input": volumes.grad, **gradients}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rounding: float) -> None:
    for name, value in expected.items():
        assert (found[name] - value).norm() <= rounding * value.norm(), name


@pytest.mark.parametrize(
    "others", [{}, {"nonlin": None}, {"nonlin_first": True}], ids=["activation", "no activation", "activation first"]
)
@pytest.mark.parametrize("shape", [(3, 3, 9, 10), (2, 3, 4, 6, 5), (1, 3, 8, 8)])
def test_values_and_gradients_are_those_of_both_operations(called, shape, others):
    torch.manual_seed(0)
    plain = block_of(len(shape) - 2, **others)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    volumes = 3 * torch.randn(shape) + 1
    expected = run(copy.deepcopy(plain), volumes, enabled=False)
    found = run(fused, volumes)
    assert called
    assert_close(found, expected, ROUNDING)
    # no less exact than one operation after the other
    apart = run(copy.deepcopy(plain), volumes)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1.5 * (apart[name] - value).norm(), name


def test_the_operation_equals_its_parts_to_the_digits_of_float32():
    torch.manual_seed(0)
    volumes = torch.randn(4, 16, 12, 11).to(memory_format=torch.channels_last)
    weight, bias = torch.linspace(-1, 2, 16), torch.linspace(0.5, -0.5, 16)
    ways = {
        "fused": lambda *own: fused_norm._NormAndActivation.apply(*own, 1e-5, 0.01),
        "parts": lambda own, *more: nn.functional.leaky_relu(nn.functional.instance_norm(own, None, None, *more), 0.01),
    }
    found = {}
    for name, way in ways.items():
        inputs = [each.clone().requires_grad_() for each in (volumes, weight, bias)]
        output = way(*inputs)
        output.sin().sum().backward()
        found[name] = [output, *(each.grad for each in inputs)]
    for one, other in zip(found["fused"], found["parts"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_weights_names_and_copies_stay(called):
    network = nn.Sequential(block_of(2))
    names = list(network.state_dict())
    fuse_norms(network)
    fuse_norms(network)
    again = copy.deepcopy(network)
    assert list(again.state_dict()) == names
    assert isinstance(again[0], ConvDropoutNormReLU)
    run(again, torch.randn(2, 3, 8, 8))
    assert len(called) == 1


def test_residual_blocks_activate_after_the_sum(called):
    torch.manual_seed(0)
    block = BasicBlockD(
        *(nn.Conv2d, 4, 16, [3, 3], [2, 2], True, nn.InstanceNorm2d, {"eps": 1e-5, "affine": True}),
        *(None, None, nn.LeakyReLU, {"inplace": True}),
    )
    fused = copy.deepcopy(block)
    fuse_norms(fused)
    volumes = torch.randn(2, 4, 16, 12)
    assert_close(run(fused, volumes), run(block, volumes, enabled=False), ROUNDING)
    assert len(called) == 3  # both convolutions and that of the skip


@pytest.mark.parametrize(
    "others",
    [
        {"nonlin": nn.ReLU},
        {"nonlin_kwargs": {"negative_slope": -0.1}},
        {"norm_op_kwargs": {"track_running_stats": True}},
        {"norm_op_kwargs": {"affine": False}},
    ],
    ids=["another activation", "slope that changes the sign", "running statistics", "no scale and shift"],
)
def test_other_blocks_are_left_alone(called, others):
    block = block_of(2, **others)
    fuse_norms(block)
    run(block, torch.randn(2, 3, 8, 8))
    assert not called


def test_float32_and_small_maps_take_the_usual_way(called, monkeypatch):
    block = block_of(2)
    fuse_norms(block)
    run(block, torch.randn(2, 3, 8, 8), enabled=False)
    assert not called
    monkeypatch.setattr(fused_norm, "SMALLEST_SAMPLE", 16 * 64 + 1)
    run(block, torch.randn(2, 3, 8, 8))
    assert not called


def test_norms_over_visible_positions_are_not_bypassed(called):
    torch.manual_seed(0)
    stage = nn.Sequential(block_of(2))
    plain = copy.deepcopy(stage)
    fuse_norms(stage)
    volumes = torch.randn(2, 3, 8, 8)
    shown = torch.rand(2, 4, 4) < 0.5
    outputs = []
    for each in (stage, plain):
        with torch.autocast("cpu", torch.bfloat16), _only_visible(each, shown):
            outputs.append(each(volumes))
    assert torch.equal(*outputs)
    assert not called


def test_dropout_before_the_norm_is_kept(called):
    block = block_of(2, dropout_op=nn.Dropout2d, dropout_op_kwargs={"p": 1.0})
    fuse_norms(block)
    output = run(block, torch.randn(2, 3, 8, 8))["output"]
    assert called
    expected = nn.functional.leaky_relu(block.norm.bias.detach(), 0.01)
    torch.testing.assert_close(output, expected.view(1, -1, 1, 1).expand_as(output), rtol=0.01, atol=0.01)


def test_float32_keeps_the_operations_of_pytorch(called):
    plain = block_of(2).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    volumes = torch.randn(1, 3, 9, 10).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(fused(volumes), plain(volumes))
    assert not called
