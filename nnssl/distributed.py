"""Rank, number of processes, and exchange of tensors between processes. With one process, tensors are returned unchanged.

All processes must call these functions in the same order, with tensors of equal shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_distributed() -> bool:
    """Whether a process group has been started."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, 0 for a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def average_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module whose backward pass averages the gradients over all ranks; with one process, the module itself."""
    if not is_distributed():
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, concatenated along axis 0 in the order of ranks, without gradient."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on the rows of every rank, so the gradients are added on the rank that owns the rows.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, concatenated along axis 0 in the order of ranks, with gradient.

    The rows of a rank receive the sum of the gradients of all ranks' losses. Averaging over ranks afterwards, as
    ``DistributedDataParallel`` does for parameters, gives the gradient of the mean of the ranks' losses.
    """
    return tensor if world_size() == 1 else _GatherWithGradient.apply(tensor)


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type, such as the gradients after a backward pass, by their means over all ranks, in place."""
    if world_size() == 1 or not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= world_size()
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a floating-point tensor over all ranks, without gradient; the tensor itself is not changed."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world_size()


def standardise_over_ranks(
    rows: Tensor, epsilon: float = 1e-5, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Return rows (sample, d) with mean 0 and variance 1 in every dimension over the rows of all ranks, with gradient.

    This is batch normalisation over the batch of all processes, without running statistics.

    Args:
        rows: Rows of this process; every process must have equally many.
        epsilon: Number that is added to the variance.
        scale: Factor of every dimension afterwards, as in batch normalisation; None for 1.
        shift: What is added to every dimension at the end; None for nothing.
    """
    if world_size() == 1 and len(rows) > 1:  # one operation, which does not accept a single row
        return nn.functional.batch_norm(rows, None, None, scale, shift, training=True, eps=epsilon)
    return _standardise_by_exchange(rows, epsilon, scale, shift)


def _standardise_by_exchange(rows: Tensor, epsilon: float, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Do what ``standardise_over_ranks`` does by exchanging means, never in half precision, where squares overflow."""
    own = rows if rows.dtype is torch.float64 else rows.float()
    centred = own - gather_with_gradient(own.mean(dim=0, keepdim=True)).mean(dim=0)
    variance = gather_with_gradient(centred.square().mean(dim=0, keepdim=True)).mean(dim=0)
    standardised = centred / (variance + epsilon).sqrt()
    scaled = standardised if scale is None else standardised * scale
    return (scaled if shift is None else scaled + shift).to(rows.dtype)
