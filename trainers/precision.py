"""Mixed precision: the number format and the memory layout that networks are computed in on a device.

bfloat16 needs no loss scaling and was measured to be faster than float32 on all hardware that supports it. Channels-last
was measured to be slower than the default layout on CPUs that have AVX512-BF16 but not AMX, so it is used only with AMX and
on CUDA.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.fused_norm import fuse_norms
from nnssl.networks.strided import guard_strided

VARIABLE = "NNSSL_PRECISION"
FORMATS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Precision of forward passes in training; weights, losses and optimizer remain float32."""

    dtype: torch.dtype | None
    """Format of the autocast region; None for float32 throughout."""
    memory_format_channels_last: bool
    """Whether volumes and networks are stored channels-last."""
    scaler: bool
    """Whether gradients need loss scaling, as in float16."""

    @property
    def name(self) -> str:
        """Name of the format, e.g. ``bfloat16``."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context for a forward pass; it has no effect in float32."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, dtype=self.dtype)

    def lay_out(self, value: Tensor | nn.Module, spatial_dimensions: int) -> Tensor | nn.Module:
        """Convert a batch of volumes or a network to the memory layout.

        Args:
            value: Volumes ``(batch, channel, [z,] y, x)``, or a module with convolutions of that dimension.
            spatial_dimensions: 2 or 3.

        Returns:
            The same values; a module is changed in place. In bfloat16, strided convolutions are guarded, which has an
            effect on the CPU only (``nnssl.networks.strided``). On the CPU in channels-last, norms and activations become one
            operation (``nnssl.networks.fused_norm``).
        """
        if isinstance(value, nn.Module) and self.dtype is torch.bfloat16:
            guard_strided(value)
            if self.memory_format_channels_last and all(each.device.type == "cpu" for each in value.parameters()):
                fuse_norms(value)
        if not self.memory_format_channels_last:
            return value
        return value.to(memory_format=torch.channels_last if spatial_dimensions == 2 else torch.channels_last_3d)


def choose_precision(device: torch.device) -> Precision:
    """Choose number format and memory layout for a device.

    The format is bfloat16 on GPUs that support it and on CPUs with AMX or AVX512-BF16, float16 with a loss scaler on older
    GPUs, and float32 elsewhere. The environment variable ``NNSSL_PRECISION`` (float32, bfloat16, float16) overrides this.

    Raises:
        UserError: If ``NNSSL_PRECISION`` has another value, or if it is float16 without a CUDA GPU, where training would fail.
    """
    amx = device.type == "cpu" and _cpu_has("_is_amx_tile_supported")
    wanted = os.environ.get(VARIABLE)
    if wanted:
        if wanted not in FORMATS:
            raise UserError(f"{VARIABLE} must be one of {', '.join(FORMATS)} or unset, got {wanted}")
        if wanted == "float16" and device.type != "cuda":
            raise UserError(f"{VARIABLE} must be float32, bfloat16 or unset without a CUDA GPU, got float16")
        dtype = FORMATS[wanted]
    elif device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif device.type == "cpu" and (amx or _cpu_has("_is_avx512_bf16_supported")):
        dtype = torch.bfloat16
    else:
        dtype = None
    channels_last = dtype is not None and (device.type == "cuda" or amx)
    return Precision(dtype, memory_format_channels_last=channels_last, scaler=dtype == torch.float16)


def _cpu_has(question: str) -> bool:
    """Return the result of one of torch.cpu's private feature tests; False if this version of PyTorch does not have it."""
    test = getattr(torch.cpu, question, None)
    return test is not None and bool(test())


def clip_and_step(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    largest_norm: float,
) -> Tensor:
    """Clip the gradient and step the optimizer.

    Args:
        parameters: Parameters whose gradient is clipped.
        optimizer: Optimizer to step.
        scaler: Loss scaler with which the gradient was computed; None for formats other than float16.
        largest_norm: Largest norm of the gradient over all parameters; a longer gradient is scaled down.

    Returns:
        The gradient's norm before clipping.
    """
    if scaler is None:
        norm = nn.utils.clip_grad_norm_(parameters, largest_norm)
        optimizer.step()
        return norm
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, largest_norm)
    scaler.step(optimizer)
    scaler.update()
    return norm


class FullPrecisionLoss(nn.Module):
    """A loss that is computed in float32 whatever the network's precision, because sums over voxels need the digits."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        """Return ``loss(outputs, target)``, computed outside autocast on float32 outputs (one tensor or a list)."""
        device_type = (outputs if isinstance(outputs, Tensor) else outputs[0]).device.type
        with torch.autocast(device_type, enabled=False):
            if isinstance(outputs, Tensor):
                return self.loss(outputs.float(), target)
            return self.loss([output.float() for output in outputs], target)
