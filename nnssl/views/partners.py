"""Pairs of patches of a batch: each patch is compared with its neighbour."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnssl.errors import UserError


def pair_up(count: int) -> tuple[list[int], list[int]]:
    """Return the first sample of every sample's group, and its partner.

    Two neighbours form a group; an odd last sample joins the group before it.

    Args:
        count: Number of samples.

    Returns:
        Index of the first sample of the group, and index of the partner, for every sample. A single sample is its own partner.
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
    """Return the partner of every sample, as given by ``pair_up``, on a device."""
    return torch.tensor(pair_up(count)[1], device=device)


def check_pairs(batch_size: int, processes: int) -> None:
    """Check that both patches of a pair are in the same process.

    Raises:
        UserError: If the batch of a process would have a patch without a partner.
    """
    if batch_size % (2 * processes):
        wanted = max(1, batch_size // (2 * processes)) * 2 * processes
        raise UserError(
            f"batch_size must be a multiple of {2 * processes}, got {batch_size}: patches come in pairs, on {processes} "
            f"process(es); set batch_size={wanted}"
        )


def of_other_pairs(partner: Int[Tensor, " batch"], keys: int, rank: int) -> Bool[Tensor, "batch key"]:
    """Return which patches of all processes belong to other pairs than each patch of this process.

    Args:
        partner: Index of each patch's partner in the batch of this process.
        keys: Number of patches of all processes, in the order of ranks.
        rank: Rank of this process.
    """
    first = rank * len(partner)
    places = torch.arange(keys, device=partner.device)
    own = first + torch.arange(len(partner), device=partner.device)[:, None]
    return (places != own) & (places != first + partner[:, None])
