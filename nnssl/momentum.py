"""A teacher that is the moving average of its student, and the queue of keys that it made.

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
    # parameters() names a shared tensor once, state_dict() under each of its names: nnU-Net's decoder holds the encoder
    own, averaged = list(student.parameters()), list(teacher.parameters())
    if [parameter.shape for parameter in own] != [parameter.shape for parameter in averaged]:
        raise ValueError("student and teacher do not have the same parameters")
    return list(zip(own, averaged, strict=True))


@torch.no_grad()
def _copy_buffers(student: nn.Module, teacher: nn.Module) -> None:
    for own, copied in zip(student.buffers(), teacher.buffers(), strict=True):
        copied.copy_(own)


def make_teacher(student: M) -> M:
    """Return a copy of a module whose parameters get no gradient, for ``update_teacher`` to move."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move the teacher in place: ``teacher = momentum * teacher + (1 - momentum) * student``; buffers are copied.

    Source: MoCo, CVPR 2020, equation 2.
    Deviations: none; buffers (statistics of batch normalisation) are not in the paper.

    Args:
        student: the bare module, not one wrapped for several processes.
        teacher: of the same architecture, parameters in float32.
        momentum: the share of the teacher that is kept, 0 to 1.

    Raises:
        ValueError: the two do not have the same parameters, or the teacher's are too coarse for small steps.
    """
    for own, averaged in _pairs(student, teacher):
        if torch.finfo(averaged.dtype).bits < 32:
            raise ValueError(f"a teacher in {averaged.dtype} would not move: its steps are below the resolution")
        averaged.mul_(momentum).add_(own.to(averaged.dtype), alpha=1 - momentum)
    _copy_buffers(student, teacher)


def cosine_momentum(step: int, total_steps: int, base: float) -> float:
    """Return ``1 - (1 - base) (cos(pi step / total_steps) + 1) / 2``: base at the start, 1 at the end.

    Source: BYOL, NeurIPS 2020, section 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def momentum_for_run(momentum: float, total_steps: int) -> float:
    """Return a momentum that fits the length of a run: the teacher averages over at most a twentieth of it.

    A teacher averages over about ``1 / (1 - momentum)`` steps; MoCo's 0.999 over a thousand of its million. After a run
    of a thousand steps such a teacher would still be a third of its random start.

    Args:
        momentum: the paper's, returned unchanged when the run is long enough.
        total_steps: of the run, at least 1.
    """
    return min(momentum, max(0.0, 1 - 20 / total_steps))


def queue_for_run(length: int, batch_size: int, dimensions: int) -> "FeatureQueue":
    """Return a queue that holds the keys of a step at least, with the same random directions in every run.

    Args:
        length: the wanted number of keys.
        batch_size: keys of a step, over all processes.
        dimensions: of a key.
    """
    return FeatureQueue(max(length, batch_size), dimensions, torch.Generator().manual_seed(0))


class FeatureQueue(nn.Module):
    """The last keys, first in first out; on several processes every rank holds the same ones.

    Source: MoCo, CVPR 2020, section 3.1.
    Deviations: MoCo's code wants a length that is a multiple of the batch; here it wraps around anywhere.

    Args:
        length: number of keys K.
        dimensions: of a key.
        generator: CPU generator that draws the first keys, random directions.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, length: int, dimensions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dimensions, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "batch d"]) -> None:
        """Replace the oldest keys; call it after the backward pass of a loss that used the queue.

        Args:
            keys: of unit norm, those of all processes (``nnssl.distributed.gather``).

        Raises:
            ValueError: there are more keys than the queue holds.
        """
        length = len(self.keys)
        if len(keys) > length:
            raise ValueError(f"{len(keys)} keys do not fit into a queue of {length}")
        # the pointer stays on the device: reading it would make the host wait in every step
        rows = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % length
        self.keys[rows] = keys.detach().to(self.keys)
        self.pointer.copy_((self.pointer + len(keys)) % length)
