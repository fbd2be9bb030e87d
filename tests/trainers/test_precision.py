import pytest
import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks import fused_norm
from trainers.precision import VARIABLE, FullPrecisionLoss, choose_precision, clip_and_step

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("device", "amx", "avx512_bf16", "cuda_bf16", "expected"),
    [
        (CPU, True, True, False, (torch.bfloat16, True, False)),
        (CPU, False, True, False, (torch.bfloat16, False, False)),
        (CPU, False, False, True, (None, False, False)),
        (CUDA, False, False, True, (torch.bfloat16, True, False)),
        (CUDA, True, True, False, (torch.float16, True, True)),
        (MPS, True, True, True, (None, False, False)),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device, amx, avx512_bf16, cuda_bf16, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16 or including_emulation)
    precision = choose_precision(device)
    assert (precision.dtype, precision.memory_format_channels_last, precision.scaler) == expected


def test_the_variable_overrules(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setenv(VARIABLE, "float32")
    precision = choose_precision(CPU)
    assert (precision.dtype, precision.memory_format_channels_last, precision.name) == (None, False, "float32")
    monkeypatch.setenv(VARIABLE, "bfloat16")
    assert choose_precision(CPU).name == "bfloat16"
    for wrong, device in (("half", CUDA), ("float16", CPU)):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(UserError, match=f"{VARIABLE} must be .*, got {wrong}"):
            choose_precision(device)


def test_a_cpu_without_the_questions_is_taken_as_old(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_precision(CPU).dtype is None


@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last_changes_strides_and_no_value(monkeypatch, dimensions):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setenv(VARIABLE, "bfloat16")
    volumes = torch.randn(2, 3, *(4, 5, 6)[-dimensions:])
    laid_out = choose_precision(CPU).lay_out(volumes, dimensions)
    assert torch.equal(laid_out, volumes)
    assert laid_out.stride(1) == 1
    monkeypatch.setenv(VARIABLE, "float32")
    assert choose_precision(CPU).lay_out(volumes, dimensions) is volumes


def test_the_network_runs_in_bfloat16_and_the_loss_in_float32(monkeypatch):
    monkeypatch.setenv(VARIABLE, "bfloat16")
    network = nn.Conv3d(1, 2, 3, padding=1)
    seen = []

    class Loss(nn.Module):
        def forward(self, outputs, target):
            seen.append([output.dtype for output in outputs] + [(outputs[0].flatten(1) @ target).dtype])
            return sum(output.square().mean() for output in outputs)

    with choose_precision(CPU).autocast(CPU):
        output = network(torch.randn(1, 1, 3, 4, 5))
        assert output.dtype == torch.bfloat16
        loss = FullPrecisionLoss(Loss())([output, output], torch.randn(120, 1))
        assert FullPrecisionLoss(nn.MSELoss())(output, torch.zeros_like(output)).dtype == torch.float32
    assert seen == [[torch.float32, torch.float32, torch.float32]]
    loss.backward()
    assert network.weight.grad.dtype == torch.float32


def stepped(scaler: torch.amp.GradScaler | None, largest_norm: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a weight after one step of SGD at rate 0.1 on ``factor * (3 w0 - 4 w1)``, and the norm."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    loss = factor * (3 * weight[0] - 4 * weight[1])
    (loss if scaler is None else scaler.scale(loss)).backward()
    norm = clip_and_step([weight], optimizer, scaler, largest_norm)
    return weight.detach(), norm


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_is_clipped_after_its_scale_is_removed(scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024) if scaled else None
    weight, norm = stepped(scaler, largest_norm=12)
    assert norm == pytest.approx(5)
    assert weight.tolist() == pytest.approx([1 - 0.3, 2 + 0.4])
    weight, norm = stepped(scaler, largest_norm=1)
    assert norm == pytest.approx(5)
    assert weight.tolist() == pytest.approx([1 - 0.06, 2 + 0.08], abs=1e-5)


def test_a_gradient_that_overflows_is_left_out_and_scaled_less():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    weight, _ = stepped(scaler, largest_norm=12, factor=1e38)
    assert weight.tolist() == [1, 2]
    assert scaler.get_scale() == 512


@pytest.mark.parametrize(("amx", "calls"), [(True, 1), (False, 0)])
def test_norm_and_activation_are_one_operation_in_channels_last(monkeypatch, amx, calls):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    apply = fused_norm._NormAndActivation.apply
    called = []
    monkeypatch.setattr(fused_norm._NormAndActivation, "apply", lambda *args: called.append(1) or apply(*args))
    block = ConvDropoutNormReLU(
        *(nn.Conv2d, 1, 32, [3, 3], [1, 1], True, nn.InstanceNorm2d, {"affine": True}),
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={},
    )
    precision = choose_precision(CPU)
    precision.lay_out(block, 2)
    with precision.autocast(CPU):
        block(precision.lay_out(torch.randn(2, 1, 32, 32), 2))
    assert len(called) == calls
