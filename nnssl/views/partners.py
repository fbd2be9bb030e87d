"""Pairs of patches of a batch: each patch is compared with its neighbour."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.errors import UserError


@dataclass(frozen=True)
class PairedViews:
    """Patches in pairs: neighbours show the same place of two scans.

    Attributes:
        patches: Patches (batch, channel, *shape), of which the student sees the visible tokens.
        mask: Mask (batch, tokens), True for masked tokens.
        visible: Indices of the visible tokens (batch, visible), ascending.
        strong: Views for the teacher (batch, channel, *shape).
        partner: Index of the other patch of the pair (batch,).
        learnable: Mask of the voxels of the patches that may be learned from (batch, *shape).
        scan: Number of the scan of each patch (batch,), by which scans are distinguished; None if unknown.
        place_mm: First corner (z, y, x) of each patch in its scan in mm (batch, 3); None if unknown.
    """

    patches: Float[Tensor, "batch channel *shape"]
    mask: Bool[Tensor, "batch tokens"]
    visible: Int[Tensor, "batch visible"]
    strong: Float[Tensor, "batch channel *shape"]
    partner: Int[Tensor, " batch"]
    learnable: Bool[Tensor, " batch *shape"]
    scan: Int[Tensor, " batch"] | None = None
    place_mm: Float[Tensor, "batch 3"] | None = None


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


def show_same_place(
    scan: Int[Tensor, " batch"],
    place_mm: Float[Tensor, "batch 3"],
    partner: Int[Tensor, " batch"],
    all_scans: Int[Tensor, " key"],
    all_places_mm: Float[Tensor, "key 3"],
    all_partners: Int[Tensor, " key"],
    extent_mm: Float[Tensor, " 3"],
) -> Bool[Tensor, "batch key"]:
    """Return which patches of all processes show the same place as each patch of this process.

    Two patches of one scan do if they overlap, that is, if they are nearer than a patch along every axis. Both patches of a pair
    show the same anatomy, so all four patches of two pairs do as soon as one patch of each overlap.

    Args:
        scan: Number of the scan of each patch.
        place_mm: First corner (z, y, x) of each patch in its scan in mm.
        partner: Index of each patch's partner in the batch of this process.
        all_scans: Number of the scan of each patch of all processes, in the order of ranks.
        all_places_mm: First corners of these patches.
        all_partners: Index of the partner of each of these patches among them.
        extent_mm: Size of a patch in mm.
    """
    near = ((place_mm[:, None] - all_places_mm).abs() < extent_mm).all(dim=2) & (scan[:, None] == all_scans)
    near = near | near[partner]
    return near | near[:, all_partners]
