"""Patches of a batch that are compared with each other: neighbours in twos."""

import torch
from jaxtyping import Int
from torch import Tensor

from nnssl.errors import UserError


def pair_up(count: int) -> tuple[list[int], list[int]]:
    """Return for every sample of a batch the first of its group, and its partner: neighbours in twos, an odd last one in a three.

    Args:
        count: samples.

    Returns:
        Index of the first sample of the group, and index of the partner; a single sample is its own.
    """
    first = [index - index % 2 for index in range(count)]
    if count % 2 and count > 1:
        first[-1] = count - 3
    members = {each: [index for index in range(count) if first[index] == each] for each in first}
    partner = [
        group[(group.index(index) + 1) % len(group)] for index in range(count) for group in [members[first[index]]]
    ]
    return first, partner


def partners_in_batch(count: int, device: torch.device) -> Int[Tensor, " batch"]:
    """Return the partner of every sample, as ``pair_up`` has it, on a device."""
    return torch.tensor(pair_up(count)[1], device=device)


def check_pairs(batch_size: int, processes: int) -> None:
    """Check that pairs stay in one process.

    Raises:
        UserError: the batch of some process would have a patch without a partner.
    """
    if batch_size % (2 * processes):
        wanted = max(1, batch_size // (2 * processes)) * 2 * processes
        raise UserError(
            f"batch_size={batch_size}: patches go in pairs to {processes} process(es); --set batch_size={wanted}"
        )
