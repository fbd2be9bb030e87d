"""A teacher that is the moving average of its student, and a queue of the keys that it computed.

Source: He et al., Momentum Contrast (MoCo), CVPR 2020, section 3.2 and equation 2; Grill et al., BYOL, NeurIPS 2020
(schedule).
"""

import copy
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    # parameters() returns a shared tensor once, state_dict() once per name. In nnU-Net, the decoder holds the encoder too.
    own, averaged = list(student.parameters()), list(teacher.parameters())
    if [parameter.shape for parameter in own] != [parameter.shape for parameter in averaged]:
        raise ValueError("student and teacher do not have the same parameters")
    return list(zip(own, averaged, strict=True))


@torch.no_grad()
def _copy_buffers(student: nn.Module, teacher: nn.Module) -> None:
    for own, copied in zip(student.modules(), teacher.modules(), strict=True):
        if not getattr(copied, "keeps_own_buffers", False):
            for buffer, other in zip(own.buffers(recurse=False), copied.buffers(recurse=False), strict=True):
                other.copy_(buffer)


def make_teacher(student: M) -> M:
    """Return a copy of a module whose parameters receive no gradient; ``update_teacher`` updates it."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Update the teacher in place: ``teacher = momentum * teacher + (1 - momentum) * student``.

    Buffers are copied, except those of modules whose attribute ``keeps_own_buffers`` is true.

    Source: MoCo, CVPR 2020, equation 2.
    Deviations: none; the paper does not mention buffers (statistics of batch normalisation).

    Args:
        student: Module that is not wrapped for several processes.
        teacher: Module of the same architecture with parameters in float32.
        momentum: Share of the teacher that is kept, 0 to 1.

    Raises:
        ValueError: If the two modules have different parameters, or the teacher's precision is too low for small steps.
    """
    for own, averaged in _pairs(student, teacher):
        if torch.finfo(averaged.dtype).bits < 32:
            raise ValueError(
                f"the teacher must have parameters in float32, got {averaged.dtype}, which rounds small steps to 0"
            )
        averaged.mul_(momentum).add_(own.to(averaged.dtype), alpha=1 - momentum)
    _copy_buffers(student, teacher)


def cosine_momentum(step: int, total_steps: int, base: float) -> float:
    """Return ``1 - (1 - base) (cos(pi step / total_steps) + 1) / 2``, which rises from ``base`` to 1.

    Source: BYOL, NeurIPS 2020, section 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def momentum_for_run(momentum: float, total_steps: int) -> float:
    """Return a momentum with which the teacher averages over at most a twentieth of the run.

    A teacher averages over about ``1 / (1 - momentum)`` steps; with MoCo's 0.999 these are a thousand of its million steps.
    After a run of only a thousand steps, a third of such a teacher would still be its random initialisation.

    Args:
        momentum: Momentum of the paper, returned unchanged if the run is long enough.
        total_steps: Number of steps of the run, at least 1.
    """
    return min(momentum, max(0.0, 1 - 20 / total_steps))


def queue_for_run(length: int, batch_size: int, dimensions: int) -> "FeatureQueue":
    """Return a queue that holds at least the keys of one step, with the same random initial keys in every run.

    Args:
        length: Requested number of keys.
        batch_size: Number of keys per step, over all processes.
        dimensions: Number of dimensions of a key.
    """
    return FeatureQueue(max(length, batch_size), dimensions, torch.Generator().manual_seed(0))


class FeatureQueue(nn.Module):
    """A queue of the most recent keys, first in first out. With several processes, every rank holds the same keys.

    Source: MoCo, CVPR 2020, section 3.1.
    Deviations: MoCo's code requires a length that is a multiple of the batch; here, any length is allowed.

    Args:
        length: Number of keys K.
        dimensions: Number of dimensions of a key.
        generator: CPU generator that draws the initial keys, which are random directions.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, length: int, dimensions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dimensions, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "batch d"]) -> None:
        """Replace the oldest keys. Call this after the backward pass of a loss that used the queue.

        Args:
            keys: Keys of unit norm from all processes (``nnssl.distributed.gather``).

        Raises:
            ValueError: If there are more keys than the queue holds.
        """
        length = len(self.keys)
        if len(keys) > length:
            raise ValueError(f"the number of keys must be at most {length}, the length of the queue, got {len(keys)}")
        # The pointer stays on the device, because reading it would make the host wait in every step.
        rows = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % length
        self.keys[rows] = keys.detach().to(self.keys)
        self.pointer.copy_((self.pointer + len(keys)) % length)
